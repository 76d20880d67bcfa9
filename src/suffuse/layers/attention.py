"""The attention layer: projections, normalisations and the processor that runs them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from suffuse.errors import ConfigError, InputError
from suffuse.layers.attention_processors import (
    AttnAddedKVProcessor2_0,
    AttnProcessor2_0,
    SlicedAttnAddedKVProcessor,
    SlicedAttnProcessor,
    XFormersAttnAddedKVProcessor,
    XFormersAttnProcessor,
)
from suffuse.layers.normalization import SpatialNorm, group_norm

AttentionProcessor = Callable[..., Tensor]
"""Called as `(attention, hidden_states, encoder_hidden_states=, attention_mask=, **options)`."""

CrossNorm = Literal["layer_norm", "group_norm"]


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al., 2017, eq. 1), over tokens or the positions of a feature map.

    The layer holds weights; its `processor` says how they are used, and users may put in their own.

    Args:
        query_dim: Size of a token.
        cross_attention_dim: Size of a token attended to; `query_dim` if `None`, which makes it self-attention.
        heads: Number of heads.
        dim_head: Size of a head.
        dropout: Probability of zeroing an output.
        bias: Whether queries, keys and values have biases.
        upcast_attention: Multiply queries and keys in float32, where the processor forms probabilities itself.
        upcast_softmax: Take the softmax in float32, where the processor forms probabilities itself.
        cross_attention_norm: Normalisation of the tokens attended to.
        added_kv_proj_dim: Size of context tokens whose keys and values are put before the layer's own.
        norm_num_groups: Groups of a normalisation before the projections.
        spatial_norm_dim: Channels of a latent that normalises before the projections.
        only_cross_attention: With added keys and values, have no others.
        eps: Added to variances in the group normalisation.
        rescale_output_factor: Divides the output.
        residual_connection: Whether the input is added to the output.
        processor: How to run; `scaled_dot_product_attention` if `None`.

    Raises:
        ConfigError: Sizes are not positive, or options exclude one another.
    """

    def __init__(
        self,
        query_dim: int,
        cross_attention_dim: int | None = None,
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
        bias: bool = False,
        upcast_attention: bool = False,
        upcast_softmax: bool = False,
        cross_attention_norm: CrossNorm | None = None,
        added_kv_proj_dim: int | None = None,
        norm_num_groups: int | None = None,
        spatial_norm_dim: int | None = None,
        only_cross_attention: bool = False,
        eps: float = 1e-5,
        rescale_output_factor: float = 1.0,
        residual_connection: bool = False,
        processor: AttentionProcessor | None = None,
    ) -> None:
        super().__init__()
        if heads < 1 or dim_head < 1:
            raise ConfigError(
                f"attention over {query_dim} channels cannot be split into heads",
                found=f"{heads} heads of size {dim_head}",
                expected="at least one head, of size at least one",
            )
        if only_cross_attention and added_kv_proj_dim is None:
            raise ConfigError(
                "attention with only_cross_attention=True and no added_kv_proj_dim has no keys",
                remedy="give added_kv_proj_dim, or leave only_cross_attention out",
            )
        inner_dim = dim_head * heads
        self.heads = self.sliceable_head_dim = heads
        self.scale = dim_head**-0.5
        self.use_bias, self.is_cross_attention = bias, cross_attention_dim is not None
        self.cross_attention_dim = query_dim if cross_attention_dim is None else cross_attention_dim
        self.added_kv_proj_dim, self.only_cross_attention = added_kv_proj_dim, only_cross_attention
        self.upcast_attention, self.upcast_softmax = upcast_attention, upcast_softmax
        self.rescale_output_factor, self.residual_connection = rescale_output_factor, residual_connection

        self.group_norm = None if norm_num_groups is None else group_norm(norm_num_groups, query_dim, eps)
        self.spatial_norm = None if spatial_norm_dim is None else SpatialNorm(query_dim, spatial_norm_dim)
        self.norm_cross = self._cross_norm(cross_attention_norm)
        self.norm_q = self.norm_k = None
        self.to_q = nn.Linear(query_dim, inner_dim, bias=bias)
        self.to_k = None if only_cross_attention else nn.Linear(self.cross_attention_dim, inner_dim, bias=bias)
        self.to_v = None if only_cross_attention else nn.Linear(self.cross_attention_dim, inner_dim, bias=bias)
        self.add_k_proj = None if added_kv_proj_dim is None else nn.Linear(added_kv_proj_dim, inner_dim)
        self.add_v_proj = None if added_kv_proj_dim is None else nn.Linear(added_kv_proj_dim, inner_dim)
        self.to_out = nn.ModuleList([nn.Linear(inner_dim, query_dim), nn.Dropout(dropout)])
        self.set_processor(processor or self.default_processor())

    def _cross_norm(self, kind: CrossNorm | None) -> nn.Module | None:
        match kind:
            case None:
                return None
            case "layer_norm":
                return nn.LayerNorm(self.cross_attention_dim)
            case "group_norm":
                return group_norm(32, self.added_kv_proj_dim or self.cross_attention_dim, eps=1e-5)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **cross_attention_kwargs: Any,
    ) -> Tensor:
        """Attend.

        Args:
            hidden_states: (batch, tokens, query_dim), or (batch, query_dim, height, width).
            encoder_hidden_states: (batch, context tokens, cross_attention_dim); `hidden_states` themselves if `None`.
            attention_mask: A bias on scores, (batch or batch * heads, 1 or tokens, context tokens).
            **cross_attention_kwargs: For the processor; those it does not take are left out, because one dictionary
                serves all layers of a model.

        Returns:
            The shape of `hidden_states`.
        """
        options = cross_attention_kwargs
        if options and self._processor_takes is not None:
            options = {name: value for name, value in options.items() if name in self._processor_takes}
        return self.processor(
            self, hidden_states, encoder_hidden_states=encoder_hidden_states, attention_mask=attention_mask, **options
        )

    def takes(self, option: str) -> bool:
        """Whether the processor has a keyword of that name."""
        return self._processor_takes is None or option in self._processor_takes

    # ---------------------------------------------------------------- which processor

    def default_processor(self) -> AttentionProcessor:
        """The processor of a layer nobody has changed."""
        return AttnProcessor2_0() if self.added_kv_proj_dim is None else AttnAddedKVProcessor2_0()

    def get_processor(self) -> AttentionProcessor:
        """The processor in use."""
        return self.processor

    def set_processor(self, processor: AttentionProcessor) -> None:
        """Use `processor` from now on; one that is a module becomes part of this one."""
        if not isinstance(processor, nn.Module):
            self._modules.pop("processor", None)
        self.processor = processor
        parameters = inspect.signature(processor).parameters.values()
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        self._processor_takes = None if takes_all else frozenset(parameter.name for parameter in parameters)

    def set_attention_slice(self, slice_size: int | None) -> None:
        """Attend to `slice_size` heads at a time, with less memory; to all at once if `None`.

        Raises:
            InputError: More than there are heads, or less than one.
        """
        if slice_size is None:
            self.set_processor(self.default_processor())
            return
        if not 1 <= slice_size <= self.sliceable_head_dim:
            raise InputError("attention slice_size", found=slice_size, expected=f"1 to {self.sliceable_head_dim}")
        sliced = SlicedAttnProcessor if self.added_kv_proj_dim is None else SlicedAttnAddedKVProcessor
        self.set_processor(sliced(slice_size))

    def set_use_memory_efficient_attention_xformers(
        self, use_memory_efficient_attention_xformers: bool, attention_op: Callable[..., Any] | None = None
    ) -> None:
        """Use xformers' kernels, or the default again.

        Raises:
            MissingPackageError: xformers is not installed.
        """
        if not use_memory_efficient_attention_xformers:
            self.set_processor(self.default_processor())
            return
        kernels = XFormersAttnProcessor if self.added_kv_proj_dim is None else XFormersAttnAddedKVProcessor
        self.set_processor(kernels(attention_op))

    # ---------------------------------------------------------------- fused projections

    @torch.no_grad()
    def fuse_projections(self) -> None:
        """Copy the projections that read the same tokens into one layer, `to_qkv` or `to_kv`, for `FusedAttnProcessor2_0`.

        Raises:
            InputError: The layer has added keys and values.
        """
        if self.to_k is None or self.to_v is None or self.added_kv_proj_dim is not None:
            raise InputError("projections cannot be fused in attention with added keys and values")
        parts = [self.to_k, self.to_v] if self.is_cross_attention else [self.to_q, self.to_k, self.to_v]
        weight = torch.cat([part.weight for part in parts])
        # Made on meta: a default initialisation would spend the user's random numbers.
        fused = nn.Linear(weight.shape[1], weight.shape[0], bias=self.use_bias, device="meta", dtype=weight.dtype)
        fused = fused.to_empty(device=weight.device)
        fused.weight.copy_(weight)
        if self.use_bias:
            fused.bias.copy_(torch.cat([part.bias for part in parts]))
        self.add_module("to_kv" if self.is_cross_attention else "to_qkv", fused)

    def unfuse_projections(self) -> None:
        """Drop what `fuse_projections` made."""
        for name in ("to_qkv", "to_kv"):
            self._modules.pop(name, None)

    # ---------------------------------------------------------------- what processors use

    def batch_to_head_dim(self, tensor: Tensor) -> Tensor:
        """(batch * heads, tokens, size) → (batch, tokens, heads * size)."""
        joined, tokens, size = tensor.shape
        split = tensor.reshape(joined // self.heads, self.heads, tokens, size)
        return split.permute(0, 2, 1, 3).reshape(joined // self.heads, tokens, self.heads * size)

    def head_to_batch_dim(self, tensor: Tensor, out_dim: int = 3) -> Tensor:
        """(batch, tokens, heads * size) → (batch * heads, tokens, size), or with a dimension each if `out_dim` is 4."""
        split = tensor.reshape(tensor.shape[0], -1, self.heads, tensor.shape[-1] // self.heads).permute(0, 2, 1, 3)
        return split.reshape(-1, *split.shape[2:]) if out_dim == 3 else split

    def get_attention_scores(self, query: Tensor, key: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Probabilities (batch * heads, tokens, context tokens) of (batch * heads, tokens, size) queries and keys."""
        dtype = query.dtype
        if self.upcast_attention:
            query, key = query.float(), key.float()
        if attention_mask is None:
            start = torch.empty(query.shape[0], query.shape[1], key.shape[1], dtype=query.dtype, device=query.device)
            scores = torch.baddbmm(start, query, key.transpose(-1, -2), beta=0, alpha=self.scale)
        else:
            scores = torch.baddbmm(attention_mask, query, key.transpose(-1, -2), beta=1, alpha=self.scale)
        if self.upcast_softmax:
            scores = scores.float()
        return scores.softmax(dim=-1).to(dtype)

    def prepare_attention_mask(
        self, attention_mask: Tensor | None, target_length: int, batch_size: int, out_dim: int = 3
    ) -> Tensor | None:
        """Repeat a bias (batch, 1 or tokens, length) for every head, for processors written by users.

        If `length` is not `target_length`, that many zeros are appended: the layer's own keys stand after the context.
        """
        if attention_mask is None:
            return None
        if attention_mask.shape[-1] != target_length:
            attention_mask = F.pad(attention_mask, (0, target_length), value=0.0)
        if out_dim == 4:
            return attention_mask.unsqueeze(1).repeat_interleave(self.heads, dim=1)
        if attention_mask.shape[0] < batch_size * self.heads:
            return attention_mask.repeat_interleave(self.heads, dim=0)
        return attention_mask

    def norm_encoder_hidden_states(self, encoder_hidden_states: Tensor) -> Tensor:
        """Normalise the tokens attended to (batch, tokens, size); unchanged if the layer has no such normalisation."""
        if isinstance(self.norm_cross, nn.GroupNorm):
            return self.norm_cross(encoder_hidden_states.transpose(1, 2)).transpose(1, 2)
        return encoder_hidden_states if self.norm_cross is None else self.norm_cross(encoder_hidden_states)
