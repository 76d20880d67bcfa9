"""Changing what a model assumes, in closed form (Orgad et al., 2023, "Editing implicit assumptions in text-to-image models").

Keys and values of cross-attention are linear in the words' embeddings. The new matrix maps the embeddings c_i of a source prompt
to what the old one made of those of a destination, v*_i = W c*_i, and stays near to the old one otherwise (equation 5):

    W' = (lambda W + sum_i v*_i c_i^T) (lambda I + sum_i c_i c_i^T)^-1
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from suffuse.errors import InputError
from suffuse.layers.attention import Attention


def projections(model: nn.Module, keys: bool = True) -> list[nn.Linear]:
    """The layers that make values, and keys, of the words' embeddings.

    Raises:
        InputError: There are none, or they are joined into one.
    """
    layers = [layer for name, layer in model.named_modules() if name.endswith("attn2") and isinstance(layer, Attention)]
    if not layers:
        raise InputError("this model has no cross-attention to words", found=type(model).__name__)
    if any(hasattr(layer, "to_kv") for layer in layers):
        raise InputError("keys and values are joined into one projection", remedy="pipe.unfuse_qkv_projections() first")
    return [getattr(layer, name) for name in (("to_v", "to_k") if keys else ("to_v",)) for layer in layers]


def edited(weight: Tensor, source: Tensor, destination: Tensor, strength: float) -> Tensor:
    """The matrix that takes the words of a source for those of a destination.

    Args:
        weight: (outputs, width).
        source: (words, width): their embeddings.
        destination: (words, width): for each, what it is to be taken for.
        strength: lambda: how near to the old matrix; smaller edits more.

    Returns:
        (outputs, width), of the type of `weight`.
    """
    old, context, wanted = weight.float(), source.float(), destination.float()
    numerator = strength * old + (wanted @ old.T).T @ context
    denominator = strength * torch.eye(old.shape[1], device=old.device) + context.T @ context
    return torch.linalg.solve(denominator, numerator, left=False).to(weight.dtype)


def aligned(source: Sequence[int], destination: Sequence[int], length: int) -> list[int]:
    """For each position of a source, the position in a destination that says the same, in order; padding for what is left.

    Args:
        source: Token numbers.
        destination: Token numbers, those of the source among them and in their order.
        length: How many positions there are.

    Raises:
        InputError: The destination leaves out a word.
    """
    found, at = list[int](), 0
    for place, token in enumerate(source):
        while at < len(destination) and destination[at] != token:
            at += 1
        if at == len(destination):
            raise InputError(
                "destination_prompt leaves out a word of source_prompt",
                found=f"token {place} of {len(source)} is missing, or stands elsewhere",
                expected="all words of source_prompt in their order, with others between them",
            )
        found.append(at)
        at += 1
    return [*found, *range(at, length), *[length - 1] * length][:length]
