"""IP-Adapters (Ye et al., 2023, "IP-Adapter: Text compatible image prompt adapter", section 3.2), beside a UNet and not in it.

An adapter is a small model of its own: it makes tokens of what an image encoder says of a picture, and of the tokens a key and a
value for each layer of cross-attention. The UNet is handed these as a value of the call, and keeps its modules and weights.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from suffuse.checkpoints.adapter_files import Choice, HeldTensors, find_adapter, open_adapter
from suffuse.checkpoints.layout import SAFETENSORS
from suffuse.checkpoints.reading import Source, load_plain
from suffuse.checkpoints.weights import first_names
from suffuse.conversion.ip_adapter import Keys, flat, in_order, read_keys
from suffuse.errors import AdapterError, CorruptFileError, InputError, WeightsMismatchError
from suffuse.hub.options import HubOptions
from suffuse.layers.attention import Attention
from suffuse.layers.image_attention import ImagePrompt
from suffuse.layers.low_rank import Weight
from suffuse.models.image_projection import projection_of

Given = str | os.PathLike[str] | Mapping[str, Any]
Scale = Weight | Sequence[float]
"""How much of a picture: everywhere, by the place of an attention layer, or for each picture where there are masks."""


@dataclass
class ImageAdapter:
    """One adapter, fitted to a UNet.

    Attributes:
        projection: What makes tokens, without weights.
        keys: Its keys by what they are.
        layers: Name of a layer of attention → its number in the file.
        tensors: Key → weight, in the type of the file.
    """

    projection: Any
    keys: Keys
    layers: dict[str, int]
    tensors: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def take_low_rank(self) -> dict[str, Tensor]:
        """The factors of the low-rank adapter that goes with it, under the names of the layers; they are gone from here."""
        words = {number: name for name, number in self.layers.items()}
        places = words | {number - 1: f"{name.removesuffix('attn2')}attn1" for number, name in words.items()}
        return {f"unet.{places[n]}.{part}": self.tensors.pop(key) for (n, part), key in self.keys.low_rank.items()}

    def check(self, name: str, embeds: Tensor) -> None:
        """Raise `InputError` unless these are (rows, pictures, …) of what this adapter makes tokens of."""
        shape = ("pictures", *(("states",) if self.projection.hidden_states else ()), self.projection.features)
        if embeds.ndim != len(shape) + 1 or embeds.shape[-1] != self.projection.features:
            raise InputError(
                f"{name} does not fit the IP-Adapter",
                found=tuple(embeds.shape),
                expected=f"(1 or 2, {', '.join(map(str, shape))})",
                remedy="use the image encoder, or the embeddings, that the adapter was trained with",
            )

    def tokens(self, embeds: Tensor) -> Tensor:
        """(rows, pictures, tokens, width) of what an image encoder says of pictures, (rows, pictures, …)."""
        # A copy, without weights either, for each run: threads must not see each other's weights come and go.
        projection = copy.deepcopy(self.projection)
        weights = {name: self.tensors[key].to(embeds) for name, key in self.keys.projection.items()}
        projection.load_state_dict(weights, assign=True)
        return projection(embeds.flatten(0, 1)).unflatten(0, embeds.shape[:2])

    def prompt(self, layer: Any, number: int, tokens: Tensor, scale: float, mask: Tensor | None) -> ImagePrompt:
        """What a layer attends to of tokens (rows, tokens, width)."""
        weights = (self.tensors[self.keys.layers[number][part]].to(tokens) for part in "kv")
        key, value = (F.linear(tokens, weight).unflatten(-1, (layer.heads, -1)).transpose(1, 2) for weight in weights)
        return ImagePrompt(key, value, scale, mask)


@dataclass(eq=False)
class ImageAdapters:
    """The adapters that a UNet is used with.

    Attributes:
        model: The UNet.
        adapters: In the order in which what they say is added.
        scales: How much of each.
        asked: The same, as it was asked for.
        low_rank: Names of the low-rank adapters that came with them.
    """

    model: Any
    adapters: list[ImageAdapter]
    scales: list[Scale]
    asked: Any = 1.0
    low_rank: list[str] = field(default_factory=list[str])

    def prompts(
        self, embeds: Sequence[Tensor], scales: Sequence[Scale], masks: Sequence[Tensor | None]
    ) -> dict[nn.Module, list[ImagePrompt]]:
        """What each layer attends to.

        Args:
            embeds: What an image encoder says, for each adapter (rows, pictures, …), where the UNet computes, in its type.
            scales: How much of each adapter.
            masks: Where each counts, (1, pictures, height, width).
        """
        made: dict[nn.Module, list[ImagePrompt]] = {}
        self._follow(embeds[0].device)
        for adapter, own, scale, mask in zip(self.adapters, embeds, scales, masks, strict=True):
            tokens = adapter.tokens(own)
            parts = [tokens.flatten(1, 2)] if mask is None else tokens.unbind(1)
            where = [None] if mask is None else mask.unbind(1)
            for name, number in adapter.layers.items():
                layer = self.model.get_submodule(name)
                wanted = scale_at(scale, name)
                each = wanted if isinstance(wanted, Sequence) else [wanted] * len(parts)
                made.setdefault(layer, []).extend(
                    adapter.prompt(layer, number, *part) for part in zip(parts, each, where, strict=True) if part[1]
                )
        return made

    def check_processors(self) -> None:
        """Raise `InputError` if a layer is run by a processor that would not look at pictures."""
        for name in self.adapters[0].layers:
            layer: Attention = self.model.get_submodule(name)
            if not layer.takes("image_prompts"):
                raise InputError(
                    f"the attention processor of {name} does not know pictures",
                    found=type(layer.processor).__name__,
                    expected="one of suffuse, or one with a keyword image_prompts",
                )

    def _follow(self, device: torch.device) -> None:
        """Stay where the UNet is; where it only visits, weights are copied for each run."""
        if self.model.device == device:
            for adapter in self.adapters:
                adapter.tensors = {key: tensor.to(device) for key, tensor in adapter.tensors.items()}


def scale_at(scale: Scale, layer: str) -> float | Sequence[float]:
    """How much of an adapter in a layer of attention."""
    if not isinstance(scale, Mapping):
        return scale
    return next(value for place, value in scale.items() if layer.startswith(f"{place}."))


# ---------------------------------------------------------------- of a UNet


def image_adapters_of(model: Any) -> ImageAdapters | None:
    """The adapters a UNet is used with; None if there are none."""
    return getattr(model, "_image_adapters", None)


def use_adapters(model: Any, adapters: Sequence[ImageAdapter]) -> ImageAdapters:
    """Use a UNet with these adapters, and no others."""
    model._image_adapters = ImageAdapters(model, list(adapters), [1.0] * len(adapters))
    return model._image_adapters


def drop_image_adapters(model: Any) -> None:
    """Use a UNet without adapters."""
    if image_adapters_of(model) is not None:
        del model._image_adapters


# ---------------------------------------------------------------- files


def read_adapter(given: Given, choice: Choice, options: HubOptions, model: Any) -> ImageAdapter:
    """An adapter from a file, or from tensors in memory, fitted to a UNet.

    Args:
        given: A file, a folder, a repository, or the contents of a file.
        choice: Which file of a folder or repository.
        options: How to fetch.
        model: The UNet, which is not changed.

    Raises:
        AdapterError: It is for another UNet, of an unknown kind, or not whole; with the numbers.
        WeightsMismatchError: A tensor holds other than floating point numbers.
        NonFiniteError: A tensor holds NaN or infinity.
        CorruptFileError: The file is damaged.
    """
    source = _opened(given, choice, options)
    adapter = _fitted(source, model)
    device = torch.device("cpu") if model.device.type == "meta" else model.device
    for key, own in source.tensors.items():
        if not own.dtype.is_floating_point:
            raise WeightsMismatchError(f"{source.where}: {key} is no weight", found=own.dtype, expected="floating point numbers")
    adapter.tensors = {key: torch.empty(own.shape, dtype=own.dtype, device=device) for key, own in source.tensors.items()}
    source.fill(adapter.tensors)
    return adapter


def _opened(given: Given, choice: Choice, options: HubOptions) -> Source:
    if isinstance(given, Mapping):
        return HeldTensors(flat(given))
    path = find_adapter(given, choice, options)
    if path.suffix == SAFETENSORS:
        return open_adapter(path)[0]
    warnings.warn(f"{path} is a pickle: read as tensors only; prefer safetensors", stacklevel=5)
    contents = flat(load_plain(path))
    if not isinstance(contents, Mapping):
        raise CorruptFileError(f"{path} holds something else than named tensors", found=type(contents).__name__)
    return HeldTensors(contents, path)


def _fitted(source: Source, model: Any) -> ImageAdapter:
    """What a file is for a UNet, if it is for it."""
    keys, stored = read_keys(source.tensors), source.tensors
    kind, projection = projection_of({name: stored[key].shape for name, key in keys.projection.items()})
    found = f"{kind} IP-Adapter: {len(keys.projection)} keys of image_proj, {len(keys.layers)} layers of ip_adapter"
    if projection is None or keys.unread or not keys.layers:
        named = [*keys.unread, *(() if projection is not None else keys.projection.values())]
        raise AdapterError(
            f"{source.where} is no IP-Adapter that is known here",
            found=f"{found}; not understood: {first_names(named) or 'nothing'}",
            expected="image_proj.… of the kinds plain, plus, full or face ID, and ip_adapter.1.to_k_ip.weight, …",
        )
    names = in_order(name for name in model.attention_layers() if name.endswith(".attn2"))
    layers = {name: 2 * place + 1 for place, name in enumerate(names)}
    blocks: dict[int, Any] = {number: model.get_submodule(name) for name, number in layers.items()}
    shapes = {number: (layer.to_q.out_features, layer.cross_attention_dim) for number, layer in blocks.items()}
    fitting = [
        number
        for number, parts in keys.layers.items()
        if [stored[key].shape for key in parts.values()] == [shapes.get(number)] * 2 and shapes[number][1] == projection.width
    ]
    known = range(2 * len(layers))
    if not len(fitting) == len(layers) == len(keys.layers) or not all(number in known for number, _ in keys.low_rank):
        width, own = projection.width, model.config.cross_attention_dim
        raise AdapterError(
            f"{source.where} does not fit: {len(fitting)} of {len(layers)} layers of attention do",
            found=f"{found}, tokens of width {width}; the UNet has {len(layers)} layers and tokens of width {own}",
            remedy="nothing was changed: load an adapter that was trained for this model",
        )
    return ImageAdapter(projection, keys, layers)
