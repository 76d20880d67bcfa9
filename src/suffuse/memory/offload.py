"""Models that wait on the CPU or on disk until they are used, by the hooks of accelerate.

    whole models     each moves to the accelerator when it is called, and back when the next one is: little slower
    parts of models  every layer's weights go there and back on their own: the least memory, and slow

Parts of one model that stay on different devices, or on disk, are in `placement`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from suffuse.errors import MissingPackageError

if TYPE_CHECKING:
    from accelerate.hooks import UserCpuOffloadHook

_Method = TypeVar("_Method", bound=Callable[..., Any])


def accelerate() -> Any:
    """The package.

    Raises:
        MissingPackageError: It is not installed.
    """
    try:
        import accelerate
    except ImportError as error:
        raise MissingPackageError("offloading needs accelerate", remedy="pip install suffuse[offload]") from error
    return accelerate


def used_as_forward(method: _Method) -> _Method:
    """Let a method count as use of the model, as its `forward` does: a model that waits elsewhere is fetched first."""

    @functools.wraps(method)
    def fetching(self: Any, *args: Any, **kwargs: Any) -> Any:
        hook = getattr(self, "_hf_hook", None)
        if hook is not None:
            hook.pre_forward(self)
        return method(self, *args, **kwargs)

    return fetching  # pyright: ignore[reportReturnType]


def offload_models(chain: Sequence[nn.Module], others: Iterable[nn.Module], device: torch.device) -> list[UserCpuOffloadHook]:
    """Let whole models wait on the CPU; those of the chain send the one before them back when they are called."""
    attach, hooks, previous = accelerate().cpu_offload_with_hook, list[Any](), None
    for model in chain:
        _, previous = attach(model, device, prev_module_hook=previous)
        hooks.append(previous)
    return [*hooks, *(attach(model, device)[1] for model in others)]


def offload_parts(model: nn.Module, device: torch.device) -> None:
    """Let every layer's weights wait on the CPU until it is called."""
    # Buffers go along where the model itself holds parameters: it uses both outside of any layer.
    accelerate().cpu_offload(model, device, offload_buffers=len(model._parameters) > 0)


def remove_hooks(model: nn.Module) -> None:
    """Undo either, and bring the weights back to where they were."""
    from accelerate.hooks import remove_hook_from_module

    remove_hook_from_module(model, recurse=True)


def gathered_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a model; on the CPU if its parts wait elsewhere."""
    if not any(hasattr(module, "_hf_hook") for module in model.modules()):
        return model.state_dict()
    from accelerate.utils.modeling import get_state_dict_offloaded_model

    return get_state_dict_offloaded_model(model)


def execution_device(models: Iterable[nn.Module]) -> torch.device | None:
    """Where offloaded models compute; None if none is offloaded."""
    for model in models:
        for module in model.modules() if hasattr(model, "_hf_hook") else ():
            device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
            if device is not None:
                return torch.device(device)
    return None
