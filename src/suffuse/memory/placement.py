"""Which device each model, or each part of one, goes to when it is loaded."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from suffuse.errors import InputError, LimitError
from suffuse.files import parse_size
from suffuse.memory.offload import accelerate

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
"""Ways to spread one model: evenly, evenly with room left on the first device, or device after device. "auto" is "balanced"."""

Device = str | int | torch.device
Memory = Mapping[int | str, int | str]
"""Device, or its number → bytes, or "10GB" and the like."""


class Placing:
    """Where the tensors of one model go: what a load asks, tensor by tensor, and does when it is done.

    Args:
        device_map: A device; prefixes of tensor names → devices, or "disk"; or one of `STRATEGIES`. None: the CPU.
        max_memory: For the strategies: how much of each device may be taken; what is free, if None.
        folder: Where weights go that the map sends to disk; it must stay for as long as the model.
        whole: Names of module classes that the strategies keep on one device.

    Raises:
        InputError: `device_map` names no device or strategy, or a size is none.
    """

    def __init__(
        self,
        device_map: Device | Mapping[str, Device] | None,
        max_memory: Memory | None = None,
        folder: str | os.PathLike[str] | None = None,
        whole: Sequence[str] = (),
    ) -> None:
        self.memory = (
            None if max_memory is None else {device: parse_size(size, "max_memory") for device, size in max_memory.items()}
        )
        self.strategy = device_map if isinstance(device_map, str) and device_map in STRATEGIES else None
        self.map: dict[str, Device] = {}
        if isinstance(device_map, Mapping):
            self.map = dict(device_map)
        elif device_map is not None and self.strategy is None:
            self.map = {"": device_map}
        self._devices()  # so that a wrong name is told before anything is read
        self.folder, self.whole, self.index = folder, list(whole), dict[str, Any]()

    def __call__(self, module: nn.Module, dtype: torch.dtype) -> dict[str, torch.device]:
        """Prefix of tensor names → device, for a module that has no storage yet; disk is "meta"."""
        if self.strategy is not None:
            self.map = self._spread(module, dtype)
        if "disk" in self.map.values() and self.folder is None:
            raise InputError("device_map sends weights to disk, and there is no folder for them", remedy="offload_folder=…")
        if "disk" in self.map.values():
            try:  # a folder of its own in there: two models may share the place
                Path(self.folder or "").mkdir(parents=True, exist_ok=True)
                self.folder = tempfile.mkdtemp(prefix="weights-", dir=self.folder)
            except (OSError, TypeError) as error:
                raise InputError(f"offload_folder cannot be used: {error}", found=self.folder) from None
        return self._devices()

    def spill(self, name: str, tensor: Tensor) -> None:
        """Write a tensor that goes to disk."""
        assert self.folder is not None
        self.index = accelerate().utils.offload_weight(tensor, name, self.folder, self.index)

    def finish(self, model: nn.Module) -> None:
        """Let what the parts of a loaded model compute travel along, if they are in several places."""
        if len({*self.map.values()} | ({"cpu"} if "disk" in self.map.values() else set())) < 2:
            return
        if self.index:
            accelerate().utils.save_offload_index(self.index, self.folder)
        try:
            dispatch(model, self.map, self.folder)
        except ValueError as error:
            raise InputError(f"device_map does not fit {type(model).__name__}: {error}", found=self.map) from None

    def _spread(self, module: nn.Module, dtype: torch.dtype) -> dict[str, Device]:
        utils = accelerate().utils
        free = utils.get_max_memory(self.memory)
        if self.strategy != "sequential":
            low = self.strategy == "balanced_low_0"
            free = utils.get_balanced_memory(module, free, self.whole, dtype=dtype, low_zero=low)
        try:
            return dict(utils.infer_auto_device_map(module, free, self.whole, dtype=dtype))
        except ValueError as error:
            raise InputError(f"max_memory cannot be used: {error}", found=self.memory) from None

    def _devices(self) -> dict[str, torch.device]:
        try:
            for device in self.map.values():
                if device != "disk" and torch.empty(0, device=device).is_meta:
                    raise TypeError("weights would be lost")
            return {prefix: torch.device("meta" if device == "disk" else device) for prefix, device in self.map.items()}
        except (RuntimeError, TypeError, AssertionError):
            raise InputError(
                "device_map names no device",
                found=self.map.get("", self.map),
                expected=f'"cuda", "cuda:1", "cpu", {{"": "cuda", "mid_block": "cpu"}}, or one of {", ".join(STRATEGIES)}',
            ) from None


def dispatch(model: nn.Module, devices: Mapping[str, Device], folder: str | os.PathLike[str] | None = None) -> None:
    """Hook a model, or parts of it, to devices: what comes in is moved there, and what goes out back."""
    logger = logging.getLogger("accelerate.big_modeling")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of what was asked for
    try:
        accelerate().dispatch_model(model, dict(devices), offload_dir=folder, force_hooks=True)
    finally:
        logger.setLevel(level)


def share_out(sizes: Mapping[str, int], max_memory: Memory) -> dict[str, int | str]:
    """A device for each model: the largest first, to and fro over the devices, and the CPU for what fits nowhere.

    Args:
        sizes: Model → bytes.
        max_memory: How much of each device may be taken.

    Raises:
        LimitError: The CPU was given a limit too, and is full.
        InputError: A size is none.
    """
    left = _sizes(max_memory)
    devices = [device for device in left if device != "cpu"] or ["cpu"]
    round_trip, turn = [*devices, *reversed(devices)], 0
    placed: dict[str, int | str] = {}
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        device = round_trip[turn % len(round_trip)]
        if size <= left.get(device, size):
            turn += 1
        else:
            roomiest = max(devices, key=lambda other: left[other])
            device = roomiest if size <= left[roomiest] else "cpu"
        if size > left.get(device, size):
            raise LimitError(
                f"{name} fits on no device",
                found=f"{size} bytes; left are {left}",
                remedy="raise max_memory, or load it as a smaller torch_dtype",
            )
        if device in left:
            left[device] -= size
        placed[name] = device
    return placed


def _sizes(max_memory: Memory) -> dict[int | str, int]:
    if not isinstance(max_memory, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError("max_memory has the wrong type", found=max_memory, expected='device → size: {0: "10GB", "cpu": "30GB"}')
    return {device: parse_size(size, "max_memory") for device, size in max_memory.items()}


def accelerators() -> dict[int | str, int]:
    """The accelerators there are and how many bytes of each are free; the CPU, where there is none."""
    free = accelerate().utils.get_max_memory()
    return {device: size for device, size in free.items() if device != "cpu"} or {"cpu": free["cpu"]}
