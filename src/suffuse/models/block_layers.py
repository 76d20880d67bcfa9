"""What blocks are made of: residual blocks and attention, by the options a network gives.

The names configurations use differ in a few settings; each setting has a function here, and the tables of
`unet_2d_blocks` choose among them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from suffuse.errors import ConfigError
from suffuse.layers.attention import Attention, CrossNorm
from suffuse.layers.normalization import AdaGroupNorm
from suffuse.layers.resnet import ResnetBlock2D
from suffuse.layers.transformer import AttentionType, Context, DualTransformer2DModel, SpatialTransformer

K_GROUP_SIZE = 32


@dataclass(frozen=True)
class BlockOptions:
    """What the blocks of a network are told; each kind of block takes what concerns it.

    Attributes:
        temb_channels: Size of the time embedding; `None` without.
        eps: Added to variances.
        act_fn: Name of the activation.
        groups: Groups of the normalisations; where `None`, a block that can finds its own.
        dropout: Probability of zeroing.
        time_scale_shift: How the embedding enters: "default", "scale_shift" or "spatial".
        skip_time_act: Project the embedding without activation.
        out_scale_factor: Divides the sum of a residual block's branches.
        head_dim: Size of a head, for attention that counts its heads from it; all channels if `None`.
        heads: Number of heads, for transformers.
        cross_attention_dim: Size of a context token.
        transformer_layers: Transformer blocks per layer, or one number for each layer.
        dual_cross_attention: Two transformers side by side.
        use_linear_projection: Linear layers at both ends of a transformer.
        only_cross_attention: No self-attention.
        upcast_attention: Scores in float32.
        attention_type: Gated attention over grounding tokens, or not.
        cross_attention_norm: Normalisation of context tokens.
        downsample_padding: Padding of the halving convolution.
        resample_type: "conv" or "resnet", for blocks that can do both.
        self_attention: For k-diffusion blocks: self-attention before cross-attention.
    """

    temb_channels: int | None
    eps: float = 1e-6
    act_fn: str = "silu"
    groups: int | None = 32
    dropout: float = 0.0
    time_scale_shift: str = "default"
    skip_time_act: bool = False
    out_scale_factor: float = 1.0
    head_dim: int | None = None
    heads: int = 1
    cross_attention_dim: int | None = None
    transformer_layers: int | Sequence[int] = 1
    dual_cross_attention: bool = False
    use_linear_projection: bool = False
    only_cross_attention: bool = False
    upcast_attention: bool = False
    attention_type: AttentionType = "default"
    cross_attention_norm: CrossNorm | None = None
    downsample_padding: int = 1
    resample_type: str = "conv"
    self_attention: bool = False


class Layer(NamedTuple):
    """Channels of one residual block: from the layer before, from a skip connection, out, and changes to its options."""

    before: int
    skip: int
    out: int
    changes: Mapping[str, Any] = {}


# ---------------------------------------------------------------- residual blocks


def plain(options: BlockOptions, layer: Layer, **changes: Any) -> ResnetBlock2D:
    """A residual block as the options say."""
    settings: dict[str, Any] = {
        "temb_channels": options.temb_channels,
        "groups": options.groups,
        "eps": options.eps,
        "dropout": options.dropout,
        "non_linearity": options.act_fn,
        "time_embedding_norm": options.time_scale_shift,
    }
    return ResnetBlock2D(layer.before + layer.skip, layer.out, **{**settings, **changes, **layer.changes})


def scaled(options: BlockOptions, layer: Layer, **changes: Any) -> ResnetBlock2D:
    """A residual block whose sum is divided."""
    return plain(options, layer, output_scale_factor=options.out_scale_factor, **changes)


def adjustable(options: BlockOptions, layer: Layer, **changes: Any) -> ResnetBlock2D:
    """A residual block whose sum is divided, and whose embedding may go without activation."""
    return scaled(options, layer, skip_time_act=options.skip_time_act, **changes)


def pyramid(options: BlockOptions, layer: Layer, **changes: Any) -> ResnetBlock2D:
    """A residual block of NCSN++ (Song et al., 2021, appendix H): groups of at least four channels, a sum over √2."""
    groups = {"groups": min((layer.before + layer.skip) // 4, 32), "groups_out": min(layer.out // 4, 32)}
    return plain(options, layer, output_scale_factor=math.sqrt(2.0), **{**groups, **changes})


def pyramid_with_attention(options: BlockOptions, layer: Layer, **changes: Any) -> ResnetBlock2D:
    """The same, with the groups that published checkpoints were trained with: `before + skip // 4`, no parentheses."""
    return pyramid(options, layer, **{"groups": min(layer.before + layer.skip // 4, 32), **changes})


def k_diffusion(options: BlockOptions, layer: Layer, **changes: Any) -> ResnetBlock2D:
    """A residual block of k-diffusion: normalisation under the embedding, groups of 32 channels."""
    settings: dict[str, Any] = {
        "time_embedding_norm": "ada_group",
        "groups": (layer.before + layer.skip) // K_GROUP_SIZE,
        "groups_out": layer.out // K_GROUP_SIZE,
        "conv_shortcut_bias": False,
    }
    return plain(options, layer, **{**settings, **changes})


# ---------------------------------------------------------------- attention


class KAttentionBlock(nn.Module):
    """Self-attention if wanted, then cross-attention, each after a normalisation under the embedding (k-diffusion)."""

    def __init__(self, options: BlockOptions, channels: int) -> None:
        super().__init__()
        head_dim, temb_channels = options.head_dim or channels, options.temb_channels or 0
        groups = max(1, channels // K_GROUP_SIZE)
        heads: dict[str, Any] = {"heads": channels // head_dim, "dim_head": head_dim, "bias": True}
        self.norm1 = self.attn1 = None
        if options.self_attention:
            self.norm1 = AdaGroupNorm(temb_channels, channels, groups)
            self.attn1 = Attention(channels, **heads)
        self.norm2 = AdaGroupNorm(temb_channels, channels, groups)
        self.attn2 = Attention(channels, options.cross_attention_dim, cross_attention_norm="layer_norm", **heads)

    def forward(self, hidden_states: Tensor, temb: Tensor | None, context: Context) -> Tensor:
        """Map (batch, channels, height, width) to the same shape."""
        tokens, mask = context.encoder_hidden_states, context.attention_mask
        if self.norm1 is not None and self.attn1 is not None:
            attended = self.attn1(self.norm1(hidden_states, temb), None, mask, **context.options)
            hidden_states = attended + hidden_states
        mask = mask if tokens is None else context.encoder_attention_mask
        return self.attn2(self.norm2(hidden_states, temb), tokens, mask, **context.options) + hidden_states


def make_self_attention(options: BlockOptions, channels: int, _: int, scale: float = 1.0) -> Attention:
    """Attention of positions to one another; `scale` divides its output."""
    spatial = options.time_scale_shift == "spatial"
    head_dim = options.head_dim or channels
    return Attention(
        channels,
        heads=channels // head_dim,
        dim_head=head_dim,
        rescale_output_factor=scale,
        eps=options.eps,
        norm_num_groups=None if spatial else options.groups,
        spatial_norm_dim=options.temb_channels if spatial else None,
        residual_connection=True,
        bias=True,
        upcast_softmax=True,
    )


def make_scaled_attention(options: BlockOptions, channels: int, index: int) -> Attention:
    """Self-attention whose output is divided as the residual blocks' are."""
    return make_self_attention(options, channels, index, options.out_scale_factor)


def make_pyramid_attention(options: BlockOptions, channels: int, index: int) -> Attention:
    """Self-attention of NCSN++."""
    return make_self_attention(replace(options, groups=32), channels, index, math.sqrt(2.0))


def make_transformer(options: BlockOptions, channels: int, index: int) -> SpatialTransformer | DualTransformer2DModel:
    """A transformer, or two."""
    shared: dict[str, Any] = {"norm_num_groups": options.groups, "cross_attention_dim": options.cross_attention_dim}
    if options.dual_cross_attention:
        return DualTransformer2DModel(channels, options.heads, **shared)
    layers = options.transformer_layers
    if not isinstance(layers, int) and index >= len(layers):
        raise ConfigError(
            "a block has more layers than its entry in transformer_layers_per_block",
            found=list(layers),
            expected="one number for all layers, or one for each; blocks on the way up have one layer more",
        )
    return SpatialTransformer(
        channels,
        options.heads,
        num_layers=layers if isinstance(layers, int) else layers[index],
        use_linear_projection=options.use_linear_projection,
        only_cross_attention=options.only_cross_attention,
        upcast_attention=options.upcast_attention,
        attention_type=options.attention_type,
        **shared,
    )


def make_added_attention(options: BlockOptions, channels: int, _: int) -> Attention:
    """Attention to context tokens and to positions at once."""
    head_dim = options.head_dim or channels
    return Attention(
        channels,
        cross_attention_dim=channels,
        heads=channels // head_dim,
        dim_head=head_dim,
        added_kv_proj_dim=options.cross_attention_dim,
        norm_num_groups=options.groups,
        residual_connection=True,
        bias=True,
        upcast_softmax=True,
        only_cross_attention=options.only_cross_attention,
        cross_attention_norm=options.cross_attention_norm,
    )


def make_k_attention(options: BlockOptions, channels: int, _: int) -> KAttentionBlock:
    """Attention of k-diffusion."""
    return KAttentionBlock(options, channels)


def apply_self_attention(attention: nn.Module, hidden_states: Tensor, temb: Tensor | None, _: Context) -> Tensor:
    """Run `Attention` over positions."""
    return attention(hidden_states, temb=temb)


def apply_transformer(attention: nn.Module, hidden_states: Tensor, _: Tensor | None, context: Context) -> Tensor:
    """Run a transformer."""
    return attention(hidden_states, context)


def apply_added_attention(attention: nn.Module, hidden_states: Tensor, _: Tensor | None, context: Context) -> Tensor:
    """Run `Attention` with added keys and values, under whichever mask there is."""
    mask = context.attention_mask
    if mask is None and context.encoder_hidden_states is not None:
        mask = context.encoder_attention_mask
    return attention(hidden_states, context.encoder_hidden_states, mask, **context.options)


def apply_k_attention(attention: nn.Module, hidden_states: Tensor, temb: Tensor | None, context: Context) -> Tensor:
    """Run attention of k-diffusion."""
    return attention(hidden_states, temb, context)


class AttentionKind(NamedTuple):
    """How attention is made, `(options, channels, index)`, and run, `(attention, hidden_states, temb, context)`."""

    make: Callable[[BlockOptions, int, int], nn.Module]
    apply: Callable[[nn.Module, Tensor, Tensor | None, Context], Tensor]
    crosses: bool = True


SELF = AttentionKind(make_self_attention, apply_self_attention, crosses=False)
SCALED_SELF = AttentionKind(make_scaled_attention, apply_self_attention, crosses=False)
PYRAMID_SELF = AttentionKind(make_pyramid_attention, apply_self_attention, crosses=False)
TRANSFORMER = AttentionKind(make_transformer, apply_transformer)
ADDED = AttentionKind(make_added_attention, apply_added_attention)
K_CROSS = AttentionKind(make_k_attention, apply_k_attention)
