"""The tasks of Stable Diffusion and its XL: the peer's pipeline and ours on one checkpoint, and what to call them with."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import diffusers
import numpy as np
import tiny
import torch
from PIL import Image

import suffuse


@dataclass(frozen=True)
class Task:
    name: str
    components: tuple[str, ...] = ()
    channels: int = 4
    asymmetric: bool = False
    refiner: bool = False
    controlnets: int = 0
    call: dict[str, Any] = field(default_factory=dict)

    @property
    def peer(self) -> type:
        return getattr(diffusers, self.name)

    @property
    def ours(self) -> type:
        return getattr(suffuse, self.name)


def picture(height: int = 64, width: int = 64, seed: int = 0, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def mask(height: int = 64, width: int = 64) -> Image.Image:
    array = np.zeros((height, width), dtype=np.uint8)
    array[height // 4 : height // 2 + 8, width // 4 : width // 2 + 12] = 255
    return Image.fromarray(array)


IMAGE = {"image": picture()}
TASKS = {
    "text": Task("StableDiffusionPipeline", call={"height": 64, "width": 48}),
    "image": Task("StableDiffusionImg2ImgPipeline", call=IMAGE | {"strength": 0.7}),
    "inpaint": Task("StableDiffusionInpaintPipeline", call=IMAGE | {"mask_image": mask(), "height": 64, "width": 64}),
    "inpaint9": Task(
        "StableDiffusionInpaintPipeline", channels=9, call=IMAGE | {"mask_image": mask(), "height": 64, "width": 64}
    ),
    "asymmetric": Task(
        "StableDiffusionInpaintPipeline",
        channels=9,
        asymmetric=True,
        call=IMAGE | {"mask_image": mask(), "height": 64, "width": 64},
    ),
    "depth": Task("StableDiffusionDepth2ImgPipeline", channels=5, call=IMAGE | {"strength": 0.7}),
    "xl text": Task("StableDiffusionXLPipeline", call={"height": 64, "width": 48}),
    "xl image": Task("StableDiffusionXLImg2ImgPipeline", call=IMAGE | {"strength": 0.7}),
    "xl refiner": Task("StableDiffusionXLImg2ImgPipeline", refiner=True, call=IMAGE | {"strength": 0.7}),
    "xl inpaint": Task("StableDiffusionXLInpaintPipeline", call=IMAGE | {"mask_image": mask(), "height": 64, "width": 64}),
    "xl inpaint9": Task(
        "StableDiffusionXLInpaintPipeline", channels=9, call=IMAGE | {"mask_image": mask(), "height": 64, "width": 64}
    ),
}

CONTROL = {"control_image": picture(seed=3)}
PAINTED = IMAGE | {"mask_image": mask(), "height": 64, "width": 64}
ONE_NET = {
    "control text": Task("StableDiffusionControlNetPipeline", controlnets=1, call={"image": picture(seed=3)}),
    "control image": Task("StableDiffusionControlNetImg2ImgPipeline", controlnets=1, call=IMAGE | CONTROL | {"strength": 0.7}),
    "control inpaint": Task("StableDiffusionControlNetInpaintPipeline", controlnets=1, call=PAINTED | CONTROL),
    "control xl text": Task("StableDiffusionXLControlNetPipeline", controlnets=1, call={"image": picture(seed=3)}),
    "control xl image": Task(
        "StableDiffusionXLControlNetImg2ImgPipeline", controlnets=1, call=IMAGE | CONTROL | {"strength": 0.7}
    ),
    "control xl inpaint": Task("StableDiffusionXLControlNetInpaintPipeline", controlnets=1, call=PAINTED | CONTROL),
    "control inpaint9": Task("StableDiffusionControlNetInpaintPipeline", channels=9, controlnets=1, call=PAINTED | CONTROL),
}
TWO_NETS = {
    name.replace("control", "controls"): replace(
        task, controlnets=2, call={k: [v, picture(seed=4)] if v == picture(seed=3) else v for k, v in task.call.items()}
    )
    for name, task in ONE_NET.items()
}
CONTROLLED = ONE_NET | TWO_NETS
"""The tasks with ControlNets."""
ALL = TASKS | CONTROLLED


@cache
def folder(name: str) -> Path:
    """A checkpoint of the task, written by the peer."""
    task, path = ALL[name], Path(mkdtemp(prefix="suffuse-"))
    nets: dict[str, Any] = {}
    if task.controlnets:
        options = tiny.xl_options() if "xl" in name else {}
        several = [tiny.controlnet(16 + number, **options) for number in range(task.controlnets)]
        nets = {"controlnet": several if len(several) > 1 else several[0]}
    if "xl" in name:
        parts = tiny.stable_diffusion_xl(path / "tokenizer", task.refiner, task.channels) | nets
        scored = {} if "xl text" in name else {"requires_aesthetics_score": task.refiner}
        task.peer(**parts, **scored, add_watermarker=False).save_pretrained(path / "pipeline")
        return path / "pipeline"
    parts = tiny.stable_diffusion(path / "tokenizer") | nets
    parts["unet"] = tiny.unet(task.channels)
    if task.asymmetric:
        parts["vae"] = tiny.asymmetric_vae()
    if name == "depth":
        del parts["safety_checker"]
        parts |= {"depth_estimator": tiny.depth_estimator(), "feature_extractor": tiny.depth_processor()}
    options = {} if name == "depth" else {"requires_safety_checker": False}
    task.peer(**parts, **options).save_pretrained(path / "pipeline")
    return path / "pipeline"


@cache
def pair(name: str) -> tuple[Any, Any]:
    """(the peer's pipeline, ours), loaded from one folder."""
    task = ALL[name]
    peer, ours = task.peer.from_pretrained(folder(name)), task.ours.from_pretrained(folder(name))
    for pipe in (peer, ours):
        pipe.set_progress_bar_config(disable=True)
    align(peer)
    return peer, ours


def align(pipe: Any) -> None:
    """Move weights to where an allocation begins, as ours are: the peer leaves some where the file had them in memory, and the
    last bit of a matrix product depends on the alignment of its operands.
    """
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            for parameter in component.parameters():
                parameter.data = parameter.data.clone()


def set_scheduler(pipes: tuple[Any, Any], name: str, **options: Any) -> None:
    """Give both pipelines a scheduler of this class, with the trained betas."""
    for pipe, library in zip(pipes, (diffusers, suffuse), strict=True):
        pipe.scheduler = getattr(library, name).from_config(tiny.scheduler().config, **options)


def call(pipe: Any, task: str, **options: Any) -> Any:
    settings = {"prompt": "a cat", "num_inference_steps": 4, "output_type": "pt", "return_dict": False}
    seeded = {"generator": torch.Generator().manual_seed(7)}
    return pipe(**{**settings, **ALL[task].call, **seeded, **options})[0]


def difference(one: Any, other: Any) -> float:
    """The largest absolute difference of two results of any kind."""
    if isinstance(one, list):
        assert len(one) == len(other)
        return max(difference(np.asarray(a, dtype=float), np.asarray(b, dtype=float)) for a, b in zip(one, other, strict=True))
    one, other = torch.as_tensor(one), torch.as_tensor(other)
    assert one.shape == other.shape
    assert bool(torch.isfinite(one).all())
    return (one - other).abs().max().item()
