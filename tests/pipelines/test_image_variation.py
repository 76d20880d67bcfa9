"""Variations of a picture equal the peer's, bit for bit."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import torch
from tasks import align, difference, picture, set_scheduler
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

import suffuse
from suffuse.errors import ConfigError, InputError

NAME = "StableDiffusionImageVariationPipeline"


@pytest.fixture(autouse=True)
def quiet_peer():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="diffusers.*")
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


def vision_model(width: int = 32) -> CLIPVisionModelWithProjection:
    torch.manual_seed(18)
    sizes = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    return CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, image_size=32, patch_size=8, projection_dim=width)).eval()


@cache
def pair() -> tuple[Any, Any]:
    """(the peer's pipeline, ours), loaded from one folder."""
    path = Path(mkdtemp(prefix="suffuse-"))
    parts = {"vae": tiny.vae(), "image_encoder": vision_model(), "unet": tiny.unet(), "scheduler": tiny.scheduler()}
    checked = {"safety_checker": tiny.safety_checker(), "feature_extractor": tiny.image_processor()}
    getattr(diffusers, NAME)(**parts, **checked).save_pretrained(path)
    pipes = tuple(getattr(library, NAME).from_pretrained(path) for library in (diffusers, suffuse))
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    align(pipes[0])
    return pipes


def call(pipe: Any, **options: Any) -> Any:
    if options.get("generator") == "list":
        options["generator"] = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    settings = {"image": picture(), "height": 64, "width": 48, "num_inference_steps": 4, "output_type": "np"}
    return pipe(**{**settings, "return_dict": False, "generator": torch.Generator().manual_seed(7), **options})[0]


def same(scheduler: str = "DDIMScheduler", **options: Any) -> bool:
    set_scheduler(pair(), scheduler)
    return difference(*(call(pipe, **dict(options)) for pipe in pair())) == 0


@pytest.fixture
def seeing() -> torch.Tensor:
    """A picture as the feature extractor makes it."""
    return tiny.image_processor()(images=[picture(), picture(seed=1)], return_tensors="pt").pixel_values


@pytest.mark.parametrize(
    "scheduler", ["DDIMScheduler", "PNDMScheduler", "HeunDiscreteScheduler", "EulerAncestralDiscreteScheduler"]
)
def test_every_kind_of_scheduler(scheduler):
    assert same(scheduler)


OPTIONS: dict[str, dict[str, Any]] = {
    "no guidance": {"guidance_scale": 1.0},
    "several": {"num_images_per_prompt": 2},
    "two pictures": {"image": [picture(seed=1), picture(seed=2)]},
    "several of two pictures": {"image": [picture(seed=1), picture(seed=2)], "num_images_per_prompt": 2},
    "a generator a picture": {"num_images_per_prompt": 2, "generator": "list"},
    "the trained size": {"height": None, "width": None},
    "a picture of another size": {"image": picture(73, 57)},
    "latents in": {"latents": torch.randn(1, 4, 32, 24, generator=torch.Generator().manual_seed(1))},
    "latents out": {"output_type": "latent"},
    "pictures out": {"output_type": "pil"},
    "eta": {"eta": 0.5},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option(option):
    assert same(**OPTIONS[option])


def test_a_tensor_is_what_the_feature_extractor_makes(seeing):
    assert same(image=seeing)
    ours = pair()[1]
    assert difference(call(ours, image=seeing[:1]), call(ours)) == 0
    without = type(ours)(**ours.components | {"feature_extractor": None, "safety_checker": None}, requires_safety_checker=False)
    without.set_progress_bar_config(disable=True)
    call(without, image=seeing)
    with pytest.raises(InputError, match="no feature_extractor, which this call needs"):
        call(without)


def test_arrays_show_what_pictures_show():
    ours = pair()[1]
    array = np.asarray(picture())
    for form in (array, array.astype(np.float32) / 255, [array]):
        assert difference(call(ours, image=form), call(ours)) == 0


def test_the_older_callback_is_called():
    seen: list[list[int]] = []
    for pipe in pair():
        steps: list[int] = []
        call(pipe, callback=lambda step, timestep, latents, steps=steps: steps.append(int(timestep)), callback_steps=2)
        seen.append(steps)
    assert seen[0] == seen[1] != []


def test_a_run_goes_on(tmp_path):
    ours = pair()[1]
    set_scheduler(pair(), "EulerAncestralDiscreteScheduler")
    made = call(ours, save_run=tmp_path / "{step}.safetensors")
    assert difference(ours(resume=tmp_path / "2.safetensors")[0], made) == 0


def test_what_is_written_the_peer_reads(tmp_path):
    ours = pair()[1]
    set_scheduler(pair(), "DDIMScheduler")
    ours.save_pretrained(tmp_path / "saved")
    theirs, mine = (library.DiffusionPipeline.from_pretrained(tmp_path / "saved") for library in (diffusers, suffuse))
    assert type(mine) is type(ours)
    align(theirs)
    for pipe in (theirs, mine):
        pipe.set_progress_bar_config(disable=True)
    assert difference(call(theirs), call(mine)) == 0


def test_each_seed_draws_its_own_picture():
    ours = pair()[1]
    both = call(ours, generator=None, seed=[5, 6], num_images_per_prompt=2)
    assert difference(both[1:], call(ours, generator=None, seed=6)) < 1e-4


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no picture": ({"image": None}, "image is no picture"),
    "a path": ({"image": "photo.png"}, "image is no picture"),
    "a tensor of another size": ({"image": torch.zeros(1, 3, 16, 16)}, r"image has the wrong shape(.|\n)*\(1, 3, 32, 32\)"),
    "latents of another shape": ({"latents": torch.zeros(1, 4, 8, 8)}, "latents has the wrong shape"),
    "generators of another number": ({"generator": "list"}, "generator: 2 given for 1 pictures"),
    "seeds of another number": ({"generator": None, "seed": [1, 2]}, "seed: 2 given for 1 pictures"),
}


@pytest.mark.parametrize("name", BAD)
def test_is_told_and_draws_nothing(name):
    options, message = BAD[name]
    generator = torch.Generator().manual_seed(7)
    state = generator.get_state()
    with pytest.raises(InputError, match=message):
        call(pair()[1], **{"generator": generator} | options)
    assert torch.equal(generator.get_state(), state)


def test_an_image_encoder_of_another_width_is_refused():
    ours = pair()[1]
    with pytest.raises(ConfigError, match="projection_dim=24, cross_attention_dim=32"):
        type(ours)(**ours.components | {"image_encoder": vision_model(24)})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_half_precision(dtype, tmp_path):
    ours = pair()[1]
    set_scheduler(pair(), "DDIMScheduler")
    ours.save_pretrained(tmp_path / "saved")
    half = suffuse.DiffusionPipeline.from_pretrained(tmp_path / "saved", torch_dtype=dtype)
    half.set_progress_bar_config(disable=True)
    assert difference(call(half), call(ours)) < 0.1
