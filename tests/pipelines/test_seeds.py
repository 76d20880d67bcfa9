"""Noise that is a function of (seed, image, step): against a reference, and in pictures made alone and together."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tasks import TASKS, call, pair, set_scheduler

from suffuse.errors import InputError
from suffuse.noise import CounterNoise, fresh, move_to, randn_tensor

ROUNDS, WORD = 10, 2**64
MULTIPLIERS, WEYL = (0xD2E7470EE14C6C93, 0xCA5A826395121157), (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x64-10, word by word (Salmon et al., 2011, section 3.3)."""
    for _ in range(ROUNDS):
        high0, low0 = divmod(counter[0] * MULTIPLIERS[0], WORD)
        high1, low1 = divmod(counter[2] * MULTIPLIERS[1], WORD)
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(word + bump) % WORD for word, bump in zip(key, WEYL, strict=True)]
    return counter


def reference(seed: int, image: int, step: int, draw: int, count: int) -> np.ndarray:
    """Normal numbers of one draw: blocks are counted from 1, each makes four words and two pairs."""
    words = [word for block in range(1, math.ceil(count / 4) + 2) for word in philox([block, draw, step, image], [seed, 0])]
    numbers = []
    for one, other in zip(words[0::2], words[1::2], strict=True):
        radius = math.sqrt(-2 * math.log(((one >> 11) + 1) / 2**53))
        angle = 2 * math.pi * (other >> 11) / 2**53
        numbers += [radius * math.cos(angle), radius * math.sin(angle)]
    return np.array(numbers[:count])


@pytest.mark.parametrize("seed", [0, 7, 2**64 - 1])
@pytest.mark.parametrize(("image", "step", "draw"), [(0, 0, 0), (3, 0, 1), (0, 12, 0), (5, 999, 2)])
@pytest.mark.parametrize("shape", [(1,), (3,), (4, 5), (2, 3, 4, 5)], ids=str)
def test_noise_is_the_reference(seed, image, step, draw, shape):
    noise = CounterNoise(seed, image)
    move_to(noise, step)
    for _ in range(draw):
        noise.normal((2,))
    wanted = reference(seed, image, step, draw, math.prod(shape)).reshape(shape)
    np.testing.assert_allclose(noise.normal(shape).numpy(), wanted, rtol=1e-13, atol=1e-14)


def test_noise_is_standard_normal_and_uncorrelated():
    draws = torch.stack([CounterNoise(seed, image).normal((40_000,)) for seed in range(2) for image in range(3)])
    assert draws.mean(1).abs().max() < 0.02
    assert (draws.std(1) - 1).abs().max() < 0.02
    assert (torch.corrcoef(draws) - torch.eye(6)).abs().max() < 0.02
    assert abs((draws**4).mean() - 3) < 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_noise_does_not_depend_on_its_type(dtype):
    exact = CounterNoise(3).normal((2, 8))
    assert torch.equal(randn_tensor((2, 8), CounterNoise(3), dtype=dtype), exact.to(dtype))


def test_each_draw_is_another_and_the_beginning_is_always_the_same():
    noise = CounterNoise(3)
    first, second = noise.normal((4,)), noise.normal((4,))
    assert not torch.equal(first, second)
    assert torch.equal(fresh(noise).normal((4,)), first)
    assert fresh(None) is None


NOISY = [
    "EulerAncestralDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DDPMScheduler",
    "LCMScheduler",
    "SASolverScheduler",
    "DPMSolverSDEScheduler",
]


@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept")
@pytest.mark.parametrize("scheduler", [*NOISY, "DDIMScheduler"])
def test_an_image_is_the_same_alone_and_in_a_batch(scheduler):
    set_scheduler(pair("text"), scheduler)
    _, pipe = pair("text")
    batch = call(pipe, "text", generator=None, seed=7, num_images_per_prompt=4)
    for image in (0, 2):
        alone = call(pipe, "text", generator=CounterNoise(7, image))
        assert (batch[image : image + 1] - alone).abs().max() < 1e-4  # the noise is equal; larger batches add in another order
    several = call(pipe, "text", generator=None, seed=[7, 9], prompt=["a cat", "a dog"])
    assert (several[:1] - batch[:1]).abs().max() < 1e-4
    assert (several[1:] - batch[1:2]).abs().max() > 1e-2


@pytest.mark.parametrize("task", list(TASKS))
def test_every_task_takes_seeds(task):
    set_scheduler(pair(task), "EulerAncestralDiscreteScheduler")
    _, pipe = pair(task)
    batch = call(pipe, task, generator=None, seed=7, num_images_per_prompt=2)
    again = call(pipe, task, generator=None, seed=7, num_images_per_prompt=2)
    assert torch.equal(batch, again)
    alone = call(pipe, task, generator=CounterNoise(7, 1))
    assert (batch[1:] - alone).abs().max() < 1e-4


def test_what_is_no_seed():
    with pytest.raises(InputError, match="seed must be a whole number"):
        CounterNoise(-1)
    with pytest.raises(InputError, match="image must be a whole number"):
        CounterNoise(1, image=2**64)
    _, pipe = pair("text")
    with pytest.raises(InputError, match="seed must be a whole number"):
        call(pipe, "text", generator=None, seed="seven")
