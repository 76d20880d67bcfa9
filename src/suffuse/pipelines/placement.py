"""Where the models of a pipeline are: moved by hand, or fetched when they are used (`suffuse.memory.offload`)."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from suffuse.checkpoints.weights import parse_dtype
from suffuse.errors import InputError
from suffuse.memory.offload import execution_device, offload_models, offload_parts, remove_hooks
from suffuse.memory.placement import Device, dispatch

if TYPE_CHECKING:
    from accelerate.hooks import UserCpuOffloadHook

_Placed = TypeVar("_Placed", bound="PlacedModels")


class PlacedModels:
    """What moves the models of a pipeline.

    Class attributes:
        model_cpu_offload_seq: Order in which models are used, "text_encoder->unet->vae".
        _exclude_from_cpu_offload: Models that stay on the accelerator.
    """

    model_cpu_offload_seq: ClassVar[str] = ""
    _exclude_from_cpu_offload: ClassVar[list[str]] = []

    _offloaded: list[UserCpuOffloadHook]
    _one_at_a_time: threading.RLock | None = None  # pyright: ignore[reportGeneralTypeIssues]
    """Threads that share offloaded models take turns: the weights are where one of them needs them."""
    hf_device_map: dict[str, Device] | None = None
    """Model → device, as `device_map` put them; None if it did not."""

    if TYPE_CHECKING:

        @property
        def components(self) -> dict[str, Any]:
            """By name."""
            ...

    @property
    def _modules_by_name(self) -> dict[str, nn.Module]:
        return {name: value for name, value in self.components.items() if isinstance(value, nn.Module)}

    @property
    def device(self) -> torch.device:
        """Where the first component with parameters is."""
        return next((p.device for m in self._modules_by_name.values() for p in m.parameters()), torch.device("cpu"))

    @property
    def _execution_device(self) -> torch.device:
        """Where the pipeline computes: the accelerator that offloaded models come to, else `device`."""
        return execution_device(self._modules_by_name.values()) or self.device

    def to(
        self: _Placed,
        *args: Any,
        torch_dtype: torch.dtype | None = None,
        torch_device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        device: str | int | torch.device | None = None,
        silence_dtype_warnings: bool = False,
    ) -> _Placed:
        """Move every model: `pipe.to("cuda")`, `pipe.to(torch.float16)`, `pipe.to("cuda", torch.float16)`, or by keyword.

        Args:
            *args: A dtype, a device, both, or a tensor to take both from.
            torch_dtype: The same as `dtype`.
            torch_device: The same as `device`.
            dtype: The floating point type.
            device: The device.
            silence_dtype_warnings: No warning for half precision on a CPU.

        Returns:
            The pipeline itself.

        Raises:
            InputError: Something that is neither device nor dtype, or a device that is not there; nothing was moved.
        """
        dtype, device = dtype or torch_dtype, device if device is not None else torch_device
        for value in args:
            if isinstance(value, torch.dtype):
                dtype = value
            elif isinstance(value, Tensor):
                dtype, device = value.dtype, value.device
            else:
                device = value
        target = self._checked_device("to", device) if device is not None else None
        offloaded = execution_device(self._modules_by_name.values()) is not None
        if offloaded and (target is not None or any(p.is_meta for m in self._modules_by_name.values() for p in m.parameters())):
            raise InputError(
                f"{type(self).__name__}.to: its models are offloaded, and move on their own",
                remedy="pipe.remove_all_hooks() first; or leave it as it is: it computes on the accelerator",
            )
        dtype = parse_dtype(dtype)
        on_cpu = (target or self.device).type == "cpu"
        if dtype == torch.float16 and on_cpu and not silence_dtype_warnings:
            warnings.warn("float16 on a CPU is slow and overflows early: use torch.bfloat16 or torch.float32", stacklevel=2)
        for module in self._modules_by_name.values():
            module.to(device=target, dtype=dtype)
        return self

    def _checked_device(self, method: str, device: str | int | torch.device) -> torch.device:
        """The device of that name, if it is there and keeps what it is given."""
        try:
            target = torch.device(device)
            torch.empty(0, device=target)
            if target.type == "meta":
                raise ValueError("weights would be lost on 'meta'")
        except (RuntimeError, TypeError, AssertionError, ValueError) as error:
            raise InputError(
                f"{type(self).__name__}.{method}: no device {device!r}",
                found=str(error).split("\n")[0],
                expected="'cpu', 'cuda', 'cuda:1', 'mps', …",
            ) from None
        return target

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str = "cuda") -> None:
        """Let the models wait on the CPU: each moves to the accelerator when it is used, and back when the next one is.

        Takes the memory of the largest model instead of all, for little time.

        Args:
            gpu_id: The number of the accelerator.
            device: Its kind; with a number, if `gpu_id` is not given.

        Raises:
            InputError: There is no such device, or two numbers were given.
            MissingPackageError: accelerate is not installed.
        """
        target = self._offload_target("enable_model_cpu_offload", gpu_id, device)
        models = self._modules_by_name
        chain = [models.pop(name) for name in self.model_cpu_offload_seq.split("->") if name in models]
        for name in self._exclude_from_cpu_offload:
            if name in models:
                models.pop(name).to(target)
        self._offloaded = offload_models(chain, models.values(), target)

    def enable_sequential_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str = "cuda") -> None:
        """Let the weights wait on the CPU: those of each layer move to the accelerator while it computes.

        Takes the least memory of all, and by far the most time.

        Args:
            gpu_id: The number of the accelerator.
            device: Its kind; with a number, if `gpu_id` is not given.

        Raises:
            InputError: There is no such device, or two numbers were given.
            MissingPackageError: accelerate is not installed.
        """
        target = self._offload_target("enable_sequential_cpu_offload", gpu_id, device)
        for name, model in self._modules_by_name.items():
            if name in self._exclude_from_cpu_offload:
                model.to(target)
            else:
                offload_parts(model, target)

    def _offload_target(self, method: str, gpu_id: int | None, device: torch.device | str) -> torch.device:
        """The device to offload from, with all models on the CPU and free of hooks."""
        target = self._checked_device(method, device)
        numbered = ":" in str(target)
        if gpu_id is not None and numbered:
            raise InputError(f"{method}: gpu_id={gpu_id} and device={device!r} both name a number", remedy="pass one of the two")
        if target.type != "cpu" and not numbered:
            target = self._checked_device(method, f"{target.type}:{gpu_id or 0}")
        for name, model in self._modules_by_name.items():
            if "disk" in (getattr(model, "hf_device_map", None) or {}).values():
                raise InputError(f"{method}: parts of the {name} are on disk already", remedy="load it without device_map")
        self.remove_all_hooks()
        self.to("cpu", silence_dtype_warnings=True)
        self._one_at_a_time = threading.RLock()
        return target

    def hold_in_place(self, places: Mapping[str, Device]) -> None:
        """Let the models stay on several devices, and what they compute travel between these."""
        if len({torch.device(place) for place in places.values()}) > 1:
            for name, place in places.items():
                dispatch(self._modules_by_name[name], {"": place})
            self.hf_device_map = dict(places)

    def reset_device_map(self) -> None:
        """Undo `device_map`: the models are on the CPU, free to be moved."""
        self.remove_all_hooks()
        self.to("cpu", silence_dtype_warnings=True)

    def remove_all_hooks(self) -> None:
        """End offloading: the models are where their weights were before."""
        for model in self._modules_by_name.values():
            remove_hooks(model)
        self._offloaded, self.hf_device_map, self._one_at_a_time = [], None, None

    def maybe_free_model_hooks(self) -> None:
        """Send offloaded models back to the CPU; every call of the pipeline ends with it."""
        for hook in self.__dict__.get("_offloaded", ()):
            hook.offload()
