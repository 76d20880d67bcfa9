"""Schedulers of models of tokens, beside the peer's: same tokens."""

from __future__ import annotations

import itertools
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from scheduler_oracle import DISCRETE, equal, quiet

import suffuse
from suffuse.errors import ConfigError, InputError
from suffuse.noise import CounterNoise

CLASSES = 9


def made(library: Any, name: str, **options: Any) -> Any:
    required = {"mask_token_id": CLASSES} if name == "AmusedScheduler" else {"num_vec_classes": CLASSES + 1}
    return quiet(getattr(library, name), **required, **options)


def logits(tokens: torch.Tensor, t: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What a model makes of tokens (batch, …): (batch, classes, …)."""
    phase = tokens.unsqueeze(1) * 0.7 + torch.arange(CLASSES).view(-1, *[1] * (tokens.ndim - 1)) * (1 + t * 0.3)
    return (torch.sin(phase) * 3).to(dtype)


def amused(scheduler: Any, steps: int, generator: Any = None, taken: int = 0, **options: Any) -> list[torch.Tensor]:
    scheduler.set_timesteps(steps, **{k: v for k, v in options.items() if k == "temperature"})
    kept = {k: v for k, v in options.items() if k == "starting_mask_ratio"}
    sample = torch.full((2, 4, 5), CLASSES)
    sample[:, 0, :3] = 1  # tokens of the input, which stay
    dtype, flat, samples = options.get("dtype", torch.float32), options.get("flat", False), [scheduler.timesteps]
    for t in scheduler.timesteps:
        output, given = logits(sample, int(t), dtype), sample
        if flat:
            output, given = output.flatten(2).transpose(1, 2), sample.flatten(1)
        out = scheduler.step(output, t, given, generator=generator, **kept)
        sample = out.prev_sample.reshape(sample.shape)
        samples += [sample, out.pred_original_sample]
    return samples


def vq(scheduler: Any, steps: int, generator: Any = None, **options: Any) -> list[torch.Tensor]:
    scheduler.set_timesteps(steps)
    sample, samples = torch.full((2, 20), CLASSES), [scheduler.timesteps]
    for t in scheduler.timesteps:
        sample = scheduler.step(logits(sample, int(t)).log_softmax(dim=1), t, sample, generator).prev_sample
        samples.append(sample)
    return samples


WALKS = {"AmusedScheduler": amused, "VQDiffusionScheduler": vq}
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "AmusedScheduler": [{}, {"masking_schedule": "linear"}],
    "VQDiffusionScheduler": [{}, {"num_train_timesteps": 77, "alpha_cum_end": 0.001, "gamma_cum_end": 0.9}],
}
each_scheduler = pytest.mark.parametrize("name", DISCRETE)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@each_scheduler
def test_a_run_is_the_peers(name: str) -> None:
    for config, steps, seed in itertools.product(OPTIONS[name], (1, 2, 12, 60), (0, 1)):
        runs = [WALKS[name](made(library, name, **config), steps, seeded(seed)) for library in (suffuse, diffusers)]
        assert len(runs[0]) == len(runs[1]) > 1
        assert all(map(equal, *runs))


@pytest.mark.parametrize(
    "options",
    [{"temperature": 3}, {"temperature": (4.0, 1.0)}, {"starting_mask_ratio": 0.4}, {"flat": True}, {"dtype": torch.float16}],
    ids=str,
)
def test_amused_as_the_caller_wants(options: dict[str, Any]) -> None:
    runs = [amused(made(library, "AmusedScheduler"), 7, seeded(0), **options) for library in (suffuse, diffusers)]
    assert all(map(equal, *runs))
    assert (runs[0][-1].reshape(2, 4, 5)[:, 0, :3] == 1).all()
    assert (runs[0][-1] < CLASSES).all()


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_amused_masks_as_the_peer_does(schedule: str) -> None:
    tokens = torch.randint(0, CLASSES, (3, 6, 6), generator=seeded(0))
    pair = [made(library, "AmusedScheduler", masking_schedule=schedule) for library in (suffuse, diffusers)]
    for scheduler in pair:
        scheduler.set_timesteps(8)
    for t in (0, 3, 7):
        assert equal(*(scheduler.add_noise(tokens, t, seeded(4)) for scheduler in pair))


def test_vq_posteriors_are_the_peers_and_probabilities() -> None:
    ours, theirs = (made(library, "VQDiffusionScheduler") for library in (suffuse, diffusers))
    tokens = torch.randint(0, CLASSES + 1, (2, 50), generator=seeded(0))
    log_p = logits(tokens, 3).log_softmax(dim=1)
    for t in (1, 40, 99):
        posterior = ours.q_posterior(log_p, tokens, t)
        assert equal(posterior, theirs.q_posterior(log_p, tokens, torch.tensor(t)))
        torch.testing.assert_close(posterior.exp().sum(dim=1), torch.ones(2, 50), atol=2e-3, rtol=0)
    for table in ("log_at", "log_bt", "log_ct", "log_cumprod_at", "log_cumprod_bt", "log_cumprod_ct"):
        assert equal(getattr(ours, table), getattr(theirs, table))


def test_vq_steps_have_the_posteriors_frequencies() -> None:
    """Equation 11 in NumPy, with the transition matrices written out."""
    scheduler, t, known = made(suffuse, "VQDiffusionScheduler"), 60, 4
    alpha, beta, gamma = (log[t].double().exp().item() for log in (scheduler.log_at, scheduler.log_bt, scheduler.log_ct))

    def matrix(a: float, b: float, c: float) -> torch.Tensor:
        """Rows: from; columns: to."""
        rows = torch.full((CLASSES + 1, CLASSES + 1), b, dtype=torch.float64) + a * torch.eye(CLASSES + 1)
        rows[:, -1], rows[-1] = c, torch.eye(CLASSES + 1)[-1]
        return rows

    def cumulated(at: int) -> torch.Tensor:
        logs = scheduler.log_cumprod_at, scheduler.log_cumprod_bt, scheduler.log_cumprod_ct
        return matrix(*(log[at].double().exp().item() for log in logs))

    p = torch.linspace(0.1, 1, CLASSES, dtype=torch.float64)
    p = p / p.sum()
    weights = p / cumulated(t)[:CLASSES, known]
    expected = matrix(alpha, beta, gamma)[:, known] * (weights @ cumulated(t - 1)[:CLASSES])
    tokens = torch.full((1, 1), known)
    log_p = p.log().float().view(1, -1, 1)
    torch.testing.assert_close(scheduler.q_posterior(log_p, tokens, t).exp()[0, :, 0].double(), expected, rtol=1e-3, atol=1e-6)
    many = scheduler.step(log_p.expand(-1, -1, 20000), t, tokens.expand(-1, 20000), seeded(0)).prev_sample
    shares = torch.bincount(many[0], minlength=CLASSES + 1) / 20000
    torch.testing.assert_close(shares.double(), expected / expected.sum(), atol=0.015, rtol=0)


@each_scheduler
def test_an_image_is_the_same_alone_and_in_a_batch(name: str) -> None:
    walk, scheduler = WALKS[name], made(suffuse, name)
    both = walk(scheduler, 5, [CounterNoise(3, 0), CounterNoise(3, 1)])[-1]
    other = walk(scheduler, 5, [CounterNoise(3, 1), CounterNoise(3, 0)])[-1]
    assert equal(both, other.flip(0))
    assert not equal(both[0], both[1])


@each_scheduler
def test_eight_threads_on_forks_get_the_serial_results(name: str) -> None:
    shared = made(suffuse, name)
    counts = [4 + index % 5 for index in range(16)]
    serial = [WALKS[name](made(suffuse, name), steps, seeded(steps)) for steps in counts]
    with ThreadPoolExecutor(8) as pool:
        parallel = list(pool.map(lambda steps: WALKS[name](shared.fork(), steps, seeded(steps)), counts))
    assert all(all(map(equal, *pair)) for pair in zip(serial, parallel, strict=True))


@each_scheduler
def test_configurations_and_runs_come_back(name: str, tmp_path: Path) -> None:
    for config in OPTIONS[name]:
        ours = made(suffuse, name, **config)
        ours.save_pretrained(tmp_path)
        theirs = getattr(diffusers, name).from_pretrained(tmp_path)
        theirs.save_pretrained(tmp_path)
        again = getattr(suffuse, name).from_pretrained(tmp_path)
        assert {k: v for k, v in again.config.items() if not k.startswith("_")}.items() >= config.items()
        ours.set_timesteps(6)
        assert equal(pickle.loads(pickle.dumps(ours)).timesteps, ours.timesteps)


@each_scheduler
def test_what_they_refuse(name: str) -> None:
    scheduler = made(suffuse, name)
    for steps in (0, 1.5, "2", None):
        with pytest.raises(InputError, match="num_inference_steps"):
            scheduler.set_timesteps(steps)
    scheduler.set_timesteps(4)
    tokens = torch.zeros(1, 5, dtype=torch.int64)
    with pytest.raises(InputError, match="do not belong together"):
        scheduler.step(torch.zeros(1, CLASSES, 7), 2, tokens)
    with pytest.raises(InputError, match=r"not one of scheduler.timesteps|outside of the training timesteps"):
        shape = (1, 5, CLASSES) if name == "AmusedScheduler" else (1, CLASSES, 5)
        scheduler.step(torch.zeros(shape), 400, tokens)
    with pytest.raises(ConfigError, match=r"masking_schedule|num_vec_classes"):
        if name == "AmusedScheduler":
            suffuse.AmusedScheduler(8, masking_schedule="square")
        else:
            suffuse.VQDiffusionScheduler(1)
