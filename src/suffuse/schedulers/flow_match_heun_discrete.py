"""Heun on the straight paths of flow matching (Lipman et al., 2023, https://arxiv.org/abs/2210.02747), with churn.

x~ = x + h d(x, sigma),  x' = x + h (d(x, sigma) + d(x~, sigma')) / 2            (Karras et al., 2022, algorithm 2)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from suffuse.configuration import register_to_config
from suffuse.noise import Generators, randn_tensor
from suffuse.schedulers.flow_match_euler_discrete import (
    FlowMatchEulerDiscreteSchedulerOutput,
    FlowMatchScheduler,
    FlowMemory,
    flow_steps,
)
from suffuse.schedulers.noise_schedule import checked_count, shifted


@dataclass
class FlowHeunMemory(FlowMemory):
    """Adds what the second half of a step wants of the first."""

    prev_derivative: Tensor | None = None
    dt: Tensor | None = None
    sample: Tensor | None = None


class FlowMatchHeunDiscreteScheduler(FlowMatchScheduler):
    """Second order, two calls of the model a step but for the last."""

    memory_class = FlowHeunMemory
    order = 2

    @register_to_config
    def __init__(self, num_train_timesteps: int = 1000, shift: float = 1.0) -> None:
        self._begin(shift)

    @property
    def state_in_first_order(self) -> bool:
        """Whether the next call of `step` begins a step."""
        return self.memory.dt is None

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose the schedule of a run."""
        count = checked_count(num_inference_steps, len(self))
        sigmas = torch.from_numpy(shifted(self._spaced(count), self.config["shift"])).to(torch.float32)
        twice = torch.cat([sigmas[:1], sigmas[1:].repeat_interleave(2)])
        self.memory = self.memory_class((twice * len(self)).to(device), count, sigmas=torch.cat([twice, torch.zeros(1)]))

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> Any:
        """Half a step to the next sigma. Returns a `FlowMatchEulerDiscreteSchedulerOutput`.

        Keywords of its own:
            s_churn, s_tmin, s_tmax, s_noise: How much noise to add on the way, at which sigmas, and its scale.
        """
        self._check_no_index(timestep)
        here, after, _ = self._row(timestep, flow_steps)
        memory, sample = self.memory, sample.to(torch.float32)
        first = memory.dt is None
        sigma, sigma_next = (here, after) if first else (memory.sigmas[memory.step_index - 1], here)
        sigma_hat = sigma
        if s_churn > 0 and s_tmin <= sigma <= s_tmax:
            sigma_hat = sigma * (min(s_churn / (len(memory.sigmas) - 1), 2**0.5 - 1) + 1)
            noise = randn_tensor(model_output.shape, generator, model_output.device, model_output.dtype)
            sample = sample + noise * s_noise * (sigma_hat**2 - sigma**2) ** 0.5
        if first:
            derivative = (sample - (sample - model_output * sigma)) / sigma_hat
            memory.prev_derivative, memory.dt, memory.sample = derivative, sigma_next - sigma_hat, sample
            previous = sample + derivative * memory.dt
        else:
            derivative = 0.5 * (memory.prev_derivative + (sample - (sample - model_output * sigma_next)) / sigma_next)
            previous = memory.sample + derivative * memory.dt
            memory.prev_derivative = memory.dt = memory.sample = None
        memory.step_index += 1
        previous = previous.to(model_output.dtype)
        return FlowMatchEulerDiscreteSchedulerOutput(previous) if return_dict else (previous,)
