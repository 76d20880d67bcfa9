"""Latents twice as large equal the peer's, bit for bit."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import diffusers
import pytest
import tiny
import torch
from tasks import align, difference, picture, set_scheduler

import suffuse
from suffuse.errors import ConfigError, InputError

NAME = "StableDiffusionLatentUpscalePipeline"


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
    parts["unet"] = tiny.unet(8, out_channels=5, time_cond_proj_dim=128 + tiny.WIDTH)
    parts = {name: parts[name] for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    parts["scheduler"] = diffusers.EulerDiscreteScheduler.from_config(parts["scheduler"].config)
    getattr(diffusers, NAME)(**parts).save_pretrained(path / "pipeline")
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


def seeded(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same(scheduler: str = "EulerDiscreteScheduler", **options: Any) -> bool:
    set_scheduler(pair(), scheduler)
    return difference(*(call(pipe, **dict(options)) for pipe in pair())) == 0


@pytest.mark.parametrize("scheduler", ["EulerDiscreteScheduler", "LMSDiscreteScheduler"])
def test_every_kind_of_scheduler(scheduler):
    assert same(scheduler)


TWO = {"prompt": ["a cat", "a dog!"], "image": [picture(24, 32, seed=1), picture(24, 32, seed=2)]}
EMBEDS = {"prompt": None, "prompt_embeds": seeded(1, 77, 32), "pooled_prompt_embeds": seeded(1, 32)}
NEGATIVE = {"negative_prompt_embeds": seeded(1, 77, 32, seed=2), "negative_pooled_prompt_embeds": seeded(1, 32, seed=2)}
OPTIONS: dict[str, dict[str, Any]] = {
    "no guidance": {"guidance_scale": 1.0},
    "a prompt that is not read": {"guidance_scale": 0},
    "negative prompt": {"negative_prompt": "a dog"},
    "two pictures": TWO,
    "two pictures, two negative prompts": TWO | {"negative_prompt": ["one", "another"]},
    "latents for a picture": {"image": seeded(1, 4, 12, 16, seed=3)},
    "a tensor": {"image": torch.rand(1, 3, 24, 32, generator=torch.Generator().manual_seed(2)) * 2 - 1},
    "embeddings": EMBEDS | NEGATIVE,
    "embeddings, no guidance": EMBEDS | {"guidance_scale": 1.0},
    "latents in": {"latents": seeded(1, 4, 24, 32)},
    "latents out": {"output_type": "latent"},
    "pictures out": {"output_type": "pil"},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option(option):
    assert same(**OPTIONS[option])


def test_a_generator_for_each_picture():
    """The peer encodes the pictures in one batch, which is another last bit."""
    set_scheduler(pair(), "EulerDiscreteScheduler")
    assert difference(*(call(pipe, **TWO, generator="list") for pipe in pair())) < 1e-4


def test_what_is_made_is_twice_as_large():
    assert call(pair()[1]).shape == (1, 48, 64, 3)


def test_what_is_written_the_peer_reads(tmp_path):
    ours = pair()[1]
    set_scheduler(pair(), "EulerDiscreteScheduler")
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


def test_one_picture_is_for_all_prompts():
    """The peer's batch does not fit together then."""
    ours = pair()[1]
    set_scheduler(pair(), "EulerDiscreteScheduler")
    both = call(ours, prompt=["a cat", "a dog"], generator=None, seed=[5, 6])
    assert difference(both[1:], call(ours, prompt="a dog", generator=None, seed=6)) < 1e-4


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no prompt": ({"prompt": None}, "prompt and prompt_embeds are both missing"),
    "no picture": ({"image": None}, "image is no picture"),
    "two pictures for one prompt": ({"image": TWO["image"]}, "image: 2 given for 1 pictures"),
    "embeddings without their vector": (EMBEDS | {"pooled_prompt_embeds": None}, "without pooled_prompt_embeds"),
    "latents of another shape": ({"latents": torch.zeros(1, 4, 8, 8)}, "latents has the wrong shape"),
    "generators of another number": ({"generator": "list"}, "generator: 2 given for 1 pictures"),
}


@pytest.mark.parametrize("name", BAD)
def test_is_told_and_draws_nothing(name):
    options, message = BAD[name]
    set_scheduler(pair(), "EulerDiscreteScheduler")
    generator = torch.Generator().manual_seed(7)
    state = generator.get_state()
    with pytest.raises(InputError, match=message):
        call(pair()[1], **{"generator": generator} | options)
    assert torch.equal(generator.get_state(), state)


def test_a_scheduler_without_sigmas_is_refused():
    set_scheduler(pair(), "DDIMScheduler")
    with pytest.raises(InputError, match="DDIMScheduler has no sigmas"):
        call(pair()[1])


def test_a_unet_of_another_task_is_refused():
    ours = pair()[1]
    other = suffuse.UNet2DConditionModel.from_config(tiny.unet(4).config)
    with pytest.raises(ConfigError, match=r"in_channels=4(.|\n)*expected: 8"):
        type(ours)(**ours.components | {"unet": other})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_half_precision(dtype, tmp_path):
    ours = pair()[1]
    set_scheduler(pair(), "EulerDiscreteScheduler")
    ours.save_pretrained(tmp_path / "saved")
    half = suffuse.DiffusionPipeline.from_pretrained(tmp_path / "saved", torch_dtype=dtype)
    half.set_progress_bar_config(disable=True)
    assert difference(call(half), call(ours)) < 0.1
