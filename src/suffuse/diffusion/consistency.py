"""Steps of consistency models, each to the clean sample and back up (Song et al., 2023; Luo et al., 2023, algorithm 3)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from suffuse.diffusion.conditioning import Denoiser
from suffuse.diffusion.guidance import Guidance
from suffuse.diffusion.loop import Step
from suffuse.schedulers.scheduler import SchedulerMixin


@dataclass
class ConsistencyStep:
    """A step that keeps what it thinks the end is, as "denoised" of the run's tensors: the last one is the result.

    Solvers that do not tell what they think the end is keep the sample.
    """

    denoiser: Denoiser
    guidance: Guidance
    scheduler: SchedulerMixin
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, step: Step) -> Tensor:
        """The latents of the next timestep."""
        prediction = self.guidance(self.denoiser, step)
        taken = self.scheduler.step(prediction, step.timestep, step.latents, **self.options)
        denoised = getattr(taken, "denoised", None)
        self.denoiser.conditioning.tensors["denoised"] = taken.prev_sample if denoised is None else denoised
        return taken.prev_sample
