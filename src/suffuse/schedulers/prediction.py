"""What a model predicts, in terms of the clean sample `x_0` and the noise `epsilon`.

Variance preserving, `x_t = alpha x_0 + sigma epsilon`:

    epsilon         x_0 = (x_t - sigma epsilon) / alpha
    sample          epsilon = (x_t - alpha x_0) / sigma
    v_prediction    v = alpha epsilon - sigma x_0        (Salimans and Ho, 2022, appendix D)
    flow_prediction x_0 = x_t - sigma u                  (Lipman et al., 2023; alpha = 1 - sigma)

Variance exploding, `x = x_0 + sigma epsilon`, where a v-model saw `x / sqrt(sigma² + 1)` (Karras et al., 2022).

The functions take tensors of any one shape, and alpha and sigma as zero-dimensional tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from suffuse.schedulers.choices import Choices

PredictionType = Literal["epsilon", "sample", "v_prediction"]
FlowPredictionType = Literal["epsilon", "sample", "v_prediction", "flow_prediction"]
Conversion = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _itself(sample: Tensor, output: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return output


def _x0_of_epsilon(sample: Tensor, output: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return (sample - sigma * output) / alpha


def _x0_of_v(sample: Tensor, output: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return alpha * sample - sigma * output


def _x0_of_flow(sample: Tensor, output: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return sample - sigma * output


def epsilon_of_x0(sample: Tensor, x0: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The noise that turns `x0` into `sample`."""
    return (sample - alpha * x0) / sigma


def _epsilon_of_v(sample: Tensor, output: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return alpha * output + sigma * sample


def _epsilon_of_flow(sample: Tensor, output: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return sample + alpha * output


X0: Choices[Conversion] = Choices(
    "prediction_type", {"epsilon": _x0_of_epsilon, "sample": _itself, "v_prediction": _x0_of_v, "flow_prediction": _x0_of_flow}
)
"""prediction_type → `x_0` from (sample, model output, alpha, sigma), variance preserving."""

EPSILON: Choices[Conversion] = Choices(
    "prediction_type",
    {"epsilon": _itself, "sample": epsilon_of_x0, "v_prediction": _epsilon_of_v, "flow_prediction": _epsilon_of_flow},
)
"""prediction_type → `epsilon` from (sample, model output, alpha, sigma), variance preserving."""


def _exploded_x0_of_epsilon(sample: Tensor, output: Tensor, sigma: Tensor, c_out: Tensor, variance: Tensor) -> Tensor:
    return sample - sigma * output


def _exploded_x0_of_v(sample: Tensor, output: Tensor, sigma: Tensor, c_out: Tensor, variance: Tensor) -> Tensor:
    return output * c_out + sample / variance


def _exploded_itself(sample: Tensor, output: Tensor, sigma: Tensor, c_out: Tensor, variance: Tensor) -> Tensor:
    return output


EXPLODED_X0: Choices[Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]] = Choices(
    "prediction_type",
    {
        "epsilon": _exploded_x0_of_epsilon,
        "sample": _exploded_itself,
        "original_sample": _exploded_itself,
        "v_prediction": _exploded_x0_of_v,
    },
)
"""prediction_type → `x_0` from (sample, model output, sigma, *exploded_scales(sigma)), variance exploding."""


def exploded_scales(sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(c_out, variance) of a v-prediction at `sigma`: `x_0 = c_out v + x / variance`."""
    return -sigma / (sigma**2 + 1) ** 0.5, sigma**2 + 1


def dynamic_threshold(x0: Tensor, ratio: float, maximum: float) -> Tensor:
    """Keep `x0` in [-1, 1] without piling it up at the ends (Saharia et al., 2022, section 2.3).

    Args:
        x0: Clean samples, (batch, channels, …).
        ratio: The quantile of |x0| of a sample beyond which it is cut.
        maximum: The quantile counts as no more than this.

    Returns:
        Samples cut at `s = clamp(quantile, 1, maximum)` and divided by `s`, in the type of `x0`.
    """
    wide = x0 if x0.dtype in (torch.float32, torch.float64) else x0.float()
    flat = wide.reshape(x0.shape[0], math.prod(x0.shape[1:]))
    s = torch.clamp(torch.quantile(flat.abs(), ratio, dim=1), min=1, max=maximum).unsqueeze(1)
    return (torch.clamp(flat, -s, s) / s).reshape(x0.shape).to(x0.dtype)
