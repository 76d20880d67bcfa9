"""Guidance by a part of what the branches differ in: what is parallel to a prediction, or alone to one of them, counts less."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from suffuse.diffusion.guidance import ClassifierFreeGuidance


@dataclass
class AdaptiveProjectedGuidance(ClassifierFreeGuidance):
    """Without the saturation of high scales (Sadat et al., 2024, "Eliminating oversaturation and artifacts …", algorithm 1).

    Attributes:
        parallel: How much of the difference counts that is parallel to the conditional prediction; 1 for all, 0 for none.
        longest: Differences are no longer than this; 0 for any length.
        momentum: How much of the differences of the steps before is added; below 0, to push away from them.
        average: What is remembered of them.
    """

    remembers: ClassVar[tuple[str, ...]] = ("average",)
    limits: ClassVar[Mapping[str, tuple[float, float]]] = {"longest": (0, inf)}
    parallel: float = 1.0
    longest: float = 0.0
    momentum: float = 0.0
    average: Tensor | None = field(default=None, repr=False)

    def difference(self, cond: Tensor, uncond: Tensor) -> Tensor:
        """What the scale multiplies."""
        axes = tuple(range(1, cond.ndim))
        difference = cond - uncond
        if self.momentum:
            difference = difference if self.average is None else difference + self.momentum * self.average.to(difference)
            self.average = difference
        if self.longest > 0:
            length = difference.norm(p=2, dim=axes, keepdim=True)
            difference = difference * torch.minimum(torch.ones_like(difference), self.longest / length)
        wide = torch.float64 if difference.device.type != "mps" else torch.float32
        exact = difference.to(wide)
        direction = F.normalize(cond.to(wide), dim=axes)  # pyright: ignore[reportArgumentType]: it takes several
        along = (exact * direction).sum(dim=axes, keepdim=True) * direction
        return (exact - along).to(difference) + self.parallel * along.to(difference)

    def extrapolated(self, cond: Tensor, uncond: Tensor) -> Tensor:
        """From the unconditional prediction along what is left of the difference."""
        return uncond + self.scale * self.difference(cond, uncond)


@dataclass
class TangentialGuidance(ClassifierFreeGuidance):
    """Of the unconditional prediction, only what it shares with the conditional one (Kwon et al., 2025, "TCFG", section 3)."""

    def extrapolated(self, cond: Tensor, uncond: Tensor) -> Tensor:
        """From the projection of the unconditional prediction onto the first singular vector of both."""
        both = torch.stack([cond, uncond], dim=1).float().flatten(2)
        vectors = torch.linalg.svd(both, full_matrices=False)[2]
        first = vectors.clone()
        first[:, 1] = 0
        shared = torch.matmul(torch.matmul(uncond.reshape(len(uncond), 1, -1).float(), vectors.transpose(-2, -1)), first)
        shared = shared.reshape(uncond.shape).to(uncond)
        return shared + self.scale * (cond - shared)
