"""A low-rank adapter on its way from a file into models: held against all of them first, read then, put in last.

What does not fit is refused with numbers before a tensor is read, and no model is changed until everything is in memory.
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from suffuse.checkpoints.adapter_files import Choice, HeldTensors, find_adapter, open_adapter
from suffuse.checkpoints.reading import Source, Stored
from suffuse.checkpoints.weights import first_names
from suffuse.conversion.lora import Parts, described, read_keys
from suffuse.errors import AdapterError
from suffuse.hub.options import HubOptions
from suffuse.layers.low_rank import Factors, adapters_of, check_known, make_adapters, number

USUAL_NAME = "pytorch_lora_weights"
METADATA = "lora_adapter_metadata"
"""Where the header of a file holds the settings of PEFT, as JSON."""

Given = str | os.PathLike[str] | Mapping[str, Tensor]


@dataclass(frozen=True)
class Fitted:
    """One layer's part of an adapter, the shapes its factors are to have in the model, and α if no tensor holds it."""

    parts: Parts
    down: tuple[int, ...]
    up: tuple[int, ...]
    device: torch.device
    alpha: float | None = None


@dataclass
class LoraFile:
    """An adapter of which only the header is read.

    Attributes:
        source: What reads its tensors.
        components: Component → layer → keys.
        unread: Keys in no known dialect.
        alphas: α by component and layer, where they are not tensors of the file.
    """

    source: Source
    components: dict[str, dict[str, Parts]]
    unread: list[str] = field(default_factory=list[str])
    alphas: dict[tuple[str, str], float] = field(default_factory=dict[tuple[str, str], float])

    @classmethod
    def open(
        cls,
        given: Given,
        choice: Choice | None = None,
        options: HubOptions | None = None,
        unet: Mapping[str, Any] | None = None,
        network_alphas: Mapping[str, float] | None = None,
    ) -> LoraFile:
        """Read the header of a file, or look at tensors in memory.

        Args:
            given: A file, a folder, a repository, or named tensors.
            choice: Which file of a folder or repository.
            options: How to fetch.
            unet: The configuration of the UNet, for files with the block names of the original code.
            network_alphas: "component.layer.alpha" → α, for those that the tensors do not tell.
        """
        if isinstance(given, Mapping):
            source, metadata = HeldTensors(given), {}
        else:
            source, metadata = open_adapter(find_adapter(given, choice or Choice(), options or HubOptions()))
        components, unread = read_keys(source.tensors, unet)
        made = cls(source, components, unread)
        made.alphas = _alphas(made, metadata.get(METADATA), network_alphas or {})
        return made

    def only(self, *components: str) -> LoraFile:
        """What it has for these components."""
        return replace(self, components={name: layers for name, layers in self.components.items() if name in components})

    # ---------------------------------------------------------------- does it fit?

    def fit(self, models: Mapping[str, nn.Module | None]) -> dict[str, dict[str, Fitted]]:
        """Where everything goes: component → layer → what is for it.

        Args:
            models: By component; for those that are None the adapter's part is left out, with a warning.

        Raises:
            AdapterError: Something is of no known kind, for no layer, of a wrong shape, or alone; with the numbers.
        """
        self._check_whole()
        fitted: dict[str, dict[str, Fitted]] = {}
        misfits: list[str] = []
        for component, layers in self.components.items():
            model = models.get(component)
            if component in models and model is None:
                warnings.warn(f"there is no {component}: what the adapter has for it is not used", stacklevel=5)
                continue
            places = {} if model is None else _places(model)
            for layer, parts in layers.items():
                place = _found(layer, places)
                shapes = None if place is None else self._shapes(places[place], parts)
                if place is None or shapes is None or place in fitted.get(component, {}):
                    misfits.append(f"{component}.{layer}")
                else:
                    fitted.setdefault(component, {})[place] = Fitted(
                        parts, *shapes, _device(places[place]), self.alphas.get((component, layer))
                    )
        if misfits or not fitted:
            self._refuse(f"does not fit: {self.count - len(misfits)} of {self.count} layers do", misfits)
        return fitted

    @property
    def count(self) -> int:
        """How many layers it is for."""
        return sum(map(len, self.components.values()))

    def _check_whole(self) -> None:
        if self.unread or not self.components:
            known = len(self.source.tensors) - len(self.unread)
            self._refuse(
                f"cannot be read: {known} of {len(self.source.tensors)} keys are those of a low-rank adapter", self.unread
            )
        halves = [
            f"{component}.{layer} has no {' and no '.join(missing)}"
            for component, layers in self.components.items()
            for layer, parts in layers.items()
            if (missing := [name for name in ("down", "up") if not getattr(parts, name)])
        ]
        if halves:
            self._refuse(f"is not whole: {len(halves)} of {self.count} layers lack a factor", halves)

    def _shapes(self, layer: nn.Module, parts: Parts) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """What the factors are to be shaped like; None if they cannot be."""
        stored = self.source.tensors
        down, up, weight = stored[parts.down].shape, stored[parts.up].shape, tuple(layer.weight.shape)  # pyright: ignore[reportArgumentType, reportCallIssue]
        rank, middle = down[0] if down else 0, stored[parts.middle].shape if parts.middle else None
        if middle is not None:
            whole = middle[:2] == (up[1] if len(up) > 1 else 0, rank) and math.prod(down) == rank * weight[1] and len(weight) == 4
            wanted = (middle[0], weight[1], *middle[2:]), (weight[0], middle[0], 1, 1)
            return wanted if whole and middle[2:] == weight[2:] and math.prod(up) == math.prod(wanted[1]) else None
        wanted = (rank, *weight[1:]), (weight[0], rank, *(1 for _ in weight[2:]))
        # A matrix and a convolution of one pixel are the same numbers.
        fits = rank > 0 and math.prod(down) == math.prod(wanted[0]) and math.prod(up) == math.prod(wanted[1])
        return wanted if fits and up[:2] == wanted[1][:2] and down[:2] == wanted[0][:2] else None

    def _refuse(self, problem: str, names: Iterable[str]) -> None:
        kind = described({key: stored.shape for key, stored in self.source.tensors.items()})
        raise AdapterError(
            f"{_where(self.source)} {problem}",
            found=f"this looks like {kind}; not used: {first_names(list(names))}",
            remedy="nothing was changed: load an adapter that was trained for this model",
        )

    # ---------------------------------------------------------------- reading

    def read(self, fitted: Mapping[str, Mapping[str, Fitted]]) -> dict[str, dict[str, Factors]]:
        """The factors, in memory of their own, in the type of the file.

        Raises:
            NonFiniteError: A tensor holds NaN or infinity.
            CorruptFileError: The file is damaged.
        """
        stored, targets = self.source.tensors, dict[str, Tensor]()
        for layers in fitted.values():
            for part in layers.values():
                for key, shape in ((part.parts.down, part.down), (part.parts.up, part.up)):
                    own = stored[key].shape if part.parts.middle else shape
                    targets[key] = torch.empty(own, dtype=_floating(stored[key]), device=part.device)
                for key in filter(None, (part.parts.middle, part.parts.alpha)):
                    targets[key] = torch.empty(stored[key].shape, dtype=_floating(stored[key]))
        self.source.fill({key: tensor.view(stored[key].shape) for key, tensor in targets.items()})
        return {
            component: {layer: self._factors(component, layer, part, targets) for layer, part in layers.items()}
            for component, layers in fitted.items()
        }

    def read_unfitted(self) -> dict[str, dict[str, Factors]]:
        """The factors, in the shapes of the file, of whatever it is for."""
        self._check_whole()
        stored, here = self.source.tensors, torch.device("cpu")
        return self.read(
            {
                component: {
                    layer: Fitted(
                        parts, stored[parts.down].shape, stored[parts.up].shape, here, self.alphas.get((component, layer))
                    )
                    for layer, parts in layers.items()
                }
                for component, layers in self.components.items()
            }
        )

    def _factors(self, component: str, layer: str, part: Fitted, tensors: Mapping[str, Tensor]) -> Factors:
        down, up = tensors[part.parts.down], tensors[part.parts.up]
        rank = down.shape[0]
        if part.parts.middle:
            middle = tensors[part.parts.middle].to(down)
            down, up = torch.einsum("omhw,mi->oihw", middle, down.flatten(1)).contiguous(), up.view(part.up)
        alpha = float(rank) if part.alpha is None else part.alpha
        if part.parts.alpha:
            alpha = _number(f"{component}.{layer}.alpha", tensors[part.parts.alpha])
        return Factors(down, up, alpha)


def load_lora(file: LoraFile, models: Mapping[str, nn.Module | None], name: str | None = None, hotswap: bool = False) -> str:
    """Put an adapter into models, and make it the only active one of each; returns its name.

    Args:
        file: The adapter.
        models: By component.
        name: What it is to be called; "default_0", "default_1", … if None.
        hotswap: Let it take the place of the adapter of that name.

    Raises:
        AdapterError: It does not fit, or its name is taken, or not there to be replaced; no model is changed.
        NonFiniteError: A tensor holds NaN or infinity; no model is changed.
    """
    present = {model: adapters_of(model) for model in models.values() if model is not None}
    taken = {known for adapters in present.values() if adapters is not None for known in adapters.names}
    if name is None:
        count = max((len(adapters.names) for adapters in present.values() if adapters is not None), default=0)
        name = next(f"default_{n}" for n in range(count, count + len(taken) + 1) if f"default_{n}" not in taken)
    if not isinstance(name, str) or not name or "." in name:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise AdapterError("adapter_name is no name", found=name, expected="text without dots")
    if hotswap:
        check_known([name], taken)
        for adapters in present.values():
            if adapters is not None:
                adapters.check_unfused([name])
    elif name in taken:
        raise AdapterError(
            f"an adapter is called {name!r} already",
            found=", ".join(sorted(taken)),
            remedy="use another adapter_name, or hotswap=True",
        )
    for model in present:
        check_unfused_projections(model)
    factors = file.read(file.fit(models))
    for component, layers in factors.items():
        model = models[component]
        adapters = make_adapters(model) if model is not None else None
        if adapters is not None:
            (adapters.replace if name in adapters.names else adapters.add)(name, layers)
    for component, model in models.items():
        if model is not None and component not in factors and (adapters := adapters_of(model)) is not None:
            if name in adapters.names:
                adapters.remove(name)
            elif not hotswap:
                adapters.activate({})
    return name


def check_unfused_projections(model: nn.Module) -> None:
    """Raise `AdapterError` if `fuse_qkv_projections` made layers of a model bypass those an adapter is for."""
    if "_processors_before_fusion" in model.__dict__:
        raise AdapterError(
            f"the query, key and value projections of {type(model).__name__} are fused, which no adapter is for",
            remedy="unfuse_qkv_projections(), or load the adapter, fuse_lora() and unload it first",
        )


def _alphas(file: LoraFile, metadata: str | None, network_alphas: Mapping[str, float]) -> dict[tuple[str, str], float]:
    """α by component and layer, of a header's settings or of those that were passed."""
    made: dict[tuple[str, str], float] = {}
    settings = _settings(file, metadata)
    for component, layers in file.components.items():
        start = f"{component}." if any("." in key for key in settings) else ""
        own = {key.removeprefix(start): value for key, value in settings.items() if key.startswith(start)}
        for layer, parts in layers.items():
            if "lora_alpha" in own and parts.down:
                rank = file.source.tensors[parts.down].shape[0]
                pattern: dict[str, Any] = own.get("alpha_pattern") or {}
                alpha = number("lora_alpha", next((a for p, a in pattern.items() if _names(p, layer)), own["lora_alpha"]))
                made[component, layer] = alpha * math.sqrt(rank) if own.get("use_rslora") else alpha
    for key, alpha in network_alphas.items():
        (component, layers), *_ = read_keys([key])[0].items() or [("", {})]
        layer = next(iter(layers), "")
        if layer not in file.components.get(component, {}):
            raise AdapterError(f"network_alphas: {key!r} is for no layer of the adapter")
        made[component, layer] = number("network_alphas", alpha)
    return made


def _settings(file: LoraFile, metadata: str | None) -> dict[str, Any]:
    try:
        settings = json.loads(metadata) if metadata else {}
    except (ValueError, RecursionError):
        settings = None
    numbers = isinstance(settings, dict) and all(
        isinstance(value, (int, float)) for key, value in settings.items() if key.endswith("lora_alpha")
    )
    if isinstance(settings, dict):
        patterns = [value for key, value in settings.items() if key.endswith("alpha_pattern")]
        numbers = numbers and all(value is None or isinstance(value, dict) for value in patterns)
    if not numbers or not isinstance(settings, dict):
        raise AdapterError(f"{_where(file.source)}: {METADATA} in its header holds no settings", found=metadata)
    return settings


def _names(pattern: str, layer: str) -> bool:
    """Whether a layer is one that a pattern of PEFT names: its whole name, or the end of it."""
    try:
        return re.match(rf"(.*\.)?({pattern})$", layer) is not None
    except re.error:
        return False


def _places(model: nn.Module) -> dict[str, nn.Module]:
    """The layers an adapter can be for."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))}


def _found(layer: str, places: Mapping[str, nn.Module]) -> str | None:
    """The layer under its name, or as transformers called it before or after version 5."""
    spelt = (layer, layer.removeprefix("text_model."), f"text_model.{layer}")
    return next((name for name in spelt if name in places), None)


def _device(layer: nn.Module) -> torch.device:
    device: torch.device = layer.weight.device  # pyright: ignore[reportAssignmentType, reportAttributeAccessIssue]
    return device if device.type != "meta" else torch.device("cpu")


def _floating(stored: Stored) -> torch.dtype:
    return stored.dtype if stored.dtype.is_floating_point else torch.float32


def _number(name: str, tensor: Tensor) -> float:
    if tensor.numel() != 1:
        raise AdapterError(f"{name} is no number", found=f"a tensor {tuple(tensor.shape)}")
    return float(tensor.item())


def _where(source: Source) -> str:
    first = next(iter(source.tensors.values()), None)
    return str(source.where if first is None else first.path)
