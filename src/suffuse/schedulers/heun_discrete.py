"""Heun's method (Karras et al., 2022, algorithm 1, https://arxiv.org/abs/2206.00364).

d = (x - x_0) / sigma,  x' = x + (sigma_next - sigma) d            first call
d' = (x' - x_0') / sigma_next,  x_next = x + (sigma_next - sigma) (d + d') / 2    second call
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from suffuse.configuration import register_to_config
from suffuse.schedulers.noise_schedule import (
    BetaSchedule,
    TimestepSpacing,
    check_one_given,
    checked_count,
    checked_timesteps,
    refuse_timesteps,
)
from suffuse.schedulers.prediction import PredictionType
from suffuse.schedulers.scheduler import Remembered, stepped
from suffuse.schedulers.sigma_space import SigmaMemory, SigmaScheduler, levels


@dataclass
class HeunMemory(SigmaMemory):
    """Adds what the first call of a step leaves for the second."""

    prev_derivative: Tensor | None = None
    dt: Tensor | None = None
    sample: Tensor | None = None


class HeunDiscreteScheduler(SigmaScheduler):
    """Second order: two calls of the model a step, so `timesteps` and `sigmas` repeat their entries."""

    order = 2
    memory_class = HeunMemory
    ladders = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
    prev_derivative = Remembered()
    dt = Remembered()
    sample = Remembered()

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: BetaSchedule = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        prediction_type: PredictionType = "epsilon",
        use_karras_sigmas: bool | None = False,
        clip_sample: bool | None = False,
        clip_sample_range: float = 1.0,
        timestep_spacing: TimestepSpacing = "linspace",
        steps_offset: int = 0,
        use_exponential_sigmas: bool | None = False,
        use_beta_sigmas: bool | None = False,
    ) -> None:
        self._prepare()
        self._start(self._scheduled(num_train_timesteps))

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        num_train_timesteps: int | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """Choose the schedule of a run: how many steps, or (falling) which timesteps.

        Keywords of its own:
            num_train_timesteps: Spread the steps over so many timesteps, instead of the configured number.
        """
        check_one_given(num_inference_steps=num_inference_steps, timesteps=timesteps)
        self.memory = self._scheduled(num_inference_steps, device, num_train_timesteps, timesteps)

    def _scheduled(
        self,
        count: int | None,
        device: str | torch.device | None = None,
        train: int | None = None,
        timesteps: list[float] | None = None,
    ) -> HeunMemory:
        train = train or len(self)
        if timesteps is not None:
            refuse_timesteps(self.config, self.ladders)
            spaced = checked_timesteps(timesteps, train).astype(np.float32)
        else:
            spaced = self._spaced(checked_count(count, train), train)
        count = count or len(spaced)
        sigmas, spaced = self._levels(spaced, count)
        return self._memory(count, np.repeat(sigmas, 2)[1:], np.repeat(spaced, 2)[1:], device)

    @property
    def state_in_first_order(self) -> bool:
        """Whether the next call is the first of a step."""
        return self.dt is None

    def step(self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, return_dict: bool = True) -> Any:
        """Take the first or the second call of a step."""
        sigma, c_out, variance, dt = self._row(timestep, levels)
        memory = self.memory
        x0 = self._x0(sample, model_output, sigma, c_out, variance)
        if self.config["clip_sample"]:
            x0 = x0.clamp(-self.config["clip_sample_range"], self.config["clip_sample_range"])
        derivative = (sample - x0) / sigma
        if memory.dt is None:
            memory.prev_derivative, memory.dt, memory.sample = derivative, dt, sample
        else:
            derivative = (memory.prev_derivative + derivative) / 2
            dt, sample = memory.dt, memory.sample
            memory.prev_derivative = memory.dt = memory.sample = None
        memory.step_index += 1
        return stepped(return_dict, sample + derivative * dt, x0)
