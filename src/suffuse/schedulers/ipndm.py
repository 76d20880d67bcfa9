"""iPNDM: the linear multistep method of PNDM without a warm-up (Zhang and Chen, 2023, https://arxiv.org/abs/2204.13902).

On the circle x = cos(pi t / 2) x_0 + sin(pi t / 2) epsilon; coefficients are those of Adams and Bashforth (Liu et al., 2022,
equation 12).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from suffuse.configuration import register_to_config
from suffuse.schedulers.noise_schedule import checked_count
from suffuse.schedulers.pndm import ADAMS_BASHFORTH
from suffuse.schedulers.scheduler import Memory, Remembered, SchedulerMixin, stepped


@dataclass
class IPNDMMemory(Memory):
    """Adds the schedule of the run, noise `betas` and signal `alphas` with one entry more than steps, and its estimates."""

    betas: Tensor = field(default_factory=lambda: torch.zeros(0))
    alphas: Tensor = field(default_factory=lambda: torch.zeros(0))
    ets: list[Tensor] = field(default_factory=list[Tensor])


class IPNDMScheduler(SchedulerMixin):
    """Fourth order, one call of the model a step; timesteps lie in (0, 1]."""

    _compatibles = []
    init_noise_sigma: float = 1.0
    pndm_order = 4
    betas: Any = Remembered()
    alphas: Any = Remembered()
    ets = Remembered()

    @register_to_config
    def __init__(self, num_train_timesteps: int = 1000, trained_betas: np.ndarray | list[float] | None = None) -> None:
        self._start(self._scheduled(num_train_timesteps))

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose the timesteps of a run."""
        self.memory = self._scheduled(checked_count(num_inference_steps, len(self)), device)

    def _scheduled(self, count: int, device: str | torch.device | None = None) -> IPNDMMemory:
        trained = self.config["trained_betas"]
        if trained is None:
            betas = torch.sin(torch.cat([torch.linspace(1, 0, count + 1)[:-1], torch.zeros(1)]) * math.pi / 2) ** 2
        else:
            betas = torch.tensor(trained, dtype=torch.float32)
        alphas = (1.0 - betas**2) ** 0.5
        timesteps = (torch.atan2(betas, alphas) / math.pi * 2)[:-1]
        return IPNDMMemory(timesteps.to(device), count, betas=betas, alphas=alphas)

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """`sample` as the model wants to see it, which is as it is."""
        return sample

    def step(self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, return_dict: bool = True) -> Any:
        """Step to the next timestep."""
        beta, alpha, divisor, beta_next, alpha_next = self._row(timestep, _factors)
        memory: IPNDMMemory = self.memory
        memory.ets = [*memory.ets[-3:], sample * beta + model_output * alpha]
        estimate = ADAMS_BASHFORTH[len(memory.ets)](memory.ets)
        previous = alpha_next * ((sample - beta * estimate) / divisor) + estimate * beta_next
        self.memory.step_index += 1
        return stepped(return_dict, previous)


def _factors(memory: IPNDMMemory) -> tuple[Tensor, ...]:
    """beta, alpha, what to divide by (alpha, never 0), and beta and alpha of the next timestep, of every step."""
    beta, alpha = memory.betas, memory.alphas
    return beta[:-1], alpha[:-1], alpha[:-1].clamp(min=1e-8), beta[1:], alpha[1:]
