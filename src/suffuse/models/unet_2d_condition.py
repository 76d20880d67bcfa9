"""The UNet of latent diffusion: a prediction for a noisy sample, under a timestep and context tokens.

Ronneberger et al. (2015) for the shape, Ho et al. (2020) for the time embedding, Rombach et al. (2022) for
cross-attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from suffuse.configuration import register_to_config
from suffuse.errors import ConfigError, InputError, unknown_argument
from suffuse.layers.activations import get_activation
from suffuse.layers.attention import CrossNorm
from suffuse.layers.embeddings import GaussianFourierProjection, TimestepEmbedding, Timesteps
from suffuse.layers.freeu import FreeU
from suffuse.layers.grounding import GLIGENTextBoundingboxProjection
from suffuse.layers.normalization import group_norm
from suffuse.layers.transformer import AttentionType, Context
from suffuse.models.attention_services import AttentionServices
from suffuse.models.block_layers import BlockOptions
from suffuse.models.model import ModelMixin
from suffuse.models.sizes import per_block, require_length, require_positive
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
from suffuse.models.unet_2d_conditioning import (
    ADDED_EMBEDDINGS,
    CLASS_EMBEDDINGS,
    CONTEXT_PROJECTIONS,
    Sizes,
    embed_added,
    make,
    project_context,
)
from suffuse.outputs import BaseOutput

# The blocks of NCSN++ carry an image along, which this model has no place for.
CONDITIONAL_DOWN_BLOCKS = {name: kind for name, kind in DOWN_BLOCKS.items() if kind.block is not SkipDownBlock}
CONDITIONAL_UP_BLOCKS = {name: kind for name, kind in UP_BLOCKS.items() if kind.block is not SkipUpBlock}


@dataclass
class UNet2DConditionOutput(BaseOutput):
    """`sample`: the prediction (batch, out_channels, height, width)."""

    sample: Tensor


class UNet2DConditionModel(AttentionServices, ModelMixin):
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
        require_length(name, count, "down_block_types", up_block_types=up_block_types, block_out_channels=block_out_channels)
        require_positive(
            name,
            sample_size=sample_size,
            in_channels=in_channels,
            out_channels=out_channels,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            cross_attention_dim=cross_attention_dim,
            attention_head_dim=attention_head_dim,
            transformer_layers_per_block=transformer_layers_per_block,
            conv_in_kernel=conv_in_kernel,
            conv_out_kernel=conv_out_kernel,
        )
        layers = per_block(name, "layers_per_block", layers_per_block, count)
        heads = per_block(name, "attention_head_dim", attention_head_dim, count)
        context_dims = per_block(name, "cross_attention_dim", cross_attention_dim, count)
        only_cross = per_block(name, "only_cross_attention", only_cross_attention, count)
        depths = per_block(name, "transformer_layers_per_block", transformer_layers_per_block, count)
        depths_up = self._depths_up(depths, reverse_transformer_layers_per_block)

        self.sample_size, first = sample_size, block_out_channels[0]
        self.conv_in = nn.Conv2d(in_channels, first, kernel_size=conv_in_kernel, padding=(conv_in_kernel - 1) // 2)
        if time_embedding_type == "fourier":
            time_embed_dim = timestep_input_dim = time_embedding_dim or first * 2
            if time_embed_dim % 2:
                raise ConfigError(f"{name}: the fourier time embedding is odd", found=time_embed_dim, expected="an even size")
            self.time_proj = GaussianFourierProjection(time_embed_dim // 2, log=False, flip_sin_to_cos=flip_sin_to_cos)
        else:
            time_embed_dim, timestep_input_dim = time_embedding_dim or first * 4, first
            self.time_proj = Timesteps(first, flip_sin_to_cos, freq_shift)
        self.time_embedding = TimestepEmbedding(timestep_input_dim, time_embed_dim, act_fn, timestep_post_act, time_cond_proj_dim)
        self.time_embed_act = None if time_embedding_act_fn is None else get_activation(time_embedding_act_fn)

        if encoder_hid_dim is not None and encoder_hid_dim_type is None:
            encoder_hid_dim_type = "text_proj"
            self.register_to_config(encoder_hid_dim_type=encoder_hid_dim_type)
        sizes = Sizes(
            time_embed_dim=time_embed_dim,
            timestep_input_dim=timestep_input_dim,
            cross_attention_dim=context_dims[0],
            act_fn=act_fn,
            encoder_hid_dim=encoder_hid_dim,
            projection_class_embeddings_input_dim=projection_class_embeddings_input_dim,
            addition_time_embed_dim=addition_time_embed_dim,
            addition_embed_type_num_heads=addition_embed_type_num_heads,
        )
        self.encoder_hid_proj = make("encoder_hid_dim_type", CONTEXT_PROJECTIONS, encoder_hid_dim_type, sizes)
        self.class_embedding = make("class_embed_type", CLASS_EMBEDDINGS, class_embed_type, sizes)
        if class_embed_type is None and num_class_embeds is not None:
            self.class_embedding = nn.Embedding(num_class_embeds, time_embed_dim)
        self.add_embedding = make("addition_embed_type", ADDED_EMBEDDINGS, addition_embed_type, sizes)
        self.add_time_proj = None
        if addition_embed_type == "text_time":
            self.add_time_proj = Timesteps(addition_time_embed_dim or 0, flip_sin_to_cos, freq_shift)
        if attention_type != "default":
            features = "text-only" if attention_type == "gated" else "text-image"
            self.position_net = GLIGENTextBoundingboxProjection(context_dims[0], context_dims[0], features)

        options = BlockOptions(
            temb_channels=time_embed_dim * 2 if class_embeddings_concat else time_embed_dim,
            eps=norm_eps,
            act_fn=act_fn,
            groups=norm_num_groups,
            dropout=dropout,
            time_scale_shift=resnet_time_scale_shift,
            skip_time_act=resnet_skip_time_act,
            out_scale_factor=resnet_out_scale_factor,
            dual_cross_attention=dual_cross_attention,
            use_linear_projection=use_linear_projection,
            upcast_attention=upcast_attention,
            attention_type=attention_type,
            cross_attention_norm=cross_attention_norm,
            downsample_padding=downsample_padding,
        )

        def at(level: int, depth: Any, head_dim: int | None, only: bool) -> BlockOptions:
            return replace(
                options,
                heads=heads[level] or 0,
                head_dim=head_dim,
                cross_attention_dim=context_dims[level],
                transformer_layers=depth,
                only_cross_attention=only,
            )

        widths = [first, *block_out_channels]
        self.down_blocks = nn.ModuleList()
        for level, block in enumerate(down_block_types):
            kind = find_block(CONDITIONAL_DOWN_BLOCKS, block)
            place = Place(widths[level], widths[level + 1], layers[level], resamples=level < count - 1)
            self.down_blocks.append(kind.block(kind, place, at(level, depths[level], heads[level], only_cross[level])))

        self.mid_block = None
        if mid_block_type is not None:
            only = mid_block_only_cross_attention
            if only is None:
                only = only_cross_attention is True
            self.mid_block = self._middle(mid_block_type, widths[-1], mid_block_scale_factor, at(-1, depths[-1], heads[-1], only))

        self.up_blocks = nn.ModuleList()
        for index, block in enumerate(up_block_types):
            level = count - 1 - index
            kind = find_block(CONDITIONAL_UP_BLOCKS, block)
            place = Place(
                widths[level],
                widths[level + 1],
                layers[level] + 1,
                resamples=index < count - 1,
                previous_channels=widths[min(level + 2, count)],
            )
            # Published checkpoints were trained with sizes of heads that are not reversed on the way up.
            self.up_blocks.append(kind.block(kind, place, at(level, depths_up[index], heads[index], only_cross[level])))

        self.conv_norm_out = self.conv_act = None
        if norm_num_groups is not None:
            self.conv_norm_out = group_norm(norm_num_groups, first, eps=norm_eps)
            self.conv_act = get_activation(act_fn)
        self.conv_out = nn.Conv2d(first, out_channels, kernel_size=conv_out_kernel, padding=(conv_out_kernel - 1) // 2)
        self._multiple = 2 ** (count - 1)
        self._context_dims = frozenset(context_dims)

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

    @staticmethod
    def _middle(name: str, channels: int, scale: float, options: BlockOptions) -> MidBlock:
        kind, options = find_block(MID_BLOCKS, name), replace(options, out_scale_factor=scale)
        if name == "UNetMidBlock2D":
            return MidBlock(kind._replace(attention=None), channels, options, num_layers=0)
        if name == "UNetMidBlock2DCrossAttn":
            options = replace(options, only_cross_attention=False)
        return MidBlock(kind, channels, options)

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
        self._check_sample(sample)
        if self.config.center_input_sample:
            sample = 2 * sample - 1.0
        emb = self.time_embedding(self.get_time_embed(sample, timestep), timestep_cond)
        emb, hint = self._add_to_time(sample, emb, encoder_hidden_states, class_labels, added_cond_kwargs)
        if hint is not None:
            sample = torch.cat([sample, hint], dim=1)
        tokens = project_context(
            self.config.encoder_hid_dim_type,
            self.encoder_hid_proj,
            encoder_hidden_states,
            added_cond_kwargs,
            getattr(self, "text_encoder_hid_proj", None),
        )
        context = self._context(sample, tokens, attention_mask, encoder_attention_mask, cross_attention_kwargs)
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

    def get_time_embed(self, sample: Tensor, timestep: Tensor | float | int) -> Tensor:
        """Sines and cosines of the timestep, one row for each sample.

        Raises:
            InputError: There are neither one timestep nor as many as samples.
        """
        if not isinstance(timestep, Tensor):
            wide = sample.device.type != "mps"
            real, whole = (torch.float64, torch.int64) if wide else (torch.float32, torch.int32)
            kind = real if isinstance(timestep, float) else whole
            timestep = torch.tensor([timestep], dtype=kind, device=sample.device)
        timestep = timestep.reshape(-1).to(sample.device)
        if len(timestep) not in (1, len(sample)):
            raise InputError("timestep", found=f"{len(timestep)} timesteps", expected=f"one, or {len(sample)} as samples")
        return self.time_proj(timestep.expand(len(sample))).to(sample.dtype)

    def _add_to_time(
        self, sample: Tensor, emb: Tensor, text: Tensor, labels: Tensor | None, added: dict[str, Any] | None
    ) -> tuple[Tensor, Tensor | None]:
        hint = None
        if self.class_embedding is not None:
            if labels is None:
                raise InputError("this UNet is conditioned on classes", remedy="give class_labels")
            if self.config.class_embed_type == "timestep":
                labels = self.time_proj(labels).to(sample.dtype)
            classes = self.class_embedding(labels).to(sample.dtype)
            emb = torch.cat([emb, classes], dim=-1) if self.config.class_embeddings_concat else emb + classes
        if self.add_embedding is not None:
            kind = self.config.addition_embed_type
            more, hint = embed_added(kind, self.add_embedding, self.add_time_proj, emb, text, added)
            emb = emb + more
        return emb if self.time_embed_act is None else self.time_embed_act(emb), hint

    def _context(
        self, sample: Tensor, tokens: Any, mask: Tensor | None, token_mask: Tensor | None, options: dict[str, Any] | None
    ) -> Context:
        if isinstance(tokens, Tensor):
            self._check_tokens(sample, tokens)
        options = options or {}
        self.check_cross_attention_kwargs(options)
        boxes = options.get("gligen")
        objects = None if boxes is None else self.position_net(**boxes)
        rest = {name: value for name, value in options.items() if name not in ("gligen", "scale")}
        return Context(tokens, _bias(mask, sample.dtype), _bias(token_mask, sample.dtype), objects, rest)

    def _down(
        self, sample: Tensor, emb: Tensor, context: Context, residuals: Iterator[Tensor]
    ) -> tuple[Tensor, list[Tensor | None]]:
        skips: list[Tensor | None] = [sample]
        for block in list[Any](self.down_blocks):
            residual = next(residuals, None)
            if block.has_cross_attention:
                sample, made = block(sample, emb, context, residual)
            else:
                sample, made = block(sample, emb)
                if residual is not None:
                    whole = sample
                    sample = sample + residual
                    made = tuple(sample if skip is whole else skip for skip in made)
            skips += made
        return sample, skips

    def _up(self, sample: Tensor, skips: list[Tensor | None], emb: Tensor, context: Context) -> Tensor:
        # Where a size did not halve evenly, doubling would miss the skip connection's size.
        uneven = any(size % self._multiple for size in skips[0].shape[-2:]) if skips[0] is not None else False
        for block in list[Any](self.up_blocks):
            count = len(block.resnets)
            own, skips = skips[-count:], skips[:-count]
            below = skips[-1] if uneven and skips and block is not self.up_blocks[-1] else None
            sample = block(sample, own, emb, context, None if below is None else below.shape[2:])
        return sample

    # ---------------------------------------------------------------- checks

    def _check_sample(self, sample: Tensor) -> None:
        channels = self.conv_in.in_channels - (4 if self.config.addition_embed_type == "image_hint" else 0)
        if sample.ndim != 4 or sample.shape[1] != channels:
            raise InputError(
                "sample has the wrong shape for this UNet",
                found=tuple(sample.shape),
                expected=f"(batch, {channels}, height, width)",
            )

    def _check_tokens(self, sample: Tensor, tokens: Tensor) -> None:
        if tokens.ndim != 3 or tokens.shape[0] != sample.shape[0] or tokens.shape[2] not in self._context_dims:
            size = " or ".join(str(dim) for dim in sorted(self._context_dims))
            raise InputError(
                "encoder_hidden_states have the wrong shape for this UNet and sample",
                found=tuple(tokens.shape),
                expected=f"({sample.shape[0]}, tokens, {size})",
            )

    def check_cross_attention_kwargs(self, options: dict[str, Any]) -> None:
        """Raise unless `forward` takes these `cross_attention_kwargs`.

        Raises:
            UnknownArgumentError: No attention layer has such a keyword.
            InputError: Boxes, for a model without gated attention.
        """
        for name in options.keys() - {"gligen", "scale"}:
            if not any(layer.takes(name) for layer in self.attention_layers().values()):
                raise unknown_argument("cross_attention_kwargs", name, ["scale", "gligen"])
        if options.get("gligen") is not None and self.config.attention_type == "default":
            raise InputError(
                "this UNet cannot be grounded in boxes: it has no gated attention",
                remedy='leave "gligen" out of cross_attention_kwargs, or use a model with attention_type="gated"',
            )


def _added(skips: Sequence[Tensor | None], residuals: Sequence[Tensor]) -> list[Tensor | None]:
    if len(skips) != len(residuals):
        raise InputError(
            "down_block_additional_residuals must be one for each skip connection", found=len(residuals), expected=len(skips)
        )
    return [None if skip is None else skip + residual for skip, residual in zip(skips, residuals, strict=True)]


def _bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """1 to keep and 0 to leave out → a bias on scores with a dimension for queries."""
    return None if mask is None else ((1 - mask.to(dtype)) * -10000.0).unsqueeze(1)
