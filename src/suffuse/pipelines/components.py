"""The parts of a pipeline on disk: which class a name stands for, and how one is loaded and named.

A checkpoint names classes as [library, class]. Both are looked up in closed tables: nothing a file says is ever imported or
called for its own sake.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from suffuse.configuration import FORMAT_VERSION
from suffuse.errors import ConfigError, nearest
from suffuse.public_names import PUBLIC

TRANSFORMERS: dict[str, str] = {
    "CLIPTextModel": "CLIPTextModel",
    "CLIPTextModelWithProjection": "CLIPTextModelWithProjection",
    "CLIPVisionModelWithProjection": "CLIPVisionModelWithProjection",
    "DPTForDepthEstimation": "DPTForDepthEstimation",
    "CLIPTokenizer": "CLIPTokenizer",
    "CLIPTokenizerFast": "CLIPTokenizer",
    # The processors that need Pillow alone; the others want torchvision.
    "CLIPFeatureExtractor": "CLIPImageProcessorPil",
    "CLIPImageProcessor": "CLIPImageProcessorPil",
    "DPTFeatureExtractor": "DPTImageProcessorPil",
    "DPTImageProcessor": "DPTImageProcessorPil",
    "CLIPImageProcessorPil": "CLIPImageProcessorPil",
    "DPTImageProcessorPil": "DPTImageProcessorPil",
}
"""Class named in a checkpoint → class of transformers that reads it."""

PIPELINE_MODULES: dict[tuple[str, str], str] = {
    ("stable_diffusion", "StableDiffusionSafetyChecker"): "suffuse.pipelines.stable_diffusion.safety_checker"
}
"""[library, class] of models that belong to one pipeline family → module."""


def component_class(name: str, entry: Any) -> type[Any]:
    """The class that a [library, class] entry of model_index.json stands for.

    Raises:
        ConfigError: The entry is malformed, or names a class outside of the tables.
    """
    if not (isinstance(entry, (list, tuple)) and len(entry) == 2 and all(isinstance(part, str) for part in entry)):
        raise ConfigError(f"model_index.json: component {name!r} is malformed", found=entry, expected='["library", "class"]')
    library, class_name = entry
    if library == "diffusers" and class_name in PUBLIC:
        return getattr(importlib.import_module(PUBLIC[class_name]), class_name)
    if library == "transformers" and class_name in TRANSFORMERS:
        return getattr(importlib.import_module("transformers"), TRANSFORMERS[class_name])
    if (library, class_name) in PIPELINE_MODULES:
        return getattr(importlib.import_module(PIPELINE_MODULES[library, class_name]), class_name)
    close = nearest(class_name, [*PUBLIC, *TRANSFORMERS, *(known for _, known in PIPELINE_MODULES)])
    raise ConfigError(
        f"model_index.json: component {name!r} names an unknown class",
        found=f"{class_name!r} of {library!r}",
        remedy=f"did you mean {close}?" if close else f"pass the component yourself: from_pretrained(…, {name}=…)",
    )


def component_entry(value: Any) -> tuple[str | None, str | None]:
    """The [library, class] entry under which a component is saved; (None, None) for no component."""
    if value is None:
        return None, None
    kind = type(value)
    for (library, class_name), module in PIPELINE_MODULES.items():
        if (kind.__name__, kind.__module__) == (class_name, module):
            return library, class_name
    root = kind.__module__.split(".")[0]
    return "diffusers" if root == "suffuse" else root, kind.__name__.removesuffix("Pil")


def load_component(name: str, kind: type[Any], folder: Path, **options: Any) -> Any:
    """Load one component from its folder.

    Args:
        name: The component's name, for errors.
        kind: Its class.
        folder: Its folder.
        **options: `torch_dtype`, `variant`, `use_safetensors`, … for those components that hold weights.
    """
    import torch

    if not issubclass(kind, torch.nn.Module):
        return kind.from_pretrained(folder)
    if kind.__module__.startswith("suffuse.models"):
        return kind.from_pretrained(folder, **options)  # pyright: ignore[reportAttributeAccessIssue]
    from suffuse.checkpoints.transformers_models import load_transformers_model

    return load_transformers_model(kind, folder, **options)


def save_component(value: Any, folder: Path, safe_serialization: bool, variant: str | None) -> None:
    """Write one component into its folder, as diffusers lays it out."""
    import torch

    if isinstance(value, torch.nn.Module):
        if type(value).__module__.startswith("suffuse.models"):
            value.save_pretrained(folder, safe_serialization=safe_serialization, variant=variant)  # pyright: ignore
        else:
            from suffuse.checkpoints.transformers_models import save_transformers_model

            save_transformers_model(value, folder, safe_serialization=safe_serialization, variant=variant)
    else:
        value.save_pretrained(folder)


__all__ = ["FORMAT_VERSION", "component_class", "component_entry", "load_component", "save_component"]
