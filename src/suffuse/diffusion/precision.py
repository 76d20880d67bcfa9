"""Lending a model float32 weights for one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from suffuse.memory.offload import gathered_weights


def in_float32(model: Any, method: str, *args: Any, **kwargs: Any) -> Any:
    """Call a method of a model with float32 copies of its weights and tensors; the model itself stays as it is.

    Args:
        model: A model of any floating type, with its configuration; it may wait elsewhere, whole or in parts.
        method: The name of the method.
        *args: Its arguments, the first a tensor on the device to compute on; floating tensors are made float32.
        **kwargs: Its keywords, likewise.
    """
    device = args[0].device
    weights = {name: _wide(tensor).to(device) for name, tensor in gathered_weights(model).items()}
    with torch.device("meta"):
        lent = type(model).from_config(model.config)
    lent.load_state_dict(weights, assign=True)
    # Switches such as tiling stand in plain attributes, processors in the layers.
    for name, module in model.named_modules():
        own = lent.get_submodule(name)
        own.__dict__.update({key: value for key, value in vars(module).items() if isinstance(value, bool | int | float)})
        if hasattr(module, "processor"):
            own.processor = module.processor
    return getattr(lent.eval(), method)(
        *(_wide(value) for value in args), **{name: _wide(value) for name, value in kwargs.items()}
    )


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
