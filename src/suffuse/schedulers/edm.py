"""The schedules and preconditioning of EDM (Karras et al., 2022, https://arxiv.org/abs/2206.00364, table 1).

The model F is shown `c_in x` and `c_noise(sigma)`, and its clean sample is

    x_0 = c_skip x + c_out F,   c_skip = sigma_d² / (sigma² + sigma_d²),   c_out = ± sigma sigma_d / sqrt(sigma² + sigma_d²)
    c_in = 1 / sqrt(sigma² + sigma_d²),   c_noise = log(sigma) / 4
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from suffuse.errors import ConfigError
from suffuse.schedulers.choices import Choices
from suffuse.schedulers.noise_schedule import karras_sigmas_at
from suffuse.schedulers.scheduler import SchedulerMixin
from suffuse.schedulers.sigma_space import SigmaMemory, noise_levels

SIGNS = Choices("prediction_type", {"epsilon": 1, "v_prediction": -1})
"""prediction_type → the sign of c_out."""

FINAL = Choices("final_sigmas_type", {"zero": 0, "sigma_min": 1})
"""final_sigmas_type → the share of `sigma_min` that a run ends with."""


def _karras(ramp: Tensor, low: float, high: float, rho: float) -> Tensor:
    return karras_sigmas_at(ramp, high, low, rho)


def _exponential(ramp: Tensor, low: float, high: float, rho: float) -> Tensor:
    return torch.linspace(math.log(low), math.log(high), len(ramp)).exp().flip(0)


SCHEDULES: Choices[Callable[[Tensor, float, float, float], Tensor]] = Choices(
    "sigma_schedule", {"karras": _karras, "exponential": _exponential}
)
"""sigma_schedule → falling sigmas from (ramp from 0 to 1, sigma_min, sigma_max, rho)."""


class PreconditionedScheduler(SchedulerMixin):
    """Base of the schedulers for EDM models.

    Attributes:
        sigmas: Noise levels of the run, falling, float32 on the CPU, shape (steps + 1,).
        init_noise_sigma: Standard deviation of the noise a run begins with.
    """

    _compatibles = []

    def _check_config(self) -> None:
        config = self.config
        for table, entry in ((SIGNS, "prediction_type"), (SCHEDULES, "sigma_schedule"), (FINAL, "final_sigmas_type")):
            table.check(config[entry])
        if not 0 < config["sigma_min"] < config["sigma_max"]:
            raise ConfigError(
                f"{type(self).__name__} has no noise levels",
                found=f"sigma_min={config['sigma_min']}, sigma_max={config['sigma_max']}",
                expected="0 < sigma_min < sigma_max",
            )

    @property
    def init_noise_sigma(self) -> Any:
        """Standard deviation of the noise a run begins with."""
        return (self.config["sigma_max"] ** 2 + 1) ** 0.5

    def _sigmas(self, ramp: Tensor) -> Tensor:
        """The sigmas at `ramp`, float32 on the CPU."""
        config = self.config
        sigmas = SCHEDULES[config["sigma_schedule"]](ramp, config["sigma_min"], config["sigma_max"], config["rho"])
        return sigmas.to(torch.float32)

    def precondition_inputs(self, sample: Tensor, sigma: Tensor) -> Tensor:
        """What the model is shown of `sample`: unit variance."""
        return sample * self._scale(sigma)

    def precondition_noise(self, sigma: float | Tensor) -> Tensor:
        """The timestep that the model knows `sigma` by."""
        return 0.25 * torch.log(torch.as_tensor(sigma).reshape(-1))

    def precondition_outputs(self, sample: Tensor, model_output: Tensor, sigma: Tensor) -> Tensor:
        """The clean sample, from the noisy one and what the model made of it."""
        c_skip, c_out = self._skip_and_out(sigma)
        return c_skip * sample + c_out * model_output

    def _scale(self, sigma: Tensor) -> Tensor:
        return 1 / (sigma**2 + self.config["sigma_data"] ** 2) ** 0.5

    def _skip_and_out(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        data, square = self.config["sigma_data"], sigma**2 + self.config["sigma_data"] ** 2
        return data**2 / square, SIGNS[self.config["prediction_type"]] * sigma * data / square**0.5

    def _input_scale(self, memory: SigmaMemory) -> tuple[Tensor]:
        return (self._scale(memory.sigmas[:-1]),)

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """`c_in x`: unit variance, as the model was trained.

        Args:
            sample: (batch, channels, …).
            timestep: The entry of `timesteps` whose turn it is.
        """
        self.memory.is_scale_input_called = True
        return sample * self._row(timestep, self._input_scale)[0]

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`x_0 + sigma epsilon` at each timestep.

        Args:
            original_samples: `x_0`, (batch, …).
            noise: Same shape.
            timesteps: Entries of `timesteps`, (batch,) or (1,).
        """
        return original_samples + noise * noise_levels(self, original_samples, timesteps)
