"""The blocks of ControlNet-XS: two rows of layers beside each other, that tell one another what they make.

The base is a UNet's block, the control side a much narrower one. Before each layer the control side is shown what the base
has; after it the base has added what the control side makes of it, both through convolutions that start at zero (Zavadski et al.,
2024, "ControlNet-XS: Rethinking the control of text-to-image diffusion models as feedback-control systems", figure 2).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from suffuse.layers.resample import Downsample2D, Upsample2D
from suffuse.layers.transformer import Context
from suffuse.models.block_layers import BlockOptions, Layer, make_transformer, plain, scaled
from suffuse.models.controlnet import zeroed
from suffuse.models.unet_2d_blocks import MID_BLOCKS, UP_BLOCKS, MidBlock, Place, UpBlock

LAYERS = 2
"""Layers in each block on the way down; blocks on the way up have one more."""

Side = tuple[nn.ModuleList, nn.ModuleList | None, nn.Module | None]
"""Residual blocks, what attends after each, and what halves the resolution."""


@dataclass(frozen=True)
class Level:
    """What the blocks of one resolution are told.

    Attributes:
        base: Channels of the base, in and out.
        control: Channels of the control side, in and out.
        options: Of the base; the control side has other heads and groups.
        control_heads: Heads of the control side.
        most_groups: Groups of its normalisations, at most.
        attends: Whether transformers follow the residual blocks.
        halves: Whether the resolution is halved at the end.
    """

    base: tuple[int, int]
    control: tuple[int, int]
    options: BlockOptions
    control_heads: int
    most_groups: int
    attends: bool
    halves: bool

    def groups(self, channels: int) -> int:
        """The most groups, up to `most_groups`, that channels of the control side divide into."""
        return next(count for count in range(min(channels, self.most_groups), 0, -1) if channels % count == 0)

    def control_options(self, channels: int) -> BlockOptions:
        """What the control side is told of transformers over so many channels."""
        return replace(self.options, heads=self.control_heads, groups=self.groups(channels))


def zero_convolution(before: int, after: int) -> nn.Module:
    """A 1x1 convolution that adds nothing until it is trained."""
    return zeroed(nn.Conv2d(before, after, kernel_size=1))


def base_side(level: Level) -> Side:
    """The layers of a UNet's block."""
    (first, out), options = level.base, level.options
    resnets = nn.ModuleList(plain(options, Layer(before, 0, out)) for before in (first, out))
    attentions = nn.ModuleList(make_transformer(options, out, i) for i in range(LAYERS)) if level.attends else None
    return resnets, attentions, Downsample2D(out) if level.halves else None


def control_side(level: Level) -> Side:
    """The layers beside them, which see both sides' channels."""
    (first, out), options = level.control, replace(level.options, eps=1e-5)
    wide = [own + base for own, base in zip((first, out), level.base, strict=True)]
    resnets = nn.ModuleList(
        plain(options, Layer(before, 0, out), groups=level.groups(before), groups_out=level.groups(out)) for before in wide
    )
    told = level.control_options(out)
    attentions = nn.ModuleList(make_transformer(told, out, i) for i in range(LAYERS)) if level.attends else None
    return resnets, attentions, Downsample2D(wide[-1], out_channels=out) if level.halves else None


def bridges(level: Level) -> tuple[nn.ModuleList, nn.ModuleList]:
    """From the base to the control side and back: for each layer, and for halving."""
    first, out = level.base
    widths = [first, out, out][: LAYERS + level.halves]
    return (
        nn.ModuleList(zero_convolution(width, width) for width in widths),
        nn.ModuleList(zero_convolution(level.control[1], out) for _ in widths),
    )


def control_middle(level: Level) -> MidBlock:
    """The middle of the control side, from both sides' channels to its own."""
    base, own = level.base[1], level.control[1]
    both = own + base
    options = replace(level.options, heads=level.control_heads, groups=level.groups(math.gcd(own, both)))
    middle = MidBlock(MID_BLOCKS["UNetMidBlock2DCrossAttn"], own, options)
    middle.resnets[0] = scaled(options, Layer(both, 0, own))
    return middle


def bridges_up(above: int, out: int, controls: Sequence[int]) -> nn.ModuleList:
    """From what the control side made on the way down to what each layer on the way up begins with."""
    widths = [above] + [out] * (len(controls) - 1)
    return nn.ModuleList(zero_convolution(own, width) for own, width in zip(controls, widths, strict=True))


# ---------------------------------------------------------------- what an adapter holds


class DownAdapter(nn.Module):
    """The control side of a block on the way down."""

    def __init__(self, level: Level) -> None:
        super().__init__()
        self.resnets, self.attentions, self.downsamplers = control_side(level)
        self.base_to_ctrl, self.ctrl_to_base = bridges(level)


class MidAdapter(nn.Module):
    """The control side of the middle."""

    def __init__(self, level: Level) -> None:
        super().__init__()
        self.base_to_ctrl = zero_convolution(level.base[1], level.base[1])
        self.midblock = control_middle(level)
        self.ctrl_to_base = zero_convolution(level.control[1], level.base[1])


class UpAdapter(nn.Module):
    """What a block on the way up adds: it has no layers of its own."""

    def __init__(self, above: int, out: int, controls: Sequence[int]) -> None:
        super().__init__()
        self.ctrl_to_base = bridges_up(above, out, controls)


# ---------------------------------------------------------------- both sides together


def exchange(
    base: Tensor,
    control: Tensor,
    own: Callable[[Tensor], Tensor],
    other: Callable[[Tensor], Tensor],
    to_control: nn.Module,
    to_base: nn.Module,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """A layer of both sides, of which each learns of the other; with a scale of `None` the base goes alone."""
    if scale is None:
        return own(base), control
    seen = torch.cat([control, to_control(base)], dim=1)
    base, control = own(base), other(seen)
    return base + to_base(control) * scale, control


def steps(side: Side, temb: Tensor, context: Context) -> list[Callable[[Tensor], Tensor]]:
    """The layers of a side, halving included, as functions of a feature map."""
    resnets, attentions, halving = side

    def run(resnet: nn.Module, attention: nn.Module | None, sample: Tensor) -> Tensor:
        sample = resnet(sample, temb)
        return sample if attention is None else attention(sample, context)

    made = [functools.partial(run, *row) for row in zip(resnets, attentions or [None] * LAYERS, strict=True)]
    return made if halving is None else [*made, halving]


class ControlledDownBlock(nn.Module):
    """A block on the way down with its control side."""

    def __init__(self, level: Level) -> None:
        super().__init__()
        self.base_resnets, self.base_attentions, self.base_downsamplers = base_side(level)
        self.ctrl_resnets, self.ctrl_attentions, self.ctrl_downsamplers = control_side(level)
        self.base_to_ctrl, self.ctrl_to_base = bridges(level)

    def forward(
        self, base: Tensor, control: Tensor, temb: Tensor, context: Context, scale: float | None
    ) -> list[tuple[Tensor, Tensor]]:
        """What both sides are after each layer."""
        own = steps((self.base_resnets, self.base_attentions, self.base_downsamplers), temb, context)
        other = steps((self.ctrl_resnets, self.ctrl_attentions, self.ctrl_downsamplers), temb, context)
        made = [(base, control)]
        for row in zip(own, other, self.base_to_ctrl, self.ctrl_to_base, strict=True):
            made.append(exchange(*made[-1], *row, scale))
        return made[1:]


class ControlledMidBlock(nn.Module):
    """The middle with its control side."""

    def __init__(self, level: Level) -> None:
        super().__init__()
        self.base_to_ctrl = zero_convolution(level.base[1], level.base[1])
        self.base_midblock = MidBlock(MID_BLOCKS["UNetMidBlock2DCrossAttn"], level.base[1], level.options)
        self.ctrl_midblock = control_middle(level)
        self.ctrl_to_base = zero_convolution(level.control[1], level.base[1])

    def forward(self, base: Tensor, control: Tensor, temb: Tensor, context: Context, scale: float | None) -> Tensor:
        """The base after the middle."""
        told: dict[str, Any] = {"temb": temb, "context": context}
        own, other = functools.partial(self.base_midblock, **told), functools.partial(self.ctrl_midblock, **told)
        return exchange(base, control, own, other, self.base_to_ctrl, self.ctrl_to_base, scale)[0]


class ControlledUpBlock(UpBlock):
    """A block on the way up, to whose layers is added what the control side made on the way down."""

    def __init__(self, name: str, place: Place, options: BlockOptions, controls: Sequence[int]) -> None:
        super().__init__(UP_BLOCKS[name], place._replace(resamples=False), options)
        self.ctrl_to_base = bridges_up(place.previous_channels, place.out_channels, controls)
        # In the files of these models this is no list.
        self.upsamplers = Upsample2D(place.out_channels) if place.resamples else None

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, base: Tensor, skips: Sequence[tuple[Tensor, Tensor]], temb: Tensor, context: Context, scale: float | None
    ) -> Tensor:
        """Map (batch, previous_channels, height, width) to (batch, out_channels, 2 height, 2 width).

        Args:
            base: The feature map.
            skips: What both sides were on the way down, one pair for each layer, last first.
            temb: The time embedding (batch, temb_channels).
            context: What attention sees.
            scale: Multiplies what is added; `None` for nothing.

        Returns:
            The feature map.
        """
        for (resnet, attention), bridge, (skip, control) in zip(self.rows(), self.ctrl_to_base, reversed(skips), strict=True):
            base = base if scale is None else base + bridge(control) * scale
            base = self.run(resnet, attention, self.join(base, skip), temb, context)
        return base if self.upsamplers is None else self.upsamplers(base)
