"""Multistep consistency sampling (Song et al., 2023, https://arxiv.org/abs/2303.01469, algorithm 1), with sigmas of Karras et al.

f(x, sigma) = c_skip x + c_out F,  x' = f(x, sigma) + sqrt(sigma'² - sigma_min²) z
c_skip = sigma_d² / ((sigma - sigma_min)² + sigma_d²),  c_out = sigma_d (sigma - sigma_min) / sqrt(sigma² + sigma_d²)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from suffuse.configuration import register_to_config
from suffuse.errors import ConfigError
from suffuse.noise import Generators, randn_tensor
from suffuse.outputs import BaseOutput
from suffuse.schedulers.noise_schedule import Array, check_one_given, checked_count, checked_timesteps, karras_sigmas_at
from suffuse.schedulers.sigma_space import SigmaMemory, SigmaScheduler


@dataclass
class CMStochasticIterativeSchedulerOutput(BaseOutput):
    """What a step returns.

    Attributes:
        prev_sample: The sample one step less noisy, (batch, channels, height, width).
    """

    prev_sample: Tensor


class CMStochasticIterativeScheduler(SigmaScheduler):
    """One or a few steps of a consistency model, each to the clean sample and back up with new noise.

    Timesteps are 250 log sigma, as its models take them.
    """

    _compatibles = []

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 40,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        s_noise: float = 1.0,
        rho: float = 7.0,
        clip_denoised: bool = True,
    ) -> None:
        if not 0 < sigma_min < sigma_max or num_train_timesteps < 2:
            raise ConfigError(
                f"{type(self).__name__} has no noise levels",
                found=f"sigma_min={sigma_min}, sigma_max={sigma_max}, num_train_timesteps={num_train_timesteps}",
                expected="0 < sigma_min < sigma_max, two timesteps or more",
            )
        sigmas = self._sigmas(np.linspace(0, 1, num_train_timesteps))
        self._start(self.memory_class(torch.from_numpy(self.sigma_to_t(sigmas)), sigmas=torch.from_numpy(sigmas)))

    @property
    def init_noise_sigma(self) -> Any:
        """Standard deviation of the noise a run begins with."""
        return self.config["sigma_max"]

    def _sigmas(self, ramp: Array) -> Array:
        config = self.config
        return karras_sigmas_at(ramp, config["sigma_max"], config["sigma_min"], config["rho"])

    def sigma_to_t(self, sigmas: float | Array) -> Array:
        """The timesteps that the model knows `sigmas` by."""
        return 1000 * 0.25 * np.log(np.asarray(sigmas, dtype=np.float64) + 1e-44)

    def set_timesteps(  # pyright: ignore[reportIncompatibleMethodOverride]  it takes timesteps
        self, num_inference_steps: int | None = None, device: str | torch.device | None = None, timesteps: list[int] | None = None
    ) -> None:
        """Choose the schedule of a run: how many steps, or (falling) which indices of the training sigmas, the lowest first.

        Keywords of its own:
            timesteps: Indices from 0 to `num_train_timesteps` - 1, e.g. [22, 0].
        """
        check_one_given(num_inference_steps=num_inference_steps, timesteps=timesteps)
        if timesteps is None:
            count = checked_count(num_inference_steps, len(self))
            indices = np.arange(count) * (len(self) // count)
        else:
            indices = checked_timesteps(timesteps, len(self)).astype("int64")[::-1].copy()
        sigmas = self._sigmas(indices / (len(self) - 1))
        self.memory = self.memory_class(
            torch.from_numpy(self.sigma_to_t(sigmas)).to(device),
            len(indices),
            sigmas=torch.from_numpy(np.append(sigmas, self.config["sigma_min"]).astype(np.float32)),
        )

    def get_scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(c_skip, c_out) at `sigma` of a model that ends at sigma 0 (Karras et al., 2022, table 1)."""
        return self._scalings(sigma, 0.0)

    def get_scalings_for_boundary_condition(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(c_skip, c_out) at `sigma`: 1 and 0 at `sigma_min`, so that `f(x, sigma_min) = x`."""
        return self._scalings(sigma, self.config["sigma_min"])

    def _scalings(self, sigma: Tensor, end: float) -> tuple[Tensor, Tensor]:
        data, way = self.config["sigma_data"], sigma - end
        return data**2 / (way**2 + data**2), way * data / (sigma**2 + data**2) ** 0.5

    def _factors(self, memory: SigmaMemory) -> tuple[Tensor, ...]:
        """Of every step: the input scale, c_skip, c_out and the deviation of the noise to add."""
        config, sigma = self.config, memory.sigmas[:-1]
        sigma_hat = memory.sigmas[1:].clamp(config["sigma_min"], config["sigma_max"])
        return (
            (sigma**2 + config["sigma_data"] ** 2) ** 0.5,
            *self.get_scalings_for_boundary_condition(sigma),
            (sigma_hat**2 - config["sigma_min"] ** 2) ** 0.5,
        )

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """`sample / sqrt(sigma² + sigma_data²)`: unit variance, as the model was trained."""
        self.memory.is_scale_input_called = True
        return sample / self._row(timestep, self._factors)[0]

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> Any:
        """Step to the next sigma; a run of one step adds no noise. Returns a `CMStochasticIterativeSchedulerOutput`."""
        self._check_ready()
        self._check_no_index(timestep)
        self._check_scaled()
        _, c_skip, c_out, deviation = self._row(timestep, self._factors)
        memory = self.memory
        previous = c_out * model_output + c_skip * sample
        if self.config["clip_denoised"]:
            previous = previous.clamp(-1, 1)
        if len(memory.timesteps) > 1:
            noise = randn_tensor(model_output.shape, generator, model_output.device, model_output.dtype)
            previous = previous + noise * self.config["s_noise"] * deviation
        memory.step_index += 1
        return CMStochasticIterativeSchedulerOutput(previous) if return_dict else (previous,)
