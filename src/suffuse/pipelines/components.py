"""The parts of a pipeline on disk: which class a name stands for, and how one is loaded and named.

A checkpoint names classes as [library, class]. Both are looked up in closed tables: nothing a file says is ever imported or
called for its own sake.
"""

from __future__ import annotations

import importlib
import operator
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from suffuse.checkpoints.foreign_code import foreign_sources, write_sources
from suffuse.checkpoints.layout import DIFFUSERS, NUMBERED, PICKLE, Naming, numbered
from suffuse.checkpoints.layout import TRANSFORMERS as TRANSFORMERS_FILES
from suffuse.checkpoints.saving import write_weights
from suffuse.checkpoints.transformers_models import load_processor, load_transformers_model
from suffuse.configuration import ConfigMixin
from suffuse.errors import ConfigError, SaveError, SuffuseError, nearest
from suffuse.memory.offload import gathered_weights
from suffuse.public_names import PUBLIC, resolve

TRANSFORMERS: dict[str, str] = {
    "CLIPTextModel": "CLIPTextModel",
    "CLIPTextModelWithProjection": "CLIPTextModelWithProjection",
    "CLIPVisionModelWithProjection": "CLIPVisionModelWithProjection",
    "DPTForDepthEstimation": "DPTForDepthEstimation",
    "BlipForConditionalGeneration": "BlipForConditionalGeneration",
    "BlipProcessor": "BlipProcessor",
    "CLIPTokenizer": "CLIPTokenizer",
    "CLIPTokenizerFast": "CLIPTokenizer",
    "CLIPProcessor": "CLIPProcessor",
    "BertTokenizer": "BertTokenizer",
    "BertTokenizerFast": "BertTokenizer",
    "XLMRobertaTokenizer": "XLMRobertaTokenizer",
    "XLMRobertaTokenizerFast": "XLMRobertaTokenizer",
    # The processors that need Pillow alone; the others want torchvision.
    "CLIPFeatureExtractor": "CLIPImageProcessorPil",
    "CLIPImageProcessor": "CLIPImageProcessorPil",
    "DPTFeatureExtractor": "DPTImageProcessorPil",
    "DPTImageProcessor": "DPTImageProcessorPil",
    "CLIPImageProcessorPil": "CLIPImageProcessorPil",
    "DPTImageProcessorPil": "DPTImageProcessorPil",
}
"""Class named in a checkpoint → class of transformers that reads it."""

DIFFUSERS_CLASSES = tuple(
    name
    for name, module in PUBLIC.items()
    if module.startswith(("suffuse.models.", "suffuse.schedulers.")) and not name.endswith("Mixin")
)
"""Classes of our own that may be components."""

PIPELINE_MODULES: dict[tuple[str, str], str] = {
    ("stable_diffusion", "StableDiffusionSafetyChecker"): "suffuse.pipelines.stable_diffusion.safety_checker",
    ("paint_by_example", "PaintByExampleImageEncoder"): "suffuse.pipelines.paint_by_example.image_encoder",
    ("stable_diffusion", "CLIPImageProjection"): "suffuse.models.clip_image_projection",
    ("stable_diffusion", "StableUnCLIPImageNormalizer"): "suffuse.pipelines.stable_unclip.image_normalizer",
    ("latent_diffusion", "LDMBertModel"): "suffuse.pipelines.latent_diffusion.bert",
    ("alt_diffusion", "RobertaSeriesModelWithTransformation"): "suffuse.pipelines.alt_diffusion.text_encoder",
    ("blip_diffusion", "ContextCLIPTextModel"): "suffuse.pipelines.blip_diffusion.text_encoder",
    ("blip_diffusion", "Blip2QFormerModel"): "suffuse.pipelines.blip_diffusion.qformer",
    ("blip_diffusion", "BlipImageProcessor"): "suffuse.pipelines.blip_diffusion.image_processor",
    ("stable_diffusion_safe", "SafeStableDiffusionSafetyChecker"): "suffuse.pipelines.safe.safety_checker",
}
"""[library, class] of models that belong to one pipeline family → module."""

FORMER: dict[tuple[str, str], tuple[str, str]] = {
    ("controlnet", "MultiControlNetModel"): ("diffusers", "MultiControlNetModel"),
    ("diffusers", "RobertaSeriesModelWithTransformation"): ("alt_diffusion", "RobertaSeriesModelWithTransformation"),
    ("diffusers", "PaintByExampleImageEncoder"): ("paint_by_example", "PaintByExampleImageEncoder"),
    ("diffusers", "SafeStableDiffusionSafetyChecker"): ("stable_diffusion_safe", "SafeStableDiffusionSafetyChecker"),
    ("deprecated", "KarrasVeScheduler"): ("diffusers", "KarrasVeScheduler"),
    ("deprecated", "ScoreSdeVpScheduler"): ("diffusers", "ScoreSdeVpScheduler"),
}
"""[library, class] as other releases write them → as they are written here."""

NEEDED: dict[str, tuple[str, ...]] = {
    "scheduler": ("fork", "follow", "set_timesteps"),
    "caption_generator": ("generate", "device"),
    "caption_processor": ("batch_decode", "__call__"),
    "unet": ("config.in_channels", "time_proj", "forward"),
    "vae": ("config.latent_channels", "config.scaling_factor", "decode"),
    "text_encoder": ("config.hidden_size", "forward"),
    "text_encoder_2": ("config.hidden_size", "config.projection_dim", "forward"),
    "tokenizer": ("model_max_length", "__call__"),
    "tokenizer_2": ("model_max_length", "__call__"),
    "feature_extractor": ("model_input_names", "__call__"),
    "safety_checker": ("forward",),
    "depth_estimator": ("forward",),
    "processor": ("__call__",),
    "image_project": ("config.hidden_size", "forward"),
    "low_res_scheduler": ("add_noise",),
    "inverse_scheduler": ("fork", "follow", "set_timesteps"),
    "image_noising_scheduler": ("add_noise",),
    "image_normalizer": ("scale", "unscale"),
    "prior": ("config.embedding_dim", "post_process_latents", "forward"),
    "prior_scheduler": ("fork", "set_timesteps", "step"),
    "prior_text_encoder": ("config.projection_dim", "forward"),
    "prior_tokenizer": ("model_max_length", "__call__"),
    "watermarker": ("apply_watermark",),
    "controlnet": ("dtype", "forward"),
    "qformer": ("config.num_query_tokens", "forward"),
    "vqvae": ("config.scaling_factor", "decode"),
    "bert": ("config.hidden_size", "forward"),
    "transformer": ("config.in_channels", "config.num_embeds_ada_norm", "forward"),
}
"""Component → what pipelines ask of it, whatever its class."""


def component_class(name: str, entry: Any) -> type[Any]:
    """The class that a [library, class] entry of model_index.json stands for.

    Raises:
        ConfigError: The entry is malformed, or names a class outside of the tables.
    """
    if not (isinstance(entry, (list, tuple)) and len(entry) == 2 and all(isinstance(part, str) for part in entry)):
        raise ConfigError(f"model_index.json: component {name!r} is malformed", found=entry, expected='["library", "class"]')
    named: tuple[Any, Any] = (entry[0], entry[1])
    library, class_name = FORMER.get(named, named)
    if library == "diffusers" and class_name in DIFFUSERS_CLASSES:
        return resolve(class_name)
    if library == "transformers" and class_name in TRANSFORMERS:
        return getattr(importlib.import_module("transformers"), TRANSFORMERS[class_name])
    if (library, class_name) in PIPELINE_MODULES:
        return getattr(importlib.import_module(PIPELINE_MODULES[library, class_name]), class_name)
    close = nearest(class_name, [*DIFFUSERS_CLASSES, *TRANSFORMERS, *(known for _, known in PIPELINE_MODULES)])
    raise ConfigError(
        f"model_index.json: component {name!r} names an unknown class",
        found=f"{class_name!r} of {library!r}",
        remedy=f"did you mean {close}?" if close else f"pass the component yourself: from_pretrained(…, {name}=…)",
    )


def is_tabled(library: str) -> bool:
    """Whether the classes of a library are looked up here, whatever files lie beside the weights."""
    return library in ("diffusers", "transformers", *(known for known, _ in (*PIPELINE_MODULES, *FORMER)))


def check_component(name: str, value: Any) -> None:
    """Raise `ConfigError` unless `value` can be the component `name`, or is None."""
    needed = NEEDED.get(name, ())
    if value is None or (not isinstance(value, type) and all(_has(value, path) for path in needed)):
        return
    raise ConfigError(
        f"the {name} of a pipeline cannot be this",
        found=repr(value) if isinstance(value, type) else f"{type(value).__module__}.{type(value).__name__}",
        expected=f"an object with {', '.join(needed)}" if needed else "an object, not a class",
        remedy="pass a component of suffuse or transformers, as its from_pretrained makes it",
    )


def _has(value: Any, path: str) -> bool:
    try:
        operator.attrgetter(path)(value)
    except AttributeError:
        return False
    return True


def component_entry(value: Any) -> tuple[str | None, str | None]:
    """The [library, class] entry under which a component is saved; (None, None) for no component."""
    if value is None:
        return None, None
    kind = type(value)
    for (library, class_name), module in PIPELINE_MODULES.items():
        if (kind.__name__, kind.__module__) == (class_name, module):
            return library, class_name
    if sources := foreign_sources(kind):
        return next(iter(sources)).removesuffix(".py"), kind.__name__
    root = kind.__module__.split(".")[0]
    return "diffusers" if root == "suffuse" else root, kind.__name__.removesuffix("Pil")


def weights_naming(kind: type[Any]) -> Naming | None:
    """How the weights files of a class are called; None for a class without weights."""
    import torch

    if not issubclass(kind, torch.nn.Module):
        return None
    return DIFFUSERS if issubclass(kind, ConfigMixin) else TRANSFORMERS_FILES


def by_folder(components: Mapping[str, Any]) -> dict[str, Any]:
    """Components by the folder in which they are saved; of one that is several models, each."""
    parts: dict[str, Any] = {}
    for name, value in components.items():
        models = enumerate(value.parts) if type(value).__name__ in NUMBERED else [(0, value)]
        parts |= {numbered(name, index): model for index, model in models}
    return parts


def is_left_over(folder: str, components: Mapping[str, Any]) -> bool:
    """Whether a folder would be read as one model more of a component that is several."""
    name, _, number = folder.rpartition("_")
    return number.isdecimal() and type(components.get(name)).__name__ in NUMBERED


def load_component(kind: type[Any], folder: Path, **options: Any) -> Any:
    """Load one component from its folder; `torch_dtype`, `variant`, … are for those that hold weights."""
    loader: Any = kind
    match weights_naming(kind):
        case None if issubclass(kind, ConfigMixin) or foreign_sources(kind):
            return loader.from_pretrained(folder)
        case None:
            return load_processor(kind, folder)
        case naming if naming is DIFFUSERS:
            return loader.from_pretrained(folder, **options)
        case _:
            return load_transformers_model(kind, folder, **options)


def save_component(value: Any, folder: Path, safe_serialization: bool, variant: str | None) -> None:
    """Write one component into its folder, as diffusers lays it out.

    Raises:
        SaveError: It could not be written, for whatever reason its library gives.
    """
    try:
        _save_component(value, folder, safe_serialization, variant)
        write_sources(type(value), folder)
    except (SuffuseError, OSError):
        raise
    except Exception as error:  # libraries raise whatever they stumble over
        raise SaveError(f"the component {folder.name} could not be written: {error}", remedy="nothing was replaced") from error


def _save_component(value: Any, folder: Path, safe_serialization: bool, variant: str | None) -> None:
    match weights_naming(type(value)):
        case None:
            value.save_pretrained(folder)
        case naming if naming is DIFFUSERS:
            value.save_pretrained(folder, safe_serialization=safe_serialization, variant=variant)
        case naming if safe_serialization:
            from suffuse.checkpoints.transformers_models import quiet

            with quiet():
                value.save_pretrained(folder, variant=variant, state_dict=gathered_weights(value))
            for path in folder.iterdir():  # it writes weights for the owner's eyes alone
                shutil.copymode(folder / "config.json", path)
        case naming:  # transformers writes no pickles any more
            value.config.save_pretrained(folder)
            write_weights(gathered_weights(value), folder, naming, PICKLE, variant)
