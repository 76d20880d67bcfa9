"""What a checkpoint will take before any of it is read: memory at each stage, as each type, and what makes it fit.

Weights are counted from the headers of their files, activations by `estimate` from the configurations. A picture of this
library's own test models, and of a Stable Diffusion 1.5, takes within 10 % of what is told.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from suffuse.checkpoints.fetching import Wanted, fetch_settings, namings_by_files
from suffuse.checkpoints.inventory import TARGETS, Component, take_inventory
from suffuse.checkpoints.layout import variants_among
from suffuse.errors import ConfigError, InputError, LimitError
from suffuse.files import read_json
from suffuse.hub.options import HubOptions
from suffuse.hub.sources import Source, opened
from suffuse.memory.estimate import decoder_activations, text_activations, unet_activations

Config = Mapping[str, Any]
LARGEST = 2**16
"""Layers, pixels and pictures that can be asked for."""
OFFLOADS: dict[str, list[str]] = {
    "none": [],
    "models": ["pipe.enable_model_cpu_offload()"],
    "parts": ["pipe.enable_sequential_cpu_offload()"],
}
"""Where models wait → the switch for it."""


@dataclass(frozen=True)
class Request:
    """What is to be drawn, and how.

    Args:
        height: Rows of the pictures; None: what the model was trained on.
        width: Columns, likewise.
        batch: Pictures at once.
        guided: With guidance, which evaluates the model for two branches.
        dtype: Type of the weights, one of `TARGETS`.
        slicing: Decode pictures one by one.
        tiling: Decode in tiles.
        offload: "none", "models" (`enable_model_cpu_offload`) or "parts" (`enable_sequential_cpu_offload`).
    """

    height: int | None = None
    width: int | None = None
    batch: int = 1
    guided: bool = True
    dtype: str = "float32"
    slicing: bool = False
    tiling: bool = False
    offload: str = "none"

    def __post_init__(self) -> None:
        for name in ("height", "width", "batch"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= LARGEST):
                raise InputError(f"{name} has the wrong value", found=value, expected=f"a whole number of 1 to {LARGEST}")


@dataclass(frozen=True)
class Stage:
    """One part of a call. Bytes of the model's weights, of what is alive besides at the worst moment, of its largest tensor."""

    name: str
    weights: int
    activations: int
    largest: int


@dataclass(frozen=True)
class Plan:
    """What a call takes.

    Args:
        request: For what.
        stages: In the order of a call.
        waiting: Bytes of the weights that have no stage of their own.
    """

    request: Request
    stages: Sequence[Stage]
    waiting: int = 0

    @property
    def weights(self) -> int:
        """Bytes of all weights."""
        return sum(stage.weights for stage in self.stages) + self.waiting

    @property
    def peak(self) -> int:
        """Bytes on the device that computes, at the worst moment."""
        match self.request.offload:
            case "models":
                return max((stage.weights + stage.activations for stage in self.stages), default=0)
            case "parts":
                return max((stage.largest + stage.activations for stage in self.stages), default=0)
            case _:
                return self.weights + max((stage.activations for stage in self.stages), default=0)


@dataclass(frozen=True)
class Survey:
    """What is known of a checkpoint before it is read.

    Args:
        name: A folder, or the name of a repository.
        components: Its parts; of a repository, sized by the names and sizes of its files.
        configs: Component → its config.json.
        fetch: File → bytes, of what a load would still have to fetch.
    """

    name: str
    components: Sequence[Component]
    configs: Mapping[str, Config]
    fetch: Mapping[str, int]


def survey(name: str | os.PathLike[str], variant: str | None = None, hub: HubOptions | None = None) -> Survey:
    """Look at a checkpoint: of a repository only configurations are fetched, of a folder only headers are read.

    Raises:
        HubError: The hub did not give them.
        MissingFileError, ConfigError, CorruptFileError: As of `take_inventory`.
    """
    with opened(name, hub) as source:
        if source.commit is None:
            components, fetch = take_inventory(source.folder, variant), dict[str, int]()
        else:
            components, fetch = _announced(source, variant)
        folders = {component.name: source.folder / component.name / "config.json" for component in components}
    return Survey(str(name), components, {n: read_json(p) if p.is_file() else {} for n, p in folders.items()}, fetch)


def plan(surveyed: Survey, request: Request) -> Plan:
    """What drawing with a pipeline takes.

    Raises:
        InputError: The type is none of `TARGETS`, or the pipeline has no UNet that this can walk through.
    """
    if request.dtype not in TARGETS:
        raise InputError("dtype is none that can be planned for", found=request.dtype, expected=", ".join(TARGETS))
    components, size = surveyed.components, TARGETS[request.dtype]
    stages = [stage for component in components for stage in _stages(component, surveyed.configs, request, size)]
    if not any(stage.name == "unet" for stage in stages):
        names = ", ".join(component.name for component in components)
        raise InputError(f"{surveyed.name} has no UNet and autoencoder to plan for", found=names, remedy="see suffuse inspect")
    staged = {stage.name for stage in stages}
    waiting = sum(c.memory.get(request.dtype, 0) for c in components if c.name not in staged)
    order = {name: index for index, name in enumerate(("text_encoder", "text_encoder_2", "unet", "vae"))}
    return Plan(request, sorted(stages, key=lambda stage: order.get(stage.name, 9)), waiting)


def ways_to_fit(surveyed: Survey, request: Request) -> Iterator[Plan]:
    """Plans that take less and less: as it is, then with each switch on that costs the least time, then the next."""
    half = "bfloat16" if request.dtype == "float32" else request.dtype
    steps: list[dict[str, Any]] = [{}, {"dtype": half}]
    decoding: list[dict[str, Any]] = [{"slicing": True}, {"tiling": True}]
    steps += [*decoding, {"offload": "models"}, *decoding, {"offload": "parts"}, *decoding]
    least: int | None = None
    for step in steps:
        made = plan(surveyed, replace(request, **step))
        if least is None or made.peak < least:  # a switch that changes nothing is no advice
            request, least = made.request, made.peak
            yield made


def switches(request: Request) -> list[str]:
    """The lines of Python that a plan stands for, after `pipe = DiffusionPipeline.from_pretrained(…)`."""
    lines: list[str] = [f"torch_dtype=torch.{request.dtype}"] if request.dtype != "float32" else []
    lines += ["pipe.enable_vae_slicing()"] if request.slicing else []
    lines += ["pipe.enable_vae_tiling()"] if request.tiling else []
    return lines + OFFLOADS[request.offload]


def _announced(source: Source, variant: str | None) -> tuple[list[Component], dict[str, int]]:
    """The components of a repository, by the names and sizes of its files, and what of it is not here yet."""
    source.fetch(["model_index.json"])
    index = read_json(source.folder / "model_index.json")
    namings = namings_by_files(source, index, ())
    components: list[Component] = []
    fetch: dict[str, int] = {}
    for name, naming in namings.items():
        own = variant if naming is not None and variant in variants_among(source.names(name), naming) else None
        large = fetch_settings(source, {name: None if naming is None else Wanted(naming, own)})
        count = sum(map(source.size, large))
        # What type the numbers are of stands inside the files: a variant called fp16 says it, and float32 is the rule.
        width = 2 if own in ("fp16", "bf16") else 4
        memory = {target: count // width * wide for target, wide in TARGETS.items()}
        components.append(Component(name, index[name][1], index[name][0], count // width, count, large, memory=memory))
        fetch |= {file: source.size(file) for file in large if not source.is_cached(file)}
    return components, fetch


def _stages(component: Component, configs: Mapping[str, Config], request: Request, size: int) -> Iterator[Stage]:
    walk = WALKS.get(component.kind or "")
    if walk is None:
        return
    config = configs[component.name]
    layers = config.get("layers_per_block", 1)
    if isinstance(layers, int) and layers > LARGEST:
        raise LimitError(f"{component.name}/config.json: layers_per_block is too large", found=layers)
    try:
        numbers = walk(config, _latents(configs, request), request)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{component.name}/config.json describes no network: {type(error).__name__}: {error}") from error
    yield Stage(component.name, component.memory.get(request.dtype, 0), numbers * size, component.largest * size)


@dataclass(frozen=True)
class Latents:
    """Rows and columns of the latents, and the side of a tile of the autoencoder."""

    height: int
    width: int
    tile: int = field(default=64)


def _latents(configs: Mapping[str, Config], request: Request) -> Latents:
    unet, vae = configs.get("unet", {}), configs.get("vae", {})
    factor = 2 ** (len(vae.get("block_out_channels", [0] * 4)) - 1)
    trained = unet.get("sample_size") or 64
    rows, columns = trained if isinstance(trained, (list, tuple)) else (trained, trained)
    tile = vae.get("sample_size", 512)
    return Latents(
        (request.height or rows * factor) // factor,
        (request.width or columns * factor) // factor,
        (tile[0] if isinstance(tile, (list, tuple)) else tile) // factor,
    )


def _denoising(config: Config, latents: Latents, request: Request) -> int:
    return unet_activations(config, request.batch * (1 + request.guided), latents.height, latents.width)


def _decoding(config: Config, latents: Latents, request: Request) -> int:
    batch = 1 if request.slicing else request.batch
    sides = (latents.height, latents.width)
    if not request.tiling or max(sides) <= latents.tile:
        return decoder_activations(config, batch, *sides)
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    picture = batch * config.get("out_channels", 3) * latents.height * latents.width * factor**2
    return decoder_activations(config, batch, *(min(side, latents.tile) for side in sides)) + 3 * picture


def _encoding(config: Config, latents: Latents, request: Request) -> int:
    return text_activations(config, request.batch)


WALKS: dict[str, Callable[[Config, Latents, Request], int]] = {
    "UNet2DConditionModel": _denoising,
    "AutoencoderKL": _decoding,
    "CLIPTextModel": _encoding,
    "CLIPTextModelWithProjection": _encoding,
}
"""Class → numbers alive at the worst moment of its stage, besides its weights."""
