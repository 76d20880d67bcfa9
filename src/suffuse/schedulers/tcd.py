"""TCD: Trajectory Consistency Distillation (Zheng et al., 2024, https://arxiv.org/abs/2402.19159), strategic stochastic sampling.

x_s = sqrt(alpha_bar_s) x_0 + sqrt(1 - alpha_bar_s) epsilon,  s = floor((1 - eta) t')            (eta is the paper's gamma)
x_{t'} = sqrt(alpha_bar_{t'} / alpha_bar_s) x_s + sqrt(1 - alpha_bar_{t'} / alpha_bar_s) z
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from suffuse.errors import InputError
from suffuse.noise import Generators, randn_tensor
from suffuse.outputs import BaseOutput
from suffuse.schedulers.distilled import DistilledScheduler
from suffuse.schedulers.noise_schedule import Array
from suffuse.schedulers.prediction import EPSILON, X0
from suffuse.schedulers.scheduler import Memory


@dataclass
class TCDSchedulerOutput(BaseOutput):
    """What a step returns.

    Attributes:
        prev_sample: The sample one step less noisy, (batch, channels, height, width).
        pred_noised_sample: The sample at timestep s, before noise is added to it, same shape.
    """

    prev_sample: Tensor
    pred_noised_sample: Tensor | None = None


class TCDScheduler(DistilledScheduler):
    """Few steps of a trajectory consistency model, each past the next timestep and back up with new noise.

    Given `original_inference_steps`, `set_timesteps` chooses among all timesteps of training.
    """

    def _distilled(self, original: int | None, strength: float) -> Array:
        return super()._distilled(None, strength) if original is None else np.arange(int(len(self) * strength))

    def _factors(self, memory: Memory, eta: float) -> tuple[Tensor, ...]:
        """Of every step: signal and noise at t, at s, and of what leads from s to t'."""
        t, alpha_bar = memory.timesteps.cpu(), self.alphas_cumprod.cpu()
        after = torch.cat([t[1:], torch.zeros_like(t[:1])])
        bar_t, bar_after, bar_s = alpha_bar[t], alpha_bar[after], alpha_bar[torch.floor((1 - eta) * after).long()]
        kept = bar_after / bar_s
        return bar_t.sqrt(), (1 - bar_t).sqrt(), bar_s.sqrt(), (1 - bar_s).sqrt(), kept.sqrt(), (1 - kept).sqrt()

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.3,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> Any:
        """Step to the next timestep. Returns a `TCDSchedulerOutput`.

        Keywords of its own:
            eta: How far beyond the next timestep to go before noise is added, 0 (not at all) to 1 (to the clean sample).
        """
        self._check_ready()
        if not 0 <= eta <= 1:
            raise InputError("eta is not possible", found=eta, expected="0 (deterministic) to 1 (most noise)")
        signal, noise, signal_s, noise_s, kept, added = self._row(timestep, self._factors, eta)
        memory, kind = self.memory, self.config["prediction_type"]
        x0, epsilon = X0[kind](sample, model_output, signal, noise), EPSILON[kind](sample, model_output, signal, noise)
        previous = noised = signal_s * x0 + noise_s * epsilon
        if eta > 0 and memory.step_index != memory.num_inference_steps - 1:
            previous = kept * noised + added * randn_tensor(noised.shape, generator, noised.device, noised.dtype)
        memory.step_index += 1
        return TCDSchedulerOutput(previous, noised) if return_dict else (previous, noised)
