"""`suffuse generate`: a picture from a prompt, a picture, a mask, or a depth map."""

from __future__ import annotations

import json
import re
import secrets
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from suffuse.errors import InputError, nearest
from suffuse.public_names import PUBLIC
from suffuse.version import __version__

if TYPE_CHECKING:
    from PIL import Image

SCHEDULERS = {
    re.sub(r"discrete|scheduler", "", name.lower()): name
    for name, module in PUBLIC.items()
    if module.startswith("suffuse.schedulers.") and name != "SchedulerMixin"
}
"""Short name → class: "euler" → EulerDiscreteScheduler."""


def generate(
    prompt: Annotated[str, typer.Argument(help="What the picture should show.")],
    model: Annotated[Path, typer.Option("--model", "-m", help="Checkpoint folder, the one with model_index.json.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="PNG to write; named after prompt and seed if left out.")
    ] = None,
    negative: Annotated[str | None, typer.Option("--negative", "-n", help="What the picture should not show.")] = None,
    image: Annotated[Path | None, typer.Option("--image", "-i", help="Picture to start from.")] = None,
    mask: Annotated[
        Path | None, typer.Option("--mask", help="Where to paint --image anew: white is painted, black is kept.")
    ] = None,
    strength: Annotated[float | None, typer.Option("--strength", help="How far from --image to go, 0 to 1.")] = None,
    steps: Annotated[int, typer.Option("--steps", "-s", help="Denoising steps.")] = 50,
    guidance: Annotated[float, typer.Option("--guidance", "-g", help="How much to favour the prompt; 1: not at all.")] = 7.5,
    seed: Annotated[int | None, typer.Option("--seed", help="The same seed gives the same picture; drawn if left out.")] = None,
    size: Annotated[
        str | None, typer.Option("--size", help="WIDTHxHEIGHT in pixels, multiples of 8; the model's own if left out.")
    ] = None,
    scheduler: Annotated[str | None, typer.Option("--scheduler", help=f"Solver: {', '.join(SCHEDULERS)}.")] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16, float16, or auto: the files' own.")] = "float32",
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, mps, …; the fastest there is if left out.")] = None,
    count: Annotated[int, typer.Option("--count", "-c", help="Pictures; the seed grows by one for each.")] = 1,
) -> None:
    """Draw a picture.

    The task follows from what is given: a prompt alone draws from noise, --image redraws a picture, --mask paints part of it anew;
    a depth-to-image model keeps the depth of --image. Every PNG carries its settings: `suffuse.settings(path)` reads them.

    Examples:
      suffuse generate "a lighthouse at dawn" --model stable-diffusion-v1-5 --seed 7

      suffuse generate "an oil painting" --model stable-diffusion-v1-5 --image photo.jpg --strength 0.6

      suffuse generate "a red door" --model stable-diffusion-inpainting --image house.png --mask door.png
    """
    # torch takes a second to import: not for --help, and not for a mistyped option.
    if mask is not None and image is None:
        raise InputError("--mask is given without --image", remedy="pass the picture the mask belongs to: --image photo.png")
    scheduler_class = _scheduler(scheduler) if scheduler else None
    call = {"num_inference_steps": steps, "guidance_scale": guidance, "negative_prompt": negative} | _size(size, image, mask)
    if strength is not None:
        call["strength"] = strength
    if image is not None:
        call["image"] = _opened("--image", image)
    if mask is not None:
        call["mask_image"] = _opened("--mask", mask)

    import torch

    seed = secrets.randbelow(2**32) if seed is None else seed
    pipe = _pipeline(model, image, mask, dtype, device or _fastest(torch))
    if scheduler_class:
        import suffuse

        pipe.scheduler = getattr(suffuse, scheduler_class).from_config(pipe.scheduler.config)
    generators = [torch.Generator().manual_seed(seed + index) for index in range(count)]
    images = pipe(prompt, num_images_per_prompt=count, generator=generators, **call).images
    console = Console(stderr=True)
    for index, picture in enumerate(images):
        path = _path(output, prompt, seed + index, index, count)
        settings = {
            "prompt": prompt,
            "seed": seed + index,
            "model": model.resolve().name,
            "pipeline": type(pipe).__name__,
            "scheduler": type(pipe.scheduler).__name__,
            "dtype": str(pipe.dtype).removeprefix("torch."),
            **{name: value for name, value in call.items() if isinstance(value, (str, int, float))},
            **{name: path.name for name, path in (("image", image), ("mask_image", mask)) if path is not None},
            "width": picture.width,
            "height": picture.height,
            "suffuse": __version__,
        }
        _write(picture, path, settings)
        console.print(f"[green]✓[/green] {path}  [dim]seed {seed + index}[/dim]")


def _pipeline(folder: Path, image: Path | None, mask: Path | None, dtype: str, device: str) -> Any:
    """The pipeline of the folder, as the class of the task."""
    import torch

    import suffuse

    types = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": "auto"}
    if dtype not in types:
        raise InputError(f"--dtype {dtype!r} is unknown", expected=", ".join(types))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*without a safety checker.*")
        pipe = suffuse.DiffusionPipeline.from_pretrained(folder, torch_dtype=types[dtype])
        own = type(pipe).__name__
        name = (
            "StableDiffusionInpaintPipeline" if mask else "StableDiffusionImg2ImgPipeline" if image else "StableDiffusionPipeline"
        )
        if own == "StableDiffusionDepth2ImgPipeline":
            if mask is not None or image is None:
                raise InputError(f"{folder} is a depth-to-image model", expected="--image, and no --mask")
        elif own != name:
            pipe = getattr(suffuse, name).from_pipe(pipe)
    return pipe.to(device)


def _fastest(torch: Any) -> str:
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def _scheduler(name: str) -> str:
    short = re.sub(r"discrete|scheduler|[-_ ]", "", name.lower())
    if short not in SCHEDULERS:
        close = nearest(short, SCHEDULERS)
        raise InputError(
            f"--scheduler {name!r} is unknown", expected=", ".join(SCHEDULERS), remedy=f"did you mean {close}?" if close else ""
        )
    return SCHEDULERS[short]


def _size(size: str | None, image: Path | None, mask: Path | None) -> dict[str, int]:
    if size is None:
        return {}
    match = re.fullmatch(r"(\d+)\s*[x×,]\s*(\d+)", size.strip().lower())
    if match is None:
        raise InputError(f"--size {size!r} is not understood", expected="WIDTHxHEIGHT, as in 512x768")
    if image is not None and mask is None:
        raise InputError("--size goes with a prompt alone or with --mask", remedy="resize the --image: the result has its size")
    return {"width": int(match[1]), "height": int(match[2])}


def _opened(option: str, path: Path) -> Image.Image:
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(path)
    except FileNotFoundError:
        raise InputError(f"{option}: no file {path}") from None
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise InputError(f"{option}: {path} cannot be read as a picture", found=str(error)) from None


def _path(output: Path | None, prompt: str, seed: int, index: int, count: int) -> Path:
    if output is None:
        slug = re.sub(r"\W+", "-", prompt.lower()).strip("-")[:48].strip("-") or "picture"
        return Path(f"{slug}-{seed}.png")
    output = output if output.suffix else output.with_suffix(".png")
    return output if count == 1 else output.with_stem(f"{output.stem}-{index + 1}")


def _write(picture: Image.Image, path: Path, settings: dict[str, Any]) -> None:
    """Write a PNG with its settings; the file is whole or not there."""
    from PIL.PngImagePlugin import PngInfo

    information = PngInfo()
    information.add_text("suffuse", json.dumps(settings, sort_keys=True, ensure_ascii=False))
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.part")
    try:
        picture.save(staged, format="PNG", pnginfo=information)
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)
