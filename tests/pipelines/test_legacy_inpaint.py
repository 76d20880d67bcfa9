"""Inpainting as it was first done: equal to the peer bit for bit; masks of every kind mean the same."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import diffusers
import numpy as np
import pytest
import tiny
import torch
from tasks import align, difference, mask, picture, set_scheduler

import suffuse
from suffuse.diffusion.guidance import ClassifierFreeGuidance
from suffuse.errors import SuffuseError


@cache
def pipes():
    """(the peer's pipeline, ours) from one folder."""
    path = Path(mkdtemp(prefix="suffuse-"))
    parts = tiny.stable_diffusion(path / "tokenizer")
    diffusers.StableDiffusionInpaintPipelineLegacy(**parts, requires_safety_checker=False).save_pretrained(path / "pipeline")
    kinds = (diffusers.StableDiffusionInpaintPipelineLegacy, suffuse.StableDiffusionInpaintPipelineLegacy)
    made = tuple(kind.from_pretrained(path / "pipeline", safety_checker=None) for kind in kinds)
    for pipe in made:
        pipe.set_progress_bar_config(disable=True)
    align(made[0])
    return made


def draw(pipe, **options):
    told = {"prompt": "a cat", "image": picture(), "mask_image": mask(), "num_inference_steps": 5, "output_type": "pt"}
    return pipe(**{**told, "return_dict": False, "generator": torch.Generator().manual_seed(7), **options})[0]


OPTIONS = {
    "plain": {},
    "no guidance": {"guidance_scale": 1.0},
    "all the way": {"strength": 1.0},
    "predicted noise": {"add_predicted_noise": True},
    "several": {"prompt": ["a cat", "a dog"], "num_images_per_prompt": 2, "negative_prompt": ["rain", "snow"]},
    "a gray mask": {"mask_image": mask().point(lambda value: value // 2)},
    "eta": {"eta": 1.0},
    "latents": {"output_type": "latent"},
}


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
@pytest.mark.parametrize("name", OPTIONS)
def test_pictures_equal_the_peers(name, scheduler):
    set_scheduler(pipes(), scheduler)
    assert difference(*(draw(pipe, **OPTIONS[name]) for pipe in pipes())) == 0


def test_masks_of_every_kind_mean_the_same():
    # The peer paints where a tensor is black.
    set_scheduler(pipes(), "DDIMScheduler")
    array = np.asarray(mask()).astype(np.float32) / 255
    expected = draw(pipes()[1])
    for given in (array, torch.from_numpy(array), torch.from_numpy(array)[None, None], mask().convert("RGB")):
        assert difference(draw(pipes()[1], mask_image=given), expected) == 0


def test_the_known_part_is_the_pictures():
    set_scheduler(pipes(), "DDIMScheduler")
    clean, other = (draw(pipes()[1], prompt=prompt, output_type="latent") for prompt in ("a cat", "a dog"))
    changed = (clean - other).abs().sum(dim=1)[0] > 0
    assert not bool(changed[:8].any())
    assert bool(changed[8:20, 8:22].any())


def test_a_strength_of_zero_returns_the_picture():
    set_scheduler(pipes(), "DDIMScheduler")
    back = draw(pipes()[1], strength=0.0, output_type="np")
    assert difference(back[0], np.asarray(picture()) / 255) < 1e-6


def test_runs_are_kept_and_resumed(tmp_path):
    set_scheduler(pipes(), "DDIMScheduler")
    whole = draw(pipes()[1], generator=None, seed=3, eta=0.5, save_run=str(tmp_path / "{step}.run"))
    assert difference(whole, pipes()[1](resume=tmp_path / "2.run")[0]) == 0


BAD = {
    "no picture": ({"image": None}, "image"),
    "no mask": ({"mask_image": None}, "mask_image"),
    "a mask of another aspect": ({"mask_image": mask(64, 32)}, "mask_image has another aspect than image"),
    "masks of another number": ({"mask_image": torch.zeros(3, 1, 64, 64)}, "mask_image: 3 given for 1 pictures"),
    "predicted noise without guidance": (
        {"add_predicted_noise": True, "guidance_scale": 1.0},
        "needs predictions without a prompt",
    ),
    "predicted noise of another guidance": (
        {"add_predicted_noise": True, "guidance": ClassifierFreeGuidance(5.0)},
        "guidance=ClassifierFreeGuidance",
    ),
    "a text for a flag": ({"add_predicted_noise": "yes"}, "add_predicted_noise has the wrong type"),
    "strength 2": ({"strength": 2}, "strength=2 is out of range"),
    "a misspelt keyword": ({"mask": mask()}, "mask_image"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_refused_before_anything_is_drawn(name):
    options, message = BAD[name]
    set_scheduler(pipes(), "DDIMScheduler")
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    with pytest.raises(SuffuseError, match=message):
        draw(pipes()[1], **{"generator": generator, **options})
    assert torch.equal(generator.get_state(), before)
