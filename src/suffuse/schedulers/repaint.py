"""RePaint: inpainting with a model that knows nothing of masks (Lugmayr et al., 2022, https://arxiv.org/abs/2201.09865).

The known part is noised to t-1, the unknown part is a DDIM step, the mask joins them (equation 8); runs jump back to noisier
timesteps to harmonise both (algorithm 1, section 4.2).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from suffuse.configuration import register_to_config
from suffuse.errors import InputError
from suffuse.noise import Generators, randn_tensor
from suffuse.schedulers.noise_schedule import BetaSchedule, checked_count
from suffuse.schedulers.prediction import X0
from suffuse.schedulers.scheduler import Memory, on_device, stepped
from suffuse.schedulers.variance_preserving import VariancePreservingScheduler, alpha_bars


class RePaintScheduler(VariancePreservingScheduler):
    """Timesteps fall, with jumps back up, where the pipeline calls `undo_step`."""

    _compatibles = []

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: BetaSchedule = "linear",
        eta: float = 0.0,
        trained_betas: np.ndarray | list[float] | None = None,
        clip_sample: bool = True,
    ) -> None:
        self._make_alphas()
        self.final_alpha_cumprod = torch.tensor(1.0)
        self.eta = eta
        self._start(Memory(torch.arange(num_train_timesteps).flip(0)))

    def set_timesteps(
        self, num_inference_steps: int, jump_length: int = 10, jump_n_sample: int = 10, device: str | torch.device | None = None
    ) -> None:
        """Choose the timesteps of a run.

        Keywords of its own:
            jump_length: How many timesteps a jump goes back.
            jump_n_sample: How often the timesteps of a jump are sampled.
        """
        count = checked_count(num_inference_steps, len(self))
        if jump_length < 1 or jump_n_sample < 1:
            found = f"jump_length={jump_length}, jump_n_sample={jump_n_sample}"
            raise InputError("no jumps are of these numbers", found=found, expected="1 or more")
        jumps = dict.fromkeys(range(0, count - jump_length, jump_length), jump_n_sample - 1)
        timesteps, t = list[int](), count
        while t >= 1:
            t -= 1
            timesteps.append(t)
            if jumps.get(t, 0) > 0:
                jumps[t] -= 1
                timesteps.extend(range(t + 1, t + jump_length + 1))
                t += jump_length
        self.memory = Memory(on_device(np.array(timesteps) * (len(self) // count), device, torch.int64), count)

    def _factors(self, gap: int, eta: float) -> Tensor:
        """Sqrt of alpha_t, of 1 - alpha_t, of alpha_{t-1}, of what noise is left, sigma_t, and sqrt of 1 - alpha_{t-1}."""
        alpha, before = alpha_bars(self, self.final_alpha_cumprod, gap)
        sigma = eta * ((1 - before) / (1 - alpha) * (1 - alpha / before)) ** 0.5
        left = (1 - before - sigma**2).clamp(min=0) ** 0.5
        return torch.stack([alpha**0.5, (1 - alpha) ** 0.5, before**0.5, left, sigma, (1 - before) ** 0.5], dim=1)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        original_image: Tensor,
        mask: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> Any:
        """Step from `timestep` to the one before.

        Keywords of its own:
            original_image: The clean picture, same shape as `sample`.
            mask: 1 where it is known, 0 where it is to be made.
        """
        self._check_ready()
        t, eta, gap = self._training_timestep(timestep), self.eta, len(self) // self.memory.num_inference_steps
        signal, noise, signal_prev, direction, sigma, noise_prev = self._row_at(t, self._factors, gap, eta)
        x0 = X0["epsilon"](sample, model_output, signal, noise)
        if self.config["clip_sample"]:
            x0 = x0.clamp(-1, 1)
        drawn = randn_tensor(model_output.shape, generator, model_output.device, model_output.dtype)
        unknown = signal_prev * x0 + direction * model_output
        if t > 0 and eta > 0:
            unknown = unknown + sigma * drawn
        known = signal_prev * original_image + noise_prev * drawn
        return stepped(return_dict, mask * known + (1.0 - mask) * unknown, x0)

    def undo_step(self, sample: Tensor, timestep: int | Tensor, generator: Generators = None) -> Tensor:
        """Add the noise of one step to `sample`, which is at `timestep` (Ho et al., 2020, equation 2)."""
        self._check_ready()
        t, betas = self._training_timestep(timestep), self.betas.cpu()
        for beta in betas[t : t + len(self) // self.memory.num_inference_steps]:
            noise = randn_tensor(sample.shape, generator, sample.device, sample.dtype)
            sample = (1 - beta) ** 0.5 * sample + beta**0.5 * noise
        return sample
