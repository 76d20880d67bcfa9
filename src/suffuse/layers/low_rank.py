"""Low-rank adapters (Hu et al., 2021, "LoRA: Low-rank adaptation of large language models", section 4.1).

A layer computes W x. An adapter adds  w (α / r) B A x  to it: A has r rows, B has r columns, α was fixed in training, and w is
how much of the adapter is wanted. For convolutions A has the kernel and the stride of the layer, and B is one by one.

A and B stand beside the layer's weights as buffers that no state_dict holds, so they go wherever the model goes; one forward hook
on the layer adds what all adapters ask for. Names and kinds of modules stay, weights are not touched, and what is removed leaves
nothing behind. How much of all adapters one call wants, `scaled`, belongs to the call and not to the model.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping
from contextvars import ContextVar, Token
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from suffuse.errors import AdapterError, InputError, NonFiniteError, nearest

_SCALE: ContextVar[float] = ContextVar("scale of the adapters in this call", default=1.0)

DOWN, UP = "lora_A:", "lora_B:"
"""How the buffers of an adapter begin; its name follows."""

Weight = float | Mapping[str, float]
"""How much of an adapter is wanted: everywhere, or by the place of an attention layer, "down_blocks.1.attentions.0"."""


def scaled(scale: float | None) -> contextlib.AbstractContextManager[None]:
    """Let all adapters count `scale` times in the calls of this thread that are made inside; None for as outside.

    Threads that share a model do not see each other's scale.

    Raises:
        InputError: It is no finite number.
    """
    if scale is None:
        return contextlib.nullcontext()
    if not isinstance(scale, Real) or not math.isfinite(scale):
        raise InputError("the scale of adapters is no number", found=scale, expected="a finite number, 1 for as they are")
    return _Scaled(scale)


class _Scaled(contextlib.AbstractContextManager[None]):
    def __init__(self, scale: float) -> None:
        self._scale = scale

    def __enter__(self) -> None:
        self._token: Token[float] = _SCALE.set(self._scale)

    def __exit__(self, *error: object) -> None:
        _SCALE.reset(self._token)


# torch.compile cannot trace a context variable: in a graph it is an operation of its own, looked up whenever the graph runs.
_OPERATIONS = torch.library.Library("suffuse", "DEF")
_OPERATIONS.define("scale_of_call(Tensor x) -> Tensor")
_OPERATIONS.impl("scale_of_call", lambda x: torch.tensor(_SCALE.get(), dtype=torch.float64), "CompositeExplicitAutograd")
torch.library.register_fake("suffuse::scale_of_call", lambda x: torch.empty((), dtype=torch.float64), lib=_OPERATIONS)


def _scale_of_call(x: Tensor) -> Any:
    return torch.ops.suffuse.scale_of_call(x) if torch.compiler.is_compiling() else _SCALE.get()


class Factors(NamedTuple):
    """What an adapter brings for one layer.

    Attributes:
        down: A, (rank, inputs) or (rank, channels, height, width).
        up: B, (outputs, rank) or (outputs, rank, 1, 1).
        alpha: α; the update is divided by the rank.
    """

    down: Tensor
    up: Tensor
    alpha: float


@dataclass(eq=False)
class LowRankUpdate:
    """The forward hook of a layer: adds the updates of the active adapters to its output.

    Attributes:
        alphas: α and r of each adapter that is for this layer.
        active: (adapter, w α / r), in the order they are added. The numbers are tensors, which what is compiled reads when it
            runs: other weights and other adapters of the same rank compile nothing again.
    """

    alphas: dict[str, tuple[float, int]]
    active: tuple[tuple[str, Tensor], ...] = ()

    def scale(self, name: str, weight: float) -> float:
        """How many times B A x of an adapter counts."""
        alpha, rank = self.alphas[name]
        return weight * alpha / rank

    def __call__(self, layer: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        """The output with the updates, in the type of the output."""
        x, total = arguments[0], output
        for name, scale in self.active:
            down, up = factors_of(layer, name)
            total = total + _product(layer, x, down.to(x), up.to(x)) * (_scale_of_call(x) * scale)
        return total.to(output.dtype)


class LowRankAdapters:
    """All adapters of one model.

    Attributes:
        names: In the order they came.
        weights: The active ones, in the order they are added, and how much of each is wanted.
        enabled: Whether the active ones count.
        fused: Those whose update is in the weights of the layers now.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._layers: dict[str, Any] = {}
        self._updates: dict[str, LowRankUpdate] = {}
        self._handles: dict[str, Any] = {}
        self._originals: dict[str, Tensor] = {}
        self.names: list[str] = []
        self.weights: dict[str, Weight] = {}
        self.enabled = True
        self.fused: list[str] = []

    # ---------------------------------------------------------------- which there are

    def add(self, name: str, factors: Mapping[str, Factors]) -> None:
        """Put an adapter beside its layers, and make it the only active one."""
        self._put(name, factors)
        self.names.append(name)
        self.activate({name: 1.0})

    def replace(self, name: str, factors: Mapping[str, Factors]) -> None:
        """Let other factors take the place of an adapter's.

        Where they have the same layers and shapes, nothing of the model changes but the numbers: what was compiled stays so.
        """
        for layer in self._for([name]).keys() - factors.keys():
            self._take(layer, name)
        self._put(name, factors)
        self._refresh()

    def remove(self, name: str) -> None:
        """Take an adapter off its layers; if no other is active then, the first that is left becomes so, as in PEFT."""
        for layer in self._for([name]):
            self._take(layer, name)
        self.names.remove(name)
        self.weights.pop(name, None)
        if not self.weights and self.names:
            self.weights = {self.names[0]: 1.0}
        self._refresh()

    def activate(self, weights: Mapping[str, Weight]) -> None:
        """Make these the active adapters, in this order."""
        self.weights = dict(weights)
        self._refresh()

    def enable(self, enabled: bool) -> None:
        """Let the active adapters count, or none."""
        self.enabled = enabled
        self._refresh()

    def factors(self, name: str) -> dict[str, Factors]:
        """What an adapter holds, by the name of the layer."""
        alphas = {layer: self._updates[layer].alphas[name][0] for layer in self._for([name])}
        return {layer: Factors(*factors_of(self._layers[layer], name), alpha) for layer, alpha in alphas.items()}

    def move(self, names: Iterable[str], device: torch.device | str | int) -> None:
        """Send adapters to a device. One that is elsewhere than its model can be used, but is copied in every call."""
        for name in names:
            for layer, factors in self.factors(name).items():
                self._place(layer, name, factors.down.to(device), factors.up.to(device))

    # ---------------------------------------------------------------- into the weights

    def check_fusing(self, names: Iterable[str], scale: float, finite: bool) -> None:
        """Raise unless `fuse` can be done.

        Args:
            names: Which.
            scale: How many times.
            finite: Look for NaN and infinity in the sums as well.

        Raises:
            AdapterError: One is not there, or fused already, or a weight is not in memory.
            NonFiniteError: There are some.
        """
        names = list(names)
        check_known(names, self.names)
        self.check_unfused(names)
        for layer, own in self._for(names).items():
            if self._layers[layer].weight.is_meta:
                raise AdapterError(
                    f"the weights of {layer} are not in memory", remedy="fuse before the model is offloaded: remove_all_hooks()"
                )
            if finite and not bool(torch.isfinite(self._fused(layer, own, scale)).all()):
                raise NonFiniteError(f"fusing {', '.join(own)} gives NaN or infinity in {layer}", remedy="use less of it")

    def check_unfused(self, names: Iterable[str]) -> None:
        """Raise `AdapterError` if one of the adapters is in the weights."""
        fused = [name for name in names if name in self.fused]
        if fused:
            raise AdapterError(
                f"{', '.join(map(repr, fused))} is fused",
                remedy="unfuse_lora() first; or unload_lora_weights(), which leaves what is fused in the weights for good",
            )

    def fuse(self, names: Iterable[str], scale: float) -> None:
        """Add updates to the weights themselves; the weights as they were are kept, in main memory, for `unfuse`.

        Args:
            names: Which; those that are active count as much as they are wanted, others once.
            scale: How many times.
        """
        names = list(names)
        for layer, own in self._for(names).items():
            weight = self._layers[layer].weight.data
            self._originals.setdefault(layer, weight.to("cpu", copy=True))
            weight.copy_(self._fused(layer, own, scale))
        self.fused += names
        self._refresh()

    def unfuse(self) -> None:
        """Give the weights back the very bits they had."""
        for layer, original in self._originals.items():
            self._layers[layer].weight.data.copy_(original)
        self._originals.clear()
        self.fused.clear()
        self._refresh()

    def _for(self, names: Iterable[str]) -> dict[str, list[str]]:
        """Layer → those of the adapters that are for it."""
        names = list(names)
        own = {layer: [name for name in names if name in update.alphas] for layer, update in self._updates.items()}
        return {layer: fitting for layer, fitting in own.items() if fitting}

    def _fused(self, layer: str, names: Iterable[str], scale: float) -> Tensor:
        module, update = self._layers[layer], self._updates[layer]
        weight = module.weight.detach()
        for name in names:
            down, up = (
                factor.to(weight.device, torch.promote_types(factor.dtype, torch.float32)) for factor in factors_of(module, name)
            )
            times = update.scale(name, _wanted(self.weights.get(name, 1.0), layer)) * scale
            weight = weight + (_matrix(module, down, up) * times).to(weight.dtype)
        return weight

    # ---------------------------------------------------------------- the layers

    def _put(self, name: str, factors: Mapping[str, Factors]) -> None:
        for layer, (down, up, alpha) in factors.items():
            if layer not in self._updates:
                self._layers[layer], self._updates[layer] = self._model.get_submodule(layer), LowRankUpdate({})
                self._handles[layer] = self._layers[layer].register_forward_hook(self._updates[layer])
            self._updates[layer].alphas[name] = alpha, down.shape[0]
            self._place(layer, name, down, up)

    def _place(self, layer: str, name: str, down: Tensor, up: Tensor) -> None:
        for prefix, tensor in ((DOWN, down), (UP, up)):
            self._layers[layer].register_buffer(prefix + name, tensor, persistent=False)

    def _take(self, layer: str, name: str) -> None:
        for prefix in (DOWN, UP):
            delattr(self._layers[layer], prefix + name)
        del self._updates[layer].alphas[name]
        if not self._updates[layer].alphas:
            self._handles.pop(layer).remove()
            del self._updates[layer], self._layers[layer]

    def _refresh(self) -> None:
        counting = {n: weight for n, weight in self.weights.items() if self.enabled and n not in self.fused}
        for layer, update in self._updates.items():
            scales = {name: update.scale(name, _wanted(w, layer)) for name, w in counting.items() if name in update.alphas}
            update.active = tuple((name, torch.tensor(scale, dtype=torch.float64)) for name, scale in scales.items())


# ---------------------------------------------------------------- of a model


def adapters_of(model: nn.Module) -> LowRankAdapters | None:
    """The adapters of a model; None if it has none."""
    return model.__dict__.get("_low_rank_adapters")


def make_adapters(model: nn.Module) -> LowRankAdapters:
    """The adapters of a model, to put one in."""
    return model.__dict__.setdefault("_low_rank_adapters", LowRankAdapters(model))


def drop_adapters(model: nn.Module) -> None:
    """Take all adapters off a model. What is fused stays in the weights, for good."""
    adapters = adapters_of(model)
    if adapters is not None:
        for name in list(adapters.names):
            adapters.remove(name)
        del model.__dict__["_low_rank_adapters"]


def delete_adapters(model: nn.Module, names: Iterable[str]) -> None:
    """Take those of these adapters off a model that it has."""
    adapters = adapters_of(model)
    if adapters is None:
        return
    for name in names:
        if name in adapters.names:
            adapters.remove(name)
    if not adapters.names:
        drop_adapters(model)


def number(what: str, value: Any) -> float:
    """How much of an adapter, as a finite number; 1 if None.

    Raises:
        AdapterError: It is none.
    """
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, Real) or not -1e300 < value < 1e300:  # pyright: ignore[reportOperatorIssue]
        raise AdapterError(f"{what} is no number", found=value, expected="a finite number")
    return float(value)


def check_known(names: Iterable[str], known: Iterable[str]) -> None:
    """Raise `AdapterError` unless all names are known, each once."""
    names, known = list(names), list(known)
    for name in names:
        if name not in known:
            close = nearest(name, known)
            raise AdapterError(
                f"no adapter is called {name!r}",
                expected=", ".join(known) or "no adapter is loaded",
                remedy=f"did you mean {close}?" if close else "load it with load_lora_weights(…, adapter_name=…)",
            )
    if len(set(names)) < len(names):
        raise AdapterError("an adapter is named twice", found=names)


# ---------------------------------------------------------------- arithmetic


def factors_of(layer: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    """A and B of an adapter of this layer."""
    buffers: dict[str, Any] = layer._buffers
    return buffers[DOWN + name], buffers[UP + name]


def _wanted(weight: Weight, layer: str) -> float:
    """How much of an adapter is wanted in a layer; layers between those of attention go with the attention of their number."""
    if not isinstance(weight, Mapping):
        return weight
    for place, value in weight.items():
        if layer.startswith(f"{place}."):
            return value
    parts = layer.split(".")
    return weight.get(f"{parts[0]}.{parts[1]}.attentions.{parts[3]}", 1.0) if len(parts) > 3 else 1.0


def _product(layer: nn.Module, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """B A x."""
    if isinstance(layer, nn.Conv2d):
        return F.conv2d(F.conv2d(x, down, None, layer.stride, layer.padding, layer.dilation), up)
    # As one matrix: else torch chooses among products that round differently, by strides and by whether weights are trained.
    return F.linear(F.linear(x.flatten(0, -2), down), up).unflatten(0, x.shape[:-1])


def _matrix(layer: nn.Module, down: Tensor, up: Tensor) -> Tensor:
    """B A, in the shape of the weight of the layer."""
    if isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1):
        return F.conv2d(down.transpose(0, 1), up).transpose(0, 1)
    return (up.flatten(1) @ down.flatten(1)).view(layer.weight.shape)  # pyright: ignore[reportArgumentType, reportCallIssue]
