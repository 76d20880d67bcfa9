"""Prompts of two sides, of what a picture shows and what it should show: encoded alike, so that both go into one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from suffuse.diffusion.conditioning import Conditioning
from suffuse.errors import InputError


def encode_sides(pipe: Any, sides: Sequence[Mapping[str, Any]]) -> list[Conditioning]:
    """The prompts of each side, joined over the branches that the guidance of the run asks for.

    Args:
        pipe: A pipeline that is called.
        sides: What stands for its arguments on each side, prompts or embeddings.

    Raises:
        InputError: They are of different numbers, or of different lengths.
    """
    arguments = pipe._run.arguments
    own, encoded, count = dict(arguments), list[Conditioning](), 1
    for side in sides:
        arguments |= {**own, **side}
        encoded.append(pipe.encode())
        count = arguments["num_images_per_prompt"]
    arguments |= own
    shapes = [tuple(_embeds(side).shape) for side in encoded]
    if len({*shapes}) > 1:
        raise InputError(
            "source_prompt and the other prompt do not go together",
            found=" and ".join(f"{shape[0] // len(encoded[0].layout) // count} of {shape[1]} tokens" for shape in shapes),
            expected="one for one, each of as many tokens",
        )
    return encoded


def per_branch(side: Conditioning) -> tuple[Tensor, ...]:
    """The embedded prompts of a side, branch by branch."""
    return _embeds(side).chunk(len(side.layout))


def _embeds(side: Conditioning) -> Tensor:
    return side.tensors["prompt_embeds"]
