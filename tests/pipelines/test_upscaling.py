"""Larger pictures equal the peer's, bit for bit."""

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

import suffuse
from suffuse.errors import ConfigError, InputError

NAME = "StableDiffusionUpscalePipeline"


@pytest.fixture(autouse=True)
def quiet_peer():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="diffusers.*")
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


@cache
def folder() -> Path:
    """A checkpoint written by the peer."""
    path = Path(mkdtemp(prefix="suffuse-"))
    parts = tiny.stable_diffusion(path / "tokenizer")
    parts["unet"] = tiny.unet(7, num_class_embeds=400)
    parts["vae"].register_to_config(scaling_factor=0.08333)
    low = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    getattr(diffusers, NAME)(**parts, low_res_scheduler=low).save_pretrained(path / "pipeline")
    return path / "pipeline"


@cache
def pair() -> tuple[Any, Any]:
    """(the peer's pipeline, ours), loaded from one folder."""
    pipes = tuple(getattr(library, NAME).from_pretrained(folder()) for library in (diffusers, suffuse))
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    align(pipes[0])
    return pipes


def call(pipe: Any, **options: Any) -> Any:
    if options.get("generator") == "list":
        options["generator"] = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    settings = {"prompt": "a cat", "image": picture(24, 32), "num_inference_steps": 4, "output_type": "np"}
    return pipe(**{**settings, "return_dict": False, "generator": torch.Generator().manual_seed(7), **options})[0]


def same(scheduler: str = "DDIMScheduler", **options: Any) -> bool:
    set_scheduler(pair(), scheduler)
    return difference(*(call(pipe, **dict(options)) for pipe in pair())) == 0


@pytest.mark.parametrize(
    "scheduler", ["DDIMScheduler", "PNDMScheduler", "HeunDiscreteScheduler", "EulerAncestralDiscreteScheduler"]
)
def test_every_kind_of_scheduler(scheduler):
    assert same(scheduler)


TWO = {"prompt": ["a cat", "a dog!"], "image": [picture(24, 32, seed=1), picture(24, 32, seed=2)]}
OPTIONS: dict[str, dict[str, Any]] = {
    "no guidance": {"guidance_scale": 1.0},
    "negative prompt": {"negative_prompt": "a dog"},
    "no noise": {"noise_level": 0},
    "more noise": {"noise_level": 350},
    "several": {"num_images_per_prompt": 2},
    "two pictures": TWO,
    "a generator a picture": TWO | {"generator": "list"},
    "a picture of odd size": {"image": picture(25, 37)},
    "a tensor": {"image": torch.rand(1, 3, 24, 32, generator=torch.Generator().manual_seed(2)) * 2 - 1},
    "latents in": {"latents": torch.randn(1, 4, 24, 32, generator=torch.Generator().manual_seed(1))},
    "latents out": {"output_type": "latent"},
    "pictures out": {"output_type": "pil"},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option(option):
    assert same(**OPTIONS[option])


def test_an_autoencoder_that_says_another_scale_is_taken_for_the_right_one():
    """The peer changes the configuration of the one it is given."""
    ours = pair()[1]
    set_scheduler(pair(), "DDIMScheduler")
    other = suffuse.AutoencoderKL.from_config(ours.vae.config, scaling_factor=0.18215).eval()
    other.load_state_dict(ours.vae.state_dict())
    with pytest.warns(UserWarning, match=r"scaling_factor 0.18215 is taken for 0.08333"):
        made = type(ours)(**ours.components | {"vae": other})
    made.set_progress_bar_config(disable=True)
    assert other.config.scaling_factor == 0.18215
    assert difference(call(made), call(ours)) == 0


def test_a_watermark_and_a_checker():
    ours = pair()[1]

    class Marks:
        def apply_watermark(self, images):
            return [image.convert("L") for image in images]

    class Checker(torch.nn.Module):
        def forward(self, images, clip_input):
            return images * 0, [True] * len(images), [False] * len(images)

    marked = type(ours)(**ours.components | {"watermarker": Marks()})
    checked = type(ours)(**ours.components | {"safety_checker": Checker(), "feature_extractor": tiny.image_processor()})
    for pipe in (marked, checked):
        pipe.set_progress_bar_config(disable=True)
    assert call(marked, output_type="pil")[0].mode == "L"
    images, flagged = checked("a cat", picture(24, 32), num_inference_steps=1, output_type="np", return_dict=False)
    assert flagged == [True]
    assert np.abs(images).max() == 0


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


def test_a_run_goes_on(tmp_path):
    ours = pair()[1]
    set_scheduler(pair(), "EulerAncestralDiscreteScheduler")
    made = call(ours, save_run=tmp_path / "{step}.safetensors")
    assert difference(ours(resume=tmp_path / "2.safetensors")[0], made) == 0


def test_a_seed_draws_each_picture_as_it_would_alone():
    ours = pair()[1]
    set_scheduler(pair(), "DDIMScheduler")
    both = call(ours, generator=None, seed=[5, 6], num_images_per_prompt=2)
    assert difference(both[1:], call(ours, generator=None, seed=6)) < 1e-4


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no picture": ({"image": None}, "image is no picture"),
    "two pictures for one prompt": ({"image": TWO["image"]}, "image: 2 given for 1 pictures"),
    "more noise than was trained": ({"noise_level": 351}, r"noise_level=351 is more(.|\n)*at most 350"),
    "less than no noise": ({"noise_level": -1}, "noise_level=-1 is out of range"),
    "latents of another shape": ({"latents": torch.zeros(1, 4, 8, 8)}, "latents has the wrong shape"),
    "generators of another number": ({"generator": "list"}, "generator: 2 given for 1 pictures"),
}


@pytest.mark.parametrize("name", BAD)
def test_is_told_and_draws_nothing(name):
    options, message = BAD[name]
    generator = torch.Generator().manual_seed(7)
    state = generator.get_state()
    with pytest.raises(InputError, match=message):
        call(pair()[1], **{"generator": generator} | options)
    assert torch.equal(generator.get_state(), state)


def test_a_unet_of_another_task_is_refused():
    ours = pair()[1]
    other = suffuse.UNet2DConditionModel.from_config(tiny.unet(4).config)
    with pytest.raises(ConfigError, match=r"in_channels=4(.|\n)*expected: 7"):
        type(ours)(**ours.components | {"unet": other})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_half_precision(dtype, tmp_path):
    ours = pair()[1]
    set_scheduler(pair(), "DDIMScheduler")
    ours.save_pretrained(tmp_path / "saved")
    half = suffuse.DiffusionPipeline.from_pretrained(tmp_path / "saved", torch_dtype=dtype)
    half.set_progress_bar_config(disable=True)
    assert difference(call(half), call(ours)) < 0.1
