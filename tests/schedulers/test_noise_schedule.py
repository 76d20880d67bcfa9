"""Properties of noise schedules and of the conversions between predictions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_oracle import NAMES

import suffuse
from suffuse.schedulers.noise_schedule import (
    BETAS,
    LADDERS,
    SPACINGS,
    sigmas_at,
    signal_and_noise,
    spaced_timesteps,
    timesteps_of,
    training_sigmas,
    zero_terminal_snr,
)
from suffuse.schedulers.prediction import EPSILON, X0, dynamic_threshold

fast = settings(max_examples=40, deadline=None)
counts = st.integers(1, 60)


@fast
@given(spacing=st.sampled_from(sorted(SPACINGS)), count=counts, offset=st.integers(0, 1), spare=st.integers(0, 1))
def test_timesteps_fall_and_stay_in_training(spacing: str, count: int, offset: int, spare: int) -> None:
    timesteps = spaced_timesteps(spacing, count, 1000, offset, spare).round()
    assert (np.diff(timesteps) < 0).all()
    assert timesteps[0] <= 1000
    assert timesteps[-1] >= 0
    assert len(timesteps) - count in (0, 1)  # "trailing" counts in floating point, as everywhere


@fast
@given(ladder=st.sampled_from(sorted(LADDERS)), count=st.integers(2, 60), low=st.floats(0.01, 0.5), high=st.floats(1, 200))
def test_sigmas_fall_from_the_highest_to_the_lowest(ladder: str, count: int, low: float, high: float) -> None:
    sigmas = LADDERS[ladder](high, low, count)
    assert (np.diff(sigmas) < 0).all()
    np.testing.assert_allclose([sigmas[0], sigmas[-1]], [high, low], rtol=1e-6)


@fast
@given(name=st.sampled_from(sorted(set(BETAS) - {"laplace"})), timesteps=st.lists(st.floats(1, 998), min_size=1, max_size=9))
def test_sigmas_and_timesteps_are_inverse(name: str, timesteps: list[float]) -> None:
    alphas_cumprod = torch.cumprod(1 - BETAS[name](0.0001, 0.02, 1000), dim=0)
    training = training_sigmas(alphas_cumprod)
    if training[-1] < 1e6:  # beyond, float32 has no room between neighbours
        whole = np.floor(np.array(timesteps))
        np.testing.assert_allclose(timesteps_of(sigmas_at(whole, training), training), whole, atol=0.01)


@pytest.mark.parametrize("name", sorted(BETAS))
def test_betas_are_shares(name: str) -> None:
    betas = BETAS[name](0.0001, 0.02, 100)
    assert betas.dtype == torch.float32
    assert betas.shape == (100,)
    assert (betas < 1).all()


def test_zero_terminal_snr_ends_in_noise_and_keeps_the_beginning() -> None:
    betas = BETAS["scaled_linear"](0.00085, 0.012, 1000)
    rescaled = zero_terminal_snr(betas)
    assert torch.cumprod(1 - rescaled, 0)[-1] == 0
    torch.testing.assert_close(rescaled[0], betas[0])


@fast
@given(kind=st.sampled_from(["epsilon", "sample", "v_prediction"]), sigma=st.floats(0.05, 20), seed=st.integers(0, 2**16))
def test_predictions_say_the_same_in_other_words(kind: str, sigma: float, seed: int) -> None:
    x0, epsilon = torch.randn(2, 1, 3, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    alpha, noise = signal_and_noise(torch.tensor(sigma, dtype=torch.float64))
    sample = alpha * x0 + noise * epsilon
    output = {"epsilon": epsilon, "sample": x0, "v_prediction": alpha * epsilon - noise * x0}[kind]
    torch.testing.assert_close(X0[kind](sample, output, alpha, noise), x0)
    torch.testing.assert_close(EPSILON[kind](sample, output, alpha, noise), epsilon)


def test_flow_predictions_too() -> None:
    x0, epsilon = torch.randn(2, 1, 3, 4, 4, dtype=torch.float64)
    alpha, sigma = signal_and_noise(torch.tensor(0.3, dtype=torch.float64), flow=True)
    sample = alpha * x0 + sigma * epsilon
    torch.testing.assert_close(X0["flow_prediction"](sample, epsilon - x0, alpha, sigma), x0)
    torch.testing.assert_close(EPSILON["flow_prediction"](sample, epsilon - x0, alpha, sigma), epsilon)


@fast
@given(scale=st.floats(0.1, 100), maximum=st.floats(1, 5))
def test_thresholded_samples_are_in_range(scale: float, maximum: float) -> None:
    x0 = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * scale
    assert dynamic_threshold(x0, 0.995, maximum).abs().max() <= 1


@pytest.mark.parametrize("name", NAMES)
def test_a_perfect_model_takes_noise_back_to_the_sample(name: str) -> None:
    """`step` undoes `add_noise` when the model knows the noise."""
    scheduler: Any = getattr(suffuse, name)(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    if "clip_sample" in scheduler.config:
        scheduler = type(scheduler).from_config(scheduler.config, clip_sample=False)
    scheduler.set_timesteps(25)
    clean, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    sample = scheduler.add_noise(clean, noise, scheduler.timesteps[:1])
    for timestep in scheduler.timesteps:
        scheduler.scale_model_input(sample, timestep)
        memory = scheduler.memory
        if hasattr(memory, "midpoints") and memory.sample is not None:
            alpha, sigma = 1.0, memory.midpoints[memory.step_index]
        elif hasattr(memory, "sigmas"):
            sigma = memory.sigmas[memory.step_index or 0]
            alpha, sigma = (1.0, sigma) if name.endswith("DiscreteScheduler") else signal_and_noise(sigma)
        else:
            bar = scheduler.alphas_cumprod[timestep]
            alpha, sigma = bar**0.5, (1 - bar) ** 0.5
        sample = scheduler.step((sample - alpha * clean) / sigma, timestep, sample).prev_sample
    torch.testing.assert_close(sample, clean, atol=0.2 if name in ("PNDMScheduler", "DEISMultistepScheduler") else 0.05, rtol=0)
