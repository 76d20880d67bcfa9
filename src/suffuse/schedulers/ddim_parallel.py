"""DDIM for parallel sampling (Shih et al., 2023, https://arxiv.org/abs/2305.16317): many steps of one run at once.

Picard iteration guesses a whole window of the trajectory and corrects it by all its drifts; `batch_step_no_noise`
is the drift at each sample's own timestep.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from suffuse.errors import InputError
from suffuse.schedulers.ddim import DDIMScheduler
from suffuse.schedulers.scheduler import per_sample
from suffuse.schedulers.variance_preserving import alpha_bars


class DDIMParallelScheduler(DDIMScheduler):
    """`DDIMScheduler` with a step whose batch may be at different timesteps."""

    _is_ode_scheduler: ClassVar[bool] = True

    def _levels(self, gap: int) -> Tensor:
        alpha, alpha_prev = alpha_bars(self, torch.tensor(1.0), gap)
        return torch.stack([alpha**0.5, (1 - alpha) ** 0.5, alpha_prev**0.5, (1 - alpha_prev) ** 0.5], dim=1)

    def batch_step_no_noise(
        self, model_output: Tensor, timesteps: Tensor, sample: Tensor, eta: float = 0.0, use_clipped_model_output: bool = False
    ) -> Tensor:
        """Step every sample from its own timestep to the one before.

        Args:
            model_output: The predictions, (batch, …).
            timesteps: Training timesteps, (batch,).
            sample: Same shape as `model_output`.
            eta: Must be 0: Picard iteration needs a deterministic step.
            use_clipped_model_output: As in `step`.

        Returns:
            The samples one step less noisy; alpha_bar is 1 after the last, whatever `set_alpha_to_one` says.
        """
        self._check_ready()
        if eta != 0:
            raise InputError("batch_step_no_noise is deterministic", found=f"eta={eta}", expected="0.0")
        gap = len(self) // self.memory.num_inference_steps
        table = self.memory.derive(("levels", gap), self._levels, gap)[timesteps.cpu()].to(sample.device)
        signal, noise, signal_prev, noise_prev = (per_sample(column, sample) for column in table.unbind(dim=1))
        x0, epsilon = self._parts(model_output, sample, signal, noise, use_clipped_model_output)
        return signal_prev * x0 + noise_prev * epsilon
