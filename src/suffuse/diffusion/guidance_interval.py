"""Guidance in a part of the way only (Kynkäänniemi et al., 2024, "Applying guidance in a limited interval …")."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from suffuse.diffusion.conditioning import Denoiser
from suffuse.diffusion.holding_guidance import HoldingGuidance
from suffuse.diffusion.loop import Step
from suffuse.errors import InputError


@dataclass
class GuidanceInterval(HoldingGuidance):
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

    def check_values(self, name: str) -> None:
        """Raise `InputError` unless these are an interval, of a guidance that is what it may be."""
        super().check_values(name)
        if not 0 <= self.start <= self.stop <= 1:
            raise InputError(
                f"{name}: no interval of guidance", found=(self.start, self.stop), expected="0 <= start <= stop <= 1"
            )

    def unheard(self, total: int) -> str | None:
        """That nothing is guided, if no step of so many lies between; that none is meant to is taken as said."""
        none = self.start < self.stop and int(self.start * total) >= int(self.stop * total)
        return f"guidance (from {self.start} to {self.stop})" if none else super().unheard(total)

    def __call__(self, denoiser: Denoiser, step: Step) -> Tensor:
        """One prediction, of the shape of the latents."""
        if int(self.start * step.total) <= step.index < int(self.stop * step.total):
            return self.guidance(denoiser, step)
        return denoiser(step, ("cond",))["cond"]
