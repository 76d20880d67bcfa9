"""DDPM for parallel sampling (Shih et al., 2023, https://arxiv.org/abs/2305.16317): many steps of one run at once.

Picard iteration guesses a whole window of the trajectory and corrects it by all its drifts; the noise of every step
is drawn beforehand, so `batch_step_no_noise` is the mean of the posterior (Ho et al., 2020, equation 7).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from suffuse.schedulers.ddpm import DDPMScheduler, posterior
from suffuse.schedulers.prediction import X0
from suffuse.schedulers.scheduler import per_sample
from suffuse.schedulers.variance_preserving import alpha_bars


class DDPMParallelScheduler(DDPMScheduler):
    """`DDPMScheduler` with a step whose batch may be at different timesteps."""

    _is_ode_scheduler: ClassVar[bool] = False

    def _means(self, gap: int) -> Tensor:
        return torch.stack(posterior(*alpha_bars(self, torch.tensor(1.0), gap)), dim=1)

    def batch_step_no_noise(self, model_output: Tensor, timesteps: Tensor, sample: Tensor) -> Tensor:
        """Step every sample from its own timestep to the mean of the one before.

        Args:
            model_output: The predictions, (batch, …); a learned variance behind them is left out.
            timesteps: Training timesteps, (batch,).
            sample: (batch, channels, …).
        """
        gap = len(self) // (self.memory.num_inference_steps or len(self))
        table = self.memory.derive(("means", gap), self._means, gap)[timesteps.cpu()].to(sample.device)
        signal, noise, of_x0, of_sample = (per_sample(column, sample) for column in table.unbind(dim=1))
        if self.config["variance_type"] in ("learned", "learned_range"):
            model_output = model_output[:, : sample.shape[1]]
        x0 = self._bounded(X0[self.config["prediction_type"]](sample, model_output, signal, noise))
        return of_x0 * x0 + of_sample * sample
