"""Acting between steps: callbacks, progress, keeping what is known, watching the numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from suffuse.diffusion.conditioning import Conditioning
from suffuse.diffusion.loop import Finished, SilentHook, Step
from suffuse.errors import InputError, NonFiniteError
from suffuse.noise import Generators, move_to
from suffuse.schedulers.scheduler import SchedulerMixin


@dataclass
class KeepUnmasked(SilentHook):
    """Paint the known picture, at this step's noise level, back outside the mask (inpainting with a plain model).

    The mask is read from the run's tensors, so that a callback may change it.
    """

    scheduler: SchedulerMixin
    timesteps: Tensor
    image_latents: Tensor
    noise: Tensor
    conditioning: Conditioning

    def after(self, step: Step) -> None:
        """Replace the latents where the mask is 0."""
        known = self.image_latents
        if step.index < step.total - 1:
            known = self.scheduler.add_noise(known, self.noise, self.timesteps[step.index + 1][None])
        mask = self.conditioning.tensors["mask"][: len(known)]
        step.latents = (1 - mask) * known + mask * step.latents


@dataclass
class CallbackOnStepEnd(SilentHook):
    """Hand out tensors by name after each step, and take back what the function returns.

    `function(pipe, step_index, timestep, {name: tensor})` returns a dictionary of replacements, or None.
    """

    pipe: Any
    function: Callable[..., dict[str, Any] | None]
    names: Sequence[str]
    conditioning: Conditioning

    def after(self, step: Step) -> None:
        """Call the function."""
        visible = {"latents": step.latents, **self.conditioning.tensors}
        returned = self.function(self.pipe, step.index, step.timestep, {name: visible.get(name) for name in self.names})
        if returned is None:
            return
        if not isinstance(returned, dict):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InputError(
                "callback_on_step_end returned no dictionary",
                found=type(returned).__name__,
                expected="None, or the dictionary of tensors it was given, with replacements",
            )
        replaced = {name: value for name, value in returned.items() if value is not visible.get(name)}
        for name, value in replaced.items():
            if name not in visible or not isinstance(value, Tensor):
                raise InputError(
                    f"callback_on_step_end returned something for {name!r} that replaces no tensor of the run",
                    found=type(value).__name__,
                    expected=f"a tensor for one of {', '.join(visible)}",
                )
        step.latents = replaced.pop("latents", step.latents)
        self.conditioning.tensors |= replaced


@dataclass
class OnWholeSteps(SilentHook):
    """Call `action` when a whole inference step is done: solvers of order 2 visit the model twice in one.

    Progress bars and the older kind of callback count these; they pass over what a solver's warm-up adds.
    """

    order: int
    num_inference_steps: int
    action: Callable[[Step], None]

    def after(self, step: Step) -> None:
        """Count the step."""
        done = step.index + 1
        warming_up = done <= step.total - self.num_inference_steps * self.order
        if done == step.total or (not warming_up and done % self.order == 0):
            self.action(step)


@dataclass
class EndWhen(SilentHook):
    """End the way before the next step once `asked()` says so."""

    asked: Callable[[], bool]

    def before(self, step: Step) -> None:
        """Ask."""
        if self.asked():
            raise Finished


@dataclass
class CountNoise(SilentHook):
    """Tell noise that is a function of the step which one it is."""

    generator: Generators

    def before(self, step: Step) -> None:
        """Begin the step."""
        move_to(self.generator, step.index + 1)


@dataclass
class WatchNumbers(SilentHook):
    """Remember after each step whether the latents are finite, without waiting for the device until `check`.

    A sum is finite when all its terms are, and one sum is the cheapest look at a tensor there is.
    """

    sums: list[Tensor] = field(default_factory=list)

    def after(self, step: Step) -> None:
        """Look at the latents."""
        self.sums.append(step.latents.sum(dtype=torch.float32))

    def check(self, latents: Tensor, model: str) -> None:
        """Raise `NonFiniteError` if these are not finite, with the first step after which they were not, if it was watched."""
        if bool(latents.isfinite().all()):
            return
        finite = [bool(total.isfinite()) for total in self.sums]
        where = f"after step {finite.index(False) + 1} of {len(finite)}" if False in finite else "after the last step"
        raise NonFiniteError(
            f"the latents are not finite {where}",
            found=f"NaN or infinity; {model} computes in {latents.dtype}",
            remedy="load it with torch_dtype=torch.bfloat16 or torch.float32; a lower guidance_scale helps too",
        )
