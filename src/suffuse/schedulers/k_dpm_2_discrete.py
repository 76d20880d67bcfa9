"""DPM-Solver-2 in sigma space (Lu et al., 2022, algorithm 1; Crowson, k-diffusion, `sample_dpm_2`).

x_mid = x + (sigma_mid - sigma) (x - x_0(x)) / sigma,  log sigma_mid = (log sigma + log sigma_next) / 2      first call
x_next = x + (sigma_next - sigma) (x_mid - x_0(x_mid)) / sigma_mid                                           second call
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from suffuse.configuration import register_to_config
from suffuse.schedulers.noise_schedule import (
    BetaSchedule,
    TimestepSpacing,
    checked_count,
    chosen_ladder,
    timesteps_of,
    to_tensor,
    training_sigmas,
)
from suffuse.schedulers.prediction import PredictionType, exploded_scales
from suffuse.schedulers.scheduler import Remembered, stepped
from suffuse.schedulers.sigma_space import SigmaMemory, SigmaScheduler


@dataclass
class TwoCallMemory(SigmaMemory):
    """Adds, for each entry of `sigmas`, the midpoint of its step, where the step arrives, and the noise to add there.

    `sample` is what the first call of a step leaves for the second.
    """

    midpoints: Tensor = field(default_factory=lambda: torch.zeros(0))
    arrivals: Tensor = field(default_factory=lambda: torch.zeros(0))
    added: Tensor = field(default_factory=lambda: torch.zeros(0))
    sample: Tensor | None = None


def doubled(values: Tensor) -> Tensor:
    """Every value but the first twice: the two calls of each step."""
    return torch.cat([values[:1], values[1:].repeat_interleave(2)])


class KDPM2DiscreteScheduler(SigmaScheduler):
    """Second order: two calls of the model a step, the second at the step's (geometric) middle."""

    order = 2
    memory_class = TwoCallMemory
    ladders = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
    sample = Remembered()

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: BetaSchedule = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        use_karras_sigmas: bool | None = False,
        prediction_type: PredictionType = "epsilon",
        timestep_spacing: TimestepSpacing = "linspace",
        steps_offset: int = 0,
        use_exponential_sigmas: bool | None = False,
        use_beta_sigmas: bool | None = False,
    ) -> None:
        self._prepare()
        self._start(self._scheduled(num_train_timesteps, None, num_train_timesteps))

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None, num_train_timesteps: int | None = None
    ) -> None:
        """Choose the timesteps of a run.

        Keywords of its own:
            num_train_timesteps: Spread the steps over so many timesteps, instead of the configured number.
        """
        self.memory = self._scheduled(num_inference_steps, device, num_train_timesteps or len(self))

    def _scheduled(self, count: int, device: str | torch.device | None, train: int) -> SigmaMemory:
        count = checked_count(count, train)
        training = training_sigmas(self.alphas_cumprod)
        sigmas, whole = self._levels(self._spaced(count, train), count)
        if chosen_ladder(self.config, self.ladders) == "use_karras_sigmas":
            whole = whole.round()
        levels = to_tensor([*sigmas, 0.0])
        midpoints, arrivals, added = self._stages(levels)
        between = timesteps_of(midpoints.numpy()[: len(whole) - 1], training, np.float32)
        timesteps = np.append(np.stack([whole[:-1], between], axis=1).flatten(), whole[-1])
        return TwoCallMemory(
            torch.from_numpy(timesteps.astype(whole.dtype)).to(device),
            count,
            sigmas=torch.cat([doubled(levels), levels[-1:]]),
            midpoints=midpoints.repeat_interleave(2),
            arrivals=arrivals.repeat_interleave(2),
            added=added.repeat_interleave(2),
        )

    def _stages(self, sigmas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(midpoint, arrival, noise added) of the step from each but the last of `sigmas`."""
        logs = sigmas.log()
        return logs.lerp(logs.roll(1), 0.5).exp()[1:], sigmas[1:], torch.zeros_like(sigmas[1:])

    @property
    def state_in_first_order(self) -> bool:
        """Whether the next call is the first of a step."""
        return self.sample is None

    def _call(self, timestep: float | Tensor) -> tuple[Tensor, ...]:
        """Of the call whose turn it is: sigma, the scales of a v-prediction, the way to go, the input's scale, noise to add."""
        return self._row(timestep, _first_calls if self.memory.sample is None else _second_calls)

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """`sample / sqrt(sigma² + 1)`, with the sigma of the call whose turn it is."""
        return sample / self._call(timestep)[4]

    def step(self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, return_dict: bool = True) -> Any:
        """Take the first or the second call of a step."""
        previous, x0 = self._moved(model_output, sample, *self._call(timestep)[:4])
        return stepped(return_dict, previous, x0)

    def _moved(self, model_output: Tensor, sample: Tensor, sigma: Tensor, *scales_and_way: Tensor) -> tuple[Tensor, Tensor]:
        """(sample at the end of the call, x_0); the memory is ready for the next call."""
        *scales, way = scales_and_way
        memory = self.memory
        x0 = self._x0(sample, model_output, sigma, *scales)
        derivative = (sample - x0) / sigma
        origin, memory.sample = (sample, sample) if memory.sample is None else (memory.sample, None)
        memory.step_index += 1
        return origin + derivative * way, x0


def _calls(memory: TwoCallMemory, sigma: Tensor, way: Tensor, added: Tensor) -> tuple[Tensor, ...]:
    columns = sigma, *exploded_scales(sigma), way, (sigma**2 + 1) ** 0.5, added
    return tuple(column[: len(memory.timesteps)] for column in columns)


def _first_calls(memory: TwoCallMemory) -> tuple[Tensor, ...]:
    sigma = _departures(memory)
    return _calls(memory, sigma, memory.midpoints - sigma, torch.zeros_like(sigma))


def _second_calls(memory: TwoCallMemory) -> tuple[Tensor, ...]:
    return _calls(memory, memory.midpoints, memory.arrivals - _departures(memory), memory.added)


def _departures(memory: TwoCallMemory) -> Tensor:
    return memory.sigmas[:-2:2].repeat_interleave(2)
