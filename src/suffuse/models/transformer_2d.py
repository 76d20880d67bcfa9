"""Transformers over the patches of latents (Peebles and Xie, 2023, "Scalable diffusion models with transformers")."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from suffuse.configuration import ConfigMixin, register_to_config
from suffuse.errors import ConfigError, InputError
from suffuse.layers.attention import Attention
from suffuse.layers.embeddings import TimestepEmbedding, Timesteps
from suffuse.layers.transformer import FeedForward, TransformerBlock
from suffuse.models.attention_services import AttentionServices
from suffuse.models.model import ModelMixin
from suffuse.models.sizes import require_positive
from suffuse.outputs import BaseOutput

FREQUENCIES = 256
"""Sines and cosines of a timestep."""


@dataclass
class Transformer2DModelOutput(BaseOutput):
    """`sample`: the prediction (batch, out_channels, height, width)."""

    sample: Tensor


# ---------------------------------------------------------------- layers


@lru_cache(maxsize=8)
def sines_of_places(rows: int, columns: int, width: int, trained: int) -> Tensor:
    """Sines and cosines of each place of a grid, (rows * columns, width): half of them of its column, half of its row.

    Args:
        rows: Of the grid.
        columns: Of the grid.
        width: Size of an embedding, a multiple of 4.
        trained: Rows and columns of the grid a model was trained on: others are stretched to it.
    """
    frequencies = 1.0 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4))

    def along(count: int) -> Tensor:
        angles = torch.outer(torch.arange(count, dtype=torch.float32) / (count / trained), frequencies)
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    across, down = along(columns)[None].expand(rows, -1, -1), along(rows)[:, None].expand(-1, columns, -1)
    return torch.cat([across, down], dim=-1).reshape(rows * columns, width).float()


class PatchEmbed(nn.Module):
    """A map cut into square patches, each a token that knows its place (Dosovitskiy et al., 2021).

    Args:
        size: Rows and columns of the maps it was trained on.
        patch_size: Rows and columns of a patch.
        in_channels: Of the map.
        width: Size of a token.
    """

    def __init__(self, size: int, patch_size: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.trained = size // patch_size
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, sample: Tensor) -> Tensor:
        """Map (batch, channels, height, width) to (batch, patches, width)."""
        patches = self.proj(sample)
        places = sines_of_places(patches.shape[-2], patches.shape[-1], patches.shape[1], self.trained)
        return (patches.flatten(2).transpose(1, 2) + places.to(patches.device)).to(patches.dtype)


class LabelEmbedding(nn.Module):
    """A table of classes, with one more for none."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(count + 1, width)

    def forward(self, labels: Tensor) -> Tensor:
        """Map (batch,) to (batch, width)."""
        return self.embedding_table(labels)


class TimestepLabelEmbedding(nn.Module):
    """The sum of a timestep's and a class's embedding."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.time_proj = Timesteps(FREQUENCIES, flip_sin_to_cos=True, downscale_freq_shift=1)
        self.timestep_embedder = TimestepEmbedding(FREQUENCIES, width)
        self.class_embedder = LabelEmbedding(classes, width)

    def forward(self, timestep: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
        """Map (batch,) and (batch,) to (batch, width)."""
        return self.timestep_embedder(self.time_proj(timestep).to(dtype)) + self.class_embedder(labels)


class AdaLayerNormZero(nn.Module):
    """Layer normalisation scaled and shifted by a condition, which also says how much of two layers counts (section 3.2)."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.emb = TimestepLabelEmbedding(classes, width)
        self.linear = nn.Linear(width, 6 * width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)

    def forward(self, tokens: Tensor, timestep: Tensor, labels: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The tokens normalised; and, each (batch, 1, width): the gate of attention, shift, scale and gate of what follows."""
        condition = self.linear(F.silu(self.emb(timestep, labels, tokens.dtype)))[:, None]
        shift, scale, *further = condition.chunk(6, dim=-1)
        return self.norm(tokens) * (1 + scale) + shift, tuple(further)


class AdaptiveBlock(TransformerBlock):
    """Self-attention and a feed-forward layer under a timestep and a class."""

    def __init__(
        self, width: int, classes: int, affine: bool, eps: float, feed: dict[str, Any], attention: dict[str, Any]
    ) -> None:
        super().__init__()
        self.norm1 = AdaLayerNormZero(width, classes)
        self.attn1 = Attention(width, **attention)
        self.norm3 = nn.LayerNorm(width, elementwise_affine=affine, eps=eps)
        self.ff = FeedForward(width, **feed)

    def forward(self, tokens: Tensor, timestep: Tensor, labels: Tensor, options: dict[str, Any]) -> Tensor:
        """Map (batch, tokens, width) to the same."""
        if self in options.get("skipped", ()):
            return tokens
        normalised, (gate, shift, scale, feed_gate) = self.norm1(tokens, timestep, labels)
        tokens = gate * self.attn1(normalised, **options) + tokens
        return feed_gate * self.ff(self.norm3(tokens) * (1 + scale) + shift) + tokens


# ---------------------------------------------------------------- models


class PatchTransformer(AttentionServices, ModelMixin):
    """What the two classes below are, which differ in their signatures."""

    def build(self) -> None:
        """Make the layers that the configuration describes.

        Raises:
            ConfigError: It describes none.
        """
        name, config = type(self).__name__, self.config
        if config.norm_type != "ada_norm_zero" or config.num_embeds_ada_norm is None or not config.patch_size:
            found = {key: config[key] for key in ("norm_type", "num_embeds_ada_norm", "patch_size")}
            expected = 'norm_type="ada_norm_zero", the number of classes in num_embeds_ada_norm, and a patch_size'
            raise ConfigError(f"{name} is built here for patches and classes only (DiT)", found=found, expected=expected)
        sizes = ("num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "num_layers", "sample_size")
        require_positive(name, patch_size=config.patch_size, **{key: config[key] for key in sizes})
        width = config.num_attention_heads * config.attention_head_dim
        if width % 4 or config.in_channels is None or config.sample_size is None:
            raise ConfigError(
                f"{name} cannot be built of these sizes",
                found={key: config[key] for key in sizes},
                expected="in_channels, sample_size, and heads whose sizes add up to a multiple of 4",
            )
        self.out_channels = config.in_channels if config.out_channels is None else config.out_channels
        self.pos_embed = PatchEmbed(config.sample_size, config.patch_size, config.in_channels, width)
        attention = {"heads": config.num_attention_heads, "dim_head": config.attention_head_dim, "dropout": config.dropout}
        attention |= {"bias": config.attention_bias, "upcast_attention": config.upcast_attention}
        feed = {"dropout": config.dropout, "activation_fn": config.activation_fn}
        norm = (config.norm_elementwise_affine, config.norm_eps)
        self.transformer_blocks = nn.ModuleList(
            AdaptiveBlock(width, config.num_embeds_ada_norm, *norm, feed, attention) for _ in range(config.num_layers)
        )
        self.norm_out = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.proj_out_1 = nn.Linear(width, 2 * width)
        self.proj_out_2 = nn.Linear(width, config.patch_size**2 * self.out_channels)

    def predict(
        self, sample: Tensor, timestep: Tensor | int | None, labels: Tensor | None, options: dict[str, Any] | None
    ) -> Tensor:
        """The prediction (batch, out_channels, height, width).

        Raises:
            InputError: Something is missing, or of a shape that does not fit.
        """
        patch, channels = self.config.patch_size, self.config.in_channels
        if sample.ndim != 4 or sample.shape[1] != channels or sample.shape[-1] % patch or sample.shape[-2] % patch:
            raise InputError(
                "hidden_states have the wrong shape for this transformer",
                found=tuple(sample.shape),
                expected=f"(batch, {channels}, height, width), the last two multiples of {patch}",
            )
        if timestep is None or labels is None:
            raise InputError(
                "this transformer needs a timestep and a class for each sample", remedy="pass timestep, class_labels"
            )
        if len(labels) != len(sample):
            raise InputError(f"class_labels: {len(labels)} given for {len(sample)} samples", expected="one for each")
        timesteps = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(len(sample))
        tokens = self.pos_embed(sample)
        blocks = cast("list[AdaptiveBlock]", list(self.transformer_blocks))
        for block in blocks:
            tokens = block(tokens, timesteps, labels, options or {})
        condition = blocks[0].norm1.emb(timesteps, labels, tokens.dtype)
        shift, scale = self.proj_out_1(F.silu(condition))[:, None].chunk(2, dim=-1)
        patches = self.proj_out_2(self.norm_out(tokens) * (1 + scale) + shift)
        rows, columns = sample.shape[-2] // patch, sample.shape[-1] // patch
        patches = patches.reshape(-1, rows, columns, patch, patch, self.out_channels)
        return torch.einsum("nhwpqc->nchpwq", patches).reshape(-1, self.out_channels, rows * patch, columns * patch)


class Transformer2DModel(PatchTransformer):
    """A transformer under the name and the keywords by which the checkpoints of DiT know it.

    Of what this class can be in diffusers, it is the transformer over patches under classes: `norm_type="ada_norm_zero"` with a
    `patch_size`. Transformers inside of UNets are `suffuse.layers.transformer.SpatialTransformer`.

    Args:
        num_attention_heads: Heads of each attention layer.
        attention_head_dim: Size of a head.
        in_channels: Channels of the latents.
        out_channels: Channels of the prediction; those of the latents if `None`.
        num_layers: Number of blocks.
        dropout: Probability of zeroing in them.
        norm_num_groups: Not used by patches, like the others that are not told here.
        cross_attention_dim: Must be `None`.
        attention_bias: Whether queries, keys and values have biases.
        sample_size: Rows and columns of the latents it was trained on.
        num_vector_embeds: Must be `None`.
        patch_size: Rows and columns of a patch.
        activation_fn: Of the feed-forward layers.
        num_embeds_ada_norm: Number of classes.
        use_linear_projection: Not used.
        only_cross_attention: Not used.
        double_self_attention: Must be False.
        upcast_attention: Multiply queries and keys in float32.
        norm_type: Must be "ada_norm_zero".
        norm_elementwise_affine: Whether the inner normalisation scales by weights, too.
        norm_eps: Added to variances.
        attention_type: Must be "default".
        caption_channels: Must be `None`.
        interpolation_scale: Not used.
        use_additional_conditions: Not used.

    Raises:
        ConfigError: The values do not make such a network; the message says which.
    """

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 88,
        in_channels: int | None = None,
        out_channels: int | None = None,
        num_layers: int = 1,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        cross_attention_dim: int | None = None,
        attention_bias: bool = False,
        sample_size: int | None = None,
        num_vector_embeds: int | None = None,
        patch_size: int | None = None,
        activation_fn: str = "geglu",
        num_embeds_ada_norm: int | None = None,
        use_linear_projection: bool = False,
        only_cross_attention: bool = False,
        double_self_attention: bool = False,
        upcast_attention: bool = False,
        norm_type: str = "layer_norm",
        norm_elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
        attention_type: str = "default",
        caption_channels: int | None = None,
        interpolation_scale: float | None = None,
        use_additional_conditions: bool | None = None,
    ) -> None:
        super().__init__()
        wanted: dict[str, Any] = dict.fromkeys(("cross_attention_dim", "num_vector_embeds", "caption_channels"))
        wanted |= {"double_self_attention": False, "attention_type": "default"}
        other = {name: self.config[name] for name, value in wanted.items() if self.config[name] != value}
        if other:
            raise ConfigError("Transformer2DModel is built here for patches and classes only (DiT)", found=other, expected=wanted)
        self.build()

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        timestep: Tensor | int | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        class_labels: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict.

        Args:
            hidden_states: Noisy latents (batch, in_channels, height, width).
            encoder_hidden_states: Must be `None`: there is no cross-attention.
            timestep: One for all, or (batch,).
            added_cond_kwargs: Not used.
            class_labels: (batch,); the number of classes stands for none.
            cross_attention_kwargs: Keywords for the attention processors.
            attention_mask: Must be `None`.
            encoder_attention_mask: Must be `None`.
            return_dict: Return an output object instead of a tuple.

        Returns:
            The prediction (batch, out_channels, height, width).

        Raises:
            InputError: Something is missing, not taken, or has a shape that does not fit.
        """
        if encoder_hidden_states is not None or attention_mask is not None or encoder_attention_mask is not None:
            raise InputError("this transformer attends to nothing but its own patches", remedy="leave tokens and masks out")
        sample = self.predict(hidden_states, timestep, class_labels, cross_attention_kwargs)
        return Transformer2DModelOutput(sample) if return_dict else (sample,)


class DiTTransformer2DModel(PatchTransformer):
    """The same under its later name.

    Args:
        num_attention_heads: Heads of each attention layer.
        attention_head_dim: Size of a head.
        in_channels: Channels of the latents.
        out_channels: Channels of the prediction; those of the latents if `None`.
        num_layers: Number of blocks.
        dropout: Probability of zeroing in them.
        norm_num_groups: Not used.
        attention_bias: Whether queries, keys and values have biases.
        sample_size: Rows and columns of the latents it was trained on.
        patch_size: Rows and columns of a patch.
        activation_fn: Of the feed-forward layers.
        num_embeds_ada_norm: Number of classes.
        upcast_attention: Multiply queries and keys in float32.
        norm_type: Must be "ada_norm_zero".
        norm_elementwise_affine: Whether the inner normalisation scales by weights, too.
        norm_eps: Added to variances.

    Raises:
        ConfigError: The values do not make such a network; the message says which.
    """

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int | None = None,
        num_layers: int = 28,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        attention_bias: bool = True,
        sample_size: int = 32,
        patch_size: int = 2,
        activation_fn: str = "gelu-approximate",
        num_embeds_ada_norm: int | None = 1000,
        upcast_attention: bool = False,
        norm_type: str = "ada_norm_zero",
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.build()

    @classmethod
    def compatible_classes(cls) -> list[type[ConfigMixin]]:
        """The class of the older checkpoints."""
        return [Transformer2DModel]

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | int | None = None,
        class_labels: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict, as `Transformer2DModel.forward` does."""
        sample = self.predict(hidden_states, timestep, class_labels, cross_attention_kwargs)
        return Transformer2DModelOutput(sample) if return_dict else (sample,)
