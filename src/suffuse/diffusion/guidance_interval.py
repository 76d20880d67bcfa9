"""Guidance in a part of the way only (Kynkäänniemi et al., 2024, "Applying guidance in a limited interval …")."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from suffuse.diffusion.conditioning import Denoiser
from suffuse.diffusion.guidance import Guidance
from suffuse.diffusion.loop import Step
from suffuse.errors import InputError


@dataclass
class GuidanceInterval:
    """Another guidance from one part of the way to another, and the conditional prediction alone elsewhere.

    Attributes:
        guidance: The other.
        start: The part of the steps before it, in [0, 1].
        stop: The part of the steps after which it ends.

    Raises:
        InputError: These are no interval.
    """

    guidance: Guidance
    start: float = 0.0
    stop: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop <= 1:
            raise InputError("no interval of guidance", found=(self.start, self.stop), expected="0 <= start <= stop <= 1")

    @property
    def scale(self) -> float:
        """That of the other."""
        return self.guidance.scale

    @scale.setter
    def scale(self, scale: float) -> None:
        self.guidance.scale = scale

    @property
    def rescale(self) -> float:
        """That of the other; 0 if it has none."""
        return getattr(self.guidance, "rescale", 0.0)

    @rescale.setter
    def rescale(self, rescale: float) -> None:
        self.guidance.rescale = rescale  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def branches(self) -> tuple[str, ...]:
        """Those of the other."""
        return self.guidance.branches

    def __call__(self, denoiser: Denoiser, step: Step) -> Tensor:
        """One prediction, of the shape of the latents."""
        if int(self.start * step.total) <= step.index < int(self.stop * step.total):
            return self.guidance(denoiser, step)
        return denoiser(step, ("cond",))["cond"]
