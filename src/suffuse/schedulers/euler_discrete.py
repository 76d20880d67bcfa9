"""Euler's method (Karras et al., 2022, algorithm 2 without the correction, https://arxiv.org/abs/2206.00364).

sigma_hat = sigma (1 + gamma),  x_hat = x + sqrt(sigma_hat² - sigma²) s_noise z
d = (x_hat - x_0) / sigma_hat,  x_next = x_hat + (sigma_next - sigma_hat) d
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from suffuse.configuration import register_to_config
from suffuse.errors import InputError
from suffuse.noise import Generators, randn_tensor
from suffuse.schedulers.choices import Choices
from suffuse.schedulers.noise_schedule import (
    Array,
    BetaSchedule,
    FinalSigma,
    TimestepSpacing,
    check_one_given,
    checked_count,
    checked_timesteps,
    refuse_timesteps,
    sigmas_at,
    timesteps_of,
    training_sigmas,
)
from suffuse.schedulers.prediction import PredictionType
from suffuse.schedulers.scheduler import stepped
from suffuse.schedulers.sigma_space import SigmaScheduler, levels


def _log_linear(timesteps: Array, training: Array) -> Array:
    """Sigmas evenly spaced in their logarithm, one more than timesteps: the last one precedes the final sigma."""
    ends = float(np.log(training[-1])), float(np.log(training[0]))
    return torch.linspace(*ends, len(timesteps) + 1).exp().numpy()


INTERPOLATIONS = Choices("interpolation_type", {"linear": sigmas_at, "log_linear": _log_linear})


class EulerDiscreteScheduler(SigmaScheduler):
    """First order, deterministic unless `s_churn` is given."""

    ladders = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: BetaSchedule = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        prediction_type: Literal[PredictionType, "original_sample"] = "epsilon",
        interpolation_type: Literal["linear", "log_linear"] = "linear",
        use_karras_sigmas: bool | None = False,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        timestep_spacing: TimestepSpacing = "linspace",
        timestep_type: Literal["discrete", "continuous"] = "discrete",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        use_exponential_sigmas: bool | None = False,
        use_beta_sigmas: bool | None = False,
        final_sigmas_type: FinalSigma = "zero",
    ) -> None:
        self._prepare()
        falling = training_sigmas(self.alphas_cumprod)[::-1]
        self._start(self._memory(None, falling, np.arange(num_train_timesteps)[::-1]))
        self._log_timesteps()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[float] | None = None,
        sigmas: list[float] | None = None,
    ) -> None:
        """Choose the schedule of a run: how many steps, or (falling) which timesteps or sigmas.

        Keywords of its own:
            sigmas: Which, the final one among them.
        """
        check_one_given(num_inference_steps=num_inference_steps, timesteps=timesteps, sigmas=sigmas)
        training = training_sigmas(self.alphas_cumprod)
        if sigmas is not None:
            chosen = np.array(sigmas, dtype=np.float32)
            if chosen.ndim != 1 or len(chosen) < 2 or not bool((np.diff(chosen) < 0).all()) or chosen[-1] < 0:
                raise InputError("sigmas must be in descending order", found=sigmas, expected="two or more, none below 0")
            self.memory = self._memory(len(chosen) - 1, chosen[:-1], timesteps_of(chosen[:-1], training), device, chosen[-1])
        else:
            if timesteps is not None:
                refuse_timesteps(self.config, self.ladders)
                if self._continuous:
                    raise InputError("timesteps cannot be given with timestep_type='continuous'", remedy="give sigmas")
                spaced = checked_timesteps(timesteps, len(self)).astype(np.float32)
            else:
                spaced = self._spaced(checked_count(num_inference_steps, len(self)))
            between = INTERPOLATIONS[self.config["interpolation_type"]]
            final = float(training[0]) if self.config["final_sigmas_type"] == "sigma_min" else 0.0
            count = num_inference_steps or len(spaced)
            self.memory = self._memory(count, *self._levels(spaced, count, between), device, final)
        self._log_timesteps()

    @property
    def _continuous(self) -> bool:
        return self.config["timestep_type"] == "continuous" and self.config["prediction_type"] == "v_prediction"

    def _log_timesteps(self) -> None:
        """Show a model of continuous time `log(sigma) / 4` instead (Karras et al., 2022, table 1)."""
        if self._continuous:
            memory = self.memory
            memory.timesteps = (0.25 * memory.sigmas[:-1].log()).to(memory.timesteps.device)

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
        """Step to the next sigma.

        Keywords of its own:
            s_churn: How much noise to add on the way, 0 for none.
            s_tmin: Add none below this sigma.
            s_tmax: Add none above this sigma.
            s_noise: Standard deviation of what is added.
        """
        self._check_no_index(timestep)
        self._check_scaled()
        sigma, c_out, variance, dt = self._row(timestep, levels)
        memory = self.memory
        sample, sigma_hat = sample.to(torch.float32), sigma
        if s_churn > 0 and s_tmin <= sigma <= s_tmax:
            gamma = min(s_churn / (len(memory.sigmas) - 1), 2**0.5 - 1)
            sigma_hat = sigma * (gamma + 1)
            dt = memory.sigmas[memory.step_index + 1] - sigma_hat
            noise = randn_tensor(model_output.shape, generator, model_output.device, model_output.dtype)
            sample = sample + noise * s_noise * (sigma_hat**2 - sigma**2) ** 0.5
        x0 = self._x0(sample, model_output, sigma_hat, c_out, variance)
        derivative = (sample - x0) / sigma_hat
        previous = sample + derivative * dt
        memory.step_index += 1
        return stepped(return_dict, previous.to(model_output.dtype), x0)
