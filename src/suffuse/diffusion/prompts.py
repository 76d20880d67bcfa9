"""From prompts to the embeddings a model attends to."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from suffuse.diffusion.weighted_prompts import TOKENIZING, Weighted, in_pieces, length_for
from suffuse.errors import InputError, NonFiniteError


def encode_text(
    texts: list[str],
    tokenizer: Any,
    text_encoder: Any,
    device: torch.device,
    *,
    length: int | None = None,
    clip_skip: int | None = None,
) -> Tensor:
    """Hidden states of a CLIP text encoder.

    Args:
        texts: One text a picture.
        tokenizer: A CLIP tokenizer.
        text_encoder: A CLIP text model.
        device: Where the text encoder computes.
        length: Tokens to pad or cut to; the tokenizer's maximum if None.
        clip_skip: How many of the last layers to leave out; None and 0 differ only in that 0 takes the last hidden state
            through the final norm by hand.

    Returns:
        (len(texts), length, width), in the dtype of the text encoder.

    Raises:
        InputError: `length` is more than the encoder has positions for.
        NonFiniteError: The encoder gave NaN or infinity even in float32.
    """

    def read(ids: Tensor, mask: Tensor | None) -> tuple[Tensor, None]:
        if clip_skip is None:
            return text_encoder(ids, attention_mask=mask)[0], None
        output = text_encoder(ids, attention_mask=mask, output_hidden_states=True)
        norm = getattr(text_encoder, "text_model", text_encoder).final_layer_norm
        return norm(output.hidden_states[-(clip_skip + 1)]), None

    return _read(texts, tokenizer, text_encoder, device, length, read)[0]


def encode_text_and_pool(
    texts: list[str], tokenizer: Any, text_encoder: Any, device: torch.device, *, length: int | None = None, clip_skip: int = 0
) -> tuple[Tensor, Tensor | None]:
    """Hidden states before the last layer, and one vector for each text, as Stable Diffusion XL sees them.

    Args:
        texts: One text a picture.
        tokenizer: A CLIP tokenizer.
        text_encoder: A CLIP text model, with a projection or without.
        device: Where the text encoder computes.
        length: Tokens to pad or cut to; the tokenizer's maximum if None.
        clip_skip: How many more of the last layers to leave out.

    Returns:
        (len(texts), length, width), and (len(texts), projection) of an encoder that has a projection.

    Raises:
        InputError: `length` is more than the encoder has positions for.
        NonFiniteError: The encoder gave NaN or infinity.
    """

    def read(ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        output = text_encoder(ids, attention_mask=mask, output_hidden_states=True)
        return output.hidden_states[-(clip_skip + 2)], output[0] if output[0].ndim == 2 else None

    return _read(texts, tokenizer, text_encoder, device, length, read)


def encode_text_and_end(texts: list[str], tokenizer: Any, text_encoder: Any, device: torch.device) -> tuple[Tensor, Any]:
    """The last hidden states, and the state of the end of each text, which stands for all of it.

    Args:
        texts: One text a picture.
        tokenizer: A CLIP tokenizer.
        text_encoder: A CLIP text model without a projection.
        device: Where the text encoder computes.

    Returns:
        (len(texts), tokens, width), and (len(texts), width).

    Raises:
        NonFiniteError: The encoder gave NaN or infinity.
    """

    def read(ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        output = text_encoder(ids, attention_mask=mask, output_hidden_states=True)
        return output.hidden_states[-1], output.pooler_output

    return _read(texts, tokenizer, text_encoder, device, None, read)


def encode_text_and_project(
    texts: list[str], tokenizer: Any, text_encoder: Any, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """What the prior of unCLIP is told of texts: a vector each, their states, and which tokens are theirs.

    Args:
        texts: One text a picture.
        tokenizer: A CLIP tokenizer.
        text_encoder: A CLIP text model with a projection.
        device: Where the text encoder computes.

    Returns:
        (len(texts), projection), (len(texts), tokens, width), and (len(texts), tokens), False where a token only fills.

    Raises:
        NonFiniteError: The encoder gave NaN or infinity.
    """
    ids, mask = _tokens(texts, tokenizer, text_encoder, device, None)
    output = text_encoder(ids)
    check_finite(output.last_hidden_state)
    return output.text_embeds, output.last_hidden_state, mask.bool()


def _read(
    texts: Sequence[str],
    tokenizer: Any,
    text_encoder: Any,
    device: torch.device,
    length: int | None,
    read: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]],
) -> tuple[Tensor, Tensor | None]:
    """States, and vectors if there are any: of plain texts at once, of weighted or long ones in pieces."""
    masks = getattr(text_encoder.config, "use_attention_mask", False)
    at_once = int(tokenizer.model_max_length)
    needed = length_for(texts, tokenizer) if length is None else length
    if any(isinstance(text, Weighted) for text in texts) or (needed is not None and needed > at_once and needed % at_once == 0):
        made = in_pieces(texts, tokenizer, needed or at_once, device, lambda ids, mask: read(ids, mask if masks else None))
    else:
        ids, mask = _tokens(texts, tokenizer, text_encoder, device, length)
        made = read(ids, mask if masks else None)
    for tensor in made:
        if tensor is not None:
            check_finite(tensor)
    return made


def listed(prompt: str | list[str] | None) -> list[str]:
    """A prompt, several or none as a list."""
    return [prompt] if isinstance(prompt, str) else prompt or []


def check_finite(states: Tensor) -> None:
    """Raise `NonFiniteError` if a text encoder gave NaN or infinity."""
    if not bool(torch.isfinite(states).all()):
        raise NonFiniteError(
            "the text encoder gave NaN or infinity",
            found=f"text_encoder computes in {states.dtype}",
            remedy="load it in torch.float32 or torch.bfloat16, or check its weights",
        )


def repeat_rows(rows: Tensor, times: int) -> Tensor:
    """(batch, length, width) → (batch · times, length, width): each row `times` over, beside itself."""
    batch, length, _ = rows.shape
    return rows.repeat(1, times, 1).view(batch * times, length, -1)


def _tokens(
    texts: Sequence[str], tokenizer: Any, text_encoder: Any, device: torch.device, length: int | None
) -> tuple[Tensor, Tensor]:
    """(token numbers, attention mask)."""
    length = length if length is not None else int(tokenizer.model_max_length)
    positions = getattr(text_encoder.config, "max_position_embeddings", length)
    if length > positions:
        raise InputError(
            f"the text encoder reads no text of {length} tokens",
            expected=f"at most {positions} (max_position_embeddings)",
            remedy="pass embeddings of this length for the negative prompts too",
        )
    with TOKENIZING:
        tokens = tokenizer([*texts], padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        counts = [len(ids) for ids in tokenizer([*texts], truncation=False, verbose=False).input_ids]
    _warn_of_cut(counts, length)
    return tokens.input_ids.to(device), tokens.attention_mask.to(device)


def _warn_of_cut(counts: list[int], length: int) -> None:
    for index, count in enumerate(counts):
        if count > length:
            warnings.warn(
                f"prompt {index} has {count} tokens and the text encoder reads {length}: the last {count - length} are ignored",
                stacklevel=8,
            )
