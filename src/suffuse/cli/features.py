"""Options of `suffuse generate` that add something to a model: adapters, learnt words, further pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from suffuse.cli.picture import opened
from suffuse.errors import InputError

Loras = Annotated[
    list[str] | None,
    typer.Option("--lora", metavar="FILE[:WEIGHT]", help="LoRA to add, as much of it as WEIGHT says; once for each."),
]
Words = Annotated[
    list[str] | None,
    typer.Option("--embedding", metavar="FILE", help="Textual inversion: words the prompt may use; once for each."),
]
ControlNets = Annotated[
    list[str] | None, typer.Option("--controlnet", metavar="FOLDER", help="ControlNet that sees --control; once for each.")
]
Controls = Annotated[
    list[Path] | None,
    typer.Option("--control", metavar="IMAGE", help="What --controlnet sees: edges, depth, a pose; once for each."),
]
ControlScales = Annotated[
    list[float] | None, typer.Option("--control-scale", help="How much of it counts, 1 if left out; once for each.")
]
Adapter = Annotated[str | None, typer.Option("--t2i-adapter", metavar="FOLDER", help="T2I-Adapter that sees --adapter-image.")]
AdapterImage = Annotated[Path | None, typer.Option("--adapter-image", metavar="IMAGE", help="What --t2i-adapter sees.")]
ImageAdapters = Annotated[
    list[str] | None, typer.Option("--ip-adapter", metavar="FILE", help="IP-Adapter that sees --ip-image; once for each.")
]
PromptImages = Annotated[
    list[Path] | None, typer.Option("--ip-image", metavar="IMAGE", help="A picture to take after; once for each.")
]
ImageScales = Annotated[
    list[float] | None, typer.Option("--ip-scale", help="How much to take after it, 1 if left out; once for each.")
]
Boxes = Annotated[
    list[str] | None,
    typer.Option(
        "--box",
        metavar="WORDS=LEFT,TOP,RIGHT,BOTTOM",
        help="What stands where, from 0 to 1, for a model that was trained to be told (GLIGEN); once for each.",
    ),
]

NEEDED = {
    "controlnet": "control",
    "control": "controlnet",
    "control_scale": "control",
    "t2i_adapter": "adapter_image",
    "adapter_image": "t2i_adapter",
    "ip_adapter": "ip_image",
    "ip_image": "ip_adapter",
    "ip_scale": "ip_image",
}
"""Option → the one without which it means nothing."""


def check_options(given: Mapping[str, Any]) -> None:
    """Raise `InputError` if an option is given without the one it needs, or they are not one for each."""
    for name, needed in NEEDED.items():
        if not given[name]:
            continue
        if not given[needed]:
            raise InputError(f"{_spelled(name)} is given without {_spelled(needed)}", remedy="pass both")
        if isinstance(given[name], list) and len(given[name]) != len(given[needed]):
            found = f"{len(given[name])} and {len(given[needed])}"
            raise InputError(f"{_spelled(name)} and {_spelled(needed)} are not one for each", found=found)
    boxes(given["box"])


def _spelled(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def weighed(text: str) -> tuple[str, float]:
    """FILE:WEIGHT → both; 1.0 if only a file is named."""
    file, colon, weight = text.rpartition(":")
    try:
        return (file, float(weight)) if colon else (text, 1.0)
    except ValueError:  # a colon of the name
        return text, 1.0


def boxes(texts: Sequence[str] | None) -> dict[str, Any]:
    """Keywords of a pipeline for WORDS=LEFT,TOP,RIGHT,BOTTOM of each thing.

    Raises:
        InputError: One is written otherwise.
    """
    phrases, corners = list[str](), list[list[float]]()
    for text in texts or ():
        words, _, numbers = text.rpartition("=")
        try:
            corners.append([float(number) for number in numbers.split(",")])
        except ValueError:
            corners.append([])
        phrases.append(words)
        if not words or len(corners[-1]) != 4:
            raise InputError(
                f"--box {text!r} is not understood", expected='WORDS=LEFT,TOP,RIGHT,BOTTOM, as in "a dog=0,0.5,0.4,1"'
            )
    return {"gligen_phrases": phrases, "gligen_boxes": corners} if phrases else {}


def pictures_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """The pictures of the options, as keywords of a pipeline; of several, a list."""
    shown = {
        "control_image": [opened("--control", path) for path in given["control"] or ()],
        "adapter_image": [opened("--adapter-image", path) for path in (given["adapter_image"],) if path is not None],
        "ip_adapter_image": [opened("--ip-image", path) for path in given["ip_image"] or ()],
    }
    return {name: _one_or_all(pictures) for name, pictures in shown.items() if pictures}


def added(pipe: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Load onto a pipeline what the options name.

    Returns:
        Keywords for its call: models and scales.
    """
    import suffuse

    weights = dict[str, float]()
    for number, (file, weight) in enumerate(map(weighed, given["lora"] or ())):
        weights[f"{number} {Path(file).stem}".replace(".", "_")] = weight
        pipe.load_lora_weights(file, adapter_name=[*weights][-1])
    if weights:
        pipe.set_adapters([*weights], [*weights.values()])
    for file in given["embedding"] or ():
        pipe.load_textual_inversion(file)
    keywords = boxes(given["box"])
    if given["ip_adapter"]:
        pipe.load_ip_adapter(_one_or_all(given["ip_adapter"]))
        keywords |= {"ip_adapter_scale": _one_or_all(given["ip_scale"])} if given["ip_scale"] else {}
    nets = [_model(pipe, suffuse.ControlNetModel, folder) for folder in given["controlnet"] or ()]
    if nets:
        scales = given["control_scale"]  # left out, it is that of the run that goes on, or 1
        keywords |= {"controlnet": _one_or_all(nets)} | ({"controlnet_conditioning_scale": _one_or_all(scales)} if scales else {})
    if given["t2i_adapter"]:
        keywords["adapter"] = _model(pipe, suffuse.T2IAdapter, given["t2i_adapter"])
    return keywords


def told(given: Mapping[str, Any]) -> dict[str, Any]:
    """What the PNG says of the options."""
    names = [*NEEDED, "lora", "embedding"]
    return {name: _name(given[name]) for name in names if given[name]} | ({"box": given["box"]} if given["box"] else {})


def _name(value: Any) -> Any:
    if isinstance(value, list):
        return [_name(item) for item in value]
    return Path(value).name if isinstance(value, (str, Path)) else value


def _model(pipe: Any, kind: Any, folder: str) -> Any:
    return kind.from_pretrained(folder, torch_dtype=pipe.unet.dtype).to(pipe.device)


def _one_or_all(items: Sequence[Any]) -> Any:
    return items[0] if len(items) == 1 else list(items)
