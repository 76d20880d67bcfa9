"""ControlNet-XS: a small network beside a UNet, with which it exchanges what both make at each layer (Zavadski et al., 2024,
"ControlNet-XS: Rethinking the control of text-to-image diffusion models as feedback-control systems").
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from suffuse.configuration import FrozenConfig, register_to_config
from suffuse.errors import ConfigError, InputError, unknown_argument
from suffuse.layers.embeddings import TimestepEmbedding, Timesteps
from suffuse.layers.freeu import FreeU
from suffuse.layers.low_rank import scaled
from suffuse.layers.normalization import group_norm
from suffuse.layers.transformer import Context
from suffuse.models.attention_services import AttentionServices
from suffuse.models.block_layers import BlockOptions
from suffuse.models.controlnet import ControlNetConditioningEmbedding
from suffuse.models.controlnet_xs_blocks import (
    LAYERS,
    ControlledDownBlock,
    ControlledMidBlock,
    ControlledUpBlock,
    DownAdapter,
    Level,
    MidAdapter,
    UpAdapter,
    zero_convolution,
)
from suffuse.models.model import ModelMixin
from suffuse.models.sizes import per_block, require_length, require_positive
from suffuse.models.unet_2d_blocks import Place
from suffuse.models.unet_2d_condition import UNet2DConditionModel
from suffuse.models.unet_2d_conditioning import embed_added
from suffuse.outputs import BaseOutput

BLOCKS = {"CrossAttnDownBlock2D": True, "DownBlock2D": False, "CrossAttnUpBlock2D": True, "UpBlock2D": False}
"""Blocks that can have a control side → whether they attend."""

ASSUMED: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": LAYERS,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "act_fn": "silu",
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "center_input_sample": False,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "dropout": 0.0,
    "only_cross_attention": False,
    "dual_cross_attention": False,
    "reverse_transformer_layers_per_block": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "class_embed_type": None,
    "num_class_embeds": None,
    "resnet_time_scale_shift": "default",
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "attention_type": "default",
    "class_embeddings_concat": False,
    "cross_attention_norm": None,
    "mid_block_only_cross_attention": None,
}
"""What a UNet must be for a control side to fit, beyond what the configurations here say."""

OF_THE_UNET = (
    *("sample_size", "down_block_types", "up_block_types", "block_out_channels", "norm_num_groups", "cross_attention_dim"),
    *("transformer_layers_per_block", "addition_embed_type", "addition_time_embed_dim", "upcast_attention"),
    *("use_linear_projection", "time_cond_proj_dim", "projection_class_embeddings_input_dim"),
)
"""Entries that both together have from the UNet."""

OF_THE_CONTROL = (
    *("conditioning_channels", "conditioning_embedding_out_channels", "conditioning_channel_order"),
    *("learn_time_embedding", "block_out_channels", "num_attention_heads", "max_norm_num_groups"),
)
"""Entries that both together have, with "ctrl_" before them, from the control side."""

FROM_UNET = (
    (r"(conv_in|time_embedding|add_embedding|conv_norm_out|conv_out)\.", r"base_\1."),
    (r"(down_blocks\.\d+\.)(resnets|attentions)\.", r"\1base_\2."),
    (r"(down_blocks\.\d+\.)downsamplers\.0\.", r"\1base_downsamplers."),
    (r"mid_block\.", "mid_block.base_midblock."),
    (r"(up_blocks\.\d+\.)upsamplers\.0\.", r"\1upsamplers."),
)
"""Names of a UNet's tensors → the names they have beside a control side; all others stay."""

FROM_CONTROL = (
    (r"(conv_in|time_embedding)\.", r"ctrl_\1."),
    (r"(down_blocks\.\d+\.)(resnets|attentions|downsamplers)\.", r"\1ctrl_\2."),
    (r"mid_block\.midblock\.", "mid_block.ctrl_midblock."),
    (r"up_connections\.(\d+)\.", r"up_blocks.\1."),
)
"""The same of a control side's tensors."""


@dataclass
class ControlNetXSOutput(BaseOutput):
    """`sample`: the prediction (batch, 4, height, width)."""

    sample: Tensor


class OfStableDiffusion(FrozenConfig):
    """A configuration that answers, without holding them, what all these UNets have in common."""

    def __missing__(self, key: str) -> Any:
        return ASSUMED[key]


def levels_of(said: Mapping[str, Any], owner: str, prefix: str) -> list[Level]:
    """What each resolution is told, the first first.

    Args:
        said: The configuration.
        owner: Whose it is, for errors.
        prefix: What stands before the entries of the control side; those of the base stand without, or with "base_".

    Raises:
        ConfigError: Lists have other lengths, or blocks have no control side.
    """
    types = said["down_block_types"]
    base = said["base_block_out_channels"] if prefix == "" else said["block_out_channels"]
    control, groups = said[f"{prefix}block_out_channels"], said.get("norm_num_groups", 32)
    names = (f"{prefix}block_out_channels", f"{prefix}num_attention_heads", f"{prefix}max_norm_num_groups")
    require_positive(owner, base=base, norm_num_groups=groups, **{name: said[name] for name in names})
    require_length(owner, len(types), "down_block_types", base_block_out_channels=base, **{names[0]: control})
    for name in (*types, *said.get("up_block_types", ())):
        if name not in BLOCKS:
            raise ConfigError(f"{owner}: no control side fits {name}", expected=", ".join(BLOCKS))

    def each(name: str) -> list[Any]:
        return per_block(owner, name, said[name], len(types))

    heads, depths, dims = each("num_attention_heads"), each("transformer_layers_per_block"), each("cross_attention_dim")
    options = [
        BlockOptions(
            base[0] * 4,
            groups=groups,
            heads=heads[level],
            cross_attention_dim=dims[level],
            transformer_layers=depths[level],
            use_linear_projection=said["use_linear_projection"],
            upcast_attention=said["upcast_attention"],
        )
        for level in range(len(types))
    ]
    control_heads, last = each(names[1]), len(types) - 1
    return [
        Level(
            (base[max(level - 1, 0)], base[level]),
            (control[max(level - 1, 0)], control[level]),
            options[level],
            control_heads[level],
            said[names[2]],
            BLOCKS[types[level]],
            level < last,
        )
        for level in range(len(types))
    ]


def skip_widths(levels: Sequence[Level]) -> list[list[int]]:
    """Channels of what the control side hands to each block on the way up, the last level first."""
    made = [levels[0].control[0]]
    for level in levels:
        made += [level.control[1]] * (LAYERS + level.halves)
    return [[made.pop() for _ in range(LAYERS + 1)] for _ in levels]


def check_mix(mix: float, learned: bool) -> None:
    """Raise `ConfigError` unless the time embedding of the control side can be mixed in so."""
    if not 0 <= mix <= 1:
        raise ConfigError("time_embedding_mix is out of range", found=mix, expected="a number in [0, 1]")
    if mix < 1 and not learned:
        raise ConfigError(
            f"time_embedding_mix={mix} needs a time embedding of the control side", remedy="pass learn_time_embedding=True"
        )


class ControlNetXSAdapter(AttentionServices, ModelMixin):
    """The control side alone, as it is trained and published: `UNetControlNetXSModel.from_unet` puts it beside a UNet.

    Args:
        conditioning_channels: Channels of the control picture.
        conditioning_channel_order: "rgb" or "bgr": which the network was trained on; callers give red first in either case.
        conditioning_embedding_out_channels: Channels of each resolution between the control picture and the sample.
        time_embedding_mix: How much of its time embedding is taken, in [0, 1]; below 1 it must have one.
        learn_time_embedding: Whether it has one of its own.
        num_attention_heads: Heads, for all blocks or each.
        block_out_channels: Channels out of each block.
        base_block_out_channels: Those of the UNet.
        cross_attention_dim: Size of a context token, for all blocks or each.
        down_block_types: Names of the UNet's blocks on the way down.
        sample_size: Height and width of latents; not used.
        transformer_layers_per_block: Transformer blocks per layer, for all blocks or each.
        upcast_attention: Scores in float32, where they are formed in memory.
        max_norm_num_groups: Groups of the normalisations, at most.
        use_linear_projection: Linear layers, not convolutions, at both ends of a transformer.

    Raises:
        ConfigError: The values do not make a network; the message says which.
    """

    @register_to_config
    def __init__(
        self,
        conditioning_channels: int = 3,
        conditioning_channel_order: Literal["rgb", "bgr"] = "rgb",
        conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256),
        time_embedding_mix: float = 1.0,
        learn_time_embedding: bool = False,
        num_attention_heads: int | tuple[int, ...] = 4,
        block_out_channels: tuple[int, ...] = (4, 8, 16, 16),
        base_block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280),
        cross_attention_dim: int | tuple[int, ...] = 1024,
        down_block_types: tuple[str, ...] = (
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "DownBlock2D",
        ),
        sample_size: int | None = 96,
        transformer_layers_per_block: int | tuple[int, ...] = 1,
        upcast_attention: bool = True,
        max_norm_num_groups: int = 32,
        use_linear_projection: bool = True,
    ) -> None:
        super().__init__()
        check_mix(time_embedding_mix, learn_time_embedding)
        levels = levels_of(self.config, "ControlNetXSAdapter", "")
        first, own = base_block_out_channels[0], block_out_channels[0]
        self.controlnet_cond_embedding = ControlNetConditioningEmbedding(
            own, conditioning_channels, conditioning_embedding_out_channels
        )
        self.time_embedding = TimestepEmbedding(first, first * 4) if learn_time_embedding else None
        self.conv_in = nn.Conv2d(4, own, kernel_size=3, padding=1)
        self.control_to_base_for_conv_in = zero_convolution(own, first)
        self.down_blocks = nn.ModuleList(DownAdapter(level) for level in levels)
        self.mid_block = MidAdapter(levels[-1])
        self.up_connections = nn.ModuleList()
        above = levels[-1]
        for level, controls in zip(reversed(levels), skip_widths(levels), strict=True):
            self.up_connections.append(UpAdapter(above.base[1], level.base[1], controls))
            above = level

    @classmethod
    def from_unet(
        cls,
        unet: UNet2DConditionModel,
        size_ratio: float | None = None,
        block_out_channels: Sequence[int] | None = None,
        num_attention_heads: Sequence[int] | None = None,
        learn_time_embedding: bool = False,
        time_embedding_mix: float = 1.0,
        conditioning_channels: int = 3,
        conditioning_channel_order: Literal["rgb", "bgr"] = "rgb",
        conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256),
    ) -> ControlNetXSAdapter:
        """A control side to train for a UNet: it adds nothing yet.

        Args:
            unet: The UNet.
            size_ratio: Channels of each block, as a part of the UNet's; or
            block_out_channels: The channels themselves.
            num_attention_heads: Heads of each block; those of the UNet, if None.
            learn_time_embedding: As `ControlNetXSAdapter` takes it, like those that follow.
            time_embedding_mix: How much of it is taken.
            conditioning_channels: Channels of the control picture.
            conditioning_channel_order: Their order.
            conditioning_embedding_out_channels: Channels on the way from it.

        Raises:
            InputError: Neither or both of `size_ratio` and `block_out_channels` are given.
            ConfigError: The values do not make a network.
        """
        if (size_ratio is None) == (block_out_channels is None):
            raise InputError("size_ratio and block_out_channels say the same", expected="one of the two")
        said = unet.config
        shared = ("cross_attention_dim", "down_block_types", "sample_size", "transformer_layers_per_block")
        made = cls(
            conditioning_channels=conditioning_channels,
            conditioning_channel_order=conditioning_channel_order,
            conditioning_embedding_out_channels=conditioning_embedding_out_channels,
            time_embedding_mix=time_embedding_mix,
            learn_time_embedding=learn_time_embedding,
            num_attention_heads=said.attention_head_dim if num_attention_heads is None else tuple(num_attention_heads),
            block_out_channels=tuple(block_out_channels or (int(width * (size_ratio or 0)) for width in said.block_out_channels)),
            base_block_out_channels=said.block_out_channels,
            upcast_attention=said.upcast_attention,
            max_norm_num_groups=said.norm_num_groups,
            use_linear_projection=said.use_linear_projection,
            **{name: said[name] for name in shared},
        )
        return made.to(unet.dtype)

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise `InputError`: it runs beside a UNet only."""
        raise InputError(
            "a ControlNetXSAdapter cannot be run by itself", remedy="UNetControlNetXSModel.from_unet(unet, controlnet=…)"
        )


class UNetControlNetXSModel(AttentionServices, ModelMixin):
    """A UNet of Stable Diffusion or its XL with a control side.

    Args:
        sample_size: Height and width of latents, for pipelines.
        down_block_types: Names of the blocks on the way down.
        up_block_types: Names of the blocks on the way up.
        block_out_channels: Channels out of each block on the way down.
        norm_num_groups: Groups of the normalisations.
        cross_attention_dim: Size of a context token, for all blocks or each.
        transformer_layers_per_block: Transformer blocks per layer, for all blocks or each.
        num_attention_heads: Heads, for all blocks or each.
        addition_embed_type: "text_time" for XL, or `None`.
        addition_time_embed_dim: Size of the embedding of each number in `time_ids`.
        upcast_attention: Scores in float32, where they are formed in memory.
        use_linear_projection: Linear layers, not convolutions, at both ends of a transformer.
        time_cond_proj_dim: Size of `timestep_cond`.
        projection_class_embeddings_input_dim: Size of what is projected, for "text_time".
        time_embedding_mix: As `ControlNetXSAdapter` takes it, like those that follow.
        ctrl_conditioning_channels: Channels of the control picture.
        ctrl_conditioning_embedding_out_channels: Channels on the way from it.
        ctrl_conditioning_channel_order: Order of its channels.
        ctrl_learn_time_embedding: Whether the control side has a time embedding.
        ctrl_block_out_channels: Channels out of its blocks.
        ctrl_num_attention_heads: Heads of its blocks.
        ctrl_max_norm_num_groups: Groups of its normalisations, at most.

    Raises:
        ConfigError: The values do not make a network; the message says which.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int | None = 96,
        down_block_types: tuple[str, ...] = (
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "DownBlock2D",
        ),
        up_block_types: tuple[str, ...] = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280),
        norm_num_groups: int | None = 32,
        cross_attention_dim: int | tuple[int, ...] = 1024,
        transformer_layers_per_block: int | tuple[int, ...] = 1,
        num_attention_heads: int | tuple[int, ...] = 8,
        addition_embed_type: str | None = None,
        addition_time_embed_dim: int | None = None,
        upcast_attention: bool = True,
        use_linear_projection: bool = True,
        time_cond_proj_dim: int | None = None,
        projection_class_embeddings_input_dim: int | None = None,
        time_embedding_mix: float = 1.0,
        ctrl_conditioning_channels: int = 3,
        ctrl_conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256),
        ctrl_conditioning_channel_order: Literal["rgb", "bgr"] = "rgb",
        ctrl_learn_time_embedding: bool = False,
        ctrl_block_out_channels: tuple[int, ...] = (4, 8, 16, 16),
        ctrl_num_attention_heads: int | tuple[int, ...] = 4,
        ctrl_max_norm_num_groups: int = 32,
    ) -> None:
        super().__init__()
        check_mix(time_embedding_mix, ctrl_learn_time_embedding)
        if addition_embed_type not in (None, "text_time"):
            raise ConfigError(f"no control side fits addition_embed_type={addition_embed_type!r}", expected="None or 'text_time'")
        levels = levels_of(self.config, "UNetControlNetXSModel", "ctrl_")
        require_length("UNetControlNetXSModel", len(levels), "down_block_types", up_block_types=up_block_types)
        first, own = block_out_channels[0], ctrl_block_out_channels[0]
        self.base_conv_in = nn.Conv2d(4, first, kernel_size=3, padding=1)
        self.controlnet_cond_embedding = ControlNetConditioningEmbedding(
            own, ctrl_conditioning_channels, ctrl_conditioning_embedding_out_channels
        )
        self.ctrl_conv_in = nn.Conv2d(4, own, kernel_size=3, padding=1)
        self.control_to_base_for_conv_in = zero_convolution(own, first)
        self.base_time_proj = Timesteps(first, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.base_time_embedding = TimestepEmbedding(first, first * 4, cond_proj_dim=time_cond_proj_dim)
        self.ctrl_time_embedding = TimestepEmbedding(first, first * 4) if ctrl_learn_time_embedding else None
        self.base_add_time_proj = self.base_add_embedding = None
        if addition_embed_type is not None:
            sizes = {"addition_time_embed_dim": addition_time_embed_dim}
            sizes["projection_class_embeddings_input_dim"] = projection_class_embeddings_input_dim
            if addition_time_embed_dim is None or projection_class_embeddings_input_dim is None:
                raise ConfigError("addition_embed_type='text_time' needs sizes", found=sizes, expected="two numbers")
            self.base_add_time_proj = Timesteps(addition_time_embed_dim, flip_sin_to_cos=True, downscale_freq_shift=0)
            self.base_add_embedding = TimestepEmbedding(projection_class_embeddings_input_dim, first * 4)
        self.down_blocks = nn.ModuleList(ControlledDownBlock(level) for level in levels)
        self.mid_block = ControlledMidBlock(levels[-1])
        self.up_blocks = nn.ModuleList()
        above = levels[-1]
        for name, level, controls in zip(up_block_types, reversed(levels), skip_widths(levels), strict=True):
            place = Place(level.base[0], level.base[1], LAYERS + 1, level is not levels[0], above.base[1])
            self.up_blocks.append(ControlledUpBlock(name, place, level.options, controls))
            above = level
        self.base_conv_norm_out = group_norm(norm_num_groups or 32, first, eps=1e-5)
        self.base_conv_act = nn.SiLU()
        self.base_conv_out = nn.Conv2d(first, 4, kernel_size=3, padding=1)

    # ---------------------------------------------------------------- both together

    @classmethod
    def from_unet(
        cls,
        unet: UNet2DConditionModel,
        controlnet: ControlNetXSAdapter | None = None,
        size_ratio: float | None = None,
        ctrl_block_out_channels: Sequence[int] | None = None,
        time_embedding_mix: float | None = None,
        ctrl_optional_kwargs: dict[str, Any] | None = None,
    ) -> UNetControlNetXSModel:
        """A UNet and a control side as one model; it shares their weights, so that nothing is in memory twice.

        Args:
            unet: The UNet.
            controlnet: The control side; a new one, if None, for which those that follow are meant.
            size_ratio: As `ControlNetXSAdapter.from_unet` takes it.
            ctrl_block_out_channels: Likewise.
            time_embedding_mix: Likewise.
            ctrl_optional_kwargs: Further keywords for it.

        Raises:
            InputError: A control side is given, and sizes for a new one.
            ConfigError: The UNet is of another kind, or the control side was made for another UNet.
        """
        new = (size_ratio, ctrl_block_out_channels, time_embedding_mix, ctrl_optional_kwargs)
        if controlnet is not None and any(value is not None for value in new):
            raise InputError("a controlnet is given, and sizes for a new one", remedy="pass one of the two")
        other = {name: unet.config[name] for name, value in ASSUMED.items() if unet.config[name] != value}
        if other:
            raise ConfigError("no control side fits this UNet", found=other, expected={name: ASSUMED[name] for name in other})
        if controlnet is None:
            further = dict(ctrl_optional_kwargs or {})
            if time_embedding_mix is not None:
                further["time_embedding_mix"] = time_embedding_mix
            controlnet = ControlNetXSAdapter.from_unet(unet, size_ratio, ctrl_block_out_channels, **further)
        said = {name: unet.config[name] for name in OF_THE_UNET} | {"num_attention_heads": unet.config.attention_head_dim}
        said |= {f"ctrl_{name}": controlnet.config[name] for name in OF_THE_CONTROL}
        with torch.device("meta"):
            made = cls.from_config({**said, "time_embedding_mix": controlnet.config.time_embedding_mix})
        tensors = renamed(unet.state_dict(), FROM_UNET) | renamed(controlnet.state_dict(), FROM_CONTROL)
        wanted = {name: tensor.shape for name, tensor in made.state_dict().items()}
        unlike = sorted(name for name in wanted.keys() | tensors.keys() if wanted.get(name) != _shape(tensors.get(name)))
        if unlike:
            raise ConfigError(
                "this control side was made for another UNet",
                found=f"{len(unlike)} of {len(wanted)} tensors do not fit: {', '.join(unlike[:3])}",
                expected=f"base_block_out_channels={unet.config.block_out_channels}",
            )
        made.load_state_dict(tensors, assign=True)
        return made.to(unet.dtype).train(unet.training)

    def freeze_unet_params(self) -> None:
        """Let training change the control side only."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad = any(part.startswith(("ctrl_", "control", "base_to_ctrl")) for part in name.split("."))

    @property
    def config(self) -> FrozenConfig:
        """The configuration, read-only, with what all UNets of this kind have in common as further attributes."""
        return OfStableDiffusion(self._internal_dict)

    @property
    def time_proj(self) -> Timesteps:
        """Sines and cosines of timesteps, by the name that UNets have for it."""
        return self.base_time_proj

    def check_cross_attention_kwargs(self, options: dict[str, Any]) -> None:
        """Raise `UnknownArgumentError` unless `forward` takes these `cross_attention_kwargs`."""
        for name in options.keys() - {"scale"}:
            if not any(layer.takes(name) for layer in self.attention_layers().values()):
                raise unknown_argument("cross_attention_kwargs", name, ["scale"])

    def enable_freeu(self, s1: float, s2: float, b1: float, b2: float) -> None:
        """Reweight the two lowest resolutions on the way up, as `UNet2DConditionModel.enable_freeu` does."""
        for block, freeu in zip(list[Any](self.up_blocks), (FreeU(b1, s1), FreeU(b2, s2)), strict=False):
            block.freeu = freeu

    def disable_freeu(self) -> None:
        """Undo `enable_freeu`."""
        for block in list[Any](self.up_blocks):
            block.freeu = None

    # ---------------------------------------------------------------- the way through

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor,
        controlnet_cond: Tensor | None = None,
        conditioning_scale: float | None = 1.0,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        return_dict: bool = True,
        apply_control: bool = True,
    ) -> ControlNetXSOutput | tuple[Tensor]:
        """Predict.

        Args:
            sample: The noisy sample (batch, 4, height, width).
            timestep: One for all, or (batch,).
            encoder_hidden_states: Context tokens (batch, tokens, cross_attention_dim).
            controlnet_cond: The control picture (batch or 1, ctrl_conditioning_channels, height · 8, width · 8), red first, in
                0..1; `None` for no control.
            conditioning_scale: Multiplies what the control side adds.
            class_labels: Must be `None`.
            timestep_cond: Added to the time embedding's input (batch, time_cond_proj_dim).
            attention_mask: (batch, height * width at one resolution), 1 to keep, 0 to leave out, in self-attention.
            cross_attention_kwargs: For the processors; "scale" is for adapters.
            added_cond_kwargs: "text_embeds" and "time_ids", for "text_time".
            return_dict: Return an output object instead of a tuple.
            apply_control: False lets the UNet go alone.

        Returns:
            The prediction (batch, 4, height, width).

        Raises:
            InputError: Something is missing, not taken, or has a shape that does not fit.
        """
        self._check(sample, encoder_hidden_states, class_labels)
        options = cross_attention_kwargs or {}
        self.check_cross_attention_kwargs(options)
        scale = conditioning_scale if apply_control and controlnet_cond is not None else None
        with scaled(options.get("scale")):
            temb = self._embed(sample, timestep, timestep_cond, scale is not None)
            if self.base_add_embedding is not None:
                told = (self.base_add_embedding, self.base_add_time_proj, temb, encoder_hidden_states, added_cond_kwargs)
                temb = temb + embed_added("text_time", *told)[0]
            mask = None if attention_mask is None else ((1 - attention_mask.to(sample.dtype)) * -10000.0).unsqueeze(1)
            rest = {name: value for name, value in options.items() if name != "scale"}
            context = Context(encoder_hidden_states, mask, options=rest)
            base, control = self.base_conv_in(sample), self.ctrl_conv_in(sample)
            if scale is not None and controlnet_cond is not None:
                control = control + self._embed_picture(controlnet_cond, sample)
                base = base + self.control_to_base_for_conv_in(control) * scale
            made = [(base, control)]
            for block in self.down_blocks:
                made += block(*made[-1], temb, context, scale)
            base = self.mid_block(*made[-1], temb, context, scale)
            for block in self.up_blocks:
                skips, made = made[-LAYERS - 1 :], made[: -LAYERS - 1]
                base = block(base, skips, temb, context, scale)
            sample = self.base_conv_out(self.base_conv_act(self.base_conv_norm_out(base)))
        return ControlNetXSOutput(sample) if return_dict else (sample,)

    def _embed(self, sample: Tensor, timestep: Tensor | float | int, cond: Tensor | None, controlled: bool) -> Tensor:
        times = torch.as_tensor(timestep, device=sample.device).reshape(-1)
        if len(times) not in (1, len(sample)):
            raise InputError("timestep", found=f"{len(times)} timesteps", expected=f"one, or {len(sample)} as samples")
        sines = self.base_time_proj(times.expand(len(sample))).to(sample.dtype)
        base = self.base_time_embedding(sines, cond)
        if self.ctrl_time_embedding is None or not controlled:
            return base
        part = self.config.time_embedding_mix**0.3
        return self.ctrl_time_embedding(sines, cond) * part + base * (1 - part)

    def _embed_picture(self, picture: Tensor, sample: Tensor) -> Tensor:
        factor = 2 ** (len(self.config.ctrl_conditioning_embedding_out_channels) - 1)
        wanted = (self.config.ctrl_conditioning_channels, *(size * factor for size in sample.shape[-2:]))
        if picture.ndim != 4 or tuple(picture.shape[1:]) != wanted or len(picture) not in (1, len(sample)):
            found, expected = tuple(picture.shape), (len(sample), *wanted)
            raise InputError("controlnet_cond has the wrong shape for this network and sample", found=found, expected=expected)
        if self.config.ctrl_conditioning_channel_order == "bgr":
            picture = torch.flip(picture, dims=[1])
        return self.controlnet_cond_embedding(picture)

    def _check(self, sample: Tensor, tokens: Tensor, labels: Tensor | None) -> None:
        multiple = 2 ** (len(self.down_blocks) - 1)
        if sample.ndim != 4 or sample.shape[1] != 4 or sample.shape[-1] % multiple or sample.shape[-2] % multiple:
            raise InputError(
                "sample has the wrong shape for this network",
                found=tuple(sample.shape),
                expected=f"(batch, 4, height, width), the last two multiples of {multiple}",
            )
        if tokens.ndim != 3 or len(tokens) != len(sample):
            expected = f"({len(sample)}, tokens, {self.config.cross_attention_dim})"
            raise InputError("encoder_hidden_states have the wrong shape", found=tuple(tokens.shape), expected=expected)
        if labels is not None:
            raise InputError("this network knows no classes", remedy="leave class_labels out")


def renamed(tensors: Mapping[str, Tensor], table: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    """Tensors under the names that the first fitting row of a table makes of theirs."""

    def name_of(name: str) -> str:
        row = next((row for row in table if re.match(row[0], name)), None)
        return name if row is None else re.sub(rf"^{row[0]}", row[1], name)

    return {name_of(name): tensor for name, tensor in tensors.items()}


def _shape(tensor: Tensor | None) -> torch.Size | None:
    return None if tensor is None else tensor.shape
