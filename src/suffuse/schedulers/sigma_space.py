"""The family that walks down the noise level itself (Karras et al., 2022): `x = x_0 + sigma epsilon`.

The model, trained on samples of unit variance, is shown `x / sqrt(sigma² + 1)`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from suffuse.errors import InputError
from suffuse.schedulers.noise_schedule import (
    SPACINGS,
    Array,
    check_one_ladder,
    checked_count,
    chosen_ladder,
    respaced_sigmas,
    sigmas_at,
    spaced_timesteps,
    timesteps_of,
    to_tensor,
    training_sigmas,
    without_zero,
)
from suffuse.schedulers.prediction import EXPLODED_X0, exploded_scales
from suffuse.schedulers.scheduler import Memory, Remembered, SchedulerMixin, per_sample


@dataclass
class SigmaMemory(Memory):
    """Adds the noise levels of the run, falling, one more than there are steps."""

    sigmas: Tensor = field(default_factory=lambda: torch.zeros(0))
    is_scale_input_called: bool = False


def noise_levels(scheduler: SchedulerMixin, like: Tensor, timesteps: Tensor) -> Tensor:
    """The sigmas to add noise with at `timesteps`, shaped and typed to multiply with `like`.

    In the run of a pipeline (one that has set `begin_index`) that is the sigma the run is at, whatever the timesteps.
    """
    memory = scheduler.memory
    if memory.begin_index is None:
        steps = [scheduler.index_for_timestep(timestep) for timestep in timesteps.tolist()]
    else:
        steps = [memory.begin_index if memory.step_index is None else memory.step_index] * timesteps.shape[0]
    return per_sample(memory.sigmas.to(like.dtype)[steps].to(like.device), like)


class SigmaScheduler(SchedulerMixin):
    """Base of Euler, Heun, LMS and their kin.

    Attributes:
        sigmas: Noise levels of the run, falling, float32 on the CPU, shape (steps + 1,).
        init_noise_sigma: Standard deviation of the noise a run begins with.
    """

    memory_class: ClassVar[type[SigmaMemory]] = SigmaMemory
    ladders: ClassVar[tuple[str, ...]] = ()
    timestep_precision: ClassVar[type[np.floating[Any]]] = np.float32
    sigmas = Remembered()
    is_scale_input_called = Remembered()

    def _prepare(self) -> None:
        """Check what the configuration names, and make the tables."""
        SPACINGS.check(self.config["timestep_spacing"])
        EXPLODED_X0.check(self.config["prediction_type"])
        check_one_ladder(self.config, self.ladders)
        self._make_alphas()
        if self.config.get("rescale_betas_zero_snr"):
            self.alphas_cumprod = without_zero(self.alphas_cumprod)

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose the timesteps of a run."""
        count = checked_count(num_inference_steps, len(self))
        self.memory = self._memory(count, *self._levels(self._spaced(count), count), device)

    @property
    def init_noise_sigma(self) -> Tensor:
        """Standard deviation of the noise a run begins with, float32, zero-dimensional."""
        largest = self.sigmas.max()
        return largest if self.config["timestep_spacing"] in ("linspace", "trailing") else (largest**2 + 1) ** 0.5

    def _spaced(self, count: int, train: int | None = None) -> Array:
        config = self.config
        return spaced_timesteps(config["timestep_spacing"], count, train or len(self), config["steps_offset"]).astype(
            self.timestep_precision
        )

    def _levels(self, timesteps: Array, count: int, between: Callable[[Array, Array], Array] = sigmas_at) -> tuple[Array, Array]:
        """(sigmas, timesteps) of a run, the final sigma not yet among them.

        Args:
            timesteps: Spaced, falling.
            count: How many sigmas, where they are not those of the timesteps.
            between: Sigmas at the timesteps from those of training.
        """
        training = training_sigmas(self.alphas_cumprod)
        sigmas = between(timesteps, training)
        if ladder := chosen_ladder(self.config, self.ladders):
            sigmas = respaced_sigmas(self.config, ladder, sigmas, count)
            timesteps = timesteps_of(sigmas, training)
        return sigmas, timesteps

    def _memory(
        self, count: int | None, sigmas: Array, timesteps: Array, device: str | torch.device | None = None, final: float = 0.0
    ) -> Any:
        """A memory for these sigmas, with the final one behind them."""
        return self.memory_class(
            torch.from_numpy(timesteps.astype(np.float32)).to(device), count, sigmas=to_tensor([*sigmas, final])
        )

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """`sample / sqrt(sigma² + 1)`: unit variance, as the model was trained.

        Args:
            sample: (batch, channels, …).
            timestep: The entry of `timesteps` whose turn it is.
        """
        self.memory.is_scale_input_called = True
        return sample / self._row(timestep, _input_scale)[0]

    def _check_scaled(self) -> None:
        if not self.memory.is_scale_input_called:
            warnings.warn("call scale_model_input before the model, or it sees more noise than it was trained on", stacklevel=3)

    def _check_no_index(self, timestep: float | Tensor) -> None:
        if isinstance(timestep, int) or (isinstance(timestep, Tensor) and not timestep.is_floating_point()):
            raise InputError(f"{type(self).__name__}.step needs an entry of scheduler.timesteps, not its index", found=timestep)

    def _x0(self, sample: Tensor, model_output: Tensor, sigma: Tensor, *scales: Tensor) -> Tensor:
        return EXPLODED_X0[self.config["prediction_type"]](sample, model_output, sigma, *scales)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`x_0 + sigma epsilon` at each timestep.

        Args:
            original_samples: `x_0`, (batch, …).
            noise: Same shape.
            timesteps: Entries of `timesteps`, (batch,) or (1,).

        Raises:
            InputError: One of them is not in the schedule.
        """
        return original_samples + noise * noise_levels(self, original_samples, timesteps)


def _input_scale(memory: SigmaMemory) -> tuple[Tensor]:
    return ((memory.sigmas[:-1] ** 2 + 1) ** 0.5,)


def levels(memory: SigmaMemory) -> tuple[Tensor, ...]:
    """sigma, the scales of a v-prediction, and the way to the next sigma, of every step."""
    sigma = memory.sigmas[:-1]
    return sigma, *exploded_scales(sigma), memory.sigmas[1:] - sigma


def ancestral(sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor, Tensor]:
    """(sigma_up, sigma_down): the noise to add after a step, and where the step must go for the sum to be `sigma_next`."""
    up = (sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2) ** 0.5
    down = (sigma_next**2 - up**2) ** 0.5
    return up, torch.where(down.isnan(), sigma_next**2 / sigma, down)  # the same number, where rounding went below 0
