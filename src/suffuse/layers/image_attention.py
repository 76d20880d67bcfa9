"""Attention to pictures beside attention to words (Ye et al., 2023, "IP-Adapter", eq. 5).

    Z = softmax(Q Kᵀ / √d) V + λ softmax(Q K'ᵀ / √d) V'

Q comes from the picture that is drawn, K and V from words, K' and V' from a picture to take after. K' and V' are the same in
every step, so they are made once, and are handed with λ to the layers as a value of the call: nothing of a model is changed.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn


class ImagePrompt(NamedTuple):
    """What a layer attends to beside the words.

    Attributes:
        key: K' (batch, heads, tokens, size).
        value: V' of the same shape.
        scale: λ.
        mask: (1, height, width): where in the picture it counts, and how much; None for everywhere.
    """

    key: Tensor
    value: Tensor
    scale: float
    mask: Tensor | None = None

    def added(self, attended: Tensor, seen: Tensor) -> Tensor:
        """What was attended to in the words (batch, positions, width), with what was seen in the picture."""
        if self.mask is not None:
            seen = seen * fitted(self.mask, seen.shape[1]).to(seen)
        return attended + self.scale * seen


ImagePrompts = Mapping[nn.Module, Sequence[ImagePrompt]]
"""Attention layer → what it attends to beside the words, in the order in which it is added."""


def fitted(mask: Tensor, positions: int) -> Tensor:
    """A mask (1, height, width) for the positions of a feature map of about its aspect: (1, positions, 1)."""
    height, width = mask.shape[-2:]
    rows = max(1, int(math.sqrt(positions * height / width)))
    rows += positions % rows != 0
    columns = positions // rows
    values = F.interpolate(mask[None], size=(rows, columns), mode="bicubic").flatten()
    if len(values) != positions:
        warnings.warn(f"a mask of {height} x {width} has another aspect than the picture: it is cut or filled up", stacklevel=2)
        values = F.pad(values, (0, positions - len(values)))
    return values[None, :, None]
