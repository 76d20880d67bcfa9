"""The UNet of latent diffusion: a prediction for a noisy sample, under a timestep and context tokens.

Ronneberger et al. (2015) for the shape, Ho et al. (2020) for the time embedding, Rombach et al. (2022) for
cross-attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from suffuse.configuration import register_to_config
from suffuse.errors import ConfigError, InputError
from suffuse.layers.activations import get_activation
from suffuse.layers.attention import CrossNorm
from suffuse.layers.freeu import FreeU
from suffuse.layers.low_rank import scaled
from suffuse.layers.normalization import group_norm
from suffuse.layers.transformer import AttentionType, Context
from suffuse.models.adapter_services import AdapterServices
from suffuse.models.sizes import require_length, require_positive
from suffuse.models.unet_2d_blocks import UP_BLOCKS, Place, SkipUpBlock, find_block
from suffuse.models.unet_2d_encoder import UNet2DEncoder
from suffuse.outputs import BaseOutput

# The blocks of NCSN++ carry an image along, which this model has no place for.
CONDITIONAL_UP_BLOCKS = {name: kind for name, kind in UP_BLOCKS.items() if kind.block is not SkipUpBlock}


@dataclass
class UNet2DConditionOutput(BaseOutput):
    """`sample`: the prediction (batch, out_channels, height, width)."""

    sample: Tensor


class UNet2DConditionModel(AdapterServices, UNet2DEncoder):
    """The UNet of Stable Diffusion and its kin.

    Args:
        sample_size: Height and width of samples, for pipelines; the model takes any.
        in_channels: Channels of the sample.
        out_channels: Channels of the prediction.
        center_input_sample: Map samples from 0..1 to -1..1 first.
        flip_sin_to_cos: In the time embedding, cosines first.
        freq_shift: In the time embedding, how far the lowest frequency stays from 1/10000.
        down_block_types: Names of the blocks on the way down.
        mid_block_type: Name of the block in the middle; `None` for none.
        up_block_types: Names of the blocks on the way up.
        only_cross_attention: No self-attention; for all blocks or each.
        block_out_channels: Channels out of each block on the way down.
        layers_per_block: Layers in each block, for all or each; blocks on the way up have one more.
        downsample_padding: Padding of the halving convolutions.
        mid_block_scale_factor: Divides the sums of residual blocks in the middle.
        dropout: Probability of zeroing in residual blocks.
        act_fn: Name of the activation.
        norm_num_groups: Groups of the normalisations; `None` for none at the end.
        norm_eps: Added to variances.
        cross_attention_dim: Size of a context token, for all blocks or each.
        transformer_layers_per_block: Transformer blocks per layer: for all, for each block, or for each layer of each.
        reverse_transformer_layers_per_block: The same for the way up, if not the reverse of the way down.
        encoder_hid_dim: Size of `encoder_hidden_states` if they are projected first.
        encoder_hid_dim_type: How they are projected: a key of `CONTEXT_PROJECTIONS`.
        attention_head_dim: The number of heads of transformers, the size of a head elsewhere; for all blocks or each.
        num_attention_heads: Not to be used; the name `attention_head_dim` has stood for it since the first checkpoints.
        dual_cross_attention: Two transformers side by side, for text and image tokens.
        use_linear_projection: Linear layers, not convolutions, at both ends of a transformer.
        class_embed_type: How class labels are embedded: a key of `CLASS_EMBEDDINGS`, or `None` for a table of
            `num_class_embeds`, if given.
        addition_embed_type: What else is added to the time embedding: a key of `ADDED_EMBEDDINGS`.
        addition_time_embed_dim: Size of the embedding of each number in `time_ids`.
        num_class_embeds: Number of classes.
        upcast_attention: Scores in float32, where they are formed in memory.
        resnet_time_scale_shift: How the time embedding enters residual blocks.
        resnet_skip_time_act: Without activation before it does.
        resnet_out_scale_factor: Divides the sums of residual blocks, in blocks that resample by residual blocks.
        time_embedding_type: Sines at fixed frequencies, or at random ones.
        time_embedding_dim: Size of the time embedding; four times the first block's channels, twice for "fourier".
        time_embedding_act_fn: Activation of the finished time embedding.
        timestep_post_act: Activation after the layers of the time embedding.
        time_cond_proj_dim: Size of `timestep_cond`.
        conv_in_kernel: Size of the first convolution.
        conv_out_kernel: Size of the last.
        projection_class_embeddings_input_dim: Size of what is projected, for class labels or for "text_time".
        attention_type: "gated" and "gated-text-image" for grounding in boxes.
        class_embeddings_concat: Class embeddings stand behind the time embedding, not added.
        mid_block_only_cross_attention: `only_cross_attention` for the middle.
        cross_attention_norm: Normalisation of context tokens.
        addition_embed_type_num_heads: Heads of the pooling for "text".

    Raises:
        ConfigError: The values do not make a network; the message says which.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int = 4,
        out_channels: int = 4,
        center_input_sample: bool = False,
        flip_sin_to_cos: bool = True,
        freq_shift: int = 0,
        down_block_types: tuple[str, ...] = (
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "DownBlock2D",
        ),
        mid_block_type: str | None = "UNetMidBlock2DCrossAttn",
        up_block_types: tuple[str, ...] = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        only_cross_attention: bool | tuple[bool, ...] = False,
        block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280),
        layers_per_block: int | tuple[int, ...] = 2,
        downsample_padding: int = 1,
        mid_block_scale_factor: float = 1,
        dropout: float = 0.0,
        act_fn: str = "silu",
        norm_num_groups: int | None = 32,
        norm_eps: float = 1e-5,
        cross_attention_dim: int | tuple[int, ...] = 1280,
        transformer_layers_per_block: int | tuple[int | tuple[int, ...], ...] = 1,
        reverse_transformer_layers_per_block: tuple[int | tuple[int, ...], ...] | None = None,
        encoder_hid_dim: int | None = None,
        encoder_hid_dim_type: str | None = None,
        attention_head_dim: int | tuple[int | None, ...] = 8,
        num_attention_heads: int | tuple[int, ...] | None = None,
        dual_cross_attention: bool = False,
        use_linear_projection: bool = False,
        class_embed_type: str | None = None,
        addition_embed_type: str | None = None,
        addition_time_embed_dim: int | None = None,
        num_class_embeds: int | None = None,
        upcast_attention: bool = False,
        resnet_time_scale_shift: Literal["default", "scale_shift"] = "default",
        resnet_skip_time_act: bool = False,
        resnet_out_scale_factor: float = 1.0,
        time_embedding_type: Literal["positional", "fourier"] = "positional",
        time_embedding_dim: int | None = None,
        time_embedding_act_fn: str | None = None,
        timestep_post_act: str | None = None,
        time_cond_proj_dim: int | None = None,
        conv_in_kernel: int = 3,
        conv_out_kernel: int = 3,
        projection_class_embeddings_input_dim: int | None = None,
        attention_type: AttentionType = "default",
        class_embeddings_concat: bool = False,
        mid_block_only_cross_attention: bool | None = None,
        cross_attention_norm: CrossNorm | None = None,
        addition_embed_type_num_heads: int = 64,
    ) -> None:
        super().__init__()
        name, count = "UNet2DConditionModel", len(down_block_types)
        if num_attention_heads is not None:
            raise ConfigError(
                f"{name}: num_attention_heads is not to be used",
                remedy="give the number of heads as attention_head_dim, the name it has had since the first checkpoints",
            )
        require_length(name, count, "down_block_types", up_block_types=up_block_types)
        require_positive(name, sample_size=sample_size, out_channels=out_channels, conv_out_kernel=conv_out_kernel)
        self.sample_size = sample_size
        levels = self._build_encoder()
        depths_up = self._depths_up(levels.depths, reverse_transformer_layers_per_block)
        self.up_blocks = nn.ModuleList()
        for index, block in enumerate(up_block_types):
            level = count - 1 - index
            kind = find_block(CONDITIONAL_UP_BLOCKS, block)
            place = Place(
                levels.widths[level],
                levels.widths[level + 1],
                levels.layers[level] + 1,
                resamples=index < count - 1,
                previous_channels=levels.widths[min(level + 2, count)],
            )
            # Published checkpoints were trained with sizes of heads that are not reversed on the way up.
            options = levels.options(level, depths_up[index], levels.head_dims[index], levels.only_cross[level])
            self.up_blocks.append(kind.block(kind, place, options))

        self.conv_norm_out = self.conv_act = None
        if norm_num_groups is not None:
            self.conv_norm_out = group_norm(norm_num_groups, levels.widths[0], eps=norm_eps)
            self.conv_act = get_activation(act_fn)
        self.conv_out = nn.Conv2d(levels.widths[0], out_channels, kernel_size=conv_out_kernel, padding=(conv_out_kernel - 1) // 2)
        self._multiple = 2 ** (count - 1)

    @staticmethod
    def _depths_up(depths: Sequence[Any], given: Sequence[Any] | None) -> list[Any]:
        if given is not None:
            require_length("UNet2DConditionModel", len(depths), "up_block_types", reverse_transformer_layers_per_block=given)
            return list(given)
        if any(isinstance(depth, (list, tuple)) for depth in depths):
            raise ConfigError(
                "UNet2DConditionModel: a transformer_layers_per_block for each layer does not say what the way up has",
                remedy="give reverse_transformer_layers_per_block, with one entry more for each block",
            )
        return list(reversed(depths))

    # ---------------------------------------------------------------- FreeU

    def enable_freeu(self, s1: float, s2: float, b1: float, b2: float) -> None:
        """Reweight the two lowest resolutions on the way up (Si et al., 2023).

        Args:
            s1: Multiplies the low frequencies of the lowest skip connections, 0.9 for example.
            s2: The same one resolution up, 0.2 for example.
            b1: Multiplies half of the lowest features, 1.2 for example.
            b2: The same one resolution up, 1.4 for example.
        """
        for block, freeu in zip(list[Any](self.up_blocks), (FreeU(b1, s1), FreeU(b2, s2)), strict=False):
            if block.takes_freeu:
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
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        added_cond_kwargs: dict[str, Any] | None = None,
        down_block_additional_residuals: Sequence[Tensor] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        down_intrablock_additional_residuals: Sequence[Tensor] | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """Predict.

        Args:
            sample: The noisy sample (batch, in_channels, height, width).
            timestep: One for all, or (batch,).
            encoder_hidden_states: Context tokens (batch, tokens, cross_attention_dim or encoder_hid_dim).
            class_labels: (batch,), or embeddings (batch, size).
            timestep_cond: Added to the time embedding's input (batch, time_cond_proj_dim): a guidance scale, say.
            attention_mask: (batch, height * width at one resolution), 1 to keep, 0 to leave out, in self-attention.
            cross_attention_kwargs: For the processors; "gligen" holds boxes, "scale" is for adapters.
            added_cond_kwargs: What `addition_embed_type` and `encoder_hid_dim_type` need, by name.
            down_block_additional_residuals: Added to the skip connections, one for each (ControlNet); without
                `mid_block_additional_residual`, taken for `down_intrablock_additional_residuals`.
            mid_block_additional_residual: Added after the middle (ControlNet).
            down_intrablock_additional_residuals: Added to each block on the way down (T2I-Adapter).
            encoder_attention_mask: (batch, tokens), 1 to keep, 0 to leave out, in cross-attention.
            return_dict: Return an output object instead of a tuple.

        Returns:
            The prediction (batch, out_channels, height, width).

        Raises:
            InputError: Something is missing, or has a shape that does not fit.
        """
        with scaled((cross_attention_kwargs or {}).get("scale")):
            sample, emb = self._embed(sample, timestep, timestep_cond, encoder_hidden_states, class_labels, added_cond_kwargs)
            context = self._context(
                sample, encoder_hidden_states, added_cond_kwargs, attention_mask, encoder_attention_mask, cross_attention_kwargs
            )
            controls, adapters = down_block_additional_residuals, down_intrablock_additional_residuals
            if mid_block_additional_residual is None and adapters is None:
                controls, adapters = None, controls

            residuals = iter(adapters or ())
            sample, skips = self._down(self.conv_in(sample), emb, context, residuals)
            if controls is not None and mid_block_additional_residual is not None:
                skips = _added(skips, controls)
            if self.mid_block is not None:
                sample = self.mid_block(sample, emb, context)
                residual = next(residuals, None)
                if residual is not None and residual.shape == sample.shape:
                    sample = sample + residual
            if controls is not None and mid_block_additional_residual is not None:
                sample = sample + mid_block_additional_residual
            sample = self._up(sample, skips, emb, context)
            if self.conv_norm_out is not None and self.conv_act is not None:
                sample = self.conv_act(self.conv_norm_out(sample))
            sample = self.conv_out(sample)
            return UNet2DConditionOutput(sample) if return_dict else (sample,)

    def _up(self, sample: Tensor, skips: list[Tensor | None], emb: Tensor, context: Context) -> Tensor:
        # Where a size did not halve evenly, doubling would miss the skip connection's size.
        uneven = any(size % self._multiple for size in skips[0].shape[-2:]) if skips[0] is not None else False
        blocks: Any = self.up_blocks
        for block in blocks:
            count = len(block.resnets)
            own, skips = skips[-count:], skips[:-count]
            below = skips[-1] if uneven and skips and block is not self.up_blocks[-1] else None
            sample = block(sample, own, emb, context, None if below is None else below.shape[2:])
        return sample


def _added(skips: Sequence[Tensor | None], residuals: Sequence[Tensor]) -> list[Tensor | None]:
    if len(skips) != len(residuals):
        raise InputError(
            "down_block_additional_residuals must be one for each skip connection", found=len(residuals), expected=len(skips)
        )
    return [None if skip is None else skip + residual for skip, residual in zip(skips, residuals, strict=True)]
