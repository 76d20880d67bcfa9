"""Low-rank adapters to files that diffusers reads too."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from suffuse.checkpoints.atomic import write_whole
from suffuse.checkpoints.layout import PICKLE, SAFETENSORS
from suffuse.checkpoints.saving import write_safetensors
from suffuse.errors import AdapterError
from suffuse.files import check_inside
from suffuse.models.lora import METADATA, USUAL_NAME

Layers = nn.Module | Mapping[str, Tensor] | None
"""Factors by name, or a module that has them; None for none."""


def write_lora(
    parts: Mapping[str, Layers],
    folder: str | os.PathLike[str],
    is_main_process: bool = True,
    weight_name: str | None = None,
    save_function: Callable[[dict[str, Tensor], str], Any] | None = None,
    safe_serialization: bool = True,
) -> None:
    """Write an adapter as one file of a folder.

    Args:
        parts: Component → "layer.lora_A.weight", "layer.lora_B.weight" and, where it is not the rank, "layer.alpha"; the
            component "" for keys that are written as they are.
        folder: Where; other files in it stay.
        is_main_process: False does nothing: of many processes with the same weights, one writes.
        weight_name: The name of the file; pytorch_lora_weights.safetensors if None.
        save_function: Writes the file, called with (tensors by name, path).
        safe_serialization: False writes a pickle.

    Raises:
        AdapterError: There is nothing to write.
        SaveError: It could not be written; what was there is untouched.
    """
    tensors: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    for component, given in parts.items():
        layers: Mapping[str, Tensor] = given.state_dict() if isinstance(given, nn.Module) else given or {}
        start = f"{component}." if component else ""
        alphas = {key: tensor for key, tensor in layers.items() if key.endswith(".alpha") and safe_serialization}
        tensors |= {f"{start}{key}": tensor for key, tensor in layers.items() if key not in alphas}
        if alphas:
            settings |= {f"{start}{name}": value for name, value in _settings_of_peft(layers).items()}
    if not tensors:
        raise AdapterError("there is nothing to write", expected="unet_lora_layers, or those of a text encoder")
    if not is_main_process:
        return
    name = weight_name or USUAL_NAME + (SAFETENSORS if safe_serialization else PICKLE)
    check_inside(Path(folder), name)
    header = {METADATA: json.dumps(settings, sort_keys=True)} if settings else None

    def write(path: Path) -> None:
        if save_function is not None:
            save_function(tensors, str(path))
        elif safe_serialization:
            write_safetensors(tensors, path, header)
        else:
            torch.save(tensors, path)

    write_whole(Path(folder, name), write)


def _settings_of_peft(layers: Mapping[str, Tensor]) -> dict[str, Any]:
    """Ranks and alphas as the settings of PEFT, whose dialect has no tensor for α: the usual one, and the others by layer."""
    ranks = {key.removesuffix(".lora_A.weight"): len(tensor) for key, tensor in layers.items() if key.endswith(".lora_A.weight")}
    alphas = {name: float(layers[f"{name}.alpha"]) if f"{name}.alpha" in layers else float(rank) for name, rank in ranks.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
        "target_modules": list(ranks),
    }
