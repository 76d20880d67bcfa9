r"""Prompts whose words weigh more or less, that are longer than a text encoder reads at once, or that are blended.

    pipe(Weighted("a (red:1.3) apple on a [wooden] table"))

    (word)  (some words:1.3)    counts 1.1 times, 1.3 times        [word]     counts 1 / 1.1 times
    a cat:0.7 | a dog:0.3       the weighted mean of two prompts   BREAK      what follows is read apart
    \( \) \[ \] \| \:           the characters themselves

A word that weighs w stands for e + w (z - e), where z are its states and e those of the empty prompt at its place: 0 is as if
nothing were said there. Prompts of more tokens than the encoder has positions are read in pieces that stand one behind the other.
Nothing of this is done with a plain text: one that says `(red:1.3)` is read as it stands.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from suffuse.errors import InputError

TOKENIZING = threading.Lock()
"""Tokenizers keep how to pad and cut in themselves: one call at a time, or threads cut each other's prompts."""
UP = 1.1
"""What a pair of round brackets multiplies by, and a pair of square ones divides by."""
_TOKEN = re.compile(r"\\[()\[\]|:\\]|\bBREAK\b|:\s*[+-]?[\d.]+\s*(?=[)\]|]|$)|[()\[\]|]|[^\\()\[\]|:B]+|.", re.DOTALL)


class Weighted(str):
    """A prompt in which brackets, `|` and BREAK mean something. Passed wherever a prompt is."""

    __slots__ = ()


Segment = tuple[str, float]
"""A text and what it weighs; the text "\\0" stands for BREAK."""
BREAK = "\0"


def parse(prompt: str) -> list[tuple[list[Segment], float]]:
    """The prompts that are blended, each as its segments, and their shares, which are 1 together.

    Raises:
        InputError: Brackets do not match, or shares are nothing together.
    """
    parts: list[tuple[list[Segment], float]] = []
    segments: list[Segment] = []
    open_: list[tuple[str, int]] = []
    share = ""

    def multiply(begin: int, factor: float) -> None:
        segments[begin:] = [(text, weight * factor) for text, weight in segments[begin:]]

    for match in _TOKEN.finditer(prompt):
        token = match.group()
        if token in ("(", "["):
            open_.append((token, len(segments)))
        elif token.startswith(":") and len(token) > 1:
            if not open_:
                share = token
            elif open_[-1][0] == "(":
                multiply(open_[-1][1], _number(token, prompt))
                open_[-1] = ("told", open_[-1][1])
            else:
                raise InputError("a weight stands where none can", found=prompt, expected="one before each closing ), none in []")
        elif token in (")", "]"):
            if not open_ or (token == "]") != (open_[-1][0] == "["):
                raise _unmatched(prompt, match.start(), token)
            kind, begin = open_.pop()
            multiply(begin, {"(": UP, "[": 1 / UP, "told": 1.0}[kind])
        elif token == "|" and open_:
            raise InputError("| stands inside of brackets", found=prompt, remedy="blend whole prompts, or write \\| for the sign")
        elif token == "|":
            parts.append((segments, _number(share or ":1", prompt)))
            segments, share = [], ""
        else:
            segments.append((BREAK if token == "BREAK" else token[-1] if token.startswith("\\") else token, 1.0))
    if open_:
        raise _unmatched(prompt, len(prompt), "[" if open_[-1][0] == "[" else "(")
    if not parts:  # nothing is blended: a colon and a number at the end are text
        return [(_joined([*segments, (share, 1.0)] if share else segments), 1.0)]
    parts.append((segments, _number(share or ":1", prompt)))
    total = sum(share for _, share in parts)
    if abs(total) < 1e-6:
        raise InputError("the shares of a blend are nothing together", found=prompt)
    return [(_joined(segments), share / total) for segments, share in parts]


def _number(text: str, prompt: str) -> float:
    try:
        return float(text[1:])
    except ValueError:
        raise InputError(f"{text[1:].strip()!r} is no weight", found=prompt, expected="a number, as in (red:1.3)") from None


def _unmatched(prompt: str, position: int, bracket: str) -> InputError:
    return InputError(
        f"a bracket {bracket} has no partner",
        found=f"{prompt!r}, character {position}",
        remedy=f"write \\{bracket} for the bracket itself",
    )


def _joined(segments: Iterable[Segment]) -> list[Segment]:
    """Neighbours of one weight as one segment."""
    joined: list[Segment] = []
    for text, weight in segments:
        if joined and joined[-1][1] == weight and BREAK not in (text, joined[-1][0]):
            joined[-1] = joined[-1][0] + text, weight
        else:
            joined.append((text, weight))
    return joined


# ---------------------------------------------------------------- tokens


Piece = list[tuple[int, float]]
"""Tokens that are read together, and what each weighs."""


def pieces(segments: Sequence[Segment], tokenizer: Any) -> list[Piece]:
    """Token numbers with their weights, in pieces that the text encoder reads at once, without begin and end."""
    room = int(tokenizer.model_max_length) - 2
    made: list[Piece] = [[]]
    for text, weight in segments:
        if text == BREAK:
            made.append([])
            continue
        with TOKENIZING:
            numbers = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids
        for number in numbers:
            if len(made[-1]) == room:
                made.append([])
            made[-1].append((number, weight))
    return made


def parsed(text: str) -> list[tuple[list[Segment], float]]:
    """The parts of a prompt; a plain text is one part that weighs one."""
    return parse(text) if isinstance(text, Weighted) else [([(text, 1.0)], 1.0)]


def length_for(texts: Iterable[str], tokenizer: Any) -> int | None:
    """The number of tokens that all these prompts fit in; None, which is the encoder's own, if they are all plain texts."""
    texts = list(texts)
    if not any(isinstance(text, Weighted) for text in texts):
        return None
    parts = (segments for text in texts for segments, _ in parsed(text))
    return int(tokenizer.model_max_length) * max(len(pieces(segments, tokenizer)) for segments in parts)


def in_pieces(
    texts: Sequence[str],
    tokenizer: Any,
    length: int,
    device: torch.device,
    read: Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]],
) -> tuple[Tensor, Tensor | None]:
    """Read prompts piece by piece, and weigh and blend what comes of them.

    Args:
        texts: Prompts, weighted or plain.
        tokenizer: A CLIP tokenizer.
        length: Tokens of the result, a multiple of what the encoder reads at once.
        device: Of the text encoder.
        read: (token numbers (rows, tokens), mask of the same shape) → (states (rows, tokens, width), one vector for each row, if
            the encoder has one).

    Returns:
        (len(texts), length, width), and (len(texts), projection): the vectors of first pieces, blended.

    Raises:
        InputError: The tokenizer is none of CLIP; or a weighted prompt does not fit into `length`, which is not its own.
    """
    at_once = int(tokenizer.model_max_length)
    count, needed = length // at_once, length_for(texts, tokenizer) or 0
    if tokenizer.bos_token_id is None:
        raise InputError("only CLIP reads weighted prompts", found=type(tokenizer).__name__, remedy="pass a plain text")
    if length % at_once or needed > length:
        raise InputError(
            f"a weighted prompt has {max(needed, at_once)} tokens, and the embeddings beside it {length}",
            remedy="pass embeddings for both, prompt and negative prompt",
        )

    def rows(made: list[Piece]) -> tuple[Tensor, Tensor, Tensor]:
        numbers = torch.full((count, at_once), tokenizer.pad_token_id)
        mask, weights = torch.zeros(count, at_once, dtype=torch.long), torch.ones(count, at_once)
        for row, piece in enumerate([*made[:count], *[[]] * (count - len(made))]):
            own = [tokenizer.bos_token_id, *(number for number, _ in piece), tokenizer.eos_token_id]
            numbers[row, : len(own)], mask[row, : len(own)] = torch.tensor(own), 1
            weights[row, 1 : len(piece) + 1] = torch.tensor([weight for _, weight in piece])
        return numbers.to(device), mask.to(device), weights.to(device)

    def weighed(segments: Sequence[Segment]) -> tuple[Tensor, Tensor | None]:
        numbers, mask, weights = rows(pieces(segments, tokenizer))
        states, pooled = read(numbers, mask)
        if bool((weights != 1).any()):
            empty, _ = read(*rows([])[:2])
            each = weights.to(states.dtype)[..., None]
            states = torch.where(each == 1, states, empty + each * (states - empty))
        return states.flatten(0, 1), None if pooled is None else pooled[0]

    def blended(text: str) -> tuple[Tensor, Tensor | None]:
        made = [(*weighed(segments), share) for segments, share in parsed(text)]
        if len(made) == 1:
            return made[0][:2]
        vectors = [pooled * share for _, pooled, share in made if pooled is not None]
        return torch.stack([states * share for states, _, share in made]).sum(0), torch.stack(vectors).sum(0) if vectors else None

    done = [blended(text) for text in texts]
    vectors = [pooled for _, pooled in done if pooled is not None]
    return torch.stack([states for states, _ in done]), torch.stack(vectors) if vectors else None
