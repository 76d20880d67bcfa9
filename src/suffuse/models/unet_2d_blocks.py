"""The blocks UNets and autoencoders are built of, by the names configurations use.

A block is a row of layers at one resolution: residual blocks, each followed by attention or not, then a change of
resolution. The thirty names differ in which residual block, which attention and which resampling they take, so each is a
row of a table here; the shapes of block are few:

    DownBlock   hands on what its layers made, for the skip connections      SkipDownBlock, KDownBlock, EncoderBlock
    UpBlock     takes the skip connections in, last first                    SkipUpBlock, KUpBlock, DecoderBlock
    MidBlock    a residual block, then pairs of attention and residual block
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from suffuse.errors import ConfigError, InputError, nearest
from suffuse.layers.freeu import FreeU
from suffuse.layers.normalization import group_norm
from suffuse.layers.resample import (
    Downsample2D,
    FirDownsample2D,
    FirUpsample2D,
    KDownsample2D,
    KUpsample2D,
    Upsample2D,
    average_downsample,
    fir_downsample,
    fir_upsample,
    nearest_upsample,
)
from suffuse.layers.resnet import ResnetBlock2D
from suffuse.layers.transformer import NO_CONTEXT, Context
from suffuse.models.block_layers import (
    ADDED,
    K_CROSS,
    K_GROUP_SIZE,
    PYRAMID_SELF,
    SCALED_SELF,
    SELF,
    TRANSFORMER,
    AttentionKind,
    BlockOptions,
    Layer,
    adjustable,
    k_diffusion,
    plain,
    pyramid,
    pyramid_with_attention,
    scaled,
)


class Place(NamedTuple):
    """Where in its network a block stands.

    Attributes:
        in_channels: Channels in; on the way up, those of the skip connection that comes last.
        out_channels: Channels out.
        num_layers: Number of layers.
        resamples: Whether the resolution changes at the end.
        previous_channels: On the way up, channels of the block before.
    """

    in_channels: int
    out_channels: int
    num_layers: int
    resamples: bool
    previous_channels: int = 0


class BlockType(NamedTuple):
    """A row of the tables: what a name stands for.

    Attributes:
        block: The shape of block.
        resnet: Its residual blocks.
        attention: What follows each of them.
        resample: What changes the resolution: "conv", "resnet", "k", "fir", or "either" for what the options say.
        freeu: Whether FreeU reweights its skip connections.
    """

    block: Callable[..., Block]
    resnet: Callable[..., ResnetBlock2D]
    attention: AttentionKind | None = None
    resample: str = "conv"
    freeu: bool = False


class Block(nn.Module):
    """What the shapes of block share: residual blocks, and attention after each or not."""

    attentions: nn.ModuleList | None

    def __init__(self, kind: BlockType, options: BlockOptions, layers: Sequence[Layer]) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(kind.resnet(options, layer) for layer in layers)
        self.attentions = None
        if kind.attention is not None:
            made = [(layer.changes.get("conv_2d_out_channels") or layer.out) for layer in layers]
            self.attentions = nn.ModuleList(kind.attention.make(options, width, i) for i, width in enumerate(made))
            self.apply_attention = kind.attention.apply
        self.has_cross_attention = kind.attention is not None and kind.attention.crosses

    def rows(self) -> Iterable[tuple[nn.Module, nn.Module | None]]:
        """Residual blocks with the attention that follows each."""
        return zip(self.resnets, self.attentions or [None] * len(self.resnets), strict=True)

    def run(
        self, resnet: nn.Module, attention: nn.Module | None, hidden_states: Tensor, temb: Tensor | None, context: Context
    ) -> Tensor:
        """One row."""
        hidden_states = resnet(hidden_states, temb)
        return hidden_states if attention is None else self.apply_attention(attention, hidden_states, temb, context)


class DownBlock(Block):
    """Layers, then half the resolution."""

    def __init__(self, kind: BlockType, place: Place, options: BlockOptions) -> None:
        before = [place.in_channels] + [place.out_channels] * (place.num_layers - 1)
        super().__init__(kind, options, [Layer(channels, 0, place.out_channels) for channels in before])
        self.downsamplers = None
        if place.resamples:
            self.downsamplers = nn.ModuleList([_downsampler(kind, options, place.out_channels)])

    def downsample(self, hidden_states: Tensor, temb: Tensor | None) -> Tensor:
        """Halve the resolution, if this block does."""
        for downsampler in self.downsamplers or ():
            by_resnet = isinstance(downsampler, ResnetBlock2D)
            hidden_states = downsampler(hidden_states, temb) if by_resnet else downsampler(hidden_states)
        return hidden_states

    def forward(
        self,
        hidden_states: Tensor,
        temb: Tensor | None = None,
        context: Context = NO_CONTEXT,
        additional_residual: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """Map (batch, in_channels, height, width) to (batch, out_channels, height / 2, width / 2).

        Args:
            hidden_states: The feature map.
            temb: The time embedding (batch, temb_channels).
            context: What attention sees.
            additional_residual: Added to the last layer's output.

        Returns:
            The feature map, and those for the skip connections.
        """
        skips: list[Tensor | None] = []
        for resnet, attention in self.rows():
            hidden_states = self.run(resnet, attention, hidden_states, temb, context)
            skips.append(hidden_states)
        if additional_residual is not None:
            skips[-1] = hidden_states = hidden_states + additional_residual
        if self.downsamplers is not None:
            hidden_states = self.downsample(hidden_states, temb)
            skips.append(hidden_states)
        return hidden_states, tuple(skips)


class KDownBlock(DownBlock):
    """A block of k-diffusion: the skip connections leave out what was downsampled."""

    def __init__(self, kind: BlockType, place: Place, options: BlockOptions) -> None:
        super().__init__(kind, place, replace(options, self_attention=not place.resamples))

    def forward(
        self,
        hidden_states: Tensor,
        temb: Tensor | None = None,
        context: Context = NO_CONTEXT,
        additional_residual: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """As `DownBlock`; the lowest block with attention has no skip connections, marked by `None`."""
        hidden_states, skips = super().forward(hidden_states, temb, context, additional_residual)
        if self.downsamplers is not None:
            return hidden_states, skips[:-1]
        return hidden_states, (None,) * len(skips) if self.has_cross_attention else skips


class EncoderBlock(DownBlock):
    """A block of an autoencoder: no embedding, no skip connections."""

    def __init__(self, kind: BlockType, place: Place, options: BlockOptions) -> None:
        super().__init__(kind, place, replace(options, temb_channels=None))

    def forward(self, hidden_states: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Map (batch, in_channels, height, width) to (batch, out_channels, height / 2, width / 2)."""
        for resnet, attention in self.rows():
            hidden_states = self.run(resnet, attention, hidden_states, None, NO_CONTEXT)
        return self.downsample(hidden_states, None)


class SkipDownBlock(DownBlock):
    """A block of NCSN++: beside the features goes a small image, joined in at each resolution."""

    def __init__(self, kind: BlockType, place: Place, options: BlockOptions) -> None:
        super().__init__(kind, place, options)
        self.resnet_down = self.skip_conv = None
        if place.resamples:
            layer = Layer(place.out_channels, 0, place.out_channels)
            self.resnet_down = pyramid(options, layer, resample=fir_downsample, use_in_shortcut=True)
            self.skip_conv = nn.Conv2d(3, place.out_channels, kernel_size=1)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, hidden_states: Tensor, temb: Tensor | None, image: Tensor
    ) -> tuple[Tensor, tuple[Tensor | None, ...], Tensor]:
        """Map features and `image` (batch, 3, height, width) to both at half the resolution, and skip connections."""
        skips: list[Tensor | None] = []
        for resnet, attention in self.rows():
            hidden_states = self.run(resnet, attention, hidden_states, temb, NO_CONTEXT)
            skips.append(hidden_states)
        if self.resnet_down is not None and self.skip_conv is not None:
            hidden_states, image = self.resnet_down(hidden_states, temb), self.downsample(image, None)
            hidden_states = self.skip_conv(image) + hidden_states
            skips.append(hidden_states)
        return hidden_states, tuple(skips), image


class UpBlock(Block):
    """Layers, each with a skip connection, then twice the resolution."""

    freeu: FreeU | None = None

    def __init__(self, kind: BlockType, place: Place, options: BlockOptions) -> None:
        super().__init__(kind, options, self.plan(kind, place, options))
        self.takes_freeu = kind.freeu
        self.upsamplers = nn.ModuleList([_upsampler(kind, options, place.out_channels)]) if place.resamples else None

    def plan(self, kind: BlockType, place: Place, options: BlockOptions) -> list[Layer]:
        """The channels of each layer."""
        before = [place.previous_channels] + [place.out_channels] * (place.num_layers - 1)
        skips = [place.out_channels] * (place.num_layers - 1) + [place.in_channels]
        return [Layer(b, skip, place.out_channels) for b, skip in zip(before, skips, strict=True)]

    def upsample(self, hidden_states: Tensor, temb: Tensor | None, output_size: tuple[int, int] | None) -> Tensor:
        """Double the resolution, or reach `output_size`, if this block does.

        Raises:
            InputError: `output_size` is not double, and this block can do nothing else.
        """
        for upsampler in self.upsamplers or ():
            if isinstance(upsampler, Upsample2D):
                return upsampler(hidden_states, output_size)
            double = tuple(2 * size for size in hidden_states.shape[-2:])
            if output_size is not None and tuple(output_size) != double:
                raise InputError(
                    "this UNet can only take heights and widths that halve evenly at every resolution",
                    found=f"{tuple(output_size)} where {double} is needed",
                    remedy=f"use blocks that upsample by convolution, or other sizes ({type(upsampler).__name__} doubles)",
                )
            return upsampler(hidden_states, temb) if isinstance(upsampler, ResnetBlock2D) else upsampler(hidden_states)
        return hidden_states

    def forward(
        self,
        hidden_states: Tensor,
        skips: Sequence[Tensor | None],
        temb: Tensor | None = None,
        context: Context = NO_CONTEXT,
        output_size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Map (batch, previous_channels, height, width) to (batch, out_channels, 2 height, 2 width).

        Args:
            hidden_states: The feature map.
            skips: Skip connections, one for each layer, last first.
            temb: The time embedding (batch, temb_channels).
            context: What attention sees.
            output_size: Height and width to reach, if not double.

        Returns:
            The feature map.
        """
        for (resnet, attention), skip in zip(self.rows(), reversed(skips), strict=True):
            hidden_states = self.run(resnet, attention, self.join(hidden_states, skip), temb, context)
        return self.upsample(hidden_states, temb, output_size)

    def join(self, hidden_states: Tensor, skip: Tensor | None) -> Tensor:
        """Put a skip connection behind the features; `None` is none."""
        if skip is None:
            return hidden_states
        if self.freeu is not None:
            hidden_states, skip = self.freeu(hidden_states, skip)
        return torch.cat([hidden_states, skip], dim=1)


class KUpBlock(UpBlock):
    """A block of k-diffusion: one skip connection for all layers, and the next block's channels out."""

    def __init__(self, kind: BlockType, place: Place, options: BlockOptions) -> None:
        super().__init__(kind, place, replace(options, self_attention=_is_lowest(place, options)))

    def plan(self, kind: BlockType, place: Place, options: BlockOptions) -> list[Layer]:
        """The channels of each layer: one layer less than elsewhere."""
        out, number = place.out_channels, place.num_layers - 1
        joins = kind.attention is None or not _is_lowest(place, options)
        before = [out] * number
        layers = [Layer(channels, 0, out) for channels in before]
        layers[0] = Layer(out, out if joins else 0, out)
        if kind.attention is None:
            groups = {"groups_out": out // K_GROUP_SIZE}
            layers[-1] = layers[-1]._replace(out=place.in_channels, changes=groups)
        elif place.in_channels != out:
            layers[-1] = layers[-1]._replace(changes={"conv_2d_out_channels": place.in_channels})
        return layers

    def forward(
        self,
        hidden_states: Tensor,
        skips: Sequence[Tensor | None],
        temb: Tensor | None = None,
        context: Context = NO_CONTEXT,
        output_size: tuple[int, int] | None = None,
    ) -> Tensor:
        """As `UpBlock`, with the last of `skips` alone."""
        hidden_states = self.join(hidden_states, skips[-1])
        for resnet, attention in self.rows():
            hidden_states = self.run(resnet, attention, hidden_states, temb, context)
        return self.upsample(hidden_states, temb, output_size)


class DecoderBlock(UpBlock):
    """A block of an autoencoder: no skip connections."""

    def plan(self, kind: BlockType, place: Place, options: BlockOptions) -> list[Layer]:
        """The channels of each layer."""
        before = [place.in_channels] + [place.out_channels] * (place.num_layers - 1)
        return [Layer(channels, 0, place.out_channels) for channels in before]

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, hidden_states: Tensor, temb: Tensor | None = None
    ) -> Tensor:
        """Map (batch, in_channels, height, width) to (batch, out_channels, 2 height, 2 width)."""
        for resnet, attention in self.rows():
            hidden_states = self.run(resnet, attention, hidden_states, temb, NO_CONTEXT)
        return self.upsample(hidden_states, temb, None)


class SkipUpBlock(UpBlock):
    """A block of NCSN++: beside the features grows an image, to which each resolution adds."""

    def __init__(self, kind: BlockType, place: Place, options: BlockOptions) -> None:
        super().__init__(kind._replace(attention=None), place._replace(resamples=False), options)
        if kind.attention is not None:
            self.attentions = nn.ModuleList([kind.attention.make(options, place.out_channels, 0)])
            self.apply_attention = kind.attention.apply
        self.upsampler = FirUpsample2D()
        self.resnet_up = self.skip_conv = self.skip_norm = self.act = None
        if place.resamples:
            channels = place.out_channels
            layer = Layer(channels, 0, channels)
            self.resnet_up = pyramid(options, layer, resample=fir_upsample, use_in_shortcut=True)
            self.skip_conv = nn.Conv2d(channels, 3, kernel_size=3, padding=1)
            self.skip_norm = group_norm(min(channels // 4, 32), channels, eps=options.eps)
            self.act = nn.SiLU()

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, hidden_states: Tensor, skips: Sequence[Tensor | None], temb: Tensor | None, image: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Map features and `image` (batch, 3, height / 2, width / 2), or none yet, to both; attention is at the end."""
        for resnet, skip in zip(self.resnets, reversed(skips), strict=True):
            hidden_states = resnet(self.join(hidden_states, skip), temb)
        for attention in self.attentions or ():
            hidden_states = self.apply_attention(attention, hidden_states, temb, NO_CONTEXT)
        image = None if image is None else self.upsampler(image)
        if self.resnet_up is not None and self.skip_conv and self.skip_norm and self.act:
            change = self.skip_conv(self.act(self.skip_norm(hidden_states)))
            image = change if image is None else image + change
            hidden_states = self.resnet_up(hidden_states, temb)
        return hidden_states, image


class MidBlock(Block):
    """A residual block, then pairs of attention and residual block.

    Args:
        kind: A row of `MID_BLOCKS`.
        channels: Channels in and out.
        options: What blocks are told; groups of `None` become a quarter of the channels, 32 at most.
        num_layers: Number of pairs.
        attention_groups: Groups of the normalisation before attention, if not those of the residual blocks.
    """

    def __init__(
        self, kind: BlockType, channels: int, options: BlockOptions, num_layers: int = 1, attention_groups: int | None = None
    ) -> None:
        options = replace(options, groups=options.groups or min(channels // 4, 32))
        layer = Layer(channels, 0, channels)
        super().__init__(kind._replace(attention=None), options, [layer] * (num_layers + 1))
        if kind.attention is not None:
            if kind.attention is SCALED_SELF:
                # Published checkpoints with "scale_shift" were trained without this normalisation.
                own = options.groups if options.time_scale_shift == "default" else None
                options = replace(options, groups=attention_groups or own)
            self.attentions = nn.ModuleList(kind.attention.make(options, channels, i) for i in range(num_layers))
            self.apply_attention = kind.attention.apply
            self.has_cross_attention = kind.attention.crosses

    def forward(self, hidden_states: Tensor, temb: Tensor | None = None, context: Context = NO_CONTEXT) -> Tensor:
        """Map (batch, channels, height, width) to the same shape."""
        first, *others = self.resnets
        hidden_states = first(hidden_states, temb)
        for attention, resnet in zip(self.attentions or [None] * len(others), others, strict=True):
            if attention is not None:
                hidden_states = self.apply_attention(attention, hidden_states, temb, context)
            hidden_states = resnet(hidden_states, temb)
        return hidden_states


def _is_lowest(place: Place, options: BlockOptions) -> bool:
    return place.in_channels == place.out_channels == options.temb_channels


def _downsampler(kind: BlockType, options: BlockOptions, channels: int) -> nn.Module:
    match options.resample_type if kind.resample == "either" else kind.resample:
        case "resnet":
            return kind.resnet(options, Layer(channels, 0, channels), resample=average_downsample)
        case "k":
            return KDownsample2D()
        case "fir":
            return FirDownsample2D()
        case _:
            return Downsample2D(channels, padding=options.downsample_padding)


def _upsampler(kind: BlockType, options: BlockOptions, channels: int) -> nn.Module:
    match options.resample_type if kind.resample == "either" else kind.resample:
        case "resnet":
            return kind.resnet(options, Layer(channels, 0, channels), resample=nearest_upsample)
        case "k":
            return KUpsample2D()
        case _:
            return Upsample2D(channels)


# ---------------------------------------------------------------- the tables

DOWN_BLOCKS: dict[str, BlockType] = {
    "DownBlock2D": BlockType(DownBlock, plain),
    "ResnetDownsampleBlock2D": BlockType(DownBlock, adjustable, resample="resnet"),
    "AttnDownBlock2D": BlockType(DownBlock, plain, SELF, "either"),
    "CrossAttnDownBlock2D": BlockType(DownBlock, plain, TRANSFORMER),
    "SimpleCrossAttnDownBlock2D": BlockType(DownBlock, adjustable, ADDED, "resnet"),
    "SkipDownBlock2D": BlockType(SkipDownBlock, pyramid, resample="fir"),
    "AttnSkipDownBlock2D": BlockType(SkipDownBlock, pyramid, PYRAMID_SELF, "fir"),
    "KDownBlock2D": BlockType(KDownBlock, k_diffusion, resample="k"),
    "KCrossAttnDownBlock2D": BlockType(KDownBlock, k_diffusion, K_CROSS, "k"),
}

UP_BLOCKS: dict[str, BlockType] = {
    "UpBlock2D": BlockType(UpBlock, plain, freeu=True),
    "ResnetUpsampleBlock2D": BlockType(UpBlock, adjustable, resample="resnet"),
    "AttnUpBlock2D": BlockType(UpBlock, plain, SELF, "either"),
    "CrossAttnUpBlock2D": BlockType(UpBlock, plain, TRANSFORMER, freeu=True),
    "SimpleCrossAttnUpBlock2D": BlockType(UpBlock, adjustable, ADDED, "resnet"),
    "SkipUpBlock2D": BlockType(SkipUpBlock, pyramid),
    "AttnSkipUpBlock2D": BlockType(SkipUpBlock, pyramid_with_attention, PYRAMID_SELF),
    "KUpBlock2D": BlockType(KUpBlock, k_diffusion, resample="k"),
    "KCrossAttnUpBlock2D": BlockType(KUpBlock, k_diffusion, K_CROSS, "k"),
}

MID_BLOCKS: dict[str, BlockType] = {
    "UNetMidBlock2DCrossAttn": BlockType(MidBlock, scaled, TRANSFORMER),
    "UNetMidBlock2DSimpleCrossAttn": BlockType(MidBlock, adjustable, ADDED),
    "UNetMidBlock2D": BlockType(MidBlock, scaled, SCALED_SELF),
}

ENCODER_BLOCKS: dict[str, BlockType] = {
    "DownEncoderBlock2D": BlockType(EncoderBlock, plain),
    "AttnDownEncoderBlock2D": BlockType(EncoderBlock, plain, SELF),
}

DECODER_BLOCKS: dict[str, BlockType] = {
    "UpDecoderBlock2D": BlockType(DecoderBlock, plain),
    "AttnUpDecoderBlock2D": BlockType(DecoderBlock, plain, SELF),
}


def find_block(table: Mapping[str, BlockType], name: str) -> BlockType:
    """The row of a block's name; old names with "UNetRes" before them are known.

    Raises:
        ConfigError: There is no such block in the table.
    """
    short = name.removeprefix("UNetRes")
    if short not in table:
        close = nearest(short, table)
        raise ConfigError(
            f"no block type {name!r} for this network",
            expected=f"one of {', '.join(table)}",
            remedy=f"did you mean {close}?" if close else "",
        )
    return table[short]
