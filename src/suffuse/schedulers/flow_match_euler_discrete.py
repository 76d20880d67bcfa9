"""Euler on the straight paths of flow matching (Lipman et al., 2023, https://arxiv.org/abs/2210.02747; Esser et al., 2024).

x = (1 - sigma) x_0 + sigma epsilon,   u = epsilon - x_0,   x' = x + (sigma' - sigma) u
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from suffuse.configuration import register_to_config
from suffuse.errors import ConfigError, InputError
from suffuse.noise import Generators, randn_tensor
from suffuse.outputs import BaseOutput
from suffuse.schedulers.choices import Choices
from suffuse.schedulers.noise_schedule import Array, check_one_ladder, checked_count, chosen_ladder, respaced_sigmas, shifted
from suffuse.schedulers.scheduler import Memory, Remembered, SchedulerMixin
from suffuse.schedulers.sigma_space import noise_levels


def _exponential(mu: float, sigma: float, t: Any) -> Any:
    return math.exp(mu) / (math.exp(mu) + (1 / t - 1) ** sigma)


def _linear(mu: float, sigma: float, t: Any) -> Any:
    return mu / (mu + (1 / t - 1) ** sigma)


TIME_SHIFTS = Choices("time_shift_type", {"exponential": _exponential, "linear": _linear})
"""time_shift_type → shifted noise shares from (mu, sigma, shares)."""


@dataclass
class FlowMemory(Memory):
    """Adds the noise shares of the run, one more than there are steps."""

    sigmas: Tensor = field(default_factory=lambda: torch.zeros(0))


@dataclass
class FlowMatchEulerDiscreteSchedulerOutput(BaseOutput):
    """What a step returns.

    Attributes:
        prev_sample: The sample one step less noisy, (batch, channels, height, width).
    """

    prev_sample: Tensor


class FlowMatchScheduler(SchedulerMixin):
    """Base of the schedulers for flow matching models.

    Attributes:
        sigmas: Noise shares of the run, float32 on the CPU, shape (steps + 1,).
        sigma_min, sigma_max: The ends of the schedule of training.
        init_noise_sigma: Standard deviation of the noise a run begins with.
    """

    memory_class: ClassVar[type[FlowMemory]] = FlowMemory
    _compatibles = []
    sigmas = Remembered()
    init_noise_sigma: float = 1.0
    sigma_min: float
    sigma_max: float

    def _begin(self, shift: float | None) -> None:
        """Make the schedule of training, shifted by `shift`, the first memory."""
        if len(self) < 1 or (shift is not None and not shift > 0):
            raise ConfigError(
                f"{type(self).__name__} has no noise levels",
                found=f"num_train_timesteps={len(self)}, shift={shift}",
                expected="one timestep or more, a shift above 0",
            )
        shares = torch.arange(len(self), 0, -1, dtype=torch.float32) / len(self)
        sigmas = shares if shift is None else shifted(shares, shift)
        self.sigma_min, self.sigma_max = sigmas[-1].item(), sigmas[0].item()
        self._start(self.memory_class(sigmas * len(self), sigmas=sigmas))

    def _spaced(self, count: int) -> Array:
        """`count` falling noise shares with both ends of training."""
        return np.linspace(self.sigma_max * len(self), self.sigma_min * len(self), count) / len(self)

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """`sample` as the model wants to see it, which is as it is."""
        return sample

    def _check_no_index(self, timestep: float | Tensor) -> None:
        if isinstance(timestep, int) or (isinstance(timestep, Tensor) and not timestep.is_floating_point()):
            raise InputError(f"{type(self).__name__}.step needs an entry of scheduler.timesteps, not its index", found=timestep)


class FlowMatchEulerDiscreteScheduler(FlowMatchScheduler):
    """First order, deterministic unless `stochastic_sampling` draws new noise at every step."""

    ladders: ClassVar[tuple[str, ...]] = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        invert_sigmas: bool = False,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool | None = False,
        use_exponential_sigmas: bool | None = False,
        use_beta_sigmas: bool | None = False,
        time_shift_type: Literal["exponential", "linear"] = "exponential",
        stochastic_sampling: bool = False,
    ) -> None:
        check_one_ladder(self.config, self.ladders)
        TIME_SHIFTS.check(time_shift_type)
        self._begin(None if use_dynamic_shifting else shift)
        self._shift = shift

    @property
    def shift(self) -> float:
        """How far noise shares are shifted towards noise."""
        return self._shift

    def set_shift(self, shift: float) -> None:
        """Shift noise shares by this from the next `set_timesteps` on."""
        self._shift = shift

    def time_shift(self, mu: float, sigma: float, t: Any) -> Any:
        """Noise shares `t`, an array or a tensor, shifted by `mu` as configured."""
        return TIME_SHIFTS[self.config["time_shift_type"]](mu, sigma, t)

    def stretch_shift_to_terminal(self, t: Any) -> Any:
        """Falling noise shares, stretched so that they end at `shift_terminal`; a single step from pure noise stays that."""
        rest = 1 - t
        return t if rest[-1] == 0 else 1 - rest / (rest[-1] / (1 - self.config["shift_terminal"]))

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """Choose the schedule of a run: how many steps, or which noise shares, or which timesteps, or both of them.

        Keywords of its own:
            sigmas: Falling noise shares, which are still shifted.
            mu: The shift by resolution, with `use_dynamic_shifting`.
            timesteps: What to show the model instead of `num_train_timesteps` times the shifted shares.
        """
        config = self.config
        if config["use_dynamic_shifting"] and mu is None:
            raise InputError("use_dynamic_shifting=True needs mu", remedy="pass mu=, which a pipeline takes from the resolution")
        lengths = {len(given) for given in (sigmas, timesteps) if given is not None}
        if num_inference_steps is not None:
            lengths.add(checked_count(num_inference_steps, len(self)))
        if len(lengths) != 1 or lengths == {0}:
            raise InputError(
                "set_timesteps needs num_inference_steps, sigmas or timesteps, and as many of one as of the other",
                found=f"num_inference_steps={num_inference_steps}, sigmas={sigmas}, timesteps={timesteps}",
            )
        count = lengths.pop()
        shown = None if timesteps is None else np.array(timesteps).astype(np.float32)
        if sigmas is not None:
            shares = np.array(sigmas).astype(np.float32)
        else:
            shares = self._spaced(count) if shown is None else shown / len(self)
        shares = (
            self.time_shift(mu, 1.0, shares) if config["use_dynamic_shifting"] and mu is not None else shifted(shares, self.shift)
        )
        if config["shift_terminal"]:
            shares = self.stretch_shift_to_terminal(shares)
        if ladder := chosen_ladder(config, self.ladders):
            shares = respaced_sigmas({}, ladder, shares, count)
        levels = torch.from_numpy(shares).to(torch.float32)
        seen = levels * len(self) if shown is None else torch.from_numpy(shown)
        if config["invert_sigmas"]:
            levels = 1.0 - levels
            seen = levels * len(self)
        final = torch.full((1,), float(config["invert_sigmas"]))
        self.memory = self.memory_class(seen.to(device), count, sigmas=torch.cat([levels, final]))

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`(1 - sigma) x_0 + sigma epsilon` at each timestep.

        Args:
            sample: `x_0`, (batch, …).
            timestep: Entries of `timesteps`, (batch,) or (1,).
            noise: Same shape as `sample`.
        """
        sigma = noise_levels(self, sample, timestep)
        return sigma * noise + (1.0 - sigma) * sample

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: Generators = None,
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Step to the next sigma. Returns a `FlowMatchEulerDiscreteSchedulerOutput`.

        Keywords of its own:
            s_churn, s_tmin, s_tmax, s_noise: Have no effect, here as in diffusers.
            per_token_timesteps: Timesteps of every token, (batch, tokens), each of which goes to the next lower sigma.
        """
        self._check_no_index(timestep)
        sigma, sigma_next, dt = self._row(timestep, flow_steps)
        memory, sample = self.memory, sample.to(torch.float32)
        if per_token_timesteps is not None:
            sigma = (per_token_timesteps / len(self))[..., None]
            levels = memory.sigmas.to(sigma.device)
            sigma_next = ((levels < sigma - 1e-6) * levels).amax(dim=-1, keepdim=True)
            dt = sigma - sigma_next
        if self.config["stochastic_sampling"]:
            x0 = sample - sigma * model_output
            noise = randn_tensor(sample.shape, generator, sample.device, sample.dtype)
            previous = (1.0 - sigma_next) * x0 + sigma_next * noise
        else:
            previous = sample + dt * model_output
        memory.step_index += 1
        if per_token_timesteps is None:
            previous = previous.to(model_output.dtype)
        return FlowMatchEulerDiscreteSchedulerOutput(previous) if return_dict else (previous,)


def flow_steps(memory: FlowMemory) -> tuple[Tensor, ...]:
    """sigma, the next sigma, and the way there, of every step."""
    sigma, after = memory.sigmas[:-1], memory.sigmas[1:]
    return sigma, after, after - sigma
