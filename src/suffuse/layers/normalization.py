"""Normalisations whose scale and shift come from a condition."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from suffuse.errors import ConfigError


def group_norm(num_groups: int, num_channels: int, eps: float) -> nn.GroupNorm:
    """Group normalisation (Wu and He, 2018).

    Raises:
        ConfigError: The channels do not divide into that many groups.
    """
    if num_groups < 1 or num_channels % num_groups:
        raise ConfigError(
            f"{num_channels} channels do not divide into {num_groups} groups of a normalisation",
            expected="channels that are multiples of norm_num_groups",
            remedy="change norm_num_groups, or the channels of the blocks",
        )
    return nn.GroupNorm(num_groups, num_channels, eps=eps)


class AdaGroupNorm(nn.Module):
    """Group normalisation scaled and shifted by an embedding (Dhariwal and Nichol, 2021, section 3)."""

    def __init__(self, embedding_dim: int, out_dim: int, num_groups: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_groups, self.eps = num_groups, eps
        self.linear = nn.Linear(embedding_dim, out_dim * 2)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Normalise `x` (batch, out_dim, height, width) under `emb` (batch, embedding_dim)."""
        scale, shift = self.linear(emb)[:, :, None, None].chunk(2, dim=1)
        return F.group_norm(x, self.num_groups, eps=self.eps) * (1 + scale) + shift


class SpatialNorm(nn.Module):
    """Group normalisation scaled and shifted at each position by a latent (Zheng et al., 2022, "MoVQ", section 3.2)."""

    def __init__(self, f_channels: int, zq_channels: int) -> None:
        super().__init__()
        self.norm_layer = group_norm(32, f_channels, eps=1e-6)
        self.conv_y = nn.Conv2d(zq_channels, f_channels, kernel_size=1)
        self.conv_b = nn.Conv2d(zq_channels, f_channels, kernel_size=1)

    def forward(self, f: Tensor, zq: Tensor) -> Tensor:
        """Normalise `f` (batch, f_channels, height, width) under `zq` (batch, zq_channels, any height, any width)."""
        zq = F.interpolate(zq, size=f.shape[-2:], mode="nearest")
        return self.norm_layer(f) * self.conv_y(zq) + self.conv_b(zq)
