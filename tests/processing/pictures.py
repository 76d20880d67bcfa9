"""Pictures to test with, and both libraries' processors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor as Peer
from PIL import Image

from suffuse.processing.image import VaeImageProcessor

MASK = {"do_normalize": False, "do_binarize": True, "do_convert_grayscale": True}


def photo(height: int = 70, width: int = 93, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Smooth shapes with some noise, of any 8-bit mode."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 7, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    return Image.fromarray(np.asarray(coarse) ^ rng.integers(0, 8, (height, width, 3), dtype=np.uint8)).convert(mode)


def floats(*shape: int, dtype: Any = np.float32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape).astype(dtype)


def tensor(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def processors(**options: Any) -> tuple[Peer, VaeImageProcessor]:
    """(the peer's, ours)"""
    return Peer(**options), VaeImageProcessor(**options)


def assert_same(one: Any, other: Any) -> None:
    """Same kind, same numbers, same layout in memory."""
    assert type(one) is type(other)
    if isinstance(one, list):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_same(*pair)
    elif isinstance(one, Image.Image):
        assert (one.mode, one.size) == (other.mode, other.size)
        assert one.tobytes() == other.tobytes()
    elif isinstance(one, torch.Tensor):
        assert (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())
        assert torch.equal(one, other)
    else:
        assert (one.dtype, one.shape, one.strides) == (other.dtype, other.shape, other.strides)
        assert np.array_equal(one, other)
