"""Schedulers whose steps take other arguments than everyone's, beside the peer's: same samples, to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import diffusers
import pytest
import torch
from diffusers.schedulers import deprecated
from scheduler_oracle import LONERS, equal, model, quiet

import suffuse
from suffuse.errors import InputError


def peers(name: str) -> Any:
    """The peer's class, which it may keep among what it has deprecated."""
    return getattr(diffusers, name, None) or getattr(deprecated, name)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def start(scale: float = 1.0) -> torch.Tensor:
    return torch.randn(2, 3, 6, 6, generator=seeded(0)) * scale


def repaint(scheduler: Any, steps: int) -> list[torch.Tensor]:
    scheduler.set_timesteps(steps, jump_length=3, jump_n_sample=2)
    picture, mask = start().flip(0).tanh(), (start() > 0).float()
    sample, drawn, samples, last = start(), seeded(1), [scheduler.timesteps], int(scheduler.timesteps[0]) + 1
    for t in scheduler.timesteps.tolist():
        if t < last:
            sample = scheduler.step(model(sample), t, sample, picture, mask, drawn).prev_sample
        else:
            sample = scheduler.undo_step(sample, last, drawn)
        last = t
        samples.append(sample)
    return samples


def exploding_sde(scheduler: Any, steps: int) -> list[torch.Tensor]:
    scheduler.set_timesteps(steps)
    scheduler.set_sigmas(steps)
    sample, drawn = start(scheduler.init_noise_sigma), seeded(1)
    samples = [scheduler.timesteps, scheduler.sigmas, scheduler.discrete_sigmas]
    for t in scheduler.timesteps:
        sample = scheduler.step_correct(model(sample), sample, drawn).prev_sample
        stepped = scheduler.step_pred(model(sample), t, sample, drawn)
        sample = stepped.prev_sample
        samples += [sample, stepped.prev_sample_mean]
    return samples


def preserving_sde(scheduler: Any, steps: int) -> list[torch.Tensor]:
    scheduler.set_timesteps(steps)
    sample, drawn, samples = start(), seeded(1), [scheduler.timesteps]
    for t in scheduler.timesteps:
        sample, mean = scheduler.step_pred(model(sample), sample, t * torch.ones(2), drawn)
        samples += [sample, mean]
    return samples


def stochastic_heun(scheduler: Any, steps: int) -> list[torch.Tensor]:
    scheduler.set_timesteps(steps)
    sample, drawn, samples = start(scheduler.init_noise_sigma), seeded(1), [scheduler.timesteps, scheduler.schedule]
    for t in scheduler.timesteps.tolist():
        sigma, sigma_prev = scheduler.schedule[t], scheduler.schedule[t - 1] if t > 0 else torch.tensor(0.0)
        sample_hat, sigma_hat = scheduler.add_noise_to_input(sample, sigma, drawn)
        out = scheduler.step(model(sample_hat), sigma_hat, sigma_prev, sample_hat)
        sample = out.prev_sample
        if sigma_prev != 0:
            slope = out.derivative
            out = scheduler.step_correct(model(sample), sigma_hat, sigma_prev, sample_hat, sample, slope)
            sample = out.prev_sample
        samples += [sample, out.pred_original_sample]
    return samples


def wuerstchen(scheduler: Any, steps: int) -> list[torch.Tensor]:
    scheduler.set_timesteps(steps)
    sample, drawn, samples = start(), seeded(1), [scheduler.timesteps]
    samples.append(scheduler.add_noise(sample, sample.flip(0), torch.tensor([0.2, 0.9])))
    for t in scheduler.timesteps[:-1]:
        sample = scheduler.step(model(sample), t.expand(2), sample, drawn).prev_sample
        samples.append(sample)
    return samples


RUNS: dict[str, tuple[Callable[[Any, int], list[torch.Tensor]], list[dict[str, Any]]]] = {
    "RePaintScheduler": (
        repaint,
        [{}, {"eta": 0.7}, {"clip_sample": False, "beta_schedule": "scaled_linear"}, {"beta_schedule": "sigmoid"}],
    ),
    "DDPMWuerstchenScheduler": (wuerstchen, [{}, {"scaler": 2.0}, {"scaler": 0.5, "s": 0.01}]),
    "ScoreSdeVeScheduler": (exploding_sde, [{}, {"snr": 0.3, "sigma_max": 50.0}]),
    "ScoreSdeVpScheduler": (preserving_sde, [{}, {"beta_max": 10, "sampling_eps": 0.01}]),
    "KarrasVeScheduler": (stochastic_heun, [{}, {"sigma_min": 0.1, "sigma_max": 80, "s_churn": 4}]),
}
"""Scheduler → (a run of it, configurations to try)."""

each_scheduler = pytest.mark.parametrize("name", LONERS)


@each_scheduler
def test_a_run_is_the_peers_to_the_last_bit(name: str) -> None:
    walk, configs = RUNS[name]
    for config in configs:
        for steps in (2, 10, 23):
            samples = walk(getattr(suffuse, name)(**config), steps)
            expected = quiet(walk, quiet(peers(name), **config), steps)
            assert len(samples) == len(expected)
            for index, (mine, other) in enumerate(zip(samples, expected, strict=True)):
                assert equal(mine, other), f"tensor {index} of {config}"
                assert mine.isfinite().all()


@each_scheduler
def test_eight_threads_on_forks_get_the_serial_results(name: str) -> None:
    walk, shared = RUNS[name][0], getattr(suffuse, name)()
    counts = [4 + index % 5 for index in range(16)]
    serial = [walk(getattr(suffuse, name)(), steps) for steps in counts]
    with ThreadPoolExecutor(8) as pool:
        parallel = list(pool.map(lambda steps: walk(shared.fork(), steps), counts))
    assert all(all(map(equal, *pair)) for pair in zip(serial, parallel, strict=True))


@each_scheduler
@pytest.mark.parametrize("steps", [0, 1.5, "2", None])
def test_impossible_numbers_of_steps(name: str, steps: Any) -> None:
    with pytest.raises(InputError, match="num_inference_steps"):
        getattr(suffuse, name)().set_timesteps(steps)


@each_scheduler
def test_configurations_come_back(name: str, tmp_path: Any) -> None:
    for config in RUNS[name][1]:
        ours = getattr(suffuse, name)(**config)
        ours.save_pretrained(tmp_path)
        assert dict(type(ours).from_pretrained(tmp_path).config).items() >= {**config}.items()


def test_score_sde_adds_noise_as_the_peer_does() -> None:
    ours, theirs = (library.ScoreSdeVeScheduler() for library in (suffuse, diffusers))
    given = start(), start().flip(0), torch.tensor([0, 1500])
    assert equal(ours.add_noise(*given), theirs.add_noise(*given))


def test_repaint_without_jumps_to_count() -> None:
    with pytest.raises(InputError, match="no jumps are of these numbers"):
        suffuse.RePaintScheduler().set_timesteps(10, jump_length=0)


def test_wuerstchen_timesteps_of_the_callers_choice() -> None:
    scheduler = suffuse.DDPMWuerstchenScheduler()
    scheduler.set_timesteps(timesteps=[1.0, 0.6, 0.0])
    assert scheduler.num_inference_steps == 2
    assert scheduler.previous_timestep(torch.ones(3)).tolist() == [pytest.approx(0.6)] * 3
    with pytest.raises(InputError, match="timesteps must be in descending order"):
        scheduler.set_timesteps(timesteps=[0.2, 0.6])
    with pytest.raises(InputError, match="all steps of the run are taken"):
        scheduler.step(start(), torch.zeros(2), start())


def test_karras_ve_adds_the_noise_of_its_schedule() -> None:
    scheduler = suffuse.KarrasVeScheduler()
    scheduler.set_timesteps(5)
    noisy = scheduler.add_noise(torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4), torch.tensor([4, 0]))
    assert noisy[:, 0, 0, 0].tolist() == scheduler.schedule[[4, 0]].tolist()
