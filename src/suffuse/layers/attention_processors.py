"""Attention processors: how the weights of an `Attention` layer are used.

A processor does two things, and each class here is a pair of functions for them:

    project   tokens → queries, keys, values      plain_projections, fused_projections, added_projections
    attend    queries, keys, values → tokens      with_kernel, with_probabilities, in_slices, with_xformers

Queries, keys and values are (batch, heads, tokens, size) between the two.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Container, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from suffuse.errors import InputError, MissingPackageError
from suffuse.layers.image_attention import ImagePrompts

if TYPE_CHECKING:
    from suffuse.layers.attention import Attention

Heads = tuple[Tensor, Tensor, Tensor]
Watch = Callable[[Tensor], None]
"""Is shown the probabilities of a layer, (batch · heads, tokens, context tokens), in each call of it."""


class Processor:
    """What the processors share: from the input to tokens, and from tokens to the output."""

    project: ClassVar[Callable[..., Heads]]
    attend: ClassVar[Callable[..., Tensor]]

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        image_prompts: ImagePrompts | None = None,
        unattended: Container[Attention] = (),
        watched: Mapping[Attention, Watch] | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            attn: The layer.
            hidden_states: As of `Attention.forward`, like the two that follow.
            encoder_hidden_states: What is attended to.
            attention_mask: A bias on scores.
            temb: For a spatial normalisation.
            image_prompts: Layer → pictures that it attends to as well.
            unattended: Layers of self-attention in which each position gets its own value.
            watched: Layer → what is shown its probabilities, which are then formed in memory.
        """
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        by_channel = hidden_states.flatten(2) if residual.ndim == 4 else hidden_states.transpose(1, 2)
        given = by_channel.transpose(1, 2)
        tokens = given if attn.group_norm is None else attn.group_norm(by_channel).transpose(1, 2)
        query, key, value = self.project(attn, tokens, encoder_hidden_states, given)
        watch = (watched or {}).get(attn)
        if attn in unattended:
            hidden_states = value.transpose(1, 2).flatten(2)
        elif watch is not None:
            hidden_states = _shown(watch, attn, query, key, value, _bias(attn, attention_mask, query, key))
        else:
            hidden_states = self.attend(attn, query, key, value, _bias(attn, attention_mask, query, key))
        for prompt in (image_prompts or {}).get(attn, ()):
            hidden_states = prompt.added(hidden_states, self.attend(attn, query, prompt.key, prompt.value, None))
        hidden_states = attn.to_out[1](attn.to_out[0](hidden_states))
        if residual.ndim == 4:
            hidden_states = hidden_states.transpose(-1, -2).reshape(residual.shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states if attn.rescale_output_factor == 1 else hidden_states / attn.rescale_output_factor


# ---------------------------------------------------------------- project


def plain_projections(_: Processor, attn: Attention, tokens: Tensor, context: Tensor | None, given: Tensor) -> Heads:
    """Keys and values of the context, or of the tokens themselves."""
    context = tokens if context is None else attn.norm_encoder_hidden_states(context)
    query, key, value = attn.to_q(tokens), _made(attn.to_k)(context), _made(attn.to_v)(context)
    return _heads(attn, query), _heads(attn, key), _heads(attn, value)


def fused_projections(_: Processor, attn: Attention, tokens: Tensor, context: Tensor | None, given: Tensor) -> Heads:
    """The same with the matrices of `Attention.fuse_projections`: one product instead of three, or two instead of three."""
    if context is None:
        query, key, value = _made(getattr(attn, "to_qkv", None))(tokens).chunk(3, dim=-1)
    else:
        query = attn.to_q(tokens)
        key, value = _made(getattr(attn, "to_kv", None))(attn.norm_encoder_hidden_states(context)).chunk(2, dim=-1)
    return _heads(attn, query), _heads(attn, key), _heads(attn, value)


def added_projections(_: Processor, attn: Attention, tokens: Tensor, context: Tensor | None, given: Tensor) -> Heads:
    """Keys and values of the context stand before those of the tokens, which `only_cross_attention` leaves out."""
    context = given if context is None else attn.norm_encoder_hidden_states(context)
    query = _heads(attn, attn.to_q(tokens))
    key = _heads(attn, _made(attn.add_k_proj)(context))
    value = _heads(attn, _made(attn.add_v_proj)(context))
    if not attn.only_cross_attention:
        key = torch.cat([key, _heads(attn, _made(attn.to_k)(tokens))], dim=2)
        value = torch.cat([value, _heads(attn, _made(attn.to_v)(tokens))], dim=2)
    return query, key, value


# ---------------------------------------------------------------- attend


def with_kernel(_: Processor, attn: Attention, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """Torch's `scaled_dot_product_attention`, which never holds all the probabilities (Dao et al., 2022)."""
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    return attended.transpose(1, 2).flatten(2)


def with_probabilities(_: Processor, attn: Attention, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """The formula as written: softmax(QKᵀ / √d) V."""
    return _shown(lambda _: None, attn, query, key, value, bias)


def in_slices(
    processor: SlicedAttnProcessor, attn: Attention, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None
) -> Tensor:
    """The formula for `slice_size` heads at a time."""
    query, key, value, bias = _by_head(query, key, value, bias)
    size = processor.slice_size
    biases = [None] * query.shape[0] if bias is None else bias.split(size)
    slices = zip(query.split(size), key.split(size), value.split(size), biases, strict=False)
    return attn.batch_to_head_dim(torch.cat([torch.bmm(attn.get_attention_scores(q, k, b), v) for q, k, v, b in slices]))


def with_xformers(
    processor: XFormersAttnProcessor, attn: Attention, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None
) -> Tensor:
    """The kernels of xformers."""
    query, key, value, bias = _by_head(query, key, value, bias)
    if bias is not None:
        bias = bias.expand(-1, query.shape[1], -1)
    attended = processor.kernels.memory_efficient_attention(
        query, key, value, attn_bias=bias, op=processor.attention_op, scale=attn.scale
    )
    return attn.batch_to_head_dim(attended.to(query.dtype))


# ---------------------------------------------------------------- the pairs


class AttnProcessor2_0(Processor):
    """The default."""

    project, attend = plain_projections, with_kernel


class AttnProcessor(Processor):
    """The default, with the probabilities in memory."""

    project, attend = plain_projections, with_probabilities


class FusedAttnProcessor2_0(Processor):
    """The default, after `fuse_qkv_projections`."""

    project, attend = fused_projections, with_kernel


class SlicedAttnProcessor(Processor):
    """`AttnProcessor` for `slice_size` heads at a time."""

    project, attend = plain_projections, in_slices

    def __init__(self, slice_size: int) -> None:
        self.slice_size = slice_size


class XFormersAttnProcessor(Processor):
    """`AttnProcessor` with the kernels of xformers, and of these `attention_op` if given."""

    project, attend = plain_projections, with_xformers

    def __init__(self, attention_op: Callable[..., Any] | None = None) -> None:
        try:
            self.kernels: Any = importlib.import_module("xformers.ops")
        except ImportError:
            raise MissingPackageError(
                "xformers is not installed",
                remedy="nothing need be done: torch's scaled_dot_product_attention, which is already in use, is as fast "
                "and as sparing of memory; to use xformers all the same: pip install xformers",
            ) from None
        self.attention_op = attention_op


class AttnAddedKVProcessor2_0(Processor):
    """The default of attention with added keys and values."""

    project, attend = added_projections, with_kernel


class AttnAddedKVProcessor(Processor):
    """The same, with the probabilities in memory."""

    project, attend = added_projections, with_probabilities


class SlicedAttnAddedKVProcessor(SlicedAttnProcessor):
    """`AttnAddedKVProcessor` for `slice_size` heads at a time."""

    project = added_projections


class XFormersAttnAddedKVProcessor(XFormersAttnProcessor):
    """`AttnAddedKVProcessor` with the kernels of xformers."""

    project = added_projections


ADDED_KV_PROCESSORS = (AttnAddedKVProcessor, AttnAddedKVProcessor2_0, SlicedAttnAddedKVProcessor, XFormersAttnAddedKVProcessor)
"""The processors of attention with added keys and values."""


def _shown(watch: Watch, attn: Attention, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    query, key, value, bias = _by_head(query, key, value, bias)
    probabilities = attn.get_attention_scores(query, key, bias)
    watch(probabilities)
    return attn.batch_to_head_dim(torch.bmm(probabilities, value))


def _heads(attn: Attention, tokens: Tensor) -> Tensor:
    return tokens.view(tokens.shape[0], -1, attn.heads, tokens.shape[-1] // attn.heads).transpose(1, 2)


def _by_head(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    if bias is not None:
        bias = bias.expand(*query.shape[:2], -1, -1).flatten(0, 1)
    return query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1), bias


def _bias(attn: Attention, mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """The mask as (batch, heads or 1, tokens or 1, keys); a context mask leaves a layer's own keys, which follow, seen."""
    if mask is None:
        return None
    missing = key.shape[2] - mask.shape[-1]
    if missing > 0 and attn.added_kv_proj_dim is not None:
        mask = F.pad(mask, (0, missing))
    elif missing:
        raise InputError(
            "an attention mask is not as long as what it masks", found=mask.shape[-1], expected=f"{key.shape[2]} entries"
        )
    if len(mask) == query.shape[0] * attn.heads:
        return mask.unflatten(0, (query.shape[0], attn.heads))
    return mask[:, None]


def _made(projection: Any) -> Any:
    if projection is None:
        raise InputError(
            "an attention processor needs a projection that the layer does not have",
            remedy="use the AddedKV processors with added keys and values only, and fuse_qkv_projections() before the fused one",
        )
    return projection
