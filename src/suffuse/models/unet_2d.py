"""The unconditional UNet: a prediction for a noisy image under a timestep (Ho et al., 2020; Song et al., 2021)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from suffuse.configuration import register_to_config
from suffuse.errors import ConfigError, InputError
from suffuse.layers.embeddings import GaussianFourierProjection, TimestepEmbedding, Timesteps
from suffuse.layers.normalization import group_norm
from suffuse.models.attention_services import AttentionServices
from suffuse.models.block_layers import BlockOptions
from suffuse.models.model import ModelMixin
from suffuse.models.sizes import require_length, require_positive
from suffuse.models.unet_2d_blocks import (
    DOWN_BLOCKS,
    MID_BLOCKS,
    UP_BLOCKS,
    MidBlock,
    Place,
    SkipDownBlock,
    SkipUpBlock,
    find_block,
)
from suffuse.outputs import BaseOutput

# There are no context tokens here to attend to.
UNCONDITIONAL_DOWN_BLOCKS = {n: k for n, k in DOWN_BLOCKS.items() if not (k.attention and k.attention.crosses)}
UNCONDITIONAL_UP_BLOCKS = {n: k for n, k in UP_BLOCKS.items() if not (k.attention and k.attention.crosses)}


@dataclass
class UNet2DOutput(BaseOutput):
    """`sample`: the prediction (batch, out_channels, height, width)."""

    sample: Tensor


class UNet2DModel(AttentionServices, ModelMixin):
    """The UNet of DDPM and, with other blocks, of NCSN++.

    Args:
        sample_size: Height and width of samples, for pipelines; the model takes any.
        in_channels: Channels of the sample.
        out_channels: Channels of the prediction.
        center_input_sample: Map samples from 0..1 to -1..1 first.
        time_embedding_type: Sines at fixed frequencies or at random ones, or a learned table.
        freq_shift: How far the lowest frequency stays from 1/10000.
        flip_sin_to_cos: Cosines first.
        down_block_types: Names of the blocks on the way down.
        up_block_types: Names of the blocks on the way up.
        block_out_channels: Channels out of each block on the way down.
        layers_per_block: Layers in each block; blocks on the way up have one more.
        mid_block_scale_factor: Divides the sums of residual blocks in the middle.
        downsample_padding: Padding of the halving convolutions.
        downsample_type: What halves in blocks with attention: "conv" or "resnet".
        upsample_type: What doubles in blocks with attention: "conv" or "resnet".
        dropout: Probability of zeroing in residual blocks.
        act_fn: Name of the activation.
        attention_head_dim: Size of a head; all channels if `None`.
        norm_num_groups: Groups of the normalisations.
        attn_norm_num_groups: Groups before the middle's attention.
        norm_eps: Added to variances.
        resnet_time_scale_shift: How the time embedding enters residual blocks.
        add_attention: Attention in the middle.
        class_embed_type: "timestep" or "identity" for how labels are embedded, or `None` for a table.
        num_class_embeds: Number of classes of the table.
        num_train_timesteps: Length of a learned table of timesteps.
        time_embedding_dim: Size of the time embedding; four times the first block's channels if `None`.
        mid_block_type: "UNetMidBlock2D", or `None` for no middle.

    Raises:
        ConfigError: The values do not make a network; the message says which.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int = 3,
        out_channels: int = 3,
        center_input_sample: bool = False,
        time_embedding_type: Literal["positional", "fourier", "learned"] = "positional",
        freq_shift: int = 0,
        flip_sin_to_cos: bool = True,
        down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        block_out_channels: tuple[int, ...] = (224, 448, 672, 896),
        layers_per_block: int = 2,
        mid_block_scale_factor: float = 1,
        downsample_padding: int = 1,
        downsample_type: Literal["conv", "resnet"] = "conv",
        upsample_type: Literal["conv", "resnet"] = "conv",
        dropout: float = 0.0,
        act_fn: str = "silu",
        attention_head_dim: int | None = 8,
        norm_num_groups: int = 32,
        attn_norm_num_groups: int | None = None,
        norm_eps: float = 1e-5,
        resnet_time_scale_shift: Literal["default", "scale_shift"] = "default",
        add_attention: bool = True,
        class_embed_type: Literal["timestep", "identity"] | None = None,
        num_class_embeds: int | None = None,
        num_train_timesteps: int | None = None,
        time_embedding_dim: int | None = None,
        mid_block_type: Literal["UNetMidBlock2D"] | None = "UNetMidBlock2D",
    ) -> None:
        super().__init__()
        name, count = "UNet2DModel", len(down_block_types)
        require_length(name, count, "down_block_types", up_block_types=up_block_types, block_out_channels=block_out_channels)
        require_positive(
            name,
            sample_size=sample_size,
            in_channels=in_channels,
            out_channels=out_channels,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            attention_head_dim=attention_head_dim,
        )
        self.sample_size, first = sample_size, block_out_channels[0]
        self.conv_in = nn.Conv2d(in_channels, first, kernel_size=3, padding=1)
        timestep_input_dim, time_embed_dim = first, time_embedding_dim or first * 4
        match time_embedding_type:
            case "fourier":
                self.time_proj, timestep_input_dim = GaussianFourierProjection(first, scale=16), 2 * first
            case "positional":
                self.time_proj = Timesteps(first, flip_sin_to_cos, freq_shift)
            case "learned":
                if num_train_timesteps is None:
                    raise ConfigError(f'{name}: time_embedding_type="learned" needs num_train_timesteps')
                self.time_proj = nn.Embedding(num_train_timesteps, first)
        self.time_embedding = TimestepEmbedding(timestep_input_dim, time_embed_dim)
        self.class_embedding = None
        if class_embed_type == "timestep":
            self.class_embedding = TimestepEmbedding(timestep_input_dim, time_embed_dim)
        elif class_embed_type == "identity":
            self.class_embedding = nn.Identity()
        elif num_class_embeds is not None:
            self.class_embedding = nn.Embedding(num_class_embeds, time_embed_dim)

        options = BlockOptions(
            temb_channels=time_embed_dim,
            eps=norm_eps,
            act_fn=act_fn,
            groups=norm_num_groups,
            dropout=dropout,
            time_scale_shift=resnet_time_scale_shift,
            head_dim=attention_head_dim,
            downsample_padding=downsample_padding,
        )
        widths = [first, *block_out_channels]
        self.down_blocks = nn.ModuleList()
        for level, block in enumerate(down_block_types):
            kind = find_block(UNCONDITIONAL_DOWN_BLOCKS, block)
            place = Place(widths[level], widths[level + 1], layers_per_block, resamples=level < count - 1)
            self.down_blocks.append(kind.block(kind, place, replace(options, resample_type=downsample_type)))
        self.mid_block = None
        if mid_block_type is not None:
            kind = MID_BLOCKS[mid_block_type]
            self.mid_block = MidBlock(
                kind if add_attention else kind._replace(attention=None),
                widths[-1],
                replace(options, out_scale_factor=mid_block_scale_factor),
                attention_groups=attn_norm_num_groups,
            )
        self.up_blocks = nn.ModuleList()
        for index, block in enumerate(up_block_types):
            level = count - 1 - index
            kind = find_block(UNCONDITIONAL_UP_BLOCKS, block)
            before = widths[min(level + 2, count)]
            place = Place(widths[level], widths[level + 1], layers_per_block + 1, index < count - 1, before)
            self.up_blocks.append(kind.block(kind, place, replace(options, resample_type=upsample_type)))
        self.conv_norm_out = group_norm(norm_num_groups, first, eps=norm_eps)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(first, out_channels, kernel_size=3, padding=1)

    def forward(
        self, sample: Tensor, timestep: Tensor | float | int, class_labels: Tensor | None = None, return_dict: bool = True
    ) -> UNet2DOutput | tuple[Tensor]:
        """Predict.

        Args:
            sample: The noisy image (batch, in_channels, height, width).
            timestep: One for all, or (batch,); with "fourier" the noise level.
            class_labels: (batch,), or embeddings with "identity".
            return_dict: Return an output object instead of a tuple.

        Returns:
            The prediction (batch, out_channels, height, width).

        Raises:
            InputError: Something is missing, not taken, or has a shape that does not fit.
        """
        if sample.ndim != 4 or sample.shape[1] != self.conv_in.in_channels:
            raise InputError(
                "sample has the wrong shape for this UNet",
                found=tuple(sample.shape),
                expected=f"(batch, {self.conv_in.in_channels}, height, width)",
            )
        if self.config.center_input_sample:
            sample = 2 * sample - 1.0
        timesteps = self._timesteps(sample, timestep)
        emb = self._embed(timesteps, class_labels)
        image = sample
        sample = self.conv_in(sample)
        skips: list[Tensor | None] = [sample]
        for block in list[Any](self.down_blocks):
            if isinstance(block, SkipDownBlock):
                sample, made, image = block(sample, emb, image)
            else:
                sample, made = block(sample, emb)
            skips += made
        if self.mid_block is not None:
            sample = self.mid_block(sample, emb)
        grown: Tensor | None = None
        for block in list[Any](self.up_blocks):
            count = len(block.resnets)
            own, skips = skips[-count:], skips[:-count]
            if isinstance(block, SkipUpBlock):
                sample, grown = block(sample, own, emb, grown)
            else:
                sample = block(sample, own, emb)
        sample = self.conv_out(self.conv_act(self.conv_norm_out(sample)))
        if grown is not None:
            sample = sample + grown
        if self.config.time_embedding_type == "fourier":
            sample = sample / timesteps.reshape(-1, 1, 1, 1)
        return UNet2DOutput(sample) if return_dict else (sample,)

    def _timesteps(self, sample: Tensor, timestep: Tensor | float | int) -> Tensor:
        if not isinstance(timestep, Tensor):
            timestep = torch.tensor([timestep], dtype=torch.long, device=sample.device)
        timestep = timestep.reshape(-1).to(sample.device)
        if len(timestep) not in (1, len(sample)):
            raise InputError("timestep", found=f"{len(timestep)} timesteps", expected=f"one, or {len(sample)} as samples")
        return timestep.expand(len(sample))

    def _embed(self, timesteps: Tensor, labels: Tensor | None) -> Tensor:
        emb = self.time_embedding(self.time_proj(timesteps).to(self.dtype))
        if (labels is None) != (self.class_embedding is None):
            conditioned = self.class_embedding is not None
            raise InputError(
                f"this UNet is {'' if conditioned else 'not '}conditioned on classes",
                remedy="give class_labels" if conditioned else "leave class_labels out",
            )
        if labels is None or self.class_embedding is None:
            return emb
        if self.config.class_embed_type == "timestep":
            labels = self.time_proj(labels).to(self.dtype)
        return emb + self.class_embedding(labels).to(self.dtype)
