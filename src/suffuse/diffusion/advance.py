"""Taking a step: ask guidance for a prediction, let the scheduler move the latents."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from suffuse.diffusion.conditioning import Denoiser
from suffuse.diffusion.guidance import Guidance
from suffuse.diffusion.loop import Step
from suffuse.schedulers.scheduler import SchedulerMixin


@dataclass
class GuidedStep:
    """The usual way to advance: guidance asks the denoiser, the scheduler takes the step."""

    denoiser: Denoiser
    guidance: Guidance
    scheduler: SchedulerMixin
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, step: Step) -> Tensor:
        """The latents of the next timestep."""
        prediction = self.guidance(self.denoiser, step)
        return self.scheduler.step(prediction, step.timestep, step.latents, **self.options, return_dict=False)[0]


def guided_step_of(kind: type[Denoiser]) -> Callable[[Denoiser, Guidance, SchedulerMixin, dict[str, Any]], GuidedStep]:
    """The usual way to advance, with a denoiser of another kind: one that makes something else of what the model says."""
    return lambda denoiser, guidance, scheduler, options: GuidedStep(kind(**vars(denoiser)), guidance, scheduler, options)


def step_options(scheduler: SchedulerMixin, **offered: Any) -> dict[str, Any]:
    """Those options that this scheduler's `step` takes (`eta` and `generator` are not universal)."""
    return {name: value for name, value in offered.items() if name in _step_parameters(type(scheduler))}


@functools.cache
def _step_parameters(scheduler: type[SchedulerMixin]) -> frozenset[str]:
    # Those of stochastic differential equations have no `step`: their pipelines take it in parts.
    return frozenset(inspect.signature(scheduler.step).parameters) if hasattr(scheduler, "step") else frozenset()
