"""Mean and standard deviation of CLIP's vectors of pictures, between which and back noise is added."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from suffuse.configuration import register_to_config
from suffuse.models.model import ModelMixin
from suffuse.models.sizes import require_positive


class StableUnCLIPImageNormalizer(ModelMixin):
    """Vectors to mean 0 and standard deviation 1, and back.

    Args:
        embedding_dim: Size of a vector.
    """

    @register_to_config
    def __init__(self, embedding_dim: int = 768) -> None:
        super().__init__()
        require_positive("StableUnCLIPImageNormalizer", embedding_dim=embedding_dim)
        self.mean = nn.Parameter(torch.zeros(1, embedding_dim))
        self.std = nn.Parameter(torch.ones(1, embedding_dim))

    def scale(self, embeds: Tensor) -> Tensor:
        """Vectors (batch, size) as noise schedules take them."""
        return (embeds - self.mean.to(embeds.device)) / self.std.to(embeds.device)

    def unscale(self, embeds: Tensor) -> Tensor:
        """Undo `scale`."""
        return embeds * self.std.to(embeds.device) + self.mean.to(embeds.device)
