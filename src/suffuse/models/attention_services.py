"""What a model with attention offers about it: other processors, slices, fused projections, xformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from suffuse.errors import InputError
from suffuse.layers.attention import Attention, AttentionProcessor
from suffuse.layers.attention_processors import (
    ADDED_KV_PROCESSORS,
    AttnAddedKVProcessor,
    AttnProcessor,
    FusedAttnProcessor2_0,
    Processor,
)
from suffuse.layers.low_rank import adapters_of


class AttentionServices(nn.Module):
    """Ways to look at and change how a model's attention layers run."""

    def attention_layers(self) -> dict[str, Attention]:
        """Every attention layer by its name in the model."""
        return {name: module for name, module in self.named_modules() if isinstance(module, Attention)}

    @property
    def attn_processors(self) -> dict[str, AttentionProcessor]:
        """The processors in use, by the name of their layer and ".processor"."""
        return {f"{name}.processor": layer.get_processor() for name, layer in self.attention_layers().items()}

    def set_attn_processor(self, processor: AttentionProcessor | Mapping[str, AttentionProcessor]) -> None:
        """Use one processor for all layers, or one for each, named as in `attn_processors`.

        Raises:
            InputError: The names are not those of the layers; nothing is changed.
        """
        layers = self.attention_layers()
        if not isinstance(processor, Mapping):
            for layer in layers.values():
                layer.set_processor(processor)
            return
        wanted = {f"{name}.processor" for name in layers}
        if wanted != set(processor):
            raise InputError(
                "set_attn_processor needs one processor for each attention layer",
                found=f"{len(processor)} processors; not layers: {sorted(set(processor) - wanted)[:5]}; "
                f"without one: {sorted(wanted - set(processor))[:5]}",
                expected=f"the {len(wanted)} names in attn_processors",
            )
        for name, layer in layers.items():
            layer.set_processor(processor[f"{name}.processor"])

    def set_default_attn_processor(self) -> None:
        """Form attention probabilities in memory, whatever processors of this library were in use.

        Raises:
            InputError: A processor is not one of this library's.
        """
        layers = self.attention_layers()
        foreign = [layer.processor for layer in layers.values() if not isinstance(layer.processor, Processor)]
        if foreign:
            raise InputError(
                "set_default_attn_processor would throw away processors that are not this library's",
                found=type(foreign[0]).__name__,
                remedy="call set_attn_processor(AttnProcessor())",
            )
        for layer in layers.values():
            layer.set_processor(AttnProcessor() if layer.added_kv_proj_dim is None else AttnAddedKVProcessor())

    def set_attention_slice(self, slice_size: str | int | list[int] | None = "auto") -> None:
        """Attend to a few heads at a time, with less memory.

        Args:
            slice_size: Heads at a time; "auto" for half of them, "max" for one; a list for one number per layer;
                `None` for no slices.

        Raises:
            InputError: A number is not between one and the layer's heads, or the list has another length.
        """
        layers = list(self.attention_layers().values())
        match slice_size:
            case "auto":
                sizes = [max(1, layer.sliceable_head_dim // 2) for layer in layers]
            case "max":
                sizes = [1] * len(layers)
            case list():
                sizes = slice_size
            case int() | None:
                sizes = [slice_size] * len(layers)
            case _:
                raise InputError("slice_size", found=slice_size, expected='"auto", "max", a number, a list or None')
        if len(sizes) != len(layers):
            raise InputError("slice_size needs one number for each attention layer", found=len(sizes), expected=len(layers))
        for layer, size in zip(layers, sizes, strict=True):
            if size is not None and not 1 <= size <= layer.sliceable_head_dim:
                raise InputError("slice_size", found=size, expected=f"1 to {layer.sliceable_head_dim} heads")
        for layer, size in zip(layers, sizes, strict=True):
            layer.set_attention_slice(size)

    def fuse_qkv_projections(self) -> None:
        """Make one matrix product of those that read the same tokens; the numbers may differ in the last bits.

        Raises:
            InputError: The model has attention with added keys and values, or adapters, which would not be used.
        """
        if adapters_of(self) is not None:
            raise InputError(
                "fuse_qkv_projections would bypass the layers that adapters are for",
                remedy="fuse_lora() and unload_lora_weights() first, which leaves the adapters in the weights",
            )
        layers = self.attention_layers()
        if any(isinstance(layer.processor, ADDED_KV_PROCESSORS) for layer in layers.values()):
            raise InputError("fuse_qkv_projections does not work on attention with added keys and values")
        if not hasattr(self, "_processors_before_fusion"):
            self._processors_before_fusion = self.attn_processors
        for layer in layers.values():
            layer.fuse_projections()
            layer.set_processor(FusedAttnProcessor2_0())

    def unfuse_qkv_projections(self) -> None:
        """Undo `fuse_qkv_projections`, if it was called."""
        if not hasattr(self, "_processors_before_fusion"):
            return
        self.set_attn_processor(self._processors_before_fusion)
        del self._processors_before_fusion
        for layer in self.attention_layers().values():
            layer.unfuse_projections()

    def set_use_memory_efficient_attention_xformers(self, valid: bool, attention_op: Callable[..., Any] | None = None) -> None:
        """Use the kernels of xformers in every attention layer, or the default again.

        Raises:
            MissingPackageError: xformers is not installed.
        """
        for layer in self.attention_layers().values():
            layer.set_use_memory_efficient_attention_xformers(valid, attention_op)

    def enable_xformers_memory_efficient_attention(self, attention_op: Callable[..., Any] | None = None) -> None:
        """Use the kernels of xformers, and of these `attention_op` if given.

        Raises:
            MissingPackageError: xformers is not installed; torch's own kernels are in use and as good.
        """
        self.set_use_memory_efficient_attention_xformers(True, attention_op)

    def disable_xformers_memory_efficient_attention(self) -> None:
        """Use torch's kernels again."""
        self.set_use_memory_efficient_attention_xformers(False)
