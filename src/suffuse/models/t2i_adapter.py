"""T2I-Adapter: a control picture as features for the way down of a UNet.

Mou et al. (2023), "T2I-Adapter: Learning Adapters to Dig out More Controllable Ability for Text-to-Image Diffusion Models",
section 3.3: pixels of a square become channels, and a few residual blocks, which see neither latents nor time, make one
feature map for each resolution. They are computed once for a picture and added at every step.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from suffuse.configuration import register_to_config
from suffuse.errors import ConfigError, InputError
from suffuse.models.model import ModelMixin
from suffuse.models.side_by_side import SideBySide
from suffuse.models.sizes import require_positive

AdapterType = Literal["full_adapter", "full_adapter_xl", "light_adapter"]


class _Residual(nn.Module):
    """x + W2 relu(W1 x)."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.block1 = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.block2 = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Of the shape of x."""
        return self.block2(nn.functional.relu(self.block1(x))) + x


class _Block(nn.Module):
    """Halve if need be, change channels, residual blocks; a light one works in a quarter of its channels."""

    def __init__(self, in_channels: int, out_channels: int, count: int, down: bool, light: bool) -> None:
        super().__init__()
        inner = out_channels // 4 if light else out_channels
        self.downsample = nn.AvgPool2d(kernel_size=2, stride=2, ceil_mode=True) if down else nn.Identity()
        self.in_conv = nn.Conv2d(in_channels, inner, kernel_size=1) if light or in_channels != out_channels else nn.Identity()
        self.resnets = nn.Sequential(*(_Residual(inner, kernel_size=3 if light else 1) for _ in range(count)))
        self.out_conv = nn.Conv2d(inner, out_channels, kernel_size=1) if light else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_channels, height, width) → (batch, out_channels, …)."""
        return self.out_conv(self.resnets(self.in_conv(self.downsample(x))))


class _Body(nn.Module):
    """The network of a kind: pixels to channels, a first convolution if it is not light, blocks."""

    def __init__(self, kind: AdapterType, in_channels: int, channels: Sequence[int], count: int, factor: int) -> None:
        super().__init__()
        light = kind == "light_adapter"
        self.unshuffle = nn.PixelUnshuffle(factor)
        squared = in_channels * factor**2
        self.conv_in = nn.Identity() if light else nn.Conv2d(squared, channels[0], kernel_size=3, padding=1)
        # (channels in, channels out, whether it halves) of each block
        plans = {
            "full_adapter": [
                (before, after, i > 0) for i, (before, after) in enumerate(itertools.pairwise([channels[0], *channels]))
            ],
            "light_adapter": [
                (before, after, i > 0) for i, (before, after) in enumerate(itertools.pairwise([squared, *channels, channels[-1]]))
            ],
            # Stable Diffusion XL has one resolution less, and its adapters change channels in the second and third block only.
            "full_adapter_xl": [(channels[i - 1] if i in (1, 2) else own, own, i == 2) for i, own in enumerate(channels)],
        }
        self.body = nn.ModuleList(_Block(before, after, count, down, light) for before, after, down in plans[kind])
        self.total_downscale_factor = factor * 2 ** (1 if kind == "full_adapter_xl" else len(plans[kind]) - 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        """A feature map for each block."""
        x = self.conv_in(self.unshuffle(x))
        return [x := block(x) for block in self.body]


class T2IAdapter(ModelMixin):
    """What a control picture adds to the way down of a UNet: features for each resolution.

    Args:
        in_channels: Channels of the control picture; 1 for gray ones.
        channels: Channels of the blocks, which are those of the UNet.
        num_res_blocks: Residual blocks in each.
        downscale_factor: Edge of the squares of pixels that become channels.
        adapter_type: "full_adapter", "full_adapter_xl" or "light_adapter".

    Raises:
        ConfigError: The kind is unknown, or a size is not positive or does not fit.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        channels: list[int] = [320, 640, 1280, 1280],  # noqa: B006
        num_res_blocks: int = 2,
        downscale_factor: int = 8,
        adapter_type: AdapterType = "full_adapter",
    ) -> None:
        super().__init__()
        sizes = {"channels": channels, "num_res_blocks": num_res_blocks, "downscale_factor": downscale_factor}
        require_positive("T2IAdapter", in_channels=in_channels, **sizes)
        if not channels or (adapter_type == "full_adapter_xl" and len({*channels[2:]}) > 1):
            raise ConfigError(
                "T2IAdapter: blocks need channels, and those of an XL adapter the same from the third on", found=channels
            )
        self.adapter = _Body(adapter_type, in_channels, channels, num_res_blocks, downscale_factor)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Features of control pictures (batch, in_channels, height, width) in [0, 1], one map for each block.

        Raises:
            InputError: The pictures have other channels, or edges that the squares do not divide.
        """
        channels, factor = self.config["in_channels"], self.downscale_factor
        if x.ndim != 4 or x.shape[1] != channels or x.shape[2] % factor or x.shape[3] % factor:
            raise InputError(
                "a T2I-Adapter cannot take this control picture",
                found=tuple(x.shape),
                expected=f"(batch, {channels}, height, width), height and width divisible by {factor}",
            )
        return self.adapter(x)

    @property
    def total_downscale_factor(self) -> int:
        """How much smaller the last feature map is than the picture."""
        return self.adapter.total_downscale_factor

    @property
    def downscale_factor(self) -> int:
        """Edge of the squares of pixels that become channels."""
        return self.adapter.unshuffle.downscale_factor


class MultiAdapter(SideBySide):
    """Several T2I-Adapters, of which each sees a picture of its own; their features are added up, each with its weight.

    Args:
        adapters: At least two, which shrink pictures alike.

    Raises:
        ConfigError: There are fewer, or they shrink pictures differently.
    """

    of = T2IAdapter

    def __init__(self, adapters: Sequence[T2IAdapter]) -> None:
        super().__init__()
        if len(adapters) < 2:
            raise ConfigError("MultiAdapter needs two adapters or more", found=len(adapters), remedy="use the T2IAdapter itself")
        factors = [(adapter.total_downscale_factor, adapter.downscale_factor) for adapter in adapters]
        if len({*factors}) > 1:
            raise ConfigError("the adapters shrink pictures differently", found=f"(in all, at first): {factors}")
        self.num_adapter = len(adapters)
        self.adapters = nn.ModuleList(adapters)
        self.total_downscale_factor, self.downscale_factor = factors[0]

    @property
    def parts(self) -> list[Any]:
        """The adapters."""
        return list(self.adapters)

    def forward(self, xs: Sequence[Tensor], adapter_weights: Sequence[float] | None = None) -> list[Tensor]:
        """The weighted sums of features, one map for each block.

        Args:
            xs: A control picture (batch, in_channels, height, width) for each adapter.
            adapter_weights: How much each counts; alike, and 1 together, if None.

        Raises:
            InputError: There are not as many pictures or weights as adapters.
        """
        weights = [1 / self.num_adapter] * self.num_adapter if adapter_weights is None else list(adapter_weights)
        for name, values in (("xs", xs), ("adapter_weights", weights)):
            if len(values) != self.num_adapter:
                raise InputError(f"{name}: {len(values)} given for {self.num_adapter} adapters", expected="one for each")
        # As tensors: a Python number would be rounded at another place.
        scaled = [
            [weight * feature for feature in adapter(x)]
            for adapter, x, weight in zip(self.adapters, xs, torch.tensor(weights), strict=True)
        ]
        return [functools.reduce(torch.add, maps) for maps in zip(*scaled, strict=True)]
