"""Many steps of one run at once (Shih et al., 2023, "Parallel sampling of diffusion models", algorithm 1).

The way to the picture is guessed, and all its steps are taken from the guess in one call of the model. Their sum is a better
guess; what no longer changes is settled, and the window of steps moves on.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from suffuse.diffusion.advance import GuidedStep
from suffuse.diffusion.conditioning import Conditioner, ModelCall
from suffuse.diffusion.guidance import ClassifierFreeGuidance
from suffuse.diffusion.loop import Step
from suffuse.diffusion.windows import InEachWindow
from suffuse.errors import InputError
from suffuse.noise import Generators, randn_tensor

FEW = 4
"""Of fewer steps than these, a call is not worth sharing out over several devices."""


@dataclass
class Settling(ClassifierFreeGuidance):
    """Classifier-free guidance of steps that are taken at once, and what is known of the way.

    Attributes:
        way: Latents before the first step and after each, (steps + 1, batch, channels, rows, columns).
        settled: How many steps are right.
    """

    remembers: ClassVar[tuple[str, ...]] = ("way", "settled")
    way: Tensor = field(default_factory=lambda: torch.zeros(0))
    settled: int = 0


def at_own_time(call: ModelCall, step: Step) -> None:
    """Tell the model a timestep for each row of its batch."""
    call.timestep = call.timestep.repeat(len(call.branches))


def variances(scheduler: Any) -> Tensor:
    """The variance of the noise of each step, (steps,) (Ho et al., 2020, section 3.2).

    Raises:
        InputError: The scheduler wants another one than those of the paper.
    """
    t, kind = scheduler.timesteps.cpu(), scheduler.config.get("variance_type", "fixed_small")
    if hasattr(scheduler, "previous_timestep"):
        before, final = torch.tensor([scheduler.previous_timestep(one) for one in t]), torch.tensor(1.0)
    else:
        before, final = t - len(scheduler) // scheduler.num_inference_steps, scheduler.final_alpha_cumprod
    alphas = scheduler.alphas_cumprod.cpu()
    alpha, alpha_before = alphas[t], torch.where(before >= 0, alphas[before.clamp(0)], final)
    beta = 1 - alpha / alpha_before
    small = (1 - alpha_before) / (1 - alpha) * beta
    if kind not in ("fixed_small", "fixed_large"):
        raise InputError(
            "steps at once need a fixed variance", found=f"variance_type={kind!r}", expected="fixed_small or fixed_large"
        )
    return beta if kind == "fixed_large" else small if scheduler._is_ode_scheduler else small.clamp(1e-20)


def noise_of_steps(scheduler: Any, like: Tensor, generator: Generators) -> Tensor:
    """The noise of each step, drawn beforehand so that every guess has the same: (steps, *like.shape)."""
    drawn = [randn_tensor(like.shape, generator, like.device, like.dtype) for _ in scheduler.timesteps]
    return torch.stack([variance**0.5 * one for variance, one in zip(variances(scheduler), drawn, strict=True)])


@dataclass
class PicardStep(GuidedStep):
    """One round: all steps of the window are taken from the guess, and summed up.

    Attributes:
        at_once: Steps in the window.
        tolerance: How much of the deviation of its noise a step may change and count as settled.
        noise: Of each step, (steps, batch, channels, rows, columns); None where steps have none.
        wide: What predicts for several steps at once, if that is not the model.
        exact: Sum up in float32 on the CPU, where the order of a sum is always the same.
    """

    at_once: int = 10
    tolerance: float = 0.1
    noise: Tensor | None = None
    wide: nn.Module | None = None
    exact: bool = False

    def __call__(self, step: Step) -> Tensor:
        """The latents after the last step that is settled."""
        state, scheduler = self._state(), self._scheduler()
        way, begin, total = state.way, state.settled, len(scheduler.timesteps)
        end = min(begin + self.at_once, total)
        block, changed = way[begin:end], slice(begin + 1, end + 1)
        times = scheduler.timesteps[begin:end].repeat_interleave(block.shape[1])
        guessed = replace(step, latents=block.flatten(0, 1), timestep=times)
        prediction = state(self._denoiser(len(block)), guessed)
        options = {name: value for name, value in self.options.items() if name != "generator"}
        moved = scheduler.batch_step_no_noise(prediction, times, guessed.latents, **options).reshape(block.shape)
        better = way[begin][None] + self._summed(moved - block)
        if self.noise is not None:
            better = better + self._summed(self.noise[begin:end])
        error = torch.linalg.norm((better - way[changed]).flatten(2), dim=-1).pow(2) / block[0, 0].numel()
        allowed = torch.cat([variances(scheduler), torch.zeros(1)]).to(error)[changed, None]
        # The last step has no noise to measure errors by: it is settled when nothing changes.
        unsettled = (error / allowed > self.tolerance**2).any(dim=1).tolist()
        state.settled = min(begin + min([*unsettled, True].index(True) + 1, self.at_once), total)
        way[changed] = better
        way[end : min(state.settled + self.at_once, total) + 1] = way[end].clone()
        step.timestep = scheduler.timesteps[begin]
        return way[state.settled].clone()

    def _state(self) -> Any:
        return self.guidance

    def _scheduler(self) -> Any:
        return self.scheduler

    def _denoiser(self, count: int) -> Any:
        told, model = self.denoiser.conditioning, self.wide if self.wide is not None and count >= FEW else self.denoiser.model
        conditioning = InEachWindow(told.batch, told.layout, told.tensors, count)
        conditioners: list[Conditioner] = [*self.denoiser.conditioners, at_own_time]
        return replace(self.denoiser, model=model, conditioning=conditioning, conditioners=conditioners)

    def _summed(self, values: Tensor) -> Tensor:
        return values.cpu().float().cumsum(0).to(values.device) if self.exact else values.cumsum(0)
