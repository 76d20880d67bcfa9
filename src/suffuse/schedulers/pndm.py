"""PNDM: Pseudo Numerical Methods for Diffusion Models on Manifolds (Liu et al., 2022, https://arxiv.org/abs/2202.09778).

The transfer of equation 11 (`_transfer`) carries a sample from one timestep to another along a noise estimate; Runge-Kutta
warms up with four estimates a step (PRK, equation 13), then the linear multistep method needs one (PLMS, equation 12).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from suffuse.configuration import register_to_config
from suffuse.errors import InputError
from suffuse.schedulers.noise_schedule import BetaSchedule, TimestepSpacing, checked_count
from suffuse.schedulers.prediction import EPSILON, PredictionType
from suffuse.schedulers.scheduler import Memory, Remembered, on_device, stepped
from suffuse.schedulers.variance_preserving import VariancePreservingScheduler, alpha_bars


@dataclass
class PNDMMemory(Memory):
    """Adds the noise estimates so far (`ets`), how many calls of `step` there were, and the Runge-Kutta step under way."""

    prk_timesteps: list[int] = field(default_factory=list[int])
    plms_timesteps: list[int] = field(default_factory=list[int])
    counter: int = 0
    ets: list[Tensor] = field(default_factory=list[Tensor])
    cur_model_output: Any = 0
    cur_sample: Tensor | None = None


def _weighted(ets: list[Tensor], *weights: Tensor) -> Tensor:
    total = weights[0] * ets[-1]
    for weight, estimate in zip(weights[1:], reversed(ets[:-1]), strict=True):
        total = total + weight * estimate
    return total


_3, _1, _23, _16, _5, _55, _59, _37, _9 = torch.tensor([3.0, -1, 23, -16, 5, 55, -59, 37, -9]).unbind()

ADAMS_BASHFORTH: dict[int, Callable[[list[Tensor]], Tensor]] = {
    1: lambda ets: ets[-1],
    2: lambda ets: _weighted(ets, _3, _1) / 2,
    3: lambda ets: _weighted(ets, _23, _16, _5) / 12,
    4: lambda ets: (1 / 24) * _weighted(ets, _55, _59, _37, _9),
}
"""How many noise estimates there are (oldest first) → what to step along."""


class PNDMScheduler(VariancePreservingScheduler):
    """Fourth-order multistep sampling in the manifold of `x_t`; each of its calls wants the next entry of `timesteps`."""

    pndm_order = 4
    prk_timesteps = Remembered()
    plms_timesteps = Remembered()
    counter = Remembered()
    ets = Remembered()
    cur_model_output = Remembered()
    cur_sample = Remembered()

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: BetaSchedule = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        skip_prk_steps: bool = False,
        set_alpha_to_one: bool = False,
        prediction_type: PredictionType = "epsilon",
        timestep_spacing: TimestepSpacing = "leading",
        steps_offset: int = 0,
    ) -> None:
        self._prepare()
        self._start(PNDMMemory(torch.arange(num_train_timesteps).flip(0)))

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose the timesteps of a run; there are more of them than steps, for the warm-up."""
        count = checked_count(num_inference_steps, len(self))
        if count < self.pndm_order and not self.config["skip_prk_steps"]:
            raise InputError(
                "PNDM needs 4 steps to warm up", found=f"num_inference_steps={count}", remedy="use skip_prk_steps=True"
            )
        rising = self._spaced(count)[::-1]
        if self.config["skip_prk_steps"]:
            prk, plms = [], np.concatenate([rising[:-1], rising[-2:-1], rising[-1:]])[::-1].tolist()
        else:
            half = len(self) // count // 2
            halves = rising[-self.pndm_order :].repeat(2) + np.tile([0, half], self.pndm_order)
            prk, plms = halves[:-1].repeat(2)[1:-1][::-1].tolist(), rising[:-3][::-1].tolist()
        timesteps = on_device(torch.tensor([*prk, *plms]), device, torch.int64)
        self.memory = PNDMMemory(timesteps, count, prk_timesteps=prk, plms_timesteps=plms)

    def step(self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True) -> Any:
        """Take the next call of the run, Runge-Kutta while it warms up, then multistep."""
        warming_up = self.counter < len(self.prk_timesteps) and not self.config["skip_prk_steps"]
        take = self.step_prk if warming_up else self.step_plms
        return take(model_output, timestep, sample, return_dict)

    def step_prk(self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True) -> Any:
        """One of the four calls of a Runge-Kutta step (equation 13)."""
        self._check_ready()
        memory: PNDMMemory = self.memory
        call = memory.counter % 4
        arrival = self._training_timestep(timestep) - (0 if call % 2 else len(self) // self.num_inference_steps // 2)
        departure = memory.prk_timesteps[memory.counter - call]
        if call == 0:
            memory.ets, memory.cur_sample = [*memory.ets, model_output], sample
        if call == 3:
            model_output = memory.cur_model_output + 1 / 6 * model_output
            memory.cur_model_output = 0
        else:
            memory.cur_model_output = memory.cur_model_output + (1 / 3 if call else 1 / 6) * model_output
        origin = sample if memory.cur_sample is None else memory.cur_sample
        memory.counter += 1
        return stepped(return_dict, self._transfer(origin, departure, arrival, model_output))

    def step_plms(self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True) -> Any:
        """One multistep call, of the order that the estimates so far allow (equation 12)."""
        self._check_ready()
        memory: PNDMMemory = self.memory
        if not self.config["skip_prk_steps"] and len(memory.ets) < 3:
            raise InputError(
                "step_plms needs three noise estimates", found=len(memory.ets), remedy="take 12 calls of step_prk before"
            )
        departure, gap = self._training_timestep(timestep), len(self) // self.num_inference_steps
        arrival = departure - gap
        if memory.counter == 1:
            departure, arrival = departure + gap, departure
        else:
            memory.ets = [*memory.ets[-3:], model_output]
        known = len(memory.ets)
        if known > 1:
            model_output = ADAMS_BASHFORTH[known](memory.ets)
        elif memory.counter == 0:
            memory.cur_sample = sample
        elif memory.cur_sample is None:
            raise InputError("PNDM steps must be taken in order", remedy="call set_timesteps before each run")
        else:
            model_output = (model_output + memory.ets[-1]) / 2
            sample, memory.cur_sample = memory.cur_sample, None
        memory.counter += 1
        return stepped(return_dict, self._transfer(sample, departure, arrival, model_output))

    def _transfer(self, sample: Tensor, departure: int, arrival: int, model_output: Tensor) -> Tensor:
        """Equation 11: carry `sample` from one timestep to another."""
        t = self._training_timestep(departure)
        of_sample, difference, divisor, signal, noise = self._row_at(t, self._factors, departure - arrival)
        epsilon = EPSILON[self.config["prediction_type"]](sample, model_output, signal, noise)
        return of_sample * sample - difference * epsilon / divisor

    def _factors(self, gap: int) -> Tensor:
        """The factors of equation 11, and sqrt of alpha_t and of 1 - alpha_t: (training timesteps, 5)."""
        alpha, alpha_prev = alpha_bars(self, self.final_alpha_cumprod, gap)
        noise = 1 - alpha
        divisor = alpha * (1 - alpha_prev) ** 0.5 + (alpha * noise * alpha_prev) ** 0.5
        return torch.stack([(alpha_prev / alpha) ** 0.5, alpha_prev - alpha, divisor, alpha**0.5, noise**0.5], dim=1)
