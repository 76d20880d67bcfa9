"""Guidance in a part of the way only (Kynkäänniemi et al., 2024, "Applying guidance in a limited interval …")."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from suffuse.diffusion.conditioning import Denoiser
from suffuse.diffusion.held_guidance import HeldGuidance
from suffuse.diffusion.loop import Step
from suffuse.errors import InputError


@dataclass
class GuidanceInterval(HeldGuidance):
    """Another guidance from one part of the way to another, and the conditional prediction alone elsewhere.

    Attributes:
        guidance: The other.
        start: The part of the steps before it, in [0, 1].
        stop: The part of the steps after which it ends.

    Raises:
        InputError: These are no interval.
    """

    start: float = 0.0
    stop: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop <= 1:
            raise InputError("no interval of guidance", found=(self.start, self.stop), expected="0 <= start <= stop <= 1")

    def __call__(self, denoiser: Denoiser, step: Step) -> Tensor:
        """One prediction, of the shape of the latents."""
        if int(self.start * step.total) <= step.index < int(self.stop * step.total):
            return self.guidance(denoiser, step)
        return denoiser(step, ("cond",))["cond"]
