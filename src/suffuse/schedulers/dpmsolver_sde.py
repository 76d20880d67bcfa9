"""DPM-Solver++ for the stochastic equation, with two calls of the model a step (Crowson, k-diffusion, `sample_dpmpp_sde`).

With t = -log sigma, a call that goes from t to t' (first the middle of the step, then its end) first goes further down, to the
sigma_down of ancestral sampling, and comes back by noise:

    x' = (sigma_down / sigma) x + (1 - sigma_down / sigma) x_0 + sigma_up z         (Lu et al., 2022, https://arxiv.org/abs/2211.01095)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from suffuse.configuration import register_to_config
from suffuse.noise import Generators
from suffuse.schedulers.brownian import Seed, brownian_noise, seed_of
from suffuse.schedulers.k_dpm_2_discrete import KDPM2DiscreteScheduler, doubled
from suffuse.schedulers.noise_schedule import (
    BetaSchedule,
    TimestepSpacing,
    checked_count,
    timesteps_of,
    to_tensor,
    training_sigmas,
)
from suffuse.schedulers.prediction import PredictionType, exploded_scales
from suffuse.schedulers.scheduler import Remembered, on_device, stepped
from suffuse.schedulers.sigma_space import SigmaMemory


@dataclass
class BrownianMemory(SigmaMemory):
    """Adds the seed of the noise, and what the first call of a step leaves for the second."""

    noise_seed: Seed | None = None
    sample: Tensor | None = None


class DPMSolverSDEScheduler(KDPM2DiscreteScheduler):
    """Two calls of the model a step, noise after each, from a Brownian path. Needs torchsde."""

    memory_class = BrownianMemory
    timestep_precision = np.float64
    noise_seed = Remembered()

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
        noise_sampler_seed: int | None = None,
        timestep_spacing: TimestepSpacing = "linspace",
        steps_offset: int = 0,
        use_exponential_sigmas: bool | None = False,
        use_beta_sigmas: bool | None = False,
    ) -> None:
        self._prepare()
        self._start(self._scheduled(num_train_timesteps, None, num_train_timesteps))

    def _scheduled(self, count: int, device: str | torch.device | None, train: int) -> BrownianMemory:
        count = checked_count(count, train)
        sigmas, whole = self._levels(self._spaced(count, train), count)
        logs = np.log(sigmas)
        between = timesteps_of(np.exp(logs[:-1] + np.diff(logs) * 0.5), training_sigmas(self.alphas_cumprod))
        timesteps = np.append(np.stack([whole[:-1], between], axis=1).flatten(), whole[-1])
        levels = torch.cat([doubled(to_tensor(sigmas)), torch.zeros(1)])
        precision = torch.float32 if str(device).startswith("mps") else torch.float64  # which Apple's devices do not have
        return BrownianMemory(on_device(timesteps, device, precision), count, sigmas=levels)

    def _call(self, timestep: float | Tensor) -> tuple[Tensor, ...]:
        return self._row(timestep, _calls)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        return_dict: bool = True,
        s_noise: float = 1.0,
        generator: Generators = None,
    ) -> Any:
        """Take the first or the second call of a step; the last step of a run has one.

        Keywords of its own:
            s_noise: Scale of the noise.
            generator: Seeds the noise of the run, at its first step, unless `noise_sampler_seed` is configured.

        Raises:
            MissingPackageError: torchsde is not installed.
        """
        sigma, c_out, variance, begin, _, end, c_x, c_0, c_z = self._call(timestep)
        memory = self.memory
        if memory.noise_seed is None:
            configured = self.config["noise_sampler_seed"]
            memory.noise_seed = seed_of(generator) if configured is None else configured
        x0 = self._x0(sample, model_output, sigma, c_out, variance)
        if end == 0:
            previous = sample + (sample - x0) / sigma * (end - sigma)
        else:
            origin, memory.sample = (sample, sample) if memory.sample is None else (memory.sample, None)
            ends = float(memory.sigmas[:-1].min()), float(memory.sigmas.max())
            noise = brownian_noise(memory, memory.noise_seed, ends, origin, begin, end)
            previous = c_x * origin + c_0 * x0 + noise * s_noise * c_z
        memory.step_index += 1
        return stepped(return_dict, previous, x0)


def _calls(memory: BrownianMemory) -> tuple[Tensor, ...]:
    """Of every call: the model's sigma, its scales, where the call begins, the input's scale, where it ends, c_x, c_0 and c_z."""
    t, t_end = (-levels.log() for levels in (memory.sigmas[0::2], memory.sigmas[1::2]))
    t_middle = t + (t_end - t) * 0.5

    def both(first: Tensor, second: Tensor) -> Tensor:
        return torch.stack([first, second], dim=1).flatten()[: len(memory.timesteps)]

    t, t_end, sigma = both(t, t), both(t_middle, t_end), both(memory.sigmas[0::2], (-t_middle).exp())
    begin, end = (-t).exp(), (-t_end).exp()
    up = torch.minimum(end, (end**2 * (begin**2 - end**2) / begin**2) ** 0.5)
    t_down = -((end**2 - up**2) ** 0.5).log()
    c_x, c_0 = (-t_down).exp() / begin, -(t - t_down).expm1()
    return sigma, *exploded_scales(sigma), begin, (sigma**2 + 1) ** 0.5, end, c_x, c_0, up
