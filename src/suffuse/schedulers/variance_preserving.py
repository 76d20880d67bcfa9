"""The family that steps between training timesteps by `alphas_cumprod` (DDPM, DDIM, PNDM): `x_t` keeps its variance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from suffuse.errors import InputError
from suffuse.schedulers.noise_schedule import SPACINGS, Array, spaced_timesteps
from suffuse.schedulers.prediction import X0, dynamic_threshold
from suffuse.schedulers.scheduler import SchedulerMixin, per_sample, rows


class VariancePreservingScheduler(SchedulerMixin):
    """Base of the schedulers for `x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) epsilon`.

    Attributes:
        betas: Noise added at each training timestep, shape (num_train_timesteps,).
        alphas: 1 - betas.
        alphas_cumprod: `alpha_bar_t`, the running product of alphas.
        final_alpha_cumprod: `alpha_bar` after the last step.
        init_noise_sigma: Standard deviation of the noise a run begins with.
    """

    init_noise_sigma: float = 1.0
    final_alpha_cumprod: Tensor

    def _prepare(self) -> None:
        """Check what the configuration names, and make the tables."""
        SPACINGS.check(self.config["timestep_spacing"])
        X0.check(self.config["prediction_type"])
        self._make_alphas()
        self.final_alpha_cumprod = self.alphas_cumprod[0] if self.config.get("set_alpha_to_one") is False else torch.tensor(1.0)

    def _spaced(self, count: int) -> Array:
        """`count` falling timesteps, int64, by the configured spacing."""
        config = self.config
        total, offset = config["num_train_timesteps"], config["steps_offset"]
        spaced = spaced_timesteps(config["timestep_spacing"], count, total, offset).round().astype("int64")
        if spaced.max() >= total:
            raise InputError(
                f"num_inference_steps={count} begins past the last of {total} training timesteps with steps_offset={offset}",
                remedy=f"use at most {total // 2} steps, or timestep_spacing='trailing'",
            )
        return spaced

    def _training_timestep(self, timestep: float | Tensor) -> int:
        t = int(self._number(timestep))
        if not 0 <= t < len(self.alphas_cumprod):
            raise InputError(f"timestep {t} is outside of the training timesteps", expected=f"0 … {len(self.alphas_cumprod) - 1}")
        return t

    def _row_at(self, t: int, table: Callable[..., Tensor], *arguments: Any) -> tuple[Tensor, ...]:
        """The row of training timestep `t` in a table (training timesteps, columns) made from `arguments`.

        Those of the run are cut out together: one by one, with the model at work in between, takes several times longer.
        """
        memory = self.memory
        whole = memory.derive((table.__name__, *arguments), table, *arguments)
        of_run = memory.derive(("run", table.__name__, *arguments), self._rows_of_run, whole)
        return of_run[t] if t in of_run else whole[t].unbind()

    def _rows_of_run(self, table: Tensor) -> dict[int, tuple[Tensor, ...]]:
        chosen = [t for t in map(int, self.timesteps.tolist()) if 0 <= t < len(table)]
        return dict(zip(chosen, rows(table[chosen].unbind(dim=1)), strict=True))

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """`sample` as the model wants to see it, which is as it is."""
        return sample

    def _bounded(self, x0: Tensor) -> Tensor:
        """`x0` thresholded or clipped, as configured."""
        config = self.config
        if config.get("thresholding"):
            return dynamic_threshold(x0, config["dynamic_thresholding_ratio"], config["sample_max_value"])
        if config["clip_sample"]:
            return x0.clamp(-config["clip_sample_range"], config["clip_sample_range"])
        return x0

    def _signal_and_noise(self, like: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        total = len(self.alphas_cumprod)
        if timesteps.device.type == "cpu" and timesteps.numel() and not bool(((timesteps >= 0) & (timesteps < total)).all()):
            raise InputError("timesteps are outside of the training timesteps", found=timesteps, expected=f"0 … {total - 1}")
        alpha_bar = self.alphas_cumprod.to(device=like.device, dtype=like.dtype)[timesteps.to(like.device)]
        return per_sample(alpha_bar**0.5, like), per_sample((1 - alpha_bar) ** 0.5, like)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`x_t` from `x_0` and noise (Ho et al., 2020, equation 4).

        Args:
            original_samples: `x_0`, (batch, …).
            noise: Same shape.
            timesteps: Whole numbers, (batch,) or (1,).
        """
        signal, strength = self._signal_and_noise(original_samples, timesteps)
        return signal * original_samples + strength * noise

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The target of a v-prediction model: `v = alpha epsilon - sigma x_0` (Salimans and Ho, 2022)."""
        signal, strength = self._signal_and_noise(sample, timesteps)
        return signal * noise - strength * sample


def alpha_bars(scheduler: SchedulerMixin, final: Tensor, gap: int) -> tuple[Tensor, Tensor]:
    """(alpha_bar_t, alpha_bar_{t - gap}) for every training timestep, `final` standing in below timestep 0."""
    alpha_bar = scheduler.alphas_cumprod.cpu()
    before = final.cpu().expand(min(max(gap, 0), len(alpha_bar)))
    return alpha_bar, torch.cat([before, alpha_bar])[: len(alpha_bar)]
