"""Noise from generators."""

from __future__ import annotations

import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor as peers

from suffuse.errors import InputError
from suffuse.noise import randn_tensor


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, None], ids=str)
@pytest.mark.parametrize("generators", [(0,), (0, 1, 2), None], ids=str)
def test_noise_is_the_peers(generators: tuple[int, ...] | None, dtype: torch.dtype | None) -> None:
    drawn = []
    for draw in (randn_tensor, peers):
        torch.manual_seed(5)
        source = seeds(*generators) if generators else None
        drawn.append(draw((3, 2, 4), source, torch.device("cpu"), dtype))
    assert torch.equal(*drawn)
    assert drawn[0].dtype == (dtype or torch.float32)


def test_each_sample_of_a_batch_has_its_own_generator() -> None:
    batch = randn_tensor((2, 3), seeds(1, 2))
    assert torch.equal(batch[1:], randn_tensor((1, 3), seeds(2)[0], device="cpu"))


def test_generators_for_another_batch() -> None:
    with pytest.raises(InputError, match="2 generators for a batch of 3"):
        randn_tensor((3, 2), seeds(0, 1))
