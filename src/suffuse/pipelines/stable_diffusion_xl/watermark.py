"""An invisible mark in pictures that says which model drew them, as the authors of Stable Diffusion XL ask for."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import numpy as np
import torch
from torch import Tensor

from suffuse.errors import MissingPackageError

PACKAGE = "imwatermark"
MESSAGE = 0b101100111110110010010000011110111011000110011110
SMALLEST = 256
"""Narrower pictures have no room for the mark."""


def is_available() -> bool:
    """Whether the package that writes the mark is installed."""
    return importlib.util.find_spec(PACKAGE) is not None


class StableDiffusionXLWatermarker:
    """Writes the mark.

    Raises:
        MissingPackageError: The package for it is not installed.
    """

    def __init__(self) -> None:
        if not is_available():
            raise MissingPackageError(
                "the watermark of Stable Diffusion XL needs a package that is not installed",
                remedy="pip install invisible-watermark, or pass add_watermarker=False",
            )
        self.encoder: Any = importlib.import_module(PACKAGE).WatermarkEncoder()
        self.encoder.set_watermark("bits", [int(bit) for bit in f"{MESSAGE:b}"])

    def apply_watermark(self, images: Tensor) -> Tensor:
        """Pictures (batch, 3, height, width) in [-1, 1] → the same with the mark, on the CPU and in float32."""
        if images.shape[-1] < SMALLEST:
            return images
        pixels = (255 * (images / 2 + 0.5)).cpu().permute(0, 2, 3, 1).float().numpy()
        # The package counts colours from blue.
        marked = np.array([self.encoder.encode(image[:, :, ::-1], "dwtDct")[:, :, ::-1] for image in pixels])
        return torch.clamp(2 * (torch.from_numpy(marked).permute(0, 3, 1, 2) / 255 - 0.5), min=-1.0, max=1.0)
