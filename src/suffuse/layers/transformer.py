"""Transformers over the positions of a feature map, conditioned on context tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from suffuse.errors import ConfigError, InputError
from suffuse.layers.activations import GEGLU, GELU
from suffuse.layers.attention import Attention
from suffuse.layers.gradient_checkpointing import Recomputable
from suffuse.layers.grounding import GatedSelfAttentionDense
from suffuse.layers.normalization import group_norm

AttentionType = Literal["default", "gated", "gated-text-image"]


class Context(NamedTuple):
    """What one call of a model lets its attention layers see: the same for all of them.

    Attributes:
        encoder_hidden_states: Context tokens (batch, tokens, size); an adapter may make it a tuple.
        attention_mask: A bias on self-attention scores, (batch, 1, tokens).
        encoder_attention_mask: A bias on cross-attention scores, (batch, 1, context tokens).
        objects: Grounding tokens (batch, objects, size) for gated layers.
        options: Further keywords for the processors.
    """

    encoder_hidden_states: Any = None
    attention_mask: Tensor | None = None
    encoder_attention_mask: Tensor | None = None
    objects: Tensor | None = None
    options: dict[str, Any] = {}


NO_CONTEXT = Context()
FEED_FORWARD: dict[str, Callable[[int, int], nn.Module]] = {
    "geglu": GEGLU,
    "gelu": GELU,
    "gelu-approximate": partial(GELU, approximate="tanh"),
}
"""Name of the activation → the first layer, made of the sizes in and out."""


class FeedForward(nn.Module):
    """Two linear layers, the first gated, or otherwise activated, and four times as wide.

    Args:
        dim: Size of a token.
        dropout: Probability of zeroing between the layers.
        activation_fn: A name from `FEED_FORWARD`.

    Raises:
        ConfigError: There is no such activation.
    """

    def __init__(self, dim: int, dropout: float = 0.0, activation_fn: str = "geglu") -> None:
        super().__init__()
        if activation_fn not in FEED_FORWARD:
            raise ConfigError(f"no feed-forward layer has activation_fn={activation_fn!r}", expected=", ".join(FEED_FORWARD))
        first = FEED_FORWARD[activation_fn](dim, 4 * dim)
        self.net = nn.ModuleList([first, nn.Dropout(dropout), nn.Linear(4 * dim, dim)])

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map (…, dim) to (…, dim)."""
        for module in self.net:
            hidden_states = module(hidden_states)
        return hidden_states


class TransformerBlock(Recomputable):
    """A block with self-attention; it does nothing in a call that says so, in `skipped` among the options of attention.

    Attributes:
        attn1: The self-attention.
    """

    attn1: Attention


class BasicTransformerBlock(TransformerBlock):
    """Self-attention, cross-attention and a feed-forward layer, each after normalisation and added to its input.

    Args:
        dim: Size of a token.
        num_attention_heads: Heads of each attention layer.
        attention_head_dim: Size of a head.
        cross_attention_dim: Size of a context token; `None` for no cross-attention.
        only_cross_attention: Attend to the context in the first layer too.
        upcast_attention: Multiply queries and keys in float32.
        attention_type: "default", or gated self-attention over grounding tokens (Li et al., 2023, "GLIGEN", eq. 8).
        attention_bias: Whether queries, keys and values have biases.
        activation_fn: Of the feed-forward layer, a name from `FEED_FORWARD`.
        dropout: Probability of zeroing in each layer.
    """

    def __init__(
        self,
        dim: int,
        num_attention_heads: int,
        attention_head_dim: int,
        cross_attention_dim: int | None = None,
        only_cross_attention: bool = False,
        upcast_attention: bool = False,
        attention_type: AttentionType = "default",
        attention_bias: bool = False,
        activation_fn: str = "geglu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        heads: dict[str, Any] = {
            "heads": num_attention_heads,
            "dim_head": attention_head_dim,
            "upcast_attention": upcast_attention,
            "bias": attention_bias,
            "dropout": dropout,
        }
        self.only_cross_attention = only_cross_attention
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, cross_attention_dim if only_cross_attention else None, **heads)
        self.norm2 = None if cross_attention_dim is None else nn.LayerNorm(dim)
        self.attn2 = None if cross_attention_dim is None else Attention(dim, cross_attention_dim, **heads)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim, dropout, activation_fn)
        if attention_type != "default":
            self.fuser = GatedSelfAttentionDense(
                Attention(dim, heads=num_attention_heads, dim_head=attention_head_dim),
                FeedForward(dim),
                query_dim=dim,
                context_dim=cross_attention_dim or dim,
            )

    def forward(self, hidden_states: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        """Map (batch, tokens, dim) to the same shape."""
        if self in context.options.get("skipped", ()):
            return hidden_states
        seen = context.encoder_hidden_states if self.only_cross_attention else None
        attended = self.attn1(self.norm1(hidden_states), seen, context.attention_mask, **context.options)
        hidden_states = attended + hidden_states
        if context.objects is not None:
            hidden_states = self.fuser(hidden_states, context.objects)
        if self.attn2 is not None and self.norm2 is not None:
            tokens, mask = context.encoder_hidden_states, context.encoder_attention_mask
            hidden_states = self.attn2(self.norm2(hidden_states), tokens, mask, **context.options) + hidden_states
        return self.ff(self.norm3(hidden_states)) + hidden_states


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a feature map (Rombach et al., 2022, appendix E.2.1).

    Args:
        channels: Channels of the feature map.
        num_attention_heads: Heads; a head is `channels // num_attention_heads` wide.
        num_layers: Number of blocks.
        norm_num_groups: Groups of the normalisation at the entrance.
        use_linear_projection: Enter and leave by linear layers instead of 1x1 convolutions.
        **block: For `BasicTransformerBlock`.
    """

    def __init__(
        self,
        channels: int,
        num_attention_heads: int,
        num_layers: int = 1,
        norm_num_groups: int = 32,
        use_linear_projection: bool = False,
        **block: Any,
    ) -> None:
        super().__init__()
        if not 1 <= num_attention_heads <= channels:
            raise ConfigError(
                f"a transformer over {channels} channels cannot have that many heads",
                found=num_attention_heads,
                expected=f"1 to {channels}",
                remedy="change attention_head_dim, which in these configurations is the number of heads",
            )
        head_dim = channels // num_attention_heads
        inner = num_attention_heads * head_dim
        self.use_linear_projection = use_linear_projection
        self.norm = group_norm(norm_num_groups, channels, eps=1e-6)
        linear = use_linear_projection
        self.proj_in = nn.Linear(channels, inner) if linear else nn.Conv2d(channels, inner, kernel_size=1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(inner, num_attention_heads, head_dim, **block) for _ in range(num_layers)
        )
        self.proj_out = nn.Linear(inner, channels) if linear else nn.Conv2d(inner, channels, kernel_size=1)

    def forward(self, hidden_states: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        """Map (batch, channels, height, width) to the same shape."""
        residual = hidden_states
        hidden_states = self.norm(hidden_states)
        if self.use_linear_projection:
            hidden_states = self.proj_in(_to_tokens(hidden_states))
        else:
            hidden_states = _to_tokens(self.proj_in(hidden_states))
        for block in self.transformer_blocks:
            hidden_states = block(hidden_states, context)
        if self.use_linear_projection:
            hidden_states = _to_map(self.proj_out(hidden_states), residual)
        else:
            hidden_states = self.proj_out(_to_map(hidden_states, residual))
        return hidden_states + residual


class DualTransformer2DModel(nn.Module):
    """Two transformers, one for 77 text tokens and one for 257 image tokens, averaged (Xu et al., 2022).

    Args:
        channels: Channels of the feature map.
        num_attention_heads: Heads; a head is `channels // num_attention_heads` wide.
        **transformer: For `SpatialTransformer`.
    """

    transformer_index_for_condition = (1, 0)

    def __init__(self, channels: int, num_attention_heads: int, **transformer: Any) -> None:
        super().__init__()
        self.condition_lengths, self.mix_ratio = [77, 257], 0.5
        self.transformers = nn.ModuleList(
            SpatialTransformer(channels, num_attention_heads, **transformer) for _ in self.condition_lengths
        )

    def forward(self, hidden_states: Tensor, context: Context = NO_CONTEXT) -> Tensor:
        """Map (batch, channels, height, width) to the same shape; masks are not used.

        Raises:
            InputError: There are not tokens for both transformers.
        """
        first, second = self.condition_lengths
        tokens = context.encoder_hidden_states
        if tokens is None or tokens.shape[1] <= first:
            raise InputError(
                "dual cross-attention needs the tokens of two conditions, one after the other",
                found=None if tokens is None else f"{tokens.shape[1]} tokens",
                expected=f"{first} + {second} tokens in encoder_hidden_states",
            )
        changes = [
            self.transformers[index](hidden_states, Context(part, options=context.options)) - hidden_states
            for index, part in zip(
                self.transformer_index_for_condition, (tokens[:, :first], tokens[:, first : first + second]), strict=True
            )
        ]
        return changes[0] * self.mix_ratio + changes[1] * (1 - self.mix_ratio) + hidden_states


def _to_tokens(feature_map: Tensor) -> Tensor:
    batch, channels = feature_map.shape[:2]
    return feature_map.permute(0, 2, 3, 1).reshape(batch, -1, channels)


def _to_map(tokens: Tensor, like: Tensor) -> Tensor:
    batch, _, height, width = like.shape
    return tokens.reshape(batch, height, width, -1).permute(0, 3, 1, 2).contiguous()
