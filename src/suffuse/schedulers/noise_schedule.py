"""The noise schedule: how much noise there is at each timestep, and at which timesteps a sampler looks.

A model is trained on `x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) epsilon` with `alpha_bar_t = prod (1 - beta_s)`
(Ho et al., 2020, equation 4), t = 0 … T-1. Solvers that think in sigmas use `sigma_t = sqrt((1 - alpha_bar_t) / alpha_bar_t)`
(Karras et al., 2022), solvers that think in signal-to-noise use `lambda_t = log(alpha_t / sigma_t)` (Lu et al., 2022).

Tables made from a configuration are float32 tensors; schedules of a run are computed in NumPy, mostly in float64, and rounded
to float32 once, at the end: results then equal those of other implementations to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from suffuse.errors import ConfigError, InputError, MissingPackageError
from suffuse.schedulers.choices import Choices

Array = NDArray[Any]
BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace", "exp"]
TimestepSpacing = Literal["linspace", "leading", "trailing"]
FinalSigma = Literal["zero", "sigma_min"]

SMALLEST_ALPHA_BAR = 2.0**-24
"""Stands for zero at the noisiest timestep of a zero-terminal-SNR schedule, where sigma would be infinite."""

MOST_TIMESTEPS = 10**6

# ---------------------------------------------------------------- training: beta_t, t = 0 … T-1


def _squared_cosine(t: float) -> float:
    return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2


def _laplace(t: float) -> float:
    snr = math.exp(-0.5 * math.copysign(1, 0.5 - t) * math.log(1 - 2 * math.fabs(0.5 - t) + 1e-6))
    return math.sqrt(snr / (1 + snr))


def _exponential(t: float) -> float:
    return math.exp(t * -12.0)


def _from_alpha_bar(alpha_bar: Callable[[float], float]) -> Callable[[float, float, int], Tensor]:
    """Betas that give the cumulative product `alpha_bar(t)`, t in [0, 1] (Nichol and Dhariwal, 2021, section 3.2)."""

    def betas(start: float, end: float, steps: int) -> Tensor:
        bars = [(alpha_bar(i / steps), alpha_bar((i + 1) / steps)) for i in range(steps)]
        return torch.tensor([min(1 - after / before, 0.999) for before, after in bars], dtype=torch.float32)

    return betas


def _linear(start: float, end: float, steps: int) -> Tensor:
    return torch.linspace(start, end, steps, dtype=torch.float32)


def _scaled_linear(start: float, end: float, steps: int) -> Tensor:
    return _linear(start**0.5, end**0.5, steps) ** 2


def _sigmoid(start: float, end: float, steps: int) -> Tensor:
    return torch.sigmoid(torch.linspace(-6, 6, steps)) * (end - start) + start


BETAS = Choices(
    "beta_schedule",
    {
        "linear": _linear,
        "scaled_linear": _scaled_linear,
        "squaredcos_cap_v2": _from_alpha_bar(_squared_cosine),
        "sigmoid": _sigmoid,
        "laplace": _from_alpha_bar(_laplace),
        "exp": _from_alpha_bar(_exponential),
    },
)


def training_betas(config: Mapping[str, Any]) -> Tensor:
    """The `beta_t` that a scheduler's configuration describes, shape (T,).

    Raises:
        ConfigError: They are not all in [0, 1], or there are none, or too many.
    """
    first, last, steps = config["beta_start"], config["beta_end"], config["num_train_timesteps"]
    if not (0 <= first <= 1 and 0 <= last <= 1 and 1 <= steps <= MOST_TIMESTEPS):
        raise ConfigError(
            "no noise schedule has these numbers",
            found=f"beta_start={first}, beta_end={last}, num_train_timesteps={steps}",
            expected=f"betas in [0, 1]; 1 to {MOST_TIMESTEPS} timesteps",
        )
    if config["trained_betas"] is not None:
        betas = torch.tensor(config["trained_betas"], dtype=torch.float32)
    else:
        betas = BETAS[config["beta_schedule"]](first, last, steps)
    if not len(betas) or not bool(((betas >= 0) & (betas <= 1)).all()):  # false for NaN too
        raise ConfigError("trained_betas are no noise schedule", found=config["trained_betas"], expected="numbers in [0, 1]")
    return zero_terminal_snr(betas) if config.get("rescale_betas_zero_snr") else betas


def zero_terminal_snr(betas: Tensor) -> Tensor:
    """Betas shifted and scaled so that the last timestep is pure noise (Lin et al., 2023, algorithm 1)."""
    root = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    bars = ((root - last) * (first / (first - last))) ** 2
    return 1 - torch.cat([bars[:1], bars[1:] / bars[:-1]])


def training_sigmas(alphas_cumprod: Tensor) -> Array:
    """`sigma_t` for every training timestep, float32, rising."""
    return (((1 - alphas_cumprod) / alphas_cumprod) ** 0.5).cpu().numpy()


def signal_and_noise(sigma: Tensor, flow: bool = False) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) with `x = alpha x_0 + sigma epsilon`: variance preserving, or the straight path of flow matching."""
    if flow:
        return 1 - sigma, sigma
    alpha = 1 / ((sigma**2 + 1) ** 0.5)
    return alpha, sigma * alpha


# ---------------------------------------------------------------- sampling: which timesteps (Lin et al., 2023, table 2)


def _linspace(count: int, spare: int, last: int, train: int, offset: int) -> Array:
    return np.linspace(0, last - 1, count + spare)[::-1][:count]


def _leading(count: int, spare: int, last: int, train: int, offset: int) -> Array:
    return (np.arange(0, count + spare) * (last // (count + spare)))[::-1][:count].astype(np.float64) + offset


def _trailing(count: int, spare: int, last: int, train: int, offset: int) -> Array:
    return np.arange(last, 0, -train / count).round() - 1


SPACINGS = Choices("timestep_spacing", {"linspace": _linspace, "leading": _leading, "trailing": _trailing})


def spaced_timesteps(spacing: str, count: int, train: int, offset: int = 0, spare: int = 0, last: int | None = None) -> Array:
    """`count` falling timesteps out of `train`, float64, not yet rounded.

    Args:
        spacing: "linspace" has both ends, "leading" starts at 0, "trailing" ends at the last.
        count: How many.
        train: How many timesteps the model was trained on.
        offset: Added by "leading" (`steps_offset`).
        spare: Space for so many more and leave out the lowest (solvers that end at the lowest sigma of training).
        last: Use only the timesteps below this one.
    """
    return SPACINGS[spacing](count, spare, train if last is None else last, train, offset)


def checked_count(count: Any, train: int) -> int:
    """`num_inference_steps` as an int.

    Raises:
        InputError: It is no whole number from 1 to `train`.
    """
    if not isinstance(count, (int, np.integer)) or isinstance(count, bool) or not 1 <= count <= train:
        raise InputError(
            "num_inference_steps is not possible", found=count, expected=f"a whole number from 1 to {train} (num_train_timesteps)"
        )
    return int(count)


def checked_timesteps(timesteps: Any, train: int) -> Array:
    """Timesteps that a caller chose, float64.

    Raises:
        InputError: They are empty, do not fall, or lie outside of 0 … `train` - 1.
    """
    try:
        values = np.array(timesteps.cpu().numpy() if isinstance(timesteps, Tensor) else timesteps, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError("timesteps must be numbers", found=timesteps, expected=f"falling numbers in 0 … {train - 1}") from None
    fine = values.ndim == 1 and values.size and bool((np.diff(values) < 0).all()) and values[-1] >= 0 and values[0] < train
    if not fine:
        raise InputError("timesteps must be in descending order", found=timesteps, expected=f"falling numbers in 0 … {train - 1}")
    return values


def check_one_given(**given: Any) -> None:
    """Raise `InputError` unless exactly one of the arguments is not None."""
    names = [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        raise InputError(f"set_timesteps needs exactly one of {', '.join(given)}", found=" and ".join(names) or "none of them")


# ---------------------------------------------------------------- sampling: which sigmas


def karras_sigmas(high: float, low: float, count: int, rho: float = 7.0) -> Array:
    """Dense at low noise (Karras et al., 2022, equation 5)."""
    return karras_sigmas_at(np.linspace(0, 1, count), high, low, rho)


def karras_sigmas_at(ramp: Any, high: float, low: float, rho: float = 7.0) -> Any:
    """The same at the places `ramp` between `high` (0) and `low` (1), an array or a tensor."""
    top, bottom = float(high) ** (1 / rho), float(low) ** (1 / rho)
    return (top + ramp * (bottom - top)) ** rho


def exponential_sigmas(high: float, low: float, count: int) -> Array:
    """Evenly spaced in log sigma."""
    return np.exp(np.linspace(math.log(high), math.log(low), count))


def beta_sigmas(high: float, low: float, count: int, alpha: float = 0.6, beta: float = 0.6) -> Array:
    """Dense at both ends, by the quantiles of a beta distribution (Lee et al., 2024).

    Raises:
        MissingPackageError: scipy is not installed.
    """
    try:
        from scipy import stats
    except ImportError as error:
        raise MissingPackageError("use_beta_sigmas needs the package scipy", remedy='pip install "suffuse[lms]"') from error
    return float(low) + stats.beta.ppf(1 - np.linspace(0, 1, count), alpha, beta) * (float(high) - float(low))


def log_snr_sigmas(high: float, low: float, count: int) -> Array:
    """Evenly spaced in the logarithm of the training sigmas, taken in their own precision (Lu et al., 2022)."""
    top, bottom = float(np.log(high)), float(np.log(low))
    return np.exp(top + np.linspace(0, 1, count) * (bottom - top))


LADDERS: dict[str, Callable[[float, float, int], Array]] = {
    "use_karras_sigmas": karras_sigmas,
    "use_lu_lambdas": log_snr_sigmas,
    "use_exponential_sigmas": exponential_sigmas,
    "use_beta_sigmas": beta_sigmas,
}
"""Configuration entry → sigmas from `high` to `low` (Python floats, or float32 entries of the training table)."""


def chosen_ladder(config: Mapping[str, Any], ladders: Sequence[str]) -> str:
    """The entry among `ladders` (those a class knows, the strongest first) that is switched on, "" if none is."""
    return next((name for name in ladders if config[name]), "")


def check_one_ladder(config: Mapping[str, Any], ladders: Sequence[str]) -> None:
    """Raise `ConfigError` where sigmas are to be of two kinds at once."""
    on = [name for name in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas") if name in ladders and config[name]]
    if len(on) > 1:
        raise ConfigError("only one kind of sigmas can be used", found=" and ".join(on), remedy="set the others to False")


def refuse_timesteps(config: Mapping[str, Any], ladders: Sequence[str]) -> None:
    """Raise `InputError` where timesteps of the caller's choice would contradict the configured sigmas."""
    if ladder := chosen_ladder(config, ladders):
        raise InputError(f"timesteps cannot be given with {ladder}=True", remedy="give num_inference_steps")


def respaced_sigmas(config: Mapping[str, Any], ladder: str, sigmas: Array, count: int) -> Array:
    """`count` sigmas of a kind of `LADDERS`, from the first of falling `sigmas` to the last, or as configured."""
    high, low = config.get("sigma_max"), config.get("sigma_min")
    return LADDERS[ladder](sigmas[0] if high is None else high, sigmas[-1] if low is None else low, count)


def without_zero(alphas_cumprod: Tensor) -> Tensor:
    """`alphas_cumprod` with a last entry above 0, so that the first sigma stays finite where training ended in pure noise."""
    return torch.cat([alphas_cumprod[:-1], torch.tensor([SMALLEST_ALPHA_BAR])])


def flow_sigmas(count: int, train: int, shift: float) -> Array:
    """Evenly spaced noise shares of flow matching, shifted towards noise (Esser et al., 2024, equation 23)."""
    shares = 1.0 - np.linspace(1, 1 / train, count + 1)
    return np.flip(shifted(shares, shift))[:-1].copy()


def shifted(shares: Any, shift: float) -> Any:
    """Noise shares in [0, 1] after the change of resolution `shift`; an array or a tensor."""
    return shift * shares / (1 + (shift - 1) * shares)


def timesteps_of(sigmas: Array, training: Array, precision: Any = np.float64) -> Array:
    """The fractional training timesteps at which the noise is `sigmas`, by interpolation in log sigma.

    Args:
        sigmas: Any order.
        training: Those of training, rising.
        precision: Type to weigh timesteps in.
    """
    log_training, log_sigmas = np.log(training), np.log(np.maximum(sigmas, 1e-10))
    # The last at or below, and not a binary search: a zero-terminal-SNR table may fall at its very end.
    below = np.cumsum(log_sigmas >= log_training[:, np.newaxis], axis=0).argmax(axis=0).clip(max=len(log_training) - 2)
    low, high = log_training[below], log_training[below + 1]
    share = np.clip((low - log_sigmas) / (low - high), 0, 1)
    return (1 - share) * below.astype(precision) + share * (below + 1).astype(precision)


def sigmas_at(timesteps: Array, training: Array) -> Array:
    """The noise at (fractional) timesteps, by linear interpolation."""
    return np.interp(timesteps, np.arange(0, len(training)), training)


def to_tensor(values: Array | Sequence[float]) -> Tensor:
    """A float32 tensor of an array."""
    return torch.from_numpy(np.array(values).astype(np.float32))
