"""The family that integrates in the log signal-to-noise ratio, `lambda = log(alpha / sigma)` (Lu et al., 2022).

`x = alpha x_0 + sigma epsilon`; sigmas of the schedule are noise-to-signal ratios, as in `sigma_space`, and alpha follows from
them. With `use_flow_sigmas` they are noise shares, and alpha = 1 - sigma.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from suffuse.errors import ConfigError, InputError
from suffuse.schedulers.noise_schedule import (
    SPACINGS,
    Array,
    check_one_given,
    check_one_ladder,
    checked_count,
    checked_timesteps,
    chosen_ladder,
    flow_sigmas,
    refuse_timesteps,
    respaced_sigmas,
    sigmas_at,
    signal_and_noise,
    spaced_timesteps,
    timesteps_of,
    to_tensor,
    training_sigmas,
    without_zero,
)
from suffuse.schedulers.prediction import EPSILON, X0, dynamic_threshold, epsilon_of_x0
from suffuse.schedulers.scheduler import Remembered, SchedulerMixin, on_device
from suffuse.schedulers.sigma_space import SigmaMemory, noise_levels


@dataclass
class MultistepMemory(SigmaMemory):
    """Adds the converted model outputs of the last steps, oldest first, and how many steps there were, up to the order."""

    model_outputs: list[Tensor | None] = field(default_factory=list[Tensor | None])
    lower_order_nums: int = 0


def needed(sample: Tensor | None) -> Tensor:
    """`sample`, which must be given though it is a keyword with a default."""
    if sample is None:
        raise InputError("sample is missing", remedy="pass sample=")
    return sample


class LogSnrScheduler(SchedulerMixin):
    """Base of DPM-Solver, UniPC and their kin.

    Class attributes:
        ladders: The `use_*` entries of the configuration that choose the sigmas, the strongest first.

    Attributes:
        alpha_t: Signal at every training timestep, shape (num_train_timesteps,).
        sigma_t: Noise at every training timestep.
        lambda_t: log(alpha_t / sigma_t).
        sigmas: Noise levels of the run, falling, float32 on the CPU, shape (steps + 1,).
        init_noise_sigma: Standard deviation of the noise a run begins with.
    """

    memory_class: ClassVar[type[MultistepMemory]] = MultistepMemory
    ladders: ClassVar[tuple[str, ...]] = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_flow_sigmas")
    init_noise_sigma: float = 1.0
    alpha_t: Tensor
    sigma_t: Tensor
    lambda_t: Tensor
    sigmas = Remembered()
    model_outputs = Remembered()
    lower_order_nums = Remembered()

    def _prepare(self, **translations: dict[str, str]) -> None:
        """Check what the configuration names, and make the tables and the first memory.

        Args:
            **translations: Entry → {a value that another scheduler has there: what it means here}.
        """
        for entry, values in translations.items():
            if self.config[entry] in values:
                self.register_to_config(**{entry: values[self.config[entry]]})
        X0.check(self.config["prediction_type"])
        if self.config["prediction_type"] == "flow_prediction" and not self.config["use_flow_sigmas"]:
            raise ConfigError("prediction_type='flow_prediction' needs flow sigmas", remedy="set use_flow_sigmas=True")
        check_one_ladder(self.config, self.ladders)
        if "timestep_spacing" in self.config:
            SPACINGS.check(self.config["timestep_spacing"])
        self._make_alphas()
        if self.config.get("rescale_betas_zero_snr"):
            self.alphas_cumprod = without_zero(self.alphas_cumprod)
        self.alpha_t, self.sigma_t = torch.sqrt(self.alphas_cumprod), torch.sqrt(1 - self.alphas_cumprod)
        self.lambda_t = torch.log(self.alpha_t) - torch.log(self.sigma_t)
        timesteps = torch.arange(len(self), dtype=torch.float32).flip(0)
        self._start(self._memory(timesteps, None, training_sigmas(self.alphas_cumprod)))

    # ------------------------------------------------------------ the schedule of a run

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        mu: float | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """Choose the schedule of a run: how many steps, or (falling) which timesteps.

        Keywords of its own:
            mu: Logarithm of the time shift, with `use_dynamic_shifting`.
        """
        check_one_given(num_inference_steps=num_inference_steps, timesteps=timesteps)
        if timesteps is None:
            count = checked_count(num_inference_steps, len(self))
            spaced = self._spaced(count)
        else:
            refuse_timesteps(self.config, self.ladders)
            spaced = checked_timesteps(timesteps, len(self))
            count = len(spaced)
        self._set(*self._levels(spaced, count, self._shift(mu)), self._final_sigma(), device)

    def _spaced(self, count: int) -> Array:
        """`count` whole timesteps, falling, that leave out the lowest: it is where the last step leads."""
        spacing, offset = self.config["timestep_spacing"], self.config["steps_offset"]
        return spaced_timesteps(spacing, count, len(self), offset, spare=1, last=self._usable()).round()

    def _memory(self, timesteps: Tensor, count: int | None, sigmas: Array) -> Any:
        return self.memory_class(timesteps, count, sigmas=to_tensor(sigmas), model_outputs=[None] * self.config["solver_order"])

    def _set(self, sigmas: Array, timesteps: Array, final: float, device: str | torch.device | None) -> None:
        """Begin a run: sigmas, whole timesteps they stand for, and the sigma to end at."""
        whole = on_device(torch.from_numpy(timesteps), device, torch.int64)
        self.memory = self._memory(whole, len(timesteps), to_tensor([*sigmas, final]).numpy())

    def _levels(self, timesteps: Array, count: int, shift: float) -> tuple[Array, Array]:
        """(sigmas, timesteps) of a run, from spaced timesteps or for `count` steps; the final sigma not yet among them."""
        training, ladder = training_sigmas(self.alphas_cumprod), chosen_ladder(self.config, self.ladders)
        if not ladder:
            return sigmas_at(timesteps, training), timesteps
        if ladder == "use_flow_sigmas":
            sigmas = flow_sigmas(count, len(self), shift)
            return sigmas, sigmas * len(self)
        sigmas = respaced_sigmas(self.config, ladder, self._ends(training), count)
        fractional = timesteps_of(sigmas, training)
        return sigmas, fractional.round() if self._rounds(ladder) else fractional

    def _ends(self, training: Array) -> Array:
        """The sigmas of training in the order of the run, which goes from the first to the last."""
        return training[::-1]

    def _rounds(self, ladder: str) -> bool:
        """Whether the timesteps of this kind of sigmas are rounded, not cut off."""
        return ladder == "use_karras_sigmas"

    def _usable(self) -> int:
        """How many timesteps, from 0, have a `lambda` of `lambda_min_clipped` or more."""
        return len(self) - int(torch.searchsorted(self.lambda_t.flip(0), self.config["lambda_min_clipped"]))

    def _final_sigma(self) -> float:
        smallest = training_sigmas(self.alphas_cumprod)[0]
        return float(smallest) if self.config["final_sigmas_type"] == "sigma_min" else 0.0

    def _shift(self, mu: float | None) -> float:
        """The time shift of flow matching, `exp(mu)` where a pipeline gives it by resolution."""
        if mu is None:
            return self.config["flow_shift"]
        if not self.config["use_dynamic_shifting"]:
            raise InputError("mu is for use_dynamic_shifting=True", found=mu, remedy="leave mu out, or configure flow_shift")
        return math.exp(mu)

    def _missing(self, timestep: float) -> int:
        # Timesteps of a run are whole numbers near what its sigmas mean: one that is not among them is from another schedule.
        return len(self.memory.timesteps) - 1

    # ------------------------------------------------------------ samples

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """`sample` as the model wants to see it, which is as it is."""
        return sample

    def _signal_and_noise(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return signal_and_noise(sigma, self.config["use_flow_sigmas"])

    def _now(self, memory: SigmaMemory) -> tuple[Tensor, ...]:
        return self._signal_and_noise(memory.sigmas[:-1])

    def _path(self, memory: SigmaMemory) -> tuple[Tensor, Tensor, Tensor]:
        """(alpha, sigma, lambda) at every sigma of the run."""
        alpha, sigma = self._signal_and_noise(memory.sigmas)
        return alpha, sigma, torch.log(alpha) - torch.log(sigma)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`alpha x_0 + sigma epsilon` at each timestep.

        Args:
            original_samples: `x_0`, (batch, …).
            noise: Same shape.
            timesteps: Entries of `timesteps`, (batch,) or (1,).
        """
        alpha, sigma = self._signal_and_noise(noise_levels(self, original_samples, timesteps))
        return alpha * original_samples + sigma * noise

    def convert_model_output(self, model_output: Tensor, *, sample: Tensor | None = None) -> Tensor:
        """What the algorithm integrates (x_0 or epsilon), from the model's prediction at the current step."""
        to = self._x0 if self.config["algorithm_type"].endswith("++") else self._thresholded_epsilon
        return to(model_output, needed(sample))

    def _x0(self, model_output: Tensor, sample: Tensor) -> Tensor:
        """What the model believes `x_0` to be at this step, thresholded as configured."""
        alpha, sigma = self._row(None, self._now)
        return self._thresholded(X0[self.config["prediction_type"]](sample, self._mean(model_output, sample), alpha, sigma))

    def _epsilon(self, model_output: Tensor, sample: Tensor) -> Tensor:
        """What the model believes epsilon to be at this step."""
        alpha, sigma = self._row(None, self._now)
        return EPSILON[self.config["prediction_type"]](sample, self._mean(model_output, sample), alpha, sigma)

    def _thresholded_epsilon(self, model_output: Tensor, sample: Tensor) -> Tensor:
        """The same, thresholded as configured."""
        epsilon = self._epsilon(model_output, sample)
        if not self.config["thresholding"]:
            return epsilon
        alpha, sigma = self._row(None, self._now)
        return epsilon_of_x0(sample, self._thresholded(X0["epsilon"](sample, epsilon, alpha, sigma)), alpha, sigma)

    def _thresholded(self, x0: Tensor) -> Tensor:
        config = self.config
        if not config.get("thresholding"):
            return x0
        return dynamic_threshold(x0, config["dynamic_thresholding_ratio"], config["sample_max_value"])

    def _mean(self, model_output: Tensor, sample: Tensor) -> Tensor:
        """The prediction without the variance that some epsilon models append to it."""
        learned = self.config.get("variance_type") in ("learned", "learned_range")
        return model_output[:, : sample.shape[1]] if learned and self.config["prediction_type"] == "epsilon" else model_output
