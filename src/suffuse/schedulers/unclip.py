"""The sampler of unCLIP (Ramesh et al., 2022, https://arxiv.org/abs/2204.06125): DDPM between any two timesteps.

beta = 1 - alpha_bar_t / alpha_bar_s; the mean of x_s is equation 7 of Ho et al. (2020), its log variance lies between that of
equation 7 and log beta (Nichol and Dhariwal, 2021, equation 15).
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from suffuse.configuration import register_to_config
from suffuse.errors import InputError
from suffuse.noise import Generators, randn_tensor
from suffuse.schedulers.noise_schedule import BETAS, checked_count
from suffuse.schedulers.prediction import X0
from suffuse.schedulers.scheduler import Memory, on_device, stepped
from suffuse.schedulers.variance_preserving import VariancePreservingScheduler


class UnCLIPScheduler(VariancePreservingScheduler):
    """DDPM for Karlo, whose pipelines name the timestep to go to."""

    _compatibles = []

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        variance_type: Literal["fixed_small_log", "learned_range"] = "fixed_small_log",
        clip_sample: bool = True,
        clip_sample_range: float = 1.0,
        prediction_type: Literal["epsilon", "sample"] = "epsilon",
        beta_schedule: Literal["squaredcos_cap_v2"] = "squaredcos_cap_v2",
    ) -> None:
        self._make_alphas(BETAS[beta_schedule](0.0, 1.0, num_train_timesteps))
        self.final_alpha_cumprod = torch.tensor(1.0)
        self._start(Memory(torch.arange(num_train_timesteps).flip(0)))

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose the timesteps of a run, both ends of training among them; two steps or more."""
        count = checked_count(num_inference_steps, len(self))
        if count < 2:
            raise InputError("num_inference_steps is not possible", found=count, expected=f"2 to {len(self)}")
        timesteps = (np.arange(0, count) * ((len(self) - 1) / (count - 1))).round()[::-1]
        self.memory = Memory(on_device(timesteps.copy(), device, torch.int64), count)

    def _factors(self, t: int, before: int) -> tuple[Tensor, ...]:
        """sqrt(alpha_bar_t), its noise, the weights of x_0 and x_t, the deviation, and the logs of both variances."""
        bar = self.alphas_cumprod[t].cpu()
        bar_before = self.alphas_cumprod[before].cpu() if before >= 0 else self.final_alpha_cumprod
        noise, noise_before = 1 - bar, 1 - bar_before
        if before == t - 1:
            beta, alpha = self.betas[t].cpu(), self.alphas[t].cpu()
        else:
            beta = 1 - bar / bar_before
            alpha = 1 - beta
        small = noise_before / noise * beta
        deviation = torch.exp(0.5 * torch.log(small.clamp(min=1e-20)))
        of_x0, of_sample = bar_before**0.5 * beta / noise, alpha**0.5 * noise_before / noise
        return bar**0.5, noise**0.5, of_x0, of_sample, deviation, small.log(), beta.log()

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        prev_timestep: int | Tensor | None = None,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> Any:
        """Step from `timestep` to `prev_timestep`.

        Keywords of its own:
            prev_timestep: Where to go, the timestep below if left out.
        """
        t, learned = self._training_timestep(timestep), self.config["variance_type"] == "learned_range"
        before = t - 1 if prev_timestep is None else self._training_timestep(prev_timestep)
        if not before < t:
            raise InputError("prev_timestep is not possible", found=before, expected=f"a timestep below {t}")
        row = self.memory.derive(("step", t, before), self._factors, t, before)
        signal, noise, of_x0, of_sample, deviation, log_small, log_large = row
        if learned:
            if model_output.shape[1] != 2 * sample.shape[1]:
                raise InputError("variance_type='learned_range' needs a model with twice the channels of the sample")
            model_output, predicted = model_output.split(sample.shape[1], dim=1)
            share = (predicted + 1) / 2
            deviation = (0.5 * (share * log_large + (1 - share) * log_small)).exp()
        x0 = self._bounded(X0[self.config["prediction_type"]](sample, model_output, signal, noise))
        previous = of_x0 * x0 + of_sample * sample
        if t > 0:
            drawn = randn_tensor(model_output.shape, generator, model_output.device, model_output.dtype)
            previous = previous + deviation * drawn
        return stepped(return_dict, previous, x0)
