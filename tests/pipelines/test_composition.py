"""Features are values: any pipeline that draws takes them, together, and equals the class that has them built in."""

from __future__ import annotations

import inspect
import random
import time
from functools import cache
from itertools import combinations

import pytest
import tiny
import torch
from tasks import CONTROLLED, call, difference, folder, mask, pair, picture

import suffuse
from suffuse.errors import InputError, UnknownArgumentError
from suffuse.pipelines.features import COMPOSED, EXCLUSIVE, FEATURES

PLAIN = {
    "text": {False: "StableDiffusionPipeline", True: "StableDiffusionXLPipeline"},
    "image": {False: "StableDiffusionImg2ImgPipeline", True: "StableDiffusionXLImg2ImgPipeline"},
    "inpaint": {False: "StableDiffusionInpaintPipeline", True: "StableDiffusionXLInpaintPipeline"},
}


def plain(task: str, kind: str):
    """A pipeline of one of the plain classes with the parts of a task that has a ControlNet, and that ControlNet."""
    ours = pair(task)[1]
    pipe = getattr(suffuse, PLAIN[kind]["xl" in task]).from_pipe(ours)
    pipe.set_progress_bar_config(disable=True)
    return pipe, ours.controlnet


def as_values(task: str) -> dict:
    """The call of a task with a ControlNet, as values of a plain pipeline."""
    given = dict(CONTROLLED[task].call)
    return given if "control_image" in given else {"control_image": given.pop("image"), "image": None} | given


SCALED = {"controlnet_conditioning_scale": 0.7, "guess_mode": True, "control_guidance_end": 0.8}


@pytest.mark.parametrize("settings", [{"controlnet_conditioning_scale": 1.0}, SCALED], ids=["plain", "scaled"])
@pytest.mark.parametrize("task", [task for task in CONTROLLED if "9" not in task])
def test_text_to_image_with_values_is_every_class_with_a_controlnet(task, settings):
    pipe, net = plain(task, "text")
    theirs = call(pair(task)[0], task, **settings)
    given = as_values(task)
    mine = pipe(
        "a cat",
        num_inference_steps=4,
        output_type="pt",
        generator=torch.Generator().manual_seed(7),
        guidance_scale=inspect.signature(pair(task)[0].__call__).parameters["guidance_scale"].default,
        controlnet=net,
        **({"strength": inspect.signature(pair(task)[0].__call__).parameters["strength"].default} if "inpaint" in task else {}),
        **given,
        **settings,
    ).images
    assert difference(theirs, mine) == 0


@pytest.mark.parametrize("task", [task for task in CONTROLLED if "text" not in task])
def test_plain_classes_take_a_controlnet_too(task):
    pipe, net = plain(task, "inpaint" if "inpaint" in task else "image")
    size = {"height": 64, "width": 64} if "inpaint" in task else {}
    settings = {"controlnet_conditioning_scale": 0.7, "guidance_scale": 5.0, "strength": 0.7}
    theirs = call(pair(task)[0], task, **settings)
    mine = pipe(
        "a cat",
        num_inference_steps=4,
        output_type="pt",
        generator=torch.Generator().manual_seed(7),
        controlnet=net,
        **CONTROLLED[task].call | size | settings,
    ).images
    assert difference(theirs, mine) == 0
