"""Many steps of one run at once (Shih et al., 2023, "Parallel sampling of diffusion models", algorithm 1).

The way to the picture is guessed, and all its steps are taken from the guess in one call of the model. Their sum is a better
guess; what no longer changes is settled, and the window of steps moves on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from suffuse.diffusion.advance import GuidedStep
from suffuse.diffusion.conditioning import Denoiser, Foreseen, ManyTimes, ModelCall, whole
from suffuse.diffusion.guidance import Guidance
from suffuse.diffusion.holding_guidance import HoldingGuidance
from suffuse.diffusion.loop import Step
from suffuse.errors import InputError
from suffuse.noise import Generators, randn_tensor

FEW = 4
"""Of fewer steps than these, a call is not worth sharing out over several devices."""


@dataclass(slots=True)
class Steps(Step):
    """Several steps that are taken at once.

    Attributes:
        span: Which of the way.
    """

    span: range = range(0)

    @property
    def indices(self) -> Sequence[int]:
        """Which steps the latents are at, one after another."""
        return self.span


def at_own_time(call: ModelCall, step: Step) -> None:
    """Tell the model a timestep for each row of its batch."""
    call.timestep = call.timestep.repeat(len(call.branches))


@dataclass
class TogetherDenoiser(Denoiser):
    """Predict for several steps in one call of the model.

    Attributes:
        wide: What predicts for several, if that is not the model.
    """

    wide: nn.Module | None = None

    def __call__(self, step: Step, branches: tuple[str, ...], latents: Tensor | None = None) -> dict[str, Tensor]:
        """Predictions by branch for all steps, (steps · batch, channels, rows, columns)."""
        told, count = self.conditioning, len(step.indices)
        model = self.wide if self.wide is not None and count >= FEW else self.model
        conditioning = ManyTimes(**vars(told), views=[whole] * count)
        return Denoiser(model, self.scheduler, conditioning, [at_own_time, *self.conditioners])(step, branches, latents)


@dataclass
class Settling(HoldingGuidance):
    """A guidance of steps that are taken at once, and what is known of the way.

    Attributes:
        way: Latents before the first step and after each, (steps + 1, batch, channels, rows, columns).
        settled: How many steps are right.
        forks: The other guidance before the steps of this round and after each of them, as it then remembers what was.
    """

    remembers: ClassVar[tuple[str, ...]] = ("way", "settled")
    way: Tensor = field(default_factory=lambda: torch.zeros(0))
    settled: int = 0
    forks: list[Guidance] = field(init=False, default_factory=list[Guidance])

    def __call__(self, denoiser: Denoiser, step: Step) -> Tensor:
        """A prediction for each of the steps, of which the model is asked at once and which are guided one after another."""
        count, self.forks = len(step.indices), [self.guidance]
        said = {branch: rows.chunk(count) for branch, rows in denoiser(step, self.branches).items()}
        alone = zip(step.indices, step.timestep.chunk(count), step.latents.chunk(count), strict=True)
        made = list[Tensor]()
        for place, (index, timestep, latents) in enumerate(alone):
            self.forks.append(self.forks[-1].fork())
            own = Foreseen.of(denoiser, {branch: rows[place] for branch, rows in said.items()})
            made.append(self.forks[-1](own, Step(latents, step.total, index, timestep[0])))
        return torch.cat(made)

    def settle(self, steps: int) -> None:
        """Take so many steps of the round for right."""
        self.settled += steps
        self.guidance = self.forks[steps]


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
        guessed = Steps(block.flatten(0, 1), step.total, step.index, times, range(begin, end))
        prediction = state(TogetherDenoiser(**vars(self.denoiser), wide=self.wide), guessed)
        options = {name: value for name, value in self.options.items() if name != "generator"}
        moved = scheduler.batch_step_no_noise(prediction, times, guessed.latents, **options).reshape(block.shape)
        better = way[begin][None] + self._summed(moved - block)
        if self.noise is not None:
            better = better + self._summed(self.noise[begin:end])
        error = torch.linalg.norm((better - way[changed]).flatten(2), dim=-1).pow(2) / block[0, 0].numel()
        allowed = torch.cat([variances(scheduler), torch.zeros(1)]).to(error)[changed, None]
        # The last step has no noise to measure errors by: it is settled when nothing changes.
        unsettled = (error / allowed > self.tolerance**2).any(dim=1).tolist()
        state.settle(min([*unsettled, True].index(True) + 1, self.at_once, total - begin))
        way[changed] = better
        way[end : min(state.settled + self.at_once, total) + 1] = way[end].clone()
        step.timestep = scheduler.timesteps[begin]
        return way[state.settled].clone()

    def _state(self) -> Any:
        return self.guidance

    def _scheduler(self) -> Any:
        return self.scheduler

    def _summed(self, values: Tensor) -> Tensor:
        return values.cpu().float().cumsum(0).to(values.device) if self.exact else values.cumsum(0)
