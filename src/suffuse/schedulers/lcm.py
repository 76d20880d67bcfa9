"""LCM: Latent Consistency Models (Luo et al., 2023, https://arxiv.org/abs/2310.04378).

f(x_t, t) = c_skip x_t + c_out x_0,  x_{t'} = sqrt(alpha_bar_{t'}) f(x_t, t) + sqrt(1 - alpha_bar_{t'}) z
c_skip = sigma_d² / ((s t)² + sigma_d²),  c_out = s t / sqrt((s t)² + sigma_d²)     (Song et al., 2023, appendix C; sigma_d = 1/2)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from suffuse.noise import Generators, randn_tensor
from suffuse.outputs import BaseOutput
from suffuse.schedulers.distilled import DistilledScheduler
from suffuse.schedulers.prediction import X0
from suffuse.schedulers.scheduler import Memory

SIGMA_DATA = 0.5


@dataclass
class LCMSchedulerOutput(BaseOutput):
    """What a step returns.

    Attributes:
        prev_sample: The sample one step less noisy, (batch, channels, height, width).
        denoised: The consistency function's clean sample, same shape.
    """

    prev_sample: Tensor
    denoised: Tensor | None = None


class LCMScheduler(DistilledScheduler):
    """One to eight steps of a consistency model, each to the clean sample and back up with new noise."""

    def get_scalings_for_boundary_condition_discrete(self, timestep: float | Tensor) -> tuple[Any, Any]:
        """(c_skip, c_out) at `timestep`: 1 and 0 at timestep 0, so that `f(x_0, 0) = x_0`."""
        scaled = timestep * self.config["timestep_scaling"]
        square = scaled**2 + SIGMA_DATA**2
        return SIGMA_DATA**2 / square, scaled / square**0.5

    def _factors(self, memory: Memory) -> tuple[Tensor, ...]:
        """Signal, noise, c_skip and c_out of every step, and signal and noise of the one after."""
        t, alpha_bar = memory.timesteps.cpu(), self.alphas_cumprod.cpu()
        here, after = alpha_bar[t], alpha_bar[torch.cat([t[1:], t[-1:]])]
        scalings = self.get_scalings_for_boundary_condition_discrete(t)
        return here.sqrt(), (1 - here).sqrt(), *scalings, after.sqrt(), (1 - after).sqrt()

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, generator: Generators = None, return_dict: bool = True
    ) -> Any:
        """Step to the next timestep; the last step ends at the clean sample. Returns an `LCMSchedulerOutput`."""
        self._check_ready()
        signal, noise, c_skip, c_out, signal_next, noise_next = self._row(timestep, self._factors)
        memory = self.memory
        x0 = self._bounded(X0[self.config["prediction_type"]](sample, model_output, signal, noise))
        denoised = previous = c_out * x0 + c_skip * sample
        if memory.step_index != memory.num_inference_steps - 1:
            drawn = randn_tensor(model_output.shape, generator, model_output.device, denoised.dtype)
            previous = signal_next * denoised + noise_next * drawn
        memory.step_index += 1
        return LCMSchedulerOutput(previous, denoised) if return_dict else (previous, denoised)
