"""ControlNet: a picture's say in what a UNet paints.

Zhang et al. (2023), "Adding Conditional Control to Text-to-Image Diffusion Models": a trainable copy of the UNet's way
down and middle sees the control picture as well, and what each of its layers makes is added to the UNet's skip connections
through convolutions that start at zero (section 3.1).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from suffuse.configuration import register_to_config
from suffuse.errors import ConfigError, InputError
from suffuse.models.side_by_side import SideBySide
from suffuse.models.single_file import SingleFileModelMixin
from suffuse.models.sizes import require_positive
from suffuse.models.unet_2d_condition import UNet2DConditionModel
from suffuse.models.unet_2d_encoder import FIXED, UNet2DEncoder
from suffuse.outputs import BaseOutput

COPIED = (
    *("conv_in", "time_proj", "time_embedding", "encoder_hid_proj", "class_embedding", "add_embedding"),
    *("down_blocks", "mid_block"),
)
"""The parts that a ControlNet starts with from a UNet."""

Residuals: TypeAlias = "tuple[Sequence[Tensor], Tensor]"
"""What is added to the skip connections of a UNet, and to its middle."""


@dataclass
class ControlNetOutput(BaseOutput):
    """What is added to a UNet.

    Attributes:
        down_block_res_samples: One for each skip connection (batch, channels, height, width).
        mid_block_res_sample: One for the middle.
    """

    down_block_res_samples: tuple[Tensor, ...]
    mid_block_res_sample: Tensor


class ControlNetConditioningEmbedding(nn.Module):
    """The control picture at the resolution of latents (Zhang et al., 2023, section 3.2).

    Args:
        conditioning_embedding_channels: Channels out.
        conditioning_channels: Channels of the picture.
        block_out_channels: Channels of each resolution on the way; each after the first is half the one before.
    """

    def __init__(
        self,
        conditioning_embedding_channels: int,
        conditioning_channels: int = 3,
        block_out_channels: Sequence[int] = (16, 32, 96, 256),
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(conditioning_channels, block_out_channels[0], kernel_size=3, padding=1)
        self.blocks = nn.ModuleList()
        for before, after in itertools.pairwise(block_out_channels):
            self.blocks.append(nn.Conv2d(before, before, kernel_size=3, padding=1))
            self.blocks.append(nn.Conv2d(before, after, kernel_size=3, padding=1, stride=2))
        self.conv_out = zeroed(nn.Conv2d(block_out_channels[-1], conditioning_embedding_channels, kernel_size=3, padding=1))

    def forward(self, conditioning: Tensor) -> Tensor:
        """Map (batch, conditioning_channels, height, width) to the channels and resolution of the first skip connection."""
        embedding = nn.functional.silu(self.conv_in(conditioning))
        for block in self.blocks:
            embedding = nn.functional.silu(block(embedding))
        return self.conv_out(embedding)


class ControlNetModel(SingleFileModelMixin, UNet2DEncoder):
    """What a control picture adds to the layers of a UNet.

    Args:
        in_channels: Channels of the sample.
        conditioning_channels: Channels of the control picture.
        flip_sin_to_cos: In the time embedding, cosines first.
        freq_shift: In the time embedding, how far the lowest frequency stays from 1/10000.
        down_block_types: Names of the blocks on the way down.
        mid_block_type: Name of the block in the middle; `None` for none.
        only_cross_attention: No self-attention; for all blocks or each.
        block_out_channels: Channels out of each block.
        layers_per_block: Layers in each block, for all or each.
        downsample_padding: Padding of the halving convolutions.
        mid_block_scale_factor: Divides the sums of residual blocks in the middle.
        act_fn: Name of the activation.
        norm_num_groups: Groups of the normalisations.
        norm_eps: Added to variances.
        cross_attention_dim: Size of a context token, for all blocks or each.
        transformer_layers_per_block: Transformer blocks per layer: for all or each.
        encoder_hid_dim: Size of `encoder_hidden_states` if they are projected first.
        encoder_hid_dim_type: How they are projected.
        attention_head_dim: The number of heads of transformers, the size of a head elsewhere; for all blocks or each.
        num_attention_heads: The number of heads of transformers, if `attention_head_dim` is not to say it.
        use_linear_projection: Linear layers, not convolutions, at both ends of a transformer.
        class_embed_type: How class labels are embedded, or `None` for a table of `num_class_embeds`, if given.
        addition_embed_type: What else is added to the time embedding.
        addition_time_embed_dim: Size of the embedding of each number in `time_ids`.
        num_class_embeds: Number of classes.
        upcast_attention: Scores in float32, where they are formed in memory.
        resnet_time_scale_shift: How the time embedding enters residual blocks.
        projection_class_embeddings_input_dim: Size of what is projected, for class labels or for "text_time".
        controlnet_conditioning_channel_order: Colours of the control picture as the network was trained: "rgb" or "bgr". Callers
            give red first in either case.
        conditioning_embedding_out_channels: Channels of each resolution between the control picture and the sample.
        global_pool_conditions: Hand on the mean over positions (Shuffle).
        addition_embed_type_num_heads: Heads of the pooling for "text".

    Raises:
        ConfigError: The values do not make a network; the message says which.
    """

    _single_file_part = "controlnet"

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        conditioning_channels: int = 3,
        flip_sin_to_cos: bool = True,
        freq_shift: int = 0,
        down_block_types: tuple[str, ...] = (
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "DownBlock2D",
        ),
        mid_block_type: str | None = "UNetMidBlock2DCrossAttn",
        only_cross_attention: bool | tuple[bool, ...] = False,
        block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280),
        layers_per_block: int | tuple[int, ...] = 2,
        downsample_padding: int = 1,
        mid_block_scale_factor: float = 1,
        act_fn: str = "silu",
        norm_num_groups: int | None = 32,
        norm_eps: float = 1e-5,
        cross_attention_dim: int | tuple[int, ...] = 1280,
        transformer_layers_per_block: int | tuple[int | tuple[int, ...], ...] = 1,
        encoder_hid_dim: int | None = None,
        encoder_hid_dim_type: str | None = None,
        attention_head_dim: int | tuple[int | None, ...] = 8,
        num_attention_heads: int | tuple[int, ...] | None = None,
        use_linear_projection: bool = False,
        class_embed_type: str | None = None,
        addition_embed_type: str | None = None,
        addition_time_embed_dim: int | None = None,
        num_class_embeds: int | None = None,
        upcast_attention: bool = False,
        resnet_time_scale_shift: Literal["default", "scale_shift"] = "default",
        projection_class_embeddings_input_dim: int | None = None,
        controlnet_conditioning_channel_order: Literal["rgb", "bgr"] = "rgb",
        conditioning_embedding_out_channels: tuple[int, ...] | None = (16, 32, 96, 256),
        global_pool_conditions: bool = False,
        addition_embed_type_num_heads: int = 64,
    ) -> None:
        super().__init__()
        if not conditioning_embedding_out_channels:
            raise ConfigError("ControlNetModel: conditioning_embedding_out_channels is empty", expected="at least one number")
        require_positive(
            "ControlNetModel",
            conditioning_channels=conditioning_channels,
            conditioning_embedding_out_channels=conditioning_embedding_out_channels,
        )
        levels = self._build_encoder()
        first = levels.widths[0]
        self.controlnet_cond_embedding = ControlNetConditioningEmbedding(
            first, conditioning_channels, conditioning_embedding_out_channels
        )
        widths = [first]
        for level, (width, layers) in enumerate(zip(levels.widths[1:], levels.layers, strict=True)):
            widths += [width] * (layers + (level < levels.count - 1))
        self.controlnet_down_blocks = nn.ModuleList(_zero_convolution(width) for width in widths)
        self.controlnet_mid_block = _zero_convolution(widths[-1])

    @classmethod
    def from_unet(
        cls,
        unet: UNet2DConditionModel,
        controlnet_conditioning_channel_order: Literal["rgb", "bgr"] = "rgb",
        conditioning_embedding_out_channels: tuple[int, ...] | None = (16, 32, 96, 256),
        load_weights_from_unet: bool = True,
        conditioning_channels: int = 3,
    ) -> ControlNetModel:
        """A ControlNet to train for a UNet: its first half, and nothing added yet.

        Args:
            unet: The UNet to copy.
            controlnet_conditioning_channel_order: As `ControlNetModel` takes it.
            conditioning_embedding_out_channels: As `ControlNetModel` takes them.
            load_weights_from_unet: Start with the UNet's weights; otherwise with random ones.
            conditioning_channels: Channels of the control picture.

        Raises:
            ConfigError: The UNet has something that a ControlNet's configuration cannot say.
        """
        own = {name: value for name, value in unet.config.items() if name in cls.parameters_of_init()}
        beyond = [name for name, value in FIXED.items() if unet.config[name] != value and name != "dropout"]
        if beyond:
            raise ConfigError(
                "ControlNetModel.from_unet: a ControlNet cannot be as this UNet is",
                found=", ".join(f"{name}={unet.config[name]!r}" for name in beyond),
                expected=", ".join(f"{name}={FIXED[name]!r}" for name in beyond),
            )
        made = cls(
            **own,
            controlnet_conditioning_channel_order=controlnet_conditioning_channel_order,
            conditioning_embedding_out_channels=conditioning_embedding_out_channels,
            conditioning_channels=conditioning_channels,
        )
        if load_weights_from_unet:
            for name in COPIED:
                part = getattr(made, name)
                if part is not None:
                    part.load_state_dict(unet.get_submodule(name).state_dict())
        return made

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor,
        controlnet_cond: Tensor,
        conditioning_scale: float = 1.0,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        attention_mask: Tensor | None = None,
        added_cond_kwargs: dict[str, Any] | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guess_mode: bool = False,
        return_dict: bool = True,
    ) -> ControlNetOutput | tuple[tuple[Tensor, ...], Tensor]:
        """What the control picture adds to a UNet for the same sample, timestep and context.

        Args:
            sample: The noisy sample (batch, in_channels, height, width).
            timestep: One for all, or (batch,).
            encoder_hidden_states: Context tokens (batch, tokens, cross_attention_dim or encoder_hid_dim).
            controlnet_cond: The control picture, red first, usually in 0..1: (batch or 1, conditioning_channels, height,
                width), as many times the sample's height and width as the conditioning embedding halves.
            conditioning_scale: Multiplies what is added.
            class_labels: (batch,), or embeddings (batch, size).
            timestep_cond: Added to the time embedding's input; no ControlNet has a place for it so far.
            attention_mask: (batch, height * width at one resolution), 1 to keep, 0 to leave out, in self-attention.
            added_cond_kwargs: What `addition_embed_type` and `encoder_hid_dim_type` need, by name.
            cross_attention_kwargs: For the processors; "scale" is for adapters.
            guess_mode: Let the deep layers say more than the shallow ones: from a tenth to the whole.
            return_dict: Return an output object instead of a tuple.

        Raises:
            InputError: Something is missing, or has a shape that does not fit.
        """
        if self.config.controlnet_conditioning_channel_order == "bgr":
            controlnet_cond = torch.flip(controlnet_cond, dims=[1])
        sample, emb = self._embed(sample, timestep, timestep_cond, encoder_hidden_states, class_labels, added_cond_kwargs)
        context = self._context(sample, encoder_hidden_states, added_cond_kwargs, attention_mask, None, cross_attention_kwargs)
        sample = self.conv_in(sample) + self._embed_picture(controlnet_cond, sample)
        sample, made = self._down(sample, emb, context, iter(()))
        if self.mid_block is not None:
            sample = self.mid_block(sample, emb, context)

        layers = [*self.controlnet_down_blocks, self.controlnet_mid_block]
        added = [layer(skip) for layer, skip in zip(layers, [*made, sample], strict=True)]
        scales: Sequence[Any] = [conditioning_scale] * len(added)
        if guess_mode and not self.config.global_pool_conditions:
            scales = list(torch.logspace(-1, 0, len(added), device=sample.device) * conditioning_scale)
        added = [residual * scale for residual, scale in zip(added, scales, strict=True)]
        if self.config.global_pool_conditions:
            added = [torch.mean(residual, dim=(2, 3), keepdim=True) for residual in added]
        output = ControlNetOutput(tuple(added[:-1]), added[-1])
        return output if return_dict else (output.down_block_res_samples, output.mid_block_res_sample)

    def _embed_picture(self, picture: Tensor, sample: Tensor) -> Tensor:
        factor = 2 ** (len(self.config.conditioning_embedding_out_channels) - 1)
        height, width = (size * factor for size in sample.shape[-2:])
        wanted = (self.config.conditioning_channels, height, width)
        if picture.ndim != 4 or tuple(picture.shape[1:]) != wanted or len(picture) not in (1, len(sample)):
            raise InputError(
                "controlnet_cond has the wrong shape for this ControlNet and sample",
                found=tuple(picture.shape),
                expected=(len(sample), *wanted),
            )
        return self.controlnet_cond_embedding(picture)


class MultiControlNetModel(SideBySide):
    """Several ControlNets, of which each sees a picture of its own; what they add is added up.

    Args:
        controlnets: At least one, all for the same UNet.

    Raises:
        ConfigError: It is empty, or holds what is no ControlNet.
    """

    of = ControlNetModel

    def __init__(self, controlnets: Sequence[ControlNetModel]) -> None:
        super().__init__()
        strangers = [type(net).__name__ for net in controlnets if not isinstance(net, nn.Module)]  # pyright: ignore[reportUnnecessaryIsInstance]
        if not controlnets or strangers:
            raise ConfigError(
                "MultiControlNetModel needs ControlNets", found=strangers or "an empty list", expected="a list of ControlNetModel"
            )
        self.nets = nn.ModuleList(controlnets)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor,
        controlnet_cond: Sequence[Tensor],
        conditioning_scale: Sequence[float],
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        attention_mask: Tensor | None = None,
        added_cond_kwargs: dict[str, Any] | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guess_mode: bool = False,
        return_dict: bool = True,
    ) -> ControlNetOutput | tuple[tuple[Tensor, ...], Tensor]:
        """What all of them add to a UNet for the same sample, timestep and context.

        Args:
            sample: As of `ControlNetModel`, like all that follow but two.
            timestep: One for all, or (batch,).
            encoder_hidden_states: Context tokens.
            controlnet_cond: A control picture for each net.
            conditioning_scale: A number for each net.
            class_labels: (batch,), or embeddings.
            timestep_cond: Added to the time embedding's input.
            attention_mask: (batch, height * width at one resolution).
            added_cond_kwargs: By name.
            cross_attention_kwargs: For the processors.
            guess_mode: Let the deep layers say more than the shallow ones.
            return_dict: Return an output object instead of a tuple.

        Raises:
            InputError: Pictures or scales are not one for each net, or a net cannot take what it is given.
        """
        for name, values in (("controlnet_cond", controlnet_cond), ("conditioning_scale", conditioning_scale)):
            if len(values) != len(self.nets):
                raise InputError(f"{name}: {len(values)} given for {len(self.nets)} ControlNets", expected="one for each")
        shared = class_labels, timestep_cond, attention_mask, added_cond_kwargs, cross_attention_kwargs, guess_mode
        said: list[Residuals] = [
            net(sample, timestep, encoder_hidden_states, picture, scale, *shared, return_dict=False)
            for net, picture, scale in zip(self.nets, controlnet_cond, conditioning_scale, strict=True)
        ]
        down, middle = functools.reduce(added, said)
        return ControlNetOutput(tuple(down), middle) if return_dict else (tuple(down), middle)

    @property
    def parts(self) -> list[Any]:
        """The ControlNets."""
        return list(self.nets)


def added(one: Residuals, other: Residuals) -> Residuals:
    """The sums of what two ControlNets add."""
    return [a + b for a, b in zip(one[0], other[0], strict=True)], one[1] + other[1]


def zeroed(module: nn.Module) -> nn.Module:
    """The module with all parameters zero: it adds nothing until it is trained."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def _zero_convolution(channels: int) -> nn.Module:
    return zeroed(nn.Conv2d(channels, channels, kernel_size=1))
