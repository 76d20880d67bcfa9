"""Laying the known part of a picture back into latents, as it was done before there were UNets for inpainting."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from suffuse.diffusion.guidance import ClassifierFreeGuidance
from suffuse.diffusion.loop import SilentHook, Step
from suffuse.schedulers.scheduler import SchedulerMixin


@dataclass
class RememberUnconditional(ClassifierFreeGuidance):
    """Classifier-free guidance that keeps what was predicted without a prompt last.

    Attributes:
        unconditional: That prediction.
    """

    unconditional: Tensor = field(default_factory=lambda: torch.zeros(0))

    def extrapolated(self, cond: Tensor, uncond: Tensor) -> Tensor:
        """From the unconditional prediction, which is kept, through the conditional one."""
        self.unconditional = uncond
        return super().extrapolated(cond, uncond)


@dataclass
class LayBack(SilentHook):
    """Lay the known picture back after each step, at the noise level that the step began with.

    Attributes:
        scheduler: Adds the noise.
        known: Latents of the picture.
        kept: How much of it stays, from 0 to 1, (batch, 1, rows, columns).
        noise: What is added to it; if None, what the guidance predicted without a prompt.
        guidance: Of the run.
    """

    scheduler: SchedulerMixin
    known: Tensor
    kept: Tensor
    noise: Tensor | None
    guidance: Any

    def after(self, step: Step) -> None:
        """Lay it back."""
        noise = self.guidance.unconditional if self.noise is None else self.noise
        step.latents = self.over(self.scheduler.add_noise(self.known, noise, step.timestep[None]), step.latents)

    def over(self, known: Tensor, latents: Tensor) -> Tensor:
        """What is known over what was painted."""
        return known * self.kept + latents * (1 - self.kept)
