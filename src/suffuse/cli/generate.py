"""`suffuse generate`: a picture from a prompt, a picture, a mask, or a depth map."""

from __future__ import annotations

import inspect
import io
import os
import re
import secrets
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from suffuse.cli.picture import check_writable, destination, write_picture
from suffuse.errors import InputError, nearest
from suffuse.public_names import PUBLIC
from suffuse.version import __version__

if TYPE_CHECKING:
    from PIL import Image

OTHER_MODELS = {
    "SchedulerMixin",
    "IPNDMScheduler",
    "DDIMInverseScheduler",
    "DPMSolverMultistepInverseScheduler",
    "UnCLIPScheduler",
    "CMStochasticIterativeScheduler",
    "EDMEulerScheduler",
    "EDMDPMSolverMultistepScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "RePaintScheduler",
    "ScoreSdeVeScheduler",
    "ScoreSdeVpScheduler",
    "KarrasVeScheduler",
    "DDPMWuerstchenScheduler",
}
"""Schedulers that cannot draw a picture from the checkpoints that this command takes."""

SCHEDULERS = {
    re.sub(r"discrete|scheduler", "", name.lower()): name
    for name, module in PUBLIC.items()
    if module.startswith("suffuse.schedulers.") and name not in OTHER_MODELS
}
"""Short name → class: "euler" → EulerDiscreteScheduler."""

DTYPES = {name: name for name in ("float32", "bfloat16", "float16", "auto")}

TASKS = {
    (False, False): "AutoPipelineForText2Image",
    (True, False): "AutoPipelineForImage2Image",
    (True, True): "AutoPipelineForInpainting",
}
"""(is there a picture, is there a mask) → what picks the class."""


def generate(
    prompt: Annotated[str, typer.Argument(help="What the picture should show.")],
    model: Annotated[
        str, typer.Option("--model", "-m", help="Folder with model_index.json, single file, or org/name on the hub.")
    ],
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="PATH", help="PNG to write or replace, or a folder for pictures with free names."),
    ] = None,
    negative: Annotated[str | None, typer.Option("--negative", "-n", help="What the picture should not show.")] = None,
    image: Annotated[Path | None, typer.Option("--image", "-i", help="Picture to start from.")] = None,
    mask: Annotated[
        Path | None, typer.Option("--mask", help="Where to paint --image anew: white is painted, black is kept.")
    ] = None,
    strength: Annotated[
        float | None, typer.Option("--strength", min=0, max=1, help="How far from --image to go: 1 leaves nothing of it.")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", "-s", min=1, help="Denoising steps.")] = 50,
    guidance: Annotated[float, typer.Option("--guidance", "-g", help="How much to favour the prompt; 1: not at all.")] = 7.5,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, max=2**63, help="The same seed gives the same picture; drawn if left out.")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            "--size", metavar="WIDTHxHEIGHT", help="Pixels, multiples of 8; that of --image or of the model if left out."
        ),
    ] = None,
    scheduler: Annotated[str | None, typer.Option("--scheduler", help=f"Solver: {', '.join(SCHEDULERS)}.")] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16, float16, or auto: the files' own.")] = "float32",
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, mps, …; the fastest there is if left out.")] = None,
    count: Annotated[int, typer.Option("--count", "-c", min=1, help="Pictures; the seed grows by one for each.")] = 1,
) -> None:
    """Draw a picture.

    A prompt alone draws from noise; --image redraws a picture; --image and --mask paint part of it anew; a depth-to-image model
    keeps the depth of --image. The PNG keeps its settings: `suffuse inspect PICTURE.png` shows them.

    Examples:
      suffuse generate "a lighthouse at dawn" -m stable-diffusion-v1-5 --seed 7
      suffuse generate "an oil painting" -m dreamlike.safetensors -i photo.jpg
      suffuse generate "a door" -m stable-diffusion-inpainting -i house.png --mask m.png
    """
    # All that can be said without torch, which takes a second to import, is said before.
    for option, value, needed in (("--mask", mask, "the picture it belongs to"), ("--strength", strength, "a picture")):
        if value is not None and image is None:
            raise InputError(f"{option} is given without --image", remedy=f"pass {needed}: --image photo.png")
    scheduler_class = _choice("--scheduler", scheduler, SCHEDULERS) if scheduler is not None else None
    dtype = _choice("--dtype", dtype, DTYPES)
    call: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance, "negative_prompt": negative}
    pictures = {
        name: _opened(option, path)
        for name, option, path in (("image", "--image", image), ("mask_image", "--mask", mask))
        if path is not None
    }
    call |= _size(size, pictures)
    seed = secrets.randbelow(2**32) if seed is None else seed
    check_writable(destination(output, prompt, seed, 0, count))

    import torch

    from suffuse.pipelines.arguments import size as check_size

    for name in call.keys() & {"height", "width"}:
        check_size(f"--size: {name}", call[name])
    device = _device(torch, device)
    pipe = _pipeline(model, TASKS[image is not None, mask is not None], dtype).to(device)
    if scheduler_class is not None:
        import suffuse

        pipe.scheduler = getattr(suffuse, scheduler_class).from_config(pipe.scheduler.config)
    if not sys.stderr.isatty():
        pipe.set_progress_bar_config(disable=True)
    if image is not None:
        call["strength"] = inspect.signature(type(pipe).__call__).parameters["strength"].default if strength is None else strength
    settings = {
        "prompt": prompt,
        **call,
        **{name: path.name for name, path in (("image", image), ("mask_image", mask)) if path is not None},
        "model": Path(model).resolve().name if Path(model).exists() else model,
        "pipeline": type(pipe).__name__,
        "scheduler": type(pipe.scheduler).__name__,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "device": pipe.device.type,
        "suffuse": __version__,
    }
    # One by one: a picture does not depend on how many are made beside it, and those that are done are kept if the rest fails.
    for index in range(count):
        generator = torch.Generator().manual_seed(seed + index)
        picture = pipe(prompt, generator=generator, **call, **pictures).images[0]
        path = destination(output, prompt, seed + index, index, count)
        made = {"seed": seed + index, "width": picture.width, "height": picture.height}
        write_picture(picture, path, settings | made)
        typer.echo(path)


def _pipeline(model: str, task: str, dtype: str) -> Any:
    """The pipeline of the checkpoint, as the class of the task; a depth-to-image model has a class of its own."""
    import torch

    import suffuse

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*without a safety checker.*")
        base = suffuse.DiffusionPipeline
        load = base.from_single_file if os.path.isfile(model) or "/blob/" in model else base.from_pretrained
        pipe = load(model, torch_dtype=getattr(torch, dtype, dtype))
        if type(pipe).__name__ == "StableDiffusionDepth2ImgPipeline":
            if task != "AutoPipelineForImage2Image":
                raise InputError(f"{model} is a depth-to-image model", expected="--image, and no --mask")
            return pipe
        if pipe.unet.config.in_channels == 9 and task != "AutoPipelineForInpainting":
            raise InputError(f"{model} is an inpainting model", expected="--image and --mask")
        return getattr(suffuse, task).from_pipe(pipe)


def _device(torch: Any, device: str | None) -> str:
    """The device asked for, or the fastest there is."""
    if device is None:
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        found = str(error).split("\n")[0]
        raise InputError(f"--device {device!r} cannot be used", found=found, expected="cpu, cuda, cuda:1, mps, …") from None
    return device


def _choice(option: str, given: str, known: Mapping[str, str]) -> str:
    """What the table has under a name, however that is cut into words."""
    short = re.sub(r"discrete|scheduler|[-_ ]", "", given.lower())
    if short not in known:
        close = nearest(short, known)
        remedy = f"did you mean {close}?" if close else ""
        raise InputError(f"{option} {given!r} is unknown", expected=", ".join(known), remedy=remedy)
    return known[short]


def _size(size: str | None, pictures: Mapping[str, Image.Image]) -> dict[str, int]:
    """Keywords for the size asked for, or else, with a mask, for that of the picture; otherwise the pipeline knows."""
    if size is not None:
        match = re.fullmatch(r"(\d{1,9})\s*[x×,]\s*(\d{1,9})", size.strip().lower())
        if match is None:
            raise InputError(f"--size {size!r} is not understood", expected="WIDTHxHEIGHT, as in 512x768")
        if "image" in pictures and "mask_image" not in pictures:
            raise InputError(
                "--size goes with a prompt alone or with --mask", remedy="resize the --image: the result has its size"
            )
        return {"width": int(match[1]), "height": int(match[2])}
    if "mask_image" not in pictures:
        return {}
    width, height = pictures["image"].size
    return {"width": width - width % 8, "height": height - height % 8}


def _opened(option: str, path: Path) -> Image.Image:
    """The picture, the right way up."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not path.is_file():
        raise InputError(f"{option}: no file {path}")
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            picture = Image.open(io.BytesIO(path.read_bytes()))
            ImageOps.exif_transpose(picture, in_place=True)
            return picture
        except UnidentifiedImageError:
            raise InputError(f"{option}: {path} is no picture, or a damaged one", expected="PNG, JPEG, WebP, …") from None
        except (OSError, Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise InputError(f"{option}: {path} cannot be read as a picture", found=str(error)) from None
