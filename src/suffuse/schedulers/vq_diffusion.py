"""VQ-Diffusion: mask and replace (Gu et al., 2022, https://arxiv.org/abs/2111.14822).

Going up, a token stays with probability alpha_t + beta_t, becomes each other class with beta_t, and the mask with gamma_t
(equation 7); products of many steps have the same form (equation 8). Going down, x_{t-1} is drawn from

    p(x_{t-1} | x_t) = sum over x_0 of q(x_t | x_{t-1}) q(x_{t-1} | x_0) p(x_0 | x_t) / q(x_t | x_0)      (equations 5 and 11)

All of it in logarithms, where `a.logaddexp(b)` is the sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from suffuse.configuration import register_to_config
from suffuse.errors import ConfigError, InputError
from suffuse.noise import Generators
from suffuse.outputs import BaseOutput
from suffuse.schedulers.discrete import for_each_image, uniform
from suffuse.schedulers.noise_schedule import checked_count
from suffuse.schedulers.scheduler import Memory, SchedulerMixin

SMALLEST = 1e-30
"""Stands for a probability of 0 in logarithms."""


@dataclass
class VQDiffusionSchedulerOutput(BaseOutput):
    """What a step returns.

    Attributes:
        prev_sample: The tokens one step less noisy, (batch, pixels).
    """

    prev_sample: Tensor


class VQDiffusionScheduler(SchedulerMixin):
    """Steps between samples of tokens, 0 to `num_vec_classes` - 1, of which the last means "masked".

    Attributes:
        log_at, log_bt, log_ct: Logarithms of alpha, beta and gamma of every timestep.
        log_cumprod_at, log_cumprod_bt, log_cumprod_ct: Those of all steps up to it; at the end, those of no step.
    """

    _compatibles = []

    @register_to_config
    def __init__(
        self,
        num_vec_classes: int,
        num_train_timesteps: int = 100,
        alpha_cum_start: float = 0.99999,
        alpha_cum_end: float = 0.000009,
        gamma_cum_start: float = 0.000009,
        gamma_cum_end: float = 0.99999,
    ) -> None:
        if num_vec_classes < 2 or num_train_timesteps < 2:
            found = f"num_vec_classes={num_vec_classes}, num_train_timesteps={num_train_timesteps}"
            raise ConfigError(f"{type(self).__name__} has nothing to draw", found=found, expected="2 or more of each")
        ramp = np.arange(num_train_timesteps) / (num_train_timesteps - 1)
        kept = ramp * (alpha_cum_end - alpha_cum_start) + alpha_cum_start
        masked = ramp * (gamma_cum_end - gamma_cum_start) + gamma_cum_start
        kept, masked = np.concatenate([[1], kept]), np.concatenate([[0], masked])
        single = kept[1:] / kept[:-1], 1 - (1 - masked[1:]) / (1 - masked[:-1])
        self.log_at, self.log_bt, self.log_ct = self._logs(*single)
        self.log_cumprod_at, self.log_cumprod_bt, self.log_cumprod_ct = self._logs(np.roll(kept, -1), np.roll(masked, -1))
        self._start(Memory(torch.arange(num_train_timesteps).flip(0)))

    def _logs(self, alpha: np.ndarray, gamma: np.ndarray) -> tuple[Tensor, ...]:
        beta = (1 - alpha - gamma) / (self.config["num_vec_classes"] - 1)
        return tuple(torch.from_numpy(values).log().float() for values in (alpha, beta, gamma))

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose how many timesteps, from 0, are gone down; a model is trained to start at all."""
        count = checked_count(num_inference_steps, len(self))
        self.memory = Memory(torch.arange(count, device=device).flip(0), count)

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, generator: Generators = None, return_dict: bool = True
    ) -> Any:
        """Draw the tokens of the timestep before. Returns a `VQDiffusionSchedulerOutput`.

        Args:
            model_output: `log p(x_0 | x_t)` of every class but the mask, (batch, classes - 1, pixels).
            timestep: 0 to `num_train_timesteps` - 1.
            sample: `x_t`, (batch, pixels).
            generator: Source of randomness.
            return_dict: Return a `VQDiffusionSchedulerOutput`, or else the tuple of its fields.

        Raises:
            InputError: The shapes do not belong together, or the timestep or a token is out of range.
        """
        t, classes = int(self._number(timestep)), self.config["num_vec_classes"]
        if not 0 <= t < len(self):
            raise InputError(f"timestep {t} is outside of the training timesteps", expected=f"0 … {len(self) - 1}")
        if model_output.shape != (len(sample), classes - 1, *sample.shape[1:]):
            found = f"{tuple(model_output.shape)} and {tuple(sample.shape)}"
            raise InputError("model_output and sample do not belong together", found=found, expected=f"{classes - 1} classes")
        log_p = self.q_posterior(model_output, sample, t) if t else model_output
        drawn = (log_p + for_each_image(_gumbel, log_p, generator)).argmax(dim=1)
        return VQDiffusionSchedulerOutput(drawn) if return_dict else (drawn,)

    def q_posterior(self, log_p_x_0: Tensor, x_t: Tensor, t: int | Tensor) -> Tensor:
        """`log p(x_{t-1} | x_t)`, (batch, classes, pixels), from `log p(x_0 | x_t)`, (batch, classes - 1, pixels)."""
        known = torch.nn.functional.one_hot(x_t, self.config["num_vec_classes"]).movedim(-1, 1).float().clamp(min=SMALLEST).log()
        log_q = log_p_x_0 - self.log_Q_t_transitioning_to_known_class(t=t, x_t=x_t, log_onehot_x_t=known, cumulative=True)
        total = torch.logsumexp(log_q, dim=1, keepdim=True)
        log_q = self.apply_cumulative_transitions(log_q - total, t - 1)
        once = self.log_Q_t_transitioning_to_known_class(t=t, x_t=x_t, log_onehot_x_t=known, cumulative=False)
        return log_q + once + total

    def log_Q_t_transitioning_to_known_class(
        self, *, t: int | Tensor, x_t: Tensor, log_onehot_x_t: Tensor, cumulative: bool
    ) -> Tensor:
        """`log q(x_t | x_{t-1})` for every class of x_{t-1}; with `cumulative` `log q(x_t | x_0)`, where x_0 is never the mask.

        Args:
            t: The timestep.
            x_t: (batch, pixels).
            log_onehot_x_t: The logarithm of its one-hot vectors, (batch, classes, pixels).
            cumulative: From x_0.
        """
        a, b, c = self._cumulated(t) if cumulative else (self.log_at[t], self.log_bt[t], self.log_ct[t])
        reached = (log_onehot_x_t[:, :-1] + a).logaddexp(b)
        reached = torch.where((x_t == self.config["num_vec_classes"] - 1).unsqueeze(1), c, reached)
        return reached if cumulative else torch.cat([reached, log_onehot_x_t[:, -1:]], dim=1)

    def apply_cumulative_transitions(self, q: Tensor, t: int | Tensor) -> Tensor:
        """`log q(x_t)`, (batch, classes, pixels), where x_0 has the log-probabilities `q`, (batch, classes - 1, pixels)."""
        a, b, c = self._cumulated(t)
        return torch.cat([(q + a).logaddexp(b), c.to(q.device).expand_as(q[:, :1])], dim=1)

    def _cumulated(self, t: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.log_cumprod_at[t], self.log_cumprod_bt[t], self.log_cumprod_ct[t]


def _gumbel(like: Tensor, source: Any) -> Tensor:
    return -torch.log(-torch.log(uniform(like.shape, source, like.device) + SMALLEST) + SMALLEST)
