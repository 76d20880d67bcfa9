"""Euler with churn for EDM models (Karras et al., 2022, https://arxiv.org/abs/2206.00364, algorithm 2 without the correction).

x' = x + (sigma' - sigma_hat) (x - x_0) / sigma_hat
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from suffuse.configuration import register_to_config
from suffuse.errors import InputError
from suffuse.noise import Generators, randn_tensor
from suffuse.schedulers.edm import FINAL, PreconditionedScheduler
from suffuse.schedulers.noise_schedule import FinalSigma, check_one_given, checked_count
from suffuse.schedulers.scheduler import Remembered, stepped
from suffuse.schedulers.sigma_space import SigmaMemory


class EDMEulerScheduler(PreconditionedScheduler):
    """First order, deterministic without churn."""

    memory_class: ClassVar[type[SigmaMemory]] = SigmaMemory
    sigmas = Remembered()
    is_scale_input_called = Remembered()

    @register_to_config
    def __init__(
        self,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        sigma_schedule: Literal["karras", "exponential"] = "karras",
        num_train_timesteps: int = 1000,
        prediction_type: Literal["epsilon", "v_prediction"] = "epsilon",
        rho: float = 7.0,
        final_sigmas_type: FinalSigma = "zero",
    ) -> None:
        self._check_config()
        self._start(self._memory(None, torch.arange(num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps))

    def _memory(self, count: int | None, ramp: Tensor, device: str | torch.device | None = None) -> SigmaMemory:
        sigmas = self._sigmas(ramp)
        final = sigmas[-1:] * FINAL[self.config["final_sigmas_type"]]
        return self.memory_class(self.precondition_noise(sigmas).to(device), count, sigmas=torch.cat([sigmas, final]))

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Tensor | list[float] | None = None,
    ) -> None:
        """Choose the schedule of a run: how many steps, or where on the curve of sigmas.

        Keywords of its own:
            sigmas: Rising places between `sigma_max` (0) and `sigma_min` (1), which `sigma_schedule` turns into sigmas.
        """
        check_one_given(num_inference_steps=num_inference_steps, sigmas=sigmas)
        if sigmas is None:
            count = checked_count(num_inference_steps, len(self))
            ramp = torch.linspace(0, 1, count, dtype=torch.float64)
        else:
            ramp = torch.as_tensor(sigmas, dtype=torch.float64).cpu().reshape(-1)
            count = len(ramp)
            if not count or not bool((ramp.diff() > 0).all()) or not 0 <= float(ramp[0]) <= float(ramp[-1]) <= 1:
                raise InputError("sigmas are no places on the curve", found=sigmas, expected="rising numbers in 0 … 1")
        self.memory = self._memory(count, ramp, device)

    def _factors(self, memory: SigmaMemory, gamma: float) -> tuple[Tensor, ...]:
        """Of every step: sigma_hat, the deviation of the churn, c_skip, c_out and the way to the next sigma."""
        sigma = memory.sigmas[:-1]
        sigma_hat = sigma * (gamma + 1)
        churn = (sigma_hat**2 - sigma**2) ** 0.5
        return sigma_hat, churn, *self._skip_and_out(sigma_hat), memory.sigmas[1:] - sigma_hat

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
        pred_original_sample: Tensor | None = None,
    ) -> Any:
        """Step to the next sigma.

        Keywords of its own:
            s_churn, s_tmin, s_tmax, s_noise: How much noise to add on the way, at which sigmas, and its scale.
            pred_original_sample: The clean sample, where the caller has it already.
        """
        memory = self.memory
        gamma, row = 0.0, self._row(timestep, self._factors, 0.0)
        if s_churn > 0 and s_tmin <= row[0] <= s_tmax:
            gamma = min(s_churn / (len(memory.sigmas) - 1), 2**0.5 - 1)
            row = self._row(timestep, self._factors, gamma)
        sigma_hat, churn, c_skip, c_out, dt = row
        sample = sample.to(torch.float32)
        if gamma > 0:
            noise = randn_tensor(model_output.shape, generator, model_output.device, model_output.dtype)
            sample = sample + noise * s_noise * churn
        x0 = c_skip * sample + c_out * model_output if pred_original_sample is None else pred_original_sample
        previous = sample + (sample - x0) / sigma_hat * dt
        memory.step_index += 1
        return stepped(return_dict, previous.to(model_output.dtype), x0)
