"""Textual inversion (Gal et al., 2022, "An image is worth one word", section 4): words that were learnt, as vectors.

A word is one row or more of the text encoder's table of tokens, and a token each of its tokenizer: "<cat>", "<cat>_1", "<cat>_2".
Both are given back as they were when it is unloaded: the tokenizer the very object it had, the table its very rows.
"""

from __future__ import annotations

import copy
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from suffuse.checkpoints.adapter_files import IN_MEMORY, Choice, find_adapter
from suffuse.checkpoints.layout import SAFETENSORS, WeightFiles
from suffuse.checkpoints.reading import SafetensorsSource, check_finite, load_plain
from suffuse.errors import AdapterError, CorruptFileError
from suffuse.hub.options import HubOptions
from suffuse.models.adapter_services import hub_options, listed

USUAL_NAME = "learned_embeds"

Given = str | os.PathLike[str] | Mapping[str, Any] | Tensor


@dataclass
class Vocabulary:
    """The words that were added to a text encoder and its tokenizer.

    Attributes:
        backend: What the tokenizer had.
        first: The number of the first token that is added.
        covered: Rows that the table had for such numbers already.
        vectors: Token → its row, in the order of their numbers.
    """

    backend: Any
    first: int
    covered: Tensor
    vectors: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def put(self, tokenizer: Any, text_encoder: Any) -> None:
        """Let tokenizer and table have these words, and no others that were added."""
        table: nn.Embedding = text_encoder.get_input_embeddings()
        weight, count = table.weight, len(self.vectors)
        added = [vector.to(weight)[None] for vector in self.vectors.values()]
        rows = torch.cat([weight.detach()[: self.first], *added, self.covered[count:].to(weight)])
        tokenizer._tokenizer = copy.deepcopy(self.backend) if self.vectors else self.backend
        for token in self.vectors:
            tokenizer.add_tokens(token)
        table.weight = nn.Parameter(rows, weight.requires_grad)
        table.num_embeddings = text_encoder.config.vocab_size = len(rows)


class TextualInversionLoaderMixin:
    """Ways of a pipeline to learn words, and to forget them."""

    def load_textual_inversion(
        self,
        pretrained_model_name_or_path: Given | Sequence[Given],
        token: str | Sequence[str | None] | None = None,
        tokenizer: Any = None,
        text_encoder: Any = None,
        *,
        weight_name: str | None = None,
        subfolder: str | None = None,
        use_safetensors: bool | None = None,
        hf_token: str | bool | None = None,
        **keywords: Any,
    ) -> None:
        """Load learnt words.

        Args:
            pretrained_model_name_or_path: A file, a folder, a repository, the contents of one, or a tensor (width,) or
                (vectors, width); or a list of such. In the form of diffusers or of A1111.
            token: What to call the word; a list for a list. What the file says, if None.
            tokenizer: The tokenizer; the pipeline's first if None.
            text_encoder: The text encoder that goes with it; the pipeline's first if None.
            weight_name: The name of the file in a folder or a repository.
            subfolder: Of the folder or the repository.
            use_safetensors: True refuses pickles, False takes nothing else, None prefers safetensors.
            hf_token: The token of an account of the hub.
            **keywords: The `suffuse.hub.options.HubOptions`, but for `token`.

        Raises:
            AdapterError: A word is known already or named twice, its vectors have another width, or there are none. Nothing is
                changed.
            NonFiniteError: A vector holds NaN or infinity. Nothing is changed.
        """
        name = f"{type(self).__name__}.load_textual_inversion"
        options = hub_options(name, keywords | ({} if hf_token is None else {"token": hf_token}))
        tokenizer, text_encoder = self._reader(tokenizer, text_encoder)
        sources: list[Any] = (
            list(pretrained_model_name_or_path)
            if isinstance(pretrained_model_name_or_path, (list, tuple))
            else [pretrained_model_name_or_path]
        )
        choice = Choice(weight_name, subfolder, use_safetensors, (USUAL_NAME,))
        width = text_encoder.get_input_embeddings().weight.shape[1]
        contents = [_contents(source, choice, options, width) for source in sources]
        added: dict[str, Tensor] = {}
        for word, vectors, where in _words(contents, token):
            tokens = _checked(word, vectors, where, text_encoder.get_input_embeddings().weight, tokenizer)
            twice = sorted(tokens.keys() & added.keys())
            if twice:
                raise AdapterError("a word is named twice", found=", ".join(twice), remedy="pass a token for each")
            added |= tokens
        known = _vocabulary(text_encoder) or _begun(tokenizer, text_encoder)
        known.vectors |= added
        known.put(tokenizer, text_encoder)
        text_encoder.__dict__["_learnt_words"] = known

    def unload_textual_inversion(
        self, tokens: str | Sequence[str] | None = None, tokenizer: Any = None, text_encoder: Any = None
    ) -> None:
        """Forget words, all of them if None: tokenizer and text encoder are as if they had never been loaded.

        Raises:
            AdapterError: A word was not loaded; nothing is changed.
        """
        tokenizer, text_encoder = self._reader(tokenizer, text_encoder)
        known = _vocabulary(text_encoder)
        words = listed(tokens) if tokens is not None else []
        missing = [word for word in words if known is None or word not in known.vectors]
        if missing:
            loaded = ", ".join(known.vectors) if known is not None else ""
            raise AdapterError(f"no word {', '.join(map(repr, missing))} was loaded", expected=loaded or "nothing is loaded")
        if known is None:
            return
        forgotten = {part for word in (known.vectors if tokens is None else words) for part in _parts(word, known.vectors)}
        known.vectors = {token: vector for token, vector in known.vectors.items() if token not in forgotten}
        known.put(tokenizer, text_encoder)
        if not known.vectors:
            del text_encoder.__dict__["_learnt_words"]

    def maybe_convert_prompt(self, prompt: Any, tokenizer: Any) -> Any:
        """A prompt, or a list of prompts, in which each learnt word of several vectors is written as all of its tokens."""
        return [_spelt(text, tokenizer) for text in prompt] if isinstance(prompt, list) else _spelt(prompt, tokenizer)

    def _reader(self, tokenizer: Any, text_encoder: Any) -> tuple[Any, Any]:
        tokenizer = getattr(self, "tokenizer", None) if tokenizer is None else tokenizer
        text_encoder = getattr(self, "text_encoder", None) if text_encoder is None else text_encoder
        if tokenizer is None or text_encoder is None:
            raise AdapterError("words need a tokenizer and a text encoder", remedy="pass tokenizer=… and text_encoder=…")
        if not hasattr(tokenizer, "_tokenizer"):
            raise AdapterError("words can be added to fast tokenizers only", found=type(tokenizer).__name__)
        return tokenizer, text_encoder


def _vocabulary(text_encoder: nn.Module) -> Vocabulary | None:
    return text_encoder.__dict__.get("_learnt_words")


def _begun(tokenizer: Any, text_encoder: Any) -> Vocabulary:
    """No words yet."""
    weight, first = text_encoder.get_input_embeddings().weight.detach(), len(tokenizer)
    return Vocabulary(tokenizer._tokenizer, first, weight[first:].clone())


# ---------------------------------------------------------------- files


def _contents(given: Given, choice: Choice, options: HubOptions, width: int) -> tuple[str, Tensor, Path]:
    """(the word as the file calls it, its vectors, where they are from)."""
    path = IN_MEMORY
    if isinstance(given, (str, os.PathLike)):
        path = find_adapter(given, choice, options)
        given = _read(path)
    if isinstance(given, Tensor):
        return "", given, path
    match given:
        case {"string_to_param": {**vectors}} if vectors:
            return str(given.get("name") or ""), _tensor(next(iter(vectors.values())), path), path
        case {"clip_l": first, "clip_g": second, **others} if not others:
            fitting = [_tensor(t, path) for t in (first, second) if _tensor(t, path).shape[-1] == width]
            return "", fitting[0] if fitting else _tensor(first, path), path
        case {**vectors} if len(vectors) == 1:
            word, tensor = next(iter(vectors.items()))
            return ("" if word == "emb_params" else str(word)), _tensor(tensor, path), path
        case _:
            raise AdapterError(
                f"{path} holds no learnt word",
                found=", ".join(map(str, given)) if isinstance(given, Mapping) else type(given).__name__,
                expected='one tensor under the name of the word, or "string_to_param" as A1111 writes it',
            )


def _read(path: Path) -> Any:
    if path.suffix != SAFETENSORS:
        warnings.warn(f"{path} is a pickle: read as tensors and texts only; prefer safetensors", stacklevel=5)
        return load_plain(path)
    source = SafetensorsSource(WeightFiles((path,), SAFETENSORS))
    tensors = {name: torch.empty(stored.shape, dtype=stored.dtype) for name, stored in source.tensors.items()}
    source.fill(tensors)
    return tensors


def _tensor(value: Any, path: Path) -> Tensor:
    if not isinstance(value, Tensor):
        raise CorruptFileError(f"{path} holds something else than vectors", found=type(value).__name__)
    return value.detach()


# ---------------------------------------------------------------- words


def _words(
    contents: Sequence[tuple[str, Tensor, Path]], token: str | Sequence[str | None] | None
) -> list[tuple[str, Tensor, Path]]:
    """(word, vectors, where they are from), with the names that were passed."""
    names: list[Any] = list(token) if isinstance(token, (list, tuple)) else [token] * len(contents)
    if len(contents) == 1 and len(names) > 1:
        _, vectors, where = contents[0]
        contents = [("", vector, where) for vector in (vectors if vectors.ndim > 1 else vectors[None])]
    if len(names) != len(contents):
        raise AdapterError("there must be one token for each word", found=f"{len(names)} for {len(contents)}")
    return [(name or own, vectors, where) for name, (own, vectors, where) in zip(names, contents, strict=True)]


def _checked(word: str, vectors: Tensor, where: Path, embeddings: Tensor, tokenizer: Any) -> dict[str, Tensor]:
    """Token → vector of a word, if it can be one."""
    width = embeddings.shape[1]
    if not isinstance(word, str) or not word.isprintable() or not word.strip():  # pyright: ignore[reportUnnecessaryIsInstance]
        raise AdapterError(f"{where} does not say what its word is", remedy="pass token='<word>'")
    if vectors.ndim not in (1, 2) or vectors.shape[-1] != width or not len(vectors) or not vectors.is_floating_point():
        raise AdapterError(
            f"{word!r} in {where} does not fit the text encoder",
            found=f"{tuple(vectors.shape)} of {vectors.dtype}",
            expected=f"floating point numbers, ({width},) or (vectors, {width})",
            remedy="load words that were learnt with this model; Stable Diffusion XL needs text_encoder=…, tokenizer=… for each",
        )
    check_finite(where, word, vectors.to(embeddings.dtype))  # what is finite in the file may be too large for the encoder
    rows = vectors[None] if vectors.ndim == 1 else vectors
    tokens = [word, *(f"{word}_{number}" for number in range(1, len(rows)))]
    taken = [token for token in (*tokens, f"{word}_1") if token in tokenizer.get_vocab()]
    if taken:
        raise AdapterError(f"{taken[0]!r} is a token already", remedy="pass another token, or unload_textual_inversion() first")
    return dict(zip(tokens, rows.clone(), strict=True))


def _parts(word: str, known: Mapping[str, Any]) -> list[str]:
    """All tokens of a word."""
    parts = [word]
    while (token := f"{word}_{len(parts)}") in known:
        parts.append(token)
    return parts


def _spelt(text: str, tokenizer: Any) -> str:
    added: Mapping[str, int] = tokenizer.added_tokens_encoder
    words = sorted((token for token in added if f"{token}_1" in added and token in text), key=len, reverse=True)
    if not words:
        return text
    pattern = "|".join(rf"{re.escape(word)}(?!_\d)" for word in words)
    return type(text)(re.sub(pattern, lambda match: " ".join(_parts(match[0], added)), text))
