"""The safety checker of Stable Diffusion: a CLIP vision model and pictures' distance to concepts that should not be shown."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPVisionModel, PreTrainedModel

SPECIAL_CARE_MARGIN = 0.01
"""How much sooner a picture is flagged when it is close to a concept that asks for special care."""


class StableDiffusionSafetyChecker(PreTrainedModel):
    """Blanks pictures whose CLIP embedding is closer to a concept than that concept's threshold."""

    config_class = CLIPConfig
    main_input_name = "clip_input"
    _no_split_modules = ["CLIPEncoderLayer"]

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__(config)
        width: Any = config.projection_dim
        self.vision_model = CLIPVisionModel(config.vision_config)  # pyright: ignore[reportArgumentType]
        self.visual_projection = nn.Linear(config.vision_config.hidden_size, width, bias=False)  # pyright: ignore
        self.concept_embeds = nn.Parameter(torch.ones(17, width), requires_grad=False)
        self.special_care_embeds = nn.Parameter(torch.ones(3, width), requires_grad=False)
        self.concept_embeds_weights = nn.Parameter(torch.ones(17), requires_grad=False)
        self.special_care_embeds_weights = nn.Parameter(torch.ones(3), requires_grad=False)
        self.post_init()

    @torch.no_grad()
    def forward(self, clip_input: Tensor, images: Any) -> tuple[Any, list[bool]]:
        """Check pictures.

        Args:
            clip_input: (batch, 3, rows, columns), as the feature extractor makes it.
            images: The pictures themselves, a tensor or array; those that are flagged are set to zero in place.

        Returns:
            The pictures, and for each whether it was blanked.
        """
        embeds = self.visual_projection(self.vision_model(clip_input)[1])
        special = self._excess(embeds, self.special_care_embeds, self.special_care_embeds_weights, 0.0)
        margin = (special > 0).any(axis=1, keepdims=True) * np.float32(SPECIAL_CARE_MARGIN)
        excess = self._excess(embeds, self.concept_embeds, self.concept_embeds_weights, margin)
        flagged = [bool(row.any()) for row in excess > 0]
        for index in np.flatnonzero(flagged):
            images[index] = images[index] * 0
        if any(flagged):
            warnings.warn(
                f"the safety checker blanked {sum(flagged)} of {len(flagged)} pictures: try another prompt or seed", stacklevel=2
            )
        return images, flagged

    @staticmethod
    def _excess(embeds: Tensor, concepts: Tensor, thresholds: Tensor, margin: Any) -> np.ndarray:
        """By how much each picture is closer to each concept than allowed, to three digits: (batch, concepts)."""
        cosine = F.normalize(embeds) @ F.normalize(concepts).t()
        return np.round(cosine.cpu().float().numpy() - thresholds.cpu().float().numpy() + margin, 3)
