"""How a pipeline is read: which class it is, which components it needs, and which files of them are fetched."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from suffuse.checkpoints.fetching import Wanted, fetch_components
from suffuse.checkpoints.foreign_code import Trust, load_foreign_class, module_on_path
from suffuse.checkpoints.inventory import take_inventory
from suffuse.checkpoints.layout import DIFFUSERS, Naming, component_variants, numbered_folders
from suffuse.configuration import FORMAT_VERSION
from suffuse.errors import ConfigError, InputError, MissingFileError, nearest, unknown_argument
from suffuse.files import read_json
from suffuse.hub.options import HubOptions
from suffuse.hub.sources import Source, is_local, opened
from suffuse.memory.placement import Device, Memory, Placing, accelerators, share_out
from suffuse.pipelines.components import component_class, is_tabled, load_component, weights_naming
from suffuse.public_names import PUBLIC, resolve

if TYPE_CHECKING:
    from suffuse.pipelines.pipeline import DiffusionPipeline

INDEX = "model_index.json"
CONNECTED = ("prior",)
"""Entries of a model card that name another checkpoint, and beginnings of the names of its components."""
COMMUNITY = "diffusers/community-pipelines-mirror"
"""The dataset that keeps the community's pipelines, in a folder for each release."""


@dataclasses.dataclass(frozen=True)
class CustomPipeline:
    """A pipeline class that is none of suffuse's.

    Attributes:
        name: A .py file, a folder or repository with pipeline.py, a file of the checkpoint, or a name in the community's dataset.
        revision: Of that repository; of the community's dataset, a release or "main".
    """

    name: str | os.PathLike[str] | None = None
    revision: str | None = None


def read_index(source: Source) -> dict[str, Any]:
    """The model_index.json of a checkpoint."""
    source.fetch([INDEX])
    return read_json(source.folder / INDEX)


def pipeline_class(
    cls: type[DiffusionPipeline], source: Source, index: dict[str, Any], custom: CustomPipeline, hub: HubOptions, trust: Trust
) -> type[DiffusionPipeline]:
    """The class to make: the custom one, `cls` where it says more than DiffusionPipeline, or the one the checkpoint names.

    Raises:
        UntrustedCodeError: It is defined by code that the caller has not said may run.
        ConfigError: There is no class of the name.
    """
    base = resolve("DiffusionPipeline")
    if custom.name is not None:
        return load_foreign_class(_custom_file(source, custom, hub), None, base, trust)
    if cls is not base:
        return cls
    name, module = index.get("_class_name"), "pipeline"
    if isinstance(name, list) and len(name) == 2 and all(isinstance(part, str) and part.isidentifier() for part in name):
        module, name = name
        return load_foreign_class(_module(source, "", module), name, base, trust)
    known = [one for one, place in PUBLIC.items() if place.startswith("suffuse.pipelines") and one.endswith("Pipeline")]
    if name in known and name != base.__name__:
        return resolve(name)
    if isinstance(name, str) and f"{module}.py" in source.names():
        return load_foreign_class(_module(source, "", module), name, base, trust)
    close = nearest(str(name), known)
    raise ConfigError(
        f"{source.folder / INDEX}: no pipeline class {name!r}",
        remedy=f"did you mean {close}?" if close else "load it with the class it was made for",
    )


def component_classes(
    pipeline: type[DiffusionPipeline], source: Source, index: dict[str, Any], given: Collection[str], trust: Trust
) -> dict[str, type[Any] | None]:
    """The class of each component that is not given; None for those the pipeline does without.

    Raises:
        ConfigError: The checkpoint lacks a component that is needed, or names an unknown class for it.
        MissingFileError: There is no folder for a component.
        UntrustedCodeError: A component's class is defined by code that the caller has not said may run.
    """
    return {name: _planned(pipeline, source, name, index, trust) for name in pipeline.component_names() if name not in given}


def folder_namings(source: Source, classes: Mapping[str, type[Any]]) -> dict[str, Naming | None]:
    """The folders of components, of which some lie in several, with how their weights are called."""
    return {
        folder: weights_naming(kind)
        for name, kind in classes.items()
        for folder in numbered_folders(name, kind.__name__, source.names)
    }


def fetch_pipeline(
    source: Source, namings: Mapping[str, Naming | None], variant: str | None, use_safetensors: bool | None, onnx: bool | None
) -> dict[str, str | None]:
    """Fetch what the components need, and nothing else.

    Args:
        source: The checkpoint.
        namings: Each component → how its weights are called, None where it has none.
        variant: Asked for.
        use_safetensors: As `find_weights` takes it.
        onnx: ONNX models too.

    Returns:
        Which variant to load of each component that has weights.
    """
    weights = {name: (naming, source.names(name)) for name, naming in namings.items() if naming is not None}
    variants = component_variants(source.folder, weights, variant)
    if source.commit is not None:
        wanted = {
            name: None if naming is None else Wanted(naming, variants[name], use_safetensors) for name, naming in namings.items()
        }
        fetch_components(source, wanted, "README.md", onnx=bool(onnx))
    return variants


def load_components(
    folder: Path,
    classes: Mapping[str, type[Any]],
    variants: Mapping[str, str | None],
    dtypes: Mapping[str, Any],
    places: Mapping[str, Device],
    informed: bool,
    options: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Load each component from its folder.

    Args:
        folder: Of the checkpoint.
        classes: Component → class.
        variants: Component → variant of its weights.
        dtypes: Component, or "default", → floating point type.
        places: Component → device; the CPU for those it does not name.
        informed: Also tell which tensors were missing or unexpected.
        options: For those that hold weights.

    Returns:
        The components; and of our own models what `informed` asks for.
    """
    loaded: dict[str, Any] = {}
    information: dict[str, Any] = {}
    for name, kind in classes.items():
        own = {**options, "variant": variants.get(name), "torch_dtype": dtypes.get(name, dtypes.get("default"))}
        if name in places and weights_naming(kind) is DIFFUSERS:
            own["device_map"] = {"": places[name]}
        if informed and weights_naming(kind) is DIFFUSERS:
            loaded[name], information[name] = load_component(kind, folder / name, output_loading_info=True, **own)
        else:
            loaded[name] = load_component(kind, folder / name, **own)
        if name in places:
            loaded[name].to(places[name])
    return loaded, information


def connected_components(
    pipeline: type[DiffusionPipeline], source: Source, given: Collection[str], options: Mapping[str, Any]
) -> dict[str, Any]:
    """The components of other checkpoints that the model card names: "prior: [org/name]" gives `prior_unet` and its like.

    Args:
        pipeline: The class to make, which says by its components what it takes.
        source: The checkpoint.
        given: Components that the caller passes.
        options: For loading the others.

    Raises:
        ConfigError: The card is none, or names what is no checkpoint.
    """
    from huggingface_hub import ModelCard

    if "README.md" not in source.names():
        return {}
    source.fetch(["README.md"])
    path = source.folder / "README.md"
    try:
        card = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=False).data.to_dict()
    except (ValueError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} has no model card to read: {error}") from None
    made: dict[str, Any] = {}
    names = [name for name in pipeline.component_names() if name not in given]
    for prefix in CONNECTED:
        others = card.get(prefix)
        if others and any(name.startswith(f"{prefix}_") for name in names):
            if not isinstance(others, list) or not isinstance(others[0], str):
                raise ConfigError(f"{path}: {prefix} names no checkpoint", found=others, expected="a list of org/name")
            other = resolve("DiffusionPipeline").from_pretrained(others[0], **options)
            made |= {f"{prefix}_{name}": part for name, part in other.components.items() if f"{prefix}_{name}" in names}
    return made


def place_models(
    folder: Path,
    models: Sequence[str],
    variant: str | None,
    dtypes: Mapping[str, Any],
    device_map: Device | Mapping[str, Device] | None,
    max_memory: Memory | None,
) -> dict[str, Device]:
    """A device for each model of a checkpoint.

    Args:
        folder: Of the checkpoint.
        models: Components that hold weights.
        variant: Of the weights.
        dtypes: Component, or "default", → floating point type.
        device_map: A device for all, a device by component, or "balanced"; None: the CPU, for which nothing is told.
        max_memory: For "balanced".

    Raises:
        InputError: There is no such device or component.
        LimitError: The models do not fit.
    """
    if device_map is None:
        return {}
    if isinstance(device_map, Mapping):
        for name in device_map:
            if name not in models:
                raise InputError(f"device_map: no model {name!r}", expected=", ".join(models))
        places = dict(device_map)
    elif device_map in ("balanced", "auto"):
        inventory = {component.name: component for component in take_inventory(folder, variant)}
        kinds = {name: str(dtypes.get(name, dtypes.get("default")) or "float32").removeprefix("torch.") for name in models}
        sizes = {name: inventory[name].memory.get(kinds[name]) or inventory[name].bytes for name in models if name in inventory}
        places = dict[str, Any](share_out(sizes, max_memory or accelerators()))
    else:
        places = dict.fromkeys(models, device_map)
    for device in places.values():
        Placing(device)  # raises if it is none
    return places


def check_keywords(
    pipeline: type[DiffusionPipeline], components: Collection[str], dtypes: Collection[str], options: Collection[str]
) -> None:
    """Raise `UnknownArgumentError` for a component, or one in `torch_dtype`, that the pipeline does not have."""
    function, parameters, names = (
        f"{pipeline.__name__}.from_pretrained",
        pipeline.parameters_of_init(),
        pipeline.component_names(),
    )
    for name in components:
        if name not in parameters:
            raise unknown_argument(function, name, [*parameters, *options])
    for name in dtypes:
        if name not in (*names, "default"):
            raise unknown_argument(f"{function}: torch_dtype", name, ["default", *names])


def check_entries(pipeline: type[DiffusionPipeline], source: Source, index: Mapping[str, Any], strict: bool) -> None:
    """Warn about entries of model_index.json that the pipeline has no use for, or raise with `strict`; empty ones say nothing."""
    told = [name for name, entry in index.items() if not name.startswith("_") and entry != [None, None]]
    extra = [name for name in told if name not in pipeline.parameters_of_init()]
    if extra and strict:
        raise ConfigError(
            f"{source.folder / INDEX}: {pipeline.__name__} has no {', '.join(extra)}", expected=pipeline.component_names()
        )
    if extra:
        warnings.warn(f"{pipeline.__name__} has no use for these entries of {INDEX}: {', '.join(extra)}", stacklevel=3)


def _planned(
    pipeline: type[DiffusionPipeline], source: Source, name: str, index: dict[str, Any], trust: Trust
) -> type[Any] | None:
    """The class of a component the checkpoint should hold, or None if it does without."""
    entry = index.get(name)
    absent = entry in (None, [None, None])
    if absent and pipeline._load_connected_pipes and name.startswith(tuple(f"{prefix}_" for prefix in CONNECTED)):
        return None
    optional = name in pipeline._optional_components or pipeline.parameters_of_init()[name].default is None
    if absent and (optional or name in index):
        return None
    if absent:
        raise ConfigError(
            f"{source.folder / INDEX} has no component {name!r}, which {pipeline.__name__} needs",
            remedy=f"pass it: from_pretrained(…, {name}=…)",
        )
    files = source.names(name)
    if not files and not (source.folder / name).is_dir():
        raise MissingFileError(
            f"no folder {source.folder / name} for the component {name!r}",
            found=source.names() if source.commit else sorted(path.name for path in source.folder.iterdir()),
            remedy=f"fetch it again, or pass the component: from_pretrained(…, {name}=…)",
        )
    match entry:
        case [str() as module, str() as kind] if not is_tabled(module) and f"{module}.py" in files:
            return load_foreign_class(_module(source, name, module), kind, object, trust)
        case [str() as module, str() as kind] if not is_tabled(module) and (path := module_on_path(module)):
            return load_foreign_class(path, kind, object, trust)
        case _:
            return component_class(name, entry)


def _custom_file(source: Source, custom: CustomPipeline, hub: HubOptions) -> Path:
    """The Python file that defines a custom pipeline."""
    name = os.fspath(custom.name or "")
    if name.endswith(".py"):
        return Path(name)
    if f"{name}.py" in source.names():
        return _module(source, "", name)
    options = dataclasses.replace(hub, revision=custom.revision)
    if is_local(name) or "/" in name:
        with opened(name, options) as other:
            return _module(other, "", "pipeline")
    revision = custom.revision or FORMAT_VERSION
    with opened(COMMUNITY, dataclasses.replace(hub, revision=None), "datasets") as other:
        path = f"{revision if revision == 'main' else 'v' + revision.removeprefix('v')}/{name}.py"
        other.fetch([path])
        return other.folder / path


def _module(source: Source, folder: str, name: str) -> Path:
    """A Python file of a checkpoint, with those it may import."""
    path = f"{folder}/" if folder else ""
    source.fetch(dict.fromkeys([f"{path}{name}.py", *(path + file for file in source.names(folder) if file.endswith(".py"))]))
    return source.folder / folder / f"{name}.py"
