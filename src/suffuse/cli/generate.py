"""`suffuse generate`: a picture from a prompt, a picture, a mask, or a depth map."""

from __future__ import annotations

import contextlib
import inspect
import re
import secrets
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from suffuse.checkpoints.bundle import DEFAULT, SETTINGS, bundled
from suffuse.cli import features, guiding
from suffuse.cli.loading import loaded, made_with, pipeline_for, quiet, usable_device
from suffuse.cli.picture import check_writable, destination, opened, write_picture
from suffuse.errors import InputError, nearest
from suffuse.public_names import PUBLIC, resolve
from suffuse.schedulers.catalogue import CATALOGUE

if TYPE_CHECKING:
    from PIL import Image

OTHER_TASKS = ("IPNDMScheduler", "UnCLIPScheduler", "RePaintScheduler", "DDPMWuerstchenScheduler")
"""Schedulers of the same models whose steps are those of other pipelines."""

SCHEDULERS = {
    re.sub(r"discrete|scheduler", "", name.lower()): name
    for name, facts in CATALOGUE.items()
    if facts.models == "alphas" and facts.kind in ("ODE", "SDE", "distilled") and name not in OTHER_TASKS
}
"""Short name → class: "euler" → EulerDiscreteScheduler."""

OF_THE_RUN = {
    *("image", "mask", "strength", "steps", "seed", "size", "scheduler", "count"),
    *("control", "adapter_image", "ip_image", "box"),
}
"""Options that a run that goes on has already."""

DTYPES = {name: name for name in ("float32", "bfloat16", "float16", "auto")}

TASKS = {
    (False, False): "AutoPipelineForText2Image",
    (True, False): "AutoPipelineForImage2Image",
    (True, True): "AutoPipelineForInpainting",
}
"""(is there a picture, is there a mask) → what picks the class."""


def generate(
    context: typer.Context,
    prompt: Annotated[str | None, typer.Argument(help="What the picture should show.")] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Folder with model_index.json, single file, or org/name on the hub; the small model that comes with suffuse "
            "if left out.",
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="PATH", help="PNG to write or replace, or a folder for pictures with free names."),
    ] = None,
    negative: Annotated[str | None, typer.Option("--negative", "-n", help="What the picture should not show.")] = None,
    weighted: Annotated[
        bool,
        typer.Option("--weighted", help="Let (words:1.3), [words], a | b and BREAK mean something in prompts, of any length."),
    ] = False,
    image: Annotated[Path | None, typer.Option("--image", "-i", help="Picture to start from.")] = None,
    mask: Annotated[
        Path | None, typer.Option("--mask", help="Where to paint --image anew: white is painted, black is kept.")
    ] = None,
    strength: Annotated[
        float | None, typer.Option("--strength", min=0, max=1, help="How far from --image to go: 1 leaves nothing of it.")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option("--steps", "-s", min=1, help="Denoising steps; 50 if left out, 25 with the model that comes along."),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            "--guidance",
            "-g",
            help="How much to favour the prompt, 1: not at all; 7.5 if left out, 3 with the model that comes along.",
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, max=2**63, help="The same seed gives the same picture; drawn if left out.")
    ] = None,
    lora: features.Loras = None,
    embedding: features.Words = None,
    controlnet: features.ControlNets = None,
    control: features.Controls = None,
    control_scale: features.ControlScales = None,
    t2i_adapter: features.Adapter = None,
    adapter_image: features.AdapterImage = None,
    ip_adapter: features.ImageAdapters = None,
    ip_image: features.PromptImages = None,
    ip_scale: features.ImageScales = None,
    box: features.Boxes = None,
    guide: guiding.Guide = None,
    edit: guiding.Edits = None,
    guide_part: guiding.Part = None,
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
    save_run: Annotated[
        str | None,
        typer.Option(
            "--save-run", metavar="FILE", help="Keep the run after each step, for --resume; {step} in the name keeps every step."
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            "--resume", metavar="FILE", help="Go on with a run; a PROMPT, --guidance or --negative change it from there."
        ),
    ] = None,
) -> None:
    """Draw a picture.

    A prompt alone draws from noise; --image redraws a picture; --image and --mask paint part of it anew; a depth-to-image model
    keeps the depth of --image. The PNG keeps its settings: `suffuse inspect PICTURE.png` shows them.

    Examples:
      suffuse generate "a red apple"
      suffuse generate "a lighthouse at dawn" -m stable-diffusion-v1-5 --seed 7
      suffuse generate "an oil painting" -m dreamlike.safetensors -i photo.jpg
      suffuse generate "a door" -m stable-diffusion-inpainting -i house.png --mask m.png
      suffuse generate "a bird" -m FOLDER --controlnet canny --control edges.png --lora ink.safetensors:0.8
      suffuse generate "a cat" --edit "a blue background" --edit "-whiskers:3"
      suffuse generate "a lighthouse" -m FOLDER --guide unattended:worse_scale=2 --guide-part 0.1-0.8
      suffuse generate "a lighthouse" -m FOLDER --save-run at-{step}.safetensors
      suffuse generate "a lighthouse at night" --resume at-20.safetensors
    """
    # All that can be said without torch, which takes a second to import, is said before.
    if save_run is not None and count > 1:
        raise InputError("--save-run keeps the run of one picture", remedy="leave out --count")
    if weighted:
        from suffuse.diffusion.weighted_prompts import Weighted

        prompt, negative = (text if text is None else Weighted(text) for text in (prompt, negative))
        context.params |= {"prompt": prompt, "negative": negative}
    guiding.check_options(context.params)
    if resume is not None:
        _go_on(resume, prompt, _changes(context), model, output, dtype, device, save_run, context.params)
        return
    features.check_options(context.params)
    if prompt is None and model is None:
        raise InputError("there is no prompt", remedy='suffuse generate "a red apple"')
    defaults = SETTINGS[DEFAULT] if model is None else {}
    if model is None:
        model = bundled(DEFAULT)
        typer.echo(f"drawn by {DEFAULT}, the small model that comes with suffuse; --model names another", err=True)
    for option, value, needed in (("--mask", mask, "the picture it belongs to"), ("--strength", strength, "a picture")):
        if value is not None and image is None:
            raise InputError(f"{option} is given without --image", remedy=f"pass {needed}: --image photo.png")
    scheduler_class = _choice("--scheduler", scheduler, SCHEDULERS) if scheduler is not None else None
    dtype = _choice("--dtype", dtype, DTYPES)
    told = {"num_inference_steps": steps, "guidance_scale": guidance, "strength": strength, "negative_prompt": negative}
    call: dict[str, Any] = defaults | {name: value for name, value in told.items() if value is not None}
    pictures = {
        name: opened(option, path)
        for name, option, path in (("image", "--image", image), ("mask_image", "--mask", mask))
        if path is not None
    }
    call |= _size(size, pictures)
    pictures |= features.pictures_of(context.params)
    seed, title = secrets.randbelow(2**32) if seed is None else seed, prompt or "picture"
    check_writable(destination(output, title, seed, 0, count))

    import torch

    from suffuse.pipelines.arguments import size as check_size

    for name in call.keys() & {"height", "width"}:
        check_size(f"--size: {name}", call[name])
    device = usable_device(torch, device)
    pipe = pipeline_for(model, TASKS[image is not None, mask is not None], dtype).to(device)
    if scheduler_class is not None:
        import suffuse

        pipe.scheduler = getattr(suffuse, scheduler_class).from_config(pipe.scheduler.config)
    quiet(pipe)
    given = features.added(pipe, context.params)
    asked = {"guidance": None} if guiding.is_asked(context.params) else {}
    call = ({} if prompt is None else {"prompt": prompt}) | call
    call = _completed(type(pipe), call, {**pictures, **given, **asked}, image is not None)
    given |= guiding.guided(context.params, call)
    files = {name: path.name for name, path in (("image", image), ("mask_image", mask)) if path is not None}
    settings = {**call, **files, **features.told(context.params), **guiding.told(context.params), **made_with(pipe, model)}
    # One by one: a picture does not depend on how many are made beside it, and those that are done are kept if the rest fails.
    for index in range(count):
        generator = torch.Generator().manual_seed(seed + index)
        with _kept(save_run):
            made = pipe(generator=generator, save_run=save_run, **call, **pictures, **given)
        picture = next(iter(made.values()))[0]
        _write(picture, destination(output, title, seed + index, index, count), settings | {"seed": seed + index})


def _completed(pipeline: type[Any], call: dict[str, Any], further: Mapping[str, Any], redraws: bool) -> dict[str, Any]:
    """The keywords of a call, with the defaults of the pipeline that the PNG is to tell.

    Raises:
        InputError: It takes none of a name, or needs a prompt.
    """
    parameters = inspect.signature(pipeline.__call__).parameters
    for name in {**call, **further}:
        if name not in parameters:
            raise InputError(f"{pipeline.__name__} takes no {name}", remedy="leave the option out, or name another --model")
    if "prompt" in parameters and "prompt" not in call:
        raise InputError("there is no prompt", remedy='suffuse generate "a red apple"')
    shown = ("prompt", "num_inference_steps", "guidance_scale", "negative_prompt", *(("strength",) if redraws else ()))
    return {name: parameters[name].default for name in shown if name in parameters} | call


def _go_on(
    file: Path,
    prompt: str | None,
    changes: dict[str, Any],
    model: str | None,
    output: str | None,
    dtype: str,
    device: str | None,
    save_run: str | None,
    options: Mapping[str, Any],
) -> None:
    """The picture of a run that was begun, with what is to change from there on."""
    import torch

    import suffuse
    from suffuse.pipelines.saved_run import SavedRun, torch_generators

    run = SavedRun.load(file)
    model = model or run.model
    if model is None:
        raise InputError(f"{file} does not tell the model", remedy="name it with --model")
    changes |= {} if prompt is None else {"prompt": prompt}
    told = run.arguments | changes
    seeds = [generator.initial_seed() for generator in torch_generators(told.get("generator"))] or [told.get("seed") or 0]
    path = destination(output, str(told.get("prompt") or "picture"), seeds[0])
    check_writable(path)
    pipeline, scheduler = (
        _named(file, name, kind)
        for name, kind in ((run.pipeline, suffuse.DiffusionPipeline), (run.scheduler, suffuse.SchedulerMixin))
    )
    pipe = pipeline.from_pipe(loaded(model, _choice("--dtype", dtype, DTYPES)))
    pipe.scheduler = scheduler.from_config(run.scheduler_config)
    pipe.to(usable_device(torch, device))
    quiet(pipe)
    given = features.added(pipe, options)  # what was added is no part of the run
    given |= guiding.guided(options, told)
    with _kept(save_run):
        pictures = pipe(resume=run, save_run=save_run, output_type="pil", return_dict=True, **changes, **given).images
    shown = {
        name: told[name]
        for name in ("prompt", "num_inference_steps", "guidance_scale", "negative_prompt", "strength")
        if name in told
    }
    made = {
        **shown,
        **features.told(options),
        **guiding.told(options),
        **made_with(pipe, model),
        "resumed": f"{file.name}, step {run.step}",
    }
    for index, picture in enumerate(pictures):
        seed = seeds[index] if index < len(seeds) else seeds[0]
        _write(picture, destination(output, str(path.stem), seed, index, len(pictures)) if index else path, made | {"seed": seed})


def _named(file: Path, name: str, kind: Any) -> Any:
    """The class that a run names, if it is one of ours and of this kind."""
    found = resolve(name) if name in PUBLIC else None
    if not isinstance(found, type) or not issubclass(found, kind):
        raise InputError(f"{file} names no {kind.__name__} of suffuse", found=name)
    return found


def _changes(context: typer.Context) -> dict[str, Any]:
    """The options given, as arguments of a run that goes on.

    Raises:
        InputError: One of them cannot change on the way.
    """
    given = {name for name in context.params if str(context.get_parameter_source(name)).endswith("COMMANDLINE")}
    for name in sorted(given & OF_THE_RUN):
        raise InputError(f"--{name.replace('_', '-')} is that of the run that --resume goes on with", remedy="leave it out")
    names = {"negative": "negative_prompt", "guidance": "guidance_scale"}
    return {argument: context.params[name] for name, argument in names.items() if name in given}


@contextlib.contextmanager
def _kept(save_run: str | None) -> Generator[None]:
    """Say where the run is kept if Ctrl-C ends it."""
    try:
        yield
    except KeyboardInterrupt:
        if save_run is not None:
            typer.echo(f"stopped; suffuse generate --resume {save_run.replace('{step}', 'STEP')} goes on", err=True)
        raise


def _write(picture: Image.Image, path: Path, settings: dict[str, Any]) -> None:
    write_picture(picture, path, settings | {"width": picture.width, "height": picture.height})
    typer.echo(path)


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
