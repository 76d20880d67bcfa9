"""Pipelines for the command line: loaded from whatever was named, on the fastest device, quiet where nobody looks."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

from suffuse.errors import InputError
from suffuse.version import __version__


def pipeline_for(model: str, task: str, dtype: str) -> Any:
    """The pipeline of the checkpoint, as the class of the task; one of a family without tasks as what it was saved as."""
    import suffuse
    from suffuse.pipelines.auto import has_tasks

    pipe = loaded(model, dtype)
    if type(pipe).__name__ == "StableDiffusionDepth2ImgPipeline":
        if task != "AutoPipelineForImage2Image":
            raise InputError(f"{model} is a depth-to-image model", expected="--image, and no --mask")
        return pipe
    if not has_tasks(type(pipe).__name__):
        return pipe
    if pipe.unet.config.in_channels == 9 and task != "AutoPipelineForInpainting":
        raise InputError(f"{model} is an inpainting model", expected="--image and --mask")
    return getattr(suffuse, task).from_pipe(pipe)


def loaded(model: str, dtype: str) -> Any:
    """The pipeline of a folder, a single file or a repository."""
    import torch

    import suffuse

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*without a safety checker.*")
        base = suffuse.DiffusionPipeline
        load = base.from_single_file if os.path.isfile(model) or "/blob/" in model else base.from_pretrained
        return load(model, torch_dtype=getattr(torch, dtype, dtype))


def usable_device(torch: Any, device: str | None) -> str:
    """The device asked for, or the fastest there is."""
    if device is None:
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        found = str(error).split("\n")[0]
        raise InputError(f"--device {device!r} cannot be used", found=found, expected="cpu, cuda, cuda:1, mps, …") from None
    return device


def quiet(pipe: Any) -> None:
    """No progress bar where nobody looks."""
    if not sys.stderr.isatty():
        pipe.set_progress_bar_config(disable=True)


def made_with(pipe: Any, model: str) -> dict[str, Any]:
    """What the PNG says of the pipeline."""
    return {
        "model": Path(model).resolve().name if Path(model).exists() else model,
        "pipeline": type(pipe).__name__,
        "scheduler": type(pipe.scheduler).__name__,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "device": pipe.device.type,
        "suffuse": __version__,
    }
