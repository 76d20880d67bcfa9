"""The way down and through the middle of a conditional UNet, with the time embedding and what is added to it.

A UNet goes up again from there; a ControlNet (Zhang et al., 2023) hands on what it made. Both read the same entries of
their configurations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from suffuse.errors import ConfigError, InputError, unknown_argument
from suffuse.layers.activations import get_activation
from suffuse.layers.embeddings import GaussianFourierProjection, TimestepEmbedding, Timesteps
from suffuse.layers.grounding import GLIGENTextBoundingboxProjection
from suffuse.layers.transformer import Context
from suffuse.models.attention_services import AttentionServices
from suffuse.models.block_layers import BlockOptions
from suffuse.models.image_adapter import image_adapters_of
from suffuse.models.model import ModelMixin
from suffuse.models.sizes import per_block, require_length, require_positive
from suffuse.models.unet_2d_blocks import DOWN_BLOCKS, MID_BLOCKS, MidBlock, Place, SkipDownBlock, find_block
from suffuse.models.unet_2d_conditioning import (
    ADDED_EMBEDDINGS,
    CLASS_EMBEDDINGS,
    CONTEXT_PROJECTIONS,
    Sizes,
    embed_added,
    make,
    project_context,
)

# The blocks of NCSN++ carry an image along, which this model has no place for.
CONDITIONAL_DOWN_BLOCKS = {name: kind for name, kind in DOWN_BLOCKS.items() if kind.block is not SkipDownBlock}

FIXED: dict[str, Any] = {
    "attention_type": "default",
    "center_input_sample": False,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "cross_attention_norm": None,
    "dropout": 0.0,
    "dual_cross_attention": False,
    "mid_block_only_cross_attention": None,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
}
"""What a model has whose configuration cannot say otherwise."""

BLOCK_OPTIONS: dict[str, str] = {
    "eps": "norm_eps",
    "act_fn": "act_fn",
    "groups": "norm_num_groups",
    "dropout": "dropout",
    "time_scale_shift": "resnet_time_scale_shift",
    "skip_time_act": "resnet_skip_time_act",
    "out_scale_factor": "resnet_out_scale_factor",
    "dual_cross_attention": "dual_cross_attention",
    "use_linear_projection": "use_linear_projection",
    "upcast_attention": "upcast_attention",
    "attention_type": "attention_type",
    "cross_attention_norm": "cross_attention_norm",
    "downsample_padding": "downsample_padding",
}
"""What blocks are told → the entry of the configuration that says it."""


class Levels:
    """What a configuration says of each resolution, the first first.

    Attributes:
        count: Number of resolutions.
        widths: Channels into each, and those out of the last.
        layers: Layers of each block on the way down.
        depths: Transformer blocks of each.
        heads: Heads of each.
        head_dims: Sizes of a head, for attention that counts its heads from it.
        only_cross: Whether each has no self-attention.
        context_dims: Sizes of a context token.
        time_dim: Size of the time embedding.

    Raises:
        ConfigError: A number is less than one, or a list has another length.
    """

    def __init__(self, owner: str, settings: Mapping[str, Any]) -> None:
        self.count = len(settings["down_block_types"])
        require_length(owner, self.count, "down_block_types", block_out_channels=settings["block_out_channels"])
        names = ("in_channels", "block_out_channels", "layers_per_block", "norm_num_groups", "cross_attention_dim")
        names += ("attention_head_dim", "num_attention_heads", "transformer_layers_per_block", "conv_in_kernel")
        require_positive(owner, **{name: settings[name] for name in names})

        def each(name: str) -> list[Any]:
            return per_block(owner, name, settings[name], self.count)

        self.widths = [settings["block_out_channels"][0], *settings["block_out_channels"]]
        self.layers, self.depths = each("layers_per_block"), each("transformer_layers_per_block")
        self.head_dims = each("attention_head_dim")
        self.heads = self.head_dims if settings["num_attention_heads"] is None else each("num_attention_heads")
        self.only_cross, self.context_dims = each("only_cross_attention"), each("cross_attention_dim")
        self.time_dim = settings["time_embedding_dim"] or self.widths[0] * (
            2 if settings["time_embedding_type"] == "fourier" else 4
        )
        told = {option: settings[name] for option, name in BLOCK_OPTIONS.items()}
        self._options = BlockOptions(self.time_dim * 2 if settings["class_embeddings_concat"] else self.time_dim, **told)

    def options(self, level: int, depth: Any, head_dim: int | None, only: bool) -> BlockOptions:
        """What a block at a level is told."""
        return replace(
            self._options,
            heads=self.heads[level] or 0,
            head_dim=head_dim,
            cross_attention_dim=self.context_dims[level],
            transformer_layers=depth,
            only_cross_attention=only,
        )


class UNet2DEncoder(AttentionServices, ModelMixin):
    """What a conditional UNet and a ControlNet have in common; no model by itself."""

    def _settings(self) -> dict[str, Any]:
        return {**FIXED, **self.config}

    def _build_encoder(self) -> Levels:
        """Make everything up to the middle from the configuration; returns what it says of each resolution."""
        said = self._settings()
        levels = Levels(type(self).__name__, said)
        kernel = said["conv_in_kernel"]
        self.conv_in = nn.Conv2d(said["in_channels"], levels.widths[0], kernel_size=kernel, padding=(kernel - 1) // 2)
        self._build_time(said, levels)
        self.down_blocks = nn.ModuleList()
        for level, block in enumerate(said["down_block_types"]):
            kind = find_block(CONDITIONAL_DOWN_BLOCKS, block)
            place = Place(levels.widths[level], levels.widths[level + 1], levels.layers[level], level < levels.count - 1)
            options = levels.options(level, levels.depths[level], levels.head_dims[level], levels.only_cross[level])
            self.down_blocks.append(kind.block(kind, place, options))
        self.mid_block = None
        if said["mid_block_type"] is not None:
            only = said["mid_block_only_cross_attention"]
            if only is None:
                only = said["only_cross_attention"] is True
            options = levels.options(-1, levels.depths[-1], levels.head_dims[-1], only)
            self.mid_block = _middle(said["mid_block_type"], levels.widths[-1], said["mid_block_scale_factor"], options)
        self._context_dims = frozenset(levels.context_dims)
        return levels

    def _build_time(self, said: dict[str, Any], levels: Levels) -> None:
        first, time_dim, flipped = levels.widths[0], levels.time_dim, said["flip_sin_to_cos"]
        if said["time_embedding_type"] == "fourier":
            if time_dim % 2:
                owner = type(self).__name__
                raise ConfigError(f"{owner}: the fourier time embedding is odd", found=time_dim, expected="an even size")
            input_dim = time_dim
            self.time_proj = GaussianFourierProjection(time_dim // 2, log=False, flip_sin_to_cos=flipped)
        else:
            input_dim = first
            self.time_proj = Timesteps(first, flipped, said["freq_shift"])
        self.time_embedding = TimestepEmbedding(
            input_dim, time_dim, said["act_fn"], said["timestep_post_act"], said["time_cond_proj_dim"]
        )
        last = said["time_embedding_act_fn"]
        self.time_embed_act = None if last is None else get_activation(last)

        if said["encoder_hid_dim"] is not None and said["encoder_hid_dim_type"] is None:
            said["encoder_hid_dim_type"] = "text_proj"
            self.register_to_config(encoder_hid_dim_type="text_proj")
        sizes = Sizes(
            time_embed_dim=time_dim,
            timestep_input_dim=input_dim,
            cross_attention_dim=levels.context_dims[0],
            **{name: said[name] for name in Sizes._fields[3:]},
        )
        self.encoder_hid_proj = make("encoder_hid_dim_type", CONTEXT_PROJECTIONS, said["encoder_hid_dim_type"], sizes)
        self.class_embedding = make("class_embed_type", CLASS_EMBEDDINGS, said["class_embed_type"], sizes)
        if said["class_embed_type"] is None and said["num_class_embeds"] is not None:
            self.class_embedding = nn.Embedding(said["num_class_embeds"], time_dim)
        self.add_embedding = make("addition_embed_type", ADDED_EMBEDDINGS, said["addition_embed_type"], sizes)
        self.add_time_proj = None
        if said["addition_embed_type"] == "text_time":
            self.add_time_proj = Timesteps(said["addition_time_embed_dim"], flipped, said["freq_shift"])
        if said["attention_type"] != "default":
            features = "text-only" if said["attention_type"] == "gated" else "text-image"
            self.position_net = GLIGENTextBoundingboxProjection(sizes.cross_attention_dim, sizes.cross_attention_dim, features)

    # ---------------------------------------------------------------- the way through

    def _embed(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        timestep_cond: Tensor | None,
        text: Tensor,
        labels: Tensor | None,
        added: dict[str, Any] | None,
    ) -> tuple[Tensor, Tensor]:
        """The sample as the first convolution takes it, and the time embedding."""
        self._check_sample(sample)
        if self._settings()["center_input_sample"]:
            sample = 2 * sample - 1.0
        emb = self.time_embedding(self.get_time_embed(sample, timestep), timestep_cond)
        emb, hint = self._add_to_time(sample, emb, text, labels, added)
        return sample if hint is None else torch.cat([sample, hint], dim=1), emb

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
                raise InputError("this network is conditioned on classes", remedy="give class_labels")
            if self.config.class_embed_type == "timestep":
                labels = self.time_proj(labels).to(sample.dtype)
            classes = self.class_embedding(labels).to(sample.dtype)
            emb = torch.cat([emb, classes], dim=-1) if self._settings()["class_embeddings_concat"] else emb + classes
        if self.add_embedding is not None:
            kind = self.config.addition_embed_type
            more, hint = embed_added(kind, self.add_embedding, self.add_time_proj, emb, text, added)
            emb = emb + more
        return emb if self.time_embed_act is None else self.time_embed_act(emb), hint

    def _context(
        self,
        sample: Tensor,
        states: Tensor,
        added: dict[str, Any] | None,
        mask: Tensor | None,
        token_mask: Tensor | None,
        options: dict[str, Any] | None,
    ) -> Context:
        former = getattr(self, "text_encoder_hid_proj", None)
        tokens = project_context(self.config.encoder_hid_dim_type, self.encoder_hid_proj, states, added, former)
        if isinstance(tokens, Tensor):
            self._check_tokens(sample, tokens)
        options = options or {}
        self.check_cross_attention_kwargs(options)
        boxes = options.get("gligen")
        objects = None if boxes is None else self.position_net(**boxes)
        rest = {name: value for name, value in options.items() if name not in ("gligen", "scale")}
        adapters, embeds = image_adapters_of(self), (added or {}).get("image_embeds")
        if adapters is not None and embeds is not None:
            masks = [None] * len(embeds)
            rest["image_prompts"] = adapters.prompts([own.to(sample) for own in embeds], adapters.scales, masks)
        return Context(tokens, _bias(mask, sample.dtype), _bias(token_mask, sample.dtype), objects, rest)

    def _down(
        self, sample: Tensor, emb: Tensor, context: Context, residuals: Iterator[Tensor]
    ) -> tuple[Tensor, list[Tensor | None]]:
        skips: list[Tensor | None] = [sample]
        blocks: Any = self.down_blocks
        for block in blocks:
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

    # ---------------------------------------------------------------- checks

    def _check_sample(self, sample: Tensor) -> None:
        channels = self.conv_in.in_channels - (4 if self.config.addition_embed_type == "image_hint" else 0)
        if sample.ndim != 4 or sample.shape[1] != channels:
            raise InputError(
                "sample has the wrong shape for this network",
                found=tuple(sample.shape),
                expected=f"(batch, {channels}, height, width)",
            )

    def _check_tokens(self, sample: Tensor, tokens: Tensor) -> None:
        if tokens.ndim != 3 or tokens.shape[0] != sample.shape[0] or tokens.shape[2] not in self._context_dims:
            size = " or ".join(str(dim) for dim in sorted(self._context_dims))
            raise InputError(
                "encoder_hidden_states have the wrong shape for this network and sample",
                found=tuple(tokens.shape),
                expected=f"({sample.shape[0]}, tokens, {size})",
            )

    def check_cross_attention_kwargs(self, options: dict[str, Any]) -> None:
        """Raise unless `forward` takes these `cross_attention_kwargs`.

        Raises:
            UnknownArgumentError: No attention layer has such a keyword.
            InputError: Boxes, for a model without gated attention.
        """
        for name in options.keys() - {"gligen", "scale", "skipped"}:
            if not any(layer.takes(name) for layer in self.attention_layers().values()):
                raise unknown_argument("cross_attention_kwargs", name, ["scale", "gligen"])
        if options.get("gligen") is not None and self._settings()["attention_type"] == "default":
            raise InputError(
                "this network cannot be grounded in boxes: it has no gated attention",
                remedy='leave "gligen" out of cross_attention_kwargs, or use a model with attention_type="gated"',
            )


def _middle(name: str, channels: int, scale: float, options: BlockOptions) -> MidBlock:
    kind, options = find_block(MID_BLOCKS, name), replace(options, out_scale_factor=scale)
    if name == "UNetMidBlock2D":
        return MidBlock(kind._replace(attention=None), channels, options, num_layers=0)
    if name == "UNetMidBlock2DCrossAttn":
        options = replace(options, only_cross_attention=False)
    return MidBlock(kind, channels, options)


def _bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """1 to keep and 0 to leave out → a bias on scores with a dimension for queries."""
    return None if mask is None else ((1 - mask.to(dtype)) * -10000.0).unsqueeze(1)
