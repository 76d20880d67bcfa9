"""Pipelines out of single files, without a network: the file is told apart by its tensors, the vocabulary is in the package."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from suffuse.checkpoints.atomic import write_whole
from suffuse.checkpoints.saving import write_safetensors
from suffuse.checkpoints.transformers_models import make_transformers_model
from suffuse.checkpoints.weights import parse_dtype
from suffuse.conversion.architecture import Part
from suffuse.conversion.single_file import SingleFile, fetched, open_single_file
from suffuse.conversion.single_file_writer import single_file_tensors
from suffuse.conversion.vocabulary import clip_tokenizer
from suffuse.errors import ConfigError, InputError, WeightsMismatchError, unknown_argument
from suffuse.hub.options import HubOptions
from suffuse.models.single_file import load_part
from suffuse.public_names import PUBLIC, resolve

SCHEDULERS = {
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "lms": ("LMSDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "dpm": ("DPMSolverMultistepScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
}
"""What `scheduler_type` names."""

MADE_FOR: tuple[tuple[str, int, str], ...] = (
    ("Stable Diffusion XL refiner", 4, "StableDiffusionXLImg2ImgPipeline"),
    ("Stable Diffusion XL", 4, "StableDiffusionXLPipeline"),
    ("Stable Diffusion XL", 9, "StableDiffusionXLInpaintPipeline"),
    ("Stable Diffusion", 4, "StableDiffusionPipeline"),
    ("Stable Diffusion", 5, "StableDiffusionDepth2ImgPipeline"),
    ("Stable Diffusion", 7, "StableDiffusionUpscalePipeline"),
    ("Stable Diffusion", 8, "StableDiffusionInstructPix2PixPipeline"),
    ("Stable Diffusion", 9, "StableDiffusionInpaintPipeline"),
)
"""Beginning of an architecture's name, channels its UNet sees → the pipeline made for it; the first that fits."""


class FromSingleFileMixin:
    """A pipeline whose components may stand in one file."""

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path: str | os.PathLike[str],
        *,
        torch_dtype: torch.dtype | str | None = None,
        original_config_file: str | os.PathLike[str] | Mapping[str, Any] | None = None,
        scheduler_type: str | None = None,
        image_size: int | None = None,
        prediction_type: str | None = None,
        upcast_attention: bool | None = None,
        extract_ema: bool = False,
        load_safety_checker: bool = False,
        strict: bool = False,
        **components: Any,
    ) -> Any:
        """A pipeline out of one file; `DiffusionPipeline.from_single_file` makes the class the file was trained for.

        Args:
            pretrained_model_link_or_path: A .safetensors file, or a .ckpt, of which only tensors are read; or the address of
                one on the hub, "https://huggingface.co/org/name/blob/main/file.safetensors".
            torch_dtype: The floating point type of all models, "auto" for the file's own; None for float32.
            original_config_file: The original configuration, if shapes do not tell all: a YAML file, or what it holds.
            scheduler_type: "ddim", "pndm", "lms", "heun", "euler", "euler-ancestral" or "dpm"; what the family uses, if None.
            image_size: What the model was trained on.
            prediction_type: "epsilon" or "v_prediction", where the file does not tell.
            upcast_attention: Compute attention scores in float32.
            extract_ema: Take the running averages of the UNet's weights, of files that hold both.
            load_safety_checker: No file holds one: pass `safety_checker=` and `feature_extractor=` instead.
            strict: Unknown tensors are errors, not warnings.
            **components: Components, or values of the pipeline's own configuration, that replace those of the file;
                and the `suffuse.hub.options.HubOptions`.

        Raises:
            MissingFileError, CorruptFileError, UnsafePickleError: Of the file.
            ConfigError: The file is of no architecture that is known, or lacks a component.
            WeightsMismatchError, NonFiniteError: The weights are not whole.
            UnknownArgumentError: A keyword is neither one of these nor a component.
        """
        hub, components = HubOptions.split(components)
        if load_safety_checker and "safety_checker" not in components:
            raise InputError("a single file holds no safety checker", remedy="pass safety_checker=… and feature_extractor=…")
        if scheduler_type is not None and str(scheduler_type) not in SCHEDULERS:
            raise InputError("scheduler_type has the wrong value", found=scheduler_type, expected=", ".join(SCHEDULERS))
        file = open_single_file(
            fetched(pretrained_model_link_or_path, hub),
            image_size=image_size,
            prediction_type=prediction_type,
            upcast_attention=upcast_attention,
            original=original_config_file,
            strict=strict,
        )
        target: Any = cls if cls.__name__ != "DiffusionPipeline" else _class_for(file)
        if ("XL" in target.__name__) != file.architecture.name.startswith("Stable Diffusion XL"):
            raise ConfigError(f"{file.path} is no checkpoint for {target.__name__}", found=file.architecture.name)
        parameters = target.parameters_of_init()
        for name in components:
            if name not in parameters:
                raise unknown_argument(f"{target.__name__}.from_single_file", name, parameters)
        absent = [n for n in target.component_names() if n not in components]
        made = {n: _component(file, n, torch_dtype, extract_ema, strict) for n in absent if n in file.architecture.parts}
        made |= {n: clip_tokenizer(padding) for n, padding in file.architecture.tokenizers.items() if n in absent}
        if "scheduler" in absent:
            made["scheduler"] = _scheduler(file, scheduler_type)
        missing = [n for n in absent if n not in made and n not in target._optional_components]
        if missing:
            raise ConfigError(
                f"{file.path} holds no {', '.join(missing)}, which {target.__name__} needs",
                found=f"{file.architecture.name}: {', '.join(file.architecture.parts)}",
                remedy=f"pass it: from_single_file(…, {missing[0]}=…)",
            )
        lost = [
            n
            for n in components
            if components[n] is None and n in target.component_names() and n not in target._optional_components
        ]
        if lost:
            raise ConfigError(f"{target.__name__} needs {', '.join(lost)}", found=None, remedy="leave it out, and it is read")
        values: dict[str, Any] = dict.fromkeys(n for n in target._optional_components if n in parameters) | made | components
        if "requires_safety_checker" in parameters:
            values.setdefault("requires_safety_checker", False)
        return target(**values)

    def save_single_file(self, path: str | os.PathLike[str]) -> None:
        """Write the models as one .safetensors file, under the names that other programs for Stable Diffusion read.

        Tokenizers, the scheduler and the safety checker have no place in it.

        Args:
            path: The file; it is the old one or the new one, never half of either.

        Raises:
            InputError: `path` does not end in ".safetensors", or a component has no place in such a file.
            SaveError: It could not be written.
        """
        path = Path(path)
        if path.suffix != ".safetensors":
            raise InputError("a single file ends in .safetensors", found=str(path), remedy=f"{path}.safetensors")
        components: dict[str, Any] = {n: v for n, v in self.components.items() if n != "safety_checker"}  # pyright: ignore[reportAttributeAccessIssue]
        write_whole(path, lambda staged: write_safetensors(single_file_tensors(components), staged))


def _class_for(file: SingleFile) -> type[Any]:
    name, channels = file.architecture.name, file.part("unet").config["in_channels"]
    for beginning, taken, pipeline in MADE_FOR:
        if name.startswith(beginning) and channels == taken:
            if pipeline in PUBLIC:
                return resolve(pipeline)
            raise ConfigError(f"{file.path}: {name} needs {pipeline}, which is not here yet")
    raise ConfigError(f"{file.path}: no pipeline is known for {name} with {channels} channels")


def _component(file: SingleFile, name: str, torch_dtype: Any, averaged: bool, strict: bool) -> Any:
    part = file.part(name)
    if part.kind in PUBLIC:
        averaged = averaged and name == "unet"
        return load_part(resolve(part.kind), file, name, torch_dtype=torch_dtype, averaged=averaged, strict=strict)
    return _text_encoder(file, part, torch_dtype, strict)


def _text_encoder(file: SingleFile, part: Part, torch_dtype: Any, strict: bool) -> Any:
    kind = getattr(importlib.import_module("transformers"), part.kind)
    source = file.tensors(part)
    if not source.tensors:
        raise WeightsMismatchError(f"{file.path} holds no text encoder behind {part.prefix!r}")
    dtype = parse_dtype(torch_dtype, source) or torch.float32
    return make_transformers_model(kind, kind.config_class(**part.config), source, dtype, strict=strict)


def _scheduler(file: SingleFile, scheduler_type: str | None) -> Any:
    default = "euler" if file.architecture.name.startswith("Stable Diffusion XL") else "ddim"
    name, options = SCHEDULERS[scheduler_type or default]
    kind = resolve(name)
    values = {n: v for n, v in file.architecture.scheduler.items() if n in kind.parameters_of_init()}
    return kind.from_config(values | options)
