"""DPM-Solver-2 with ancestral sampling (Crowson, k-diffusion, `sample_dpm_2_ancestral`).

As `k_dpm_2_discrete`, but each step goes to sigma_down, and sigma_up z brings it back to sigma_next.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from suffuse.noise import Generators, randn_tensor
from suffuse.schedulers.k_dpm_2_discrete import KDPM2DiscreteScheduler
from suffuse.schedulers.scheduler import stepped
from suffuse.schedulers.sigma_space import ancestral


class KDPM2AncestralDiscreteScheduler(KDPM2DiscreteScheduler):
    """Two calls of the model a step, and noise after the second."""

    def _stages(self, sigmas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        up, down = ancestral(sigmas[:-1], sigmas[1:])
        down = torch.where(down == 0, sigmas[1:] ** 2 / sigmas[:-1], down)  # its logarithm is needed
        end = torch.zeros(1)
        midpoints = sigmas.log().lerp(torch.cat([down, end]).log(), 0.5).exp()[:-1]
        return torch.cat([midpoints[:-1], end]), down, up

    def step(  # pyright: ignore[reportIncompatibleMethodOverride]  the order of the keywords is the contract's
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> Any:
        """Take the first or the second call of a step; noise is drawn in the second."""
        second, (*row, _, added) = not self.state_in_first_order, self._call(timestep)
        previous, x0 = self._moved(model_output, sample, *row)
        if second:
            noise = randn_tensor(model_output.shape, generator, model_output.device, model_output.dtype)
            previous = previous + noise * added
        return stepped(return_dict, previous, x0)
