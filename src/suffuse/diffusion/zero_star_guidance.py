"""Guidance for models of flows (Fan et al., 2025, "CFG-Zero*: Improved classifier-free guidance for flow matching models")."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import ClassVar

import torch
from torch import Tensor

from suffuse.diffusion.conditioning import Denoiser
from suffuse.diffusion.guidance import ClassifierFreeGuidance
from suffuse.diffusion.loop import Step


@dataclass
class ZeroStarGuidance(ClassifierFreeGuidance):
    """The unconditional prediction is scaled to come closest to the conditional one; the first steps stand still.

    Attributes:
        still: How many steps, from the first, in which the prediction is zero (section 4.2). Of a flow that is to stand still;
            for a model that predicts noise or samples it is another picture, and 0 the choice.
    """

    limits: ClassVar[Mapping[str, tuple[float, float]]] = {"still": (0, inf)}
    still: int = 1

    def unheard(self, total: int) -> str | None:
        """That no step goes anywhere, if so many stand still."""
        return f"anything (still={self.still})" if self.still >= total else None

    def __call__(self, denoiser: Denoiser, step: Step) -> Tensor:
        """One prediction, of the shape of the latents."""
        return torch.zeros_like(step.latents) if step.index < self.still else super().__call__(denoiser, step)

    def extrapolated(self, cond: Tensor, uncond: Tensor) -> Tensor:
        """From the scaled unconditional prediction: s* = cond · uncond / |uncond|² (equation 7)."""
        first, second = cond.flatten(1).float(), uncond.flatten(1).float()
        best = (first * second).sum(dim=1, keepdim=True) / ((second**2).sum(dim=1, keepdim=True) + 1e-8)
        scaled = uncond * best.to(cond).view(-1, *(1 for _ in cond.shape[1:]))
        return scaled + self.scale * (cond - scaled)
