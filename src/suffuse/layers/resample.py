"""Halving and doubling the resolution of feature maps (batch, channels, height, width)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

_BINOMIAL = (1.0, 3.0, 3.0, 1.0)
# Nested tuples, not a buffer: nothing to load, and a model built on the meta device needs no second visit.
_SMOOTHING = tuple(tuple(a * b / 64 for b in _BINOMIAL) for a in _BINOMIAL)
_LARGEST_NEAREST = 2**31


class Upsample2D(nn.Module):
    """Nearest-neighbour doubling, or to a given size, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, hidden_states: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        """Map to (batch, channels, 2 height, 2 width), or to `output_size`."""
        return self.conv(nearest_upsample(hidden_states, output_size))


class Downsample2D(nn.Module):
    """A 3x3 convolution of stride 2, to as many channels or to `out_channels`.

    Padding 0 pads on the right and below only, as the first autoencoders were trained.
    """

    def __init__(self, channels: int, padding: int = 1, out_channels: int | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels or channels, kernel_size=3, stride=2, padding=padding)
        self.pads_one_side = padding == 0

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map to (batch, channels, height / 2, width / 2)."""
        return self.conv(F.pad(hidden_states, (0, 1, 0, 1)) if self.pads_one_side else hidden_states)


def nearest_upsample(x: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
    """Repeat values to double the resolution, or to reach `output_size`."""
    if x.numel() * 2 > _LARGEST_NEAREST:
        # torch's channels-last kernel counts in 32 bits (pytorch/pytorch#141831).
        x = x.contiguous()
    if output_size is None:
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    return F.interpolate(x, size=output_size, mode="nearest")


def average_downsample(x: Tensor) -> Tensor:
    """Average 2x2 values to halve the resolution."""
    return F.avg_pool2d(x, kernel_size=2, stride=2)


def fir_upsample(x: Tensor) -> Tensor:
    """Double with a [1, 3, 3, 1] filter (Karras et al., 2020, "StyleGAN2", appendix B)."""
    return _filter(_spread(x), gain=4, pad=(2, 1))


def fir_downsample(x: Tensor) -> Tensor:
    """Halve with a [1, 3, 3, 1] filter."""
    return _filter(x, gain=1, pad=(1, 1))[:, :, ::2, ::2]


class FirUpsample2D(nn.Module):
    """`fir_upsample` as a layer."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map to (batch, channels, 2 height, 2 width)."""
        return fir_upsample(hidden_states)


class FirDownsample2D(nn.Module):
    """`fir_downsample` as a layer."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map to (batch, channels, height / 2, width / 2)."""
        return fir_downsample(hidden_states)


class KUpsample2D(nn.Module):
    """Doubling with a [1, 3, 3, 1] filter and reflected borders (Crowson, k-diffusion)."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Map to (batch, channels, 2 height, 2 width)."""
        inputs = F.pad(inputs, (1,) * 4, mode="reflect")
        return F.conv_transpose2d(inputs, _per_channel(inputs, gain=4), stride=2, padding=3)


class KDownsample2D(nn.Module):
    """Halving with a [1, 3, 3, 1] filter and reflected borders (Crowson, k-diffusion)."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Map to (batch, channels, height / 2, width / 2)."""
        inputs = F.pad(inputs, (1,) * 4, mode="reflect")
        return F.conv2d(inputs, _per_channel(inputs, gain=1), stride=2)


def _smoothing(like: Tensor, gain: int) -> Tensor:
    return like.new_tensor(_SMOOTHING) * gain


def _per_channel(like: Tensor, gain: int) -> Tensor:
    # Dense, though a grouped convolution would do: it adds in another order and differs in the last bit.
    channels = like.shape[1]
    weight = like.new_zeros(channels, channels, 4, 4)
    weight.diagonal().copy_(_smoothing(like, gain)[..., None])
    return weight


def _spread(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    spaced = F.pad(x.reshape(batch, channels, height, 1, width, 1), (0, 1, 0, 0, 0, 1))
    return spaced.reshape(batch, channels, 2 * height, 2 * width)


def _filter(x: Tensor, gain: int, pad: tuple[int, int]) -> Tensor:
    batch, channels = x.shape[:2]
    x = F.pad(x.reshape(batch * channels, 1, *x.shape[2:]), (*pad, *pad))
    x = F.conv2d(x, _smoothing(x, gain)[None, None])
    return x.reshape(batch, channels, *x.shape[2:])
