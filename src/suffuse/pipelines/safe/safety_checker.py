"""A safety checker that says which pictures it objects to, and leaves them as they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from suffuse.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker


class SafeStableDiffusionSafetyChecker(StableDiffusionSafetyChecker):
    """The safety checker of Stable Diffusion for pipelines that keep what it objects to."""

    @torch.no_grad()
    def forward(self, clip_input: Tensor, images: Any) -> tuple[Any, list[bool]]:
        """Check pictures.

        Args:
            clip_input: (batch, 3, rows, columns), as the feature extractor makes it.
            images: The pictures themselves.

        Returns:
            The pictures, and for each whether it is objected to.
        """
        blanks = [0] * len(clip_input)
        return images, super().forward(clip_input, blanks)[1]
