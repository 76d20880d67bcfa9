"""Stable unCLIP with a picture equals the peer's, bit for bit."""

from __future__ import annotations

import json
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
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from tasks import align, difference, picture, set_scheduler
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

import suffuse
from suffuse.errors import ConfigError, InputError

NAME = "StableUnCLIPImg2ImgPipeline"


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
    told = {name: parts[name] for name in ("vae", "text_encoder", "tokenizer", "scheduler")}
    unet = tiny.unet(4, class_embed_type="projection", projection_class_embeddings_input_dim=64)
    torch.manual_seed(22)
    sizes = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    normalizer = StableUnCLIPImageNormalizer(32)
    normalizer.mean.data, normalizer.std.data = torch.randn(1, 32) * 0.2, torch.rand(1, 32) + 0.5
    seeing = {
        "image_encoder": CLIPVisionModelWithProjection(
            CLIPVisionConfig(**sizes, image_size=32, patch_size=8, projection_dim=32)
        ).eval(),
        "feature_extractor": tiny.image_processor(),
        "image_normalizer": normalizer,
        "image_noising_scheduler": diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    }
    getattr(diffusers, NAME)(**told, **seeing, unet=unet).save_pretrained(path / "pipeline")
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
    settings = {"prompt": "a cat", "image": picture(), "height": 64, "width": 48, "num_inference_steps": 4}
    seeded = {"output_type": "np", "return_dict": False, "generator": torch.Generator().manual_seed(7)}
    return pipe(**{**settings, **seeded, **options})[0]


def seeded(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same(scheduler: str = "DDIMScheduler", **options: Any) -> bool:
    set_scheduler(pair(), scheduler)
    return difference(*(call(pipe, **dict(options)) for pipe in pair())) == 0


@pytest.mark.parametrize(
    "scheduler", ["DDIMScheduler", "PNDMScheduler", "HeunDiscreteScheduler", "EulerAncestralDiscreteScheduler"]
)
def test_every_kind_of_scheduler(scheduler):
    assert same(scheduler)


TWO = {"prompt": ["a cat", "a dog!"], "image": [picture(seed=1), picture(seed=2)]}
OPTIONS: dict[str, dict[str, Any]] = {
    "no guidance": {"guidance_scale": 1.0},
    "negative prompt": {"negative_prompt": "a dog"},
    "no prompt": {"prompt": None},
    "pictures without prompts": {"prompt": None, "image": TWO["image"]},
    "more noise": {"noise_level": 500},
    "several": {"num_images_per_prompt": 2},
    "one picture for two prompts": {"prompt": TWO["prompt"]},
    "several of two": TWO | {"num_images_per_prompt": 2},
    "a generator a picture": TWO | {"generator": "list"},
    "a prepared tensor": {"image": seeded(1, 3, 32, 32)},
    "vectors": {"image": None, "image_embeds": seeded(1, 32)},
    "the trained size": {"height": None, "width": None},
    "latents in": {"latents": seeded(1, 4, 32, 24)},
    "latents out": {"output_type": "latent"},
    "pictures out": {"output_type": "pil"},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option(option):
    assert same(**OPTIONS[option])


def test_vectors_are_noised_as_the_peer_does():
    vectors, noise = seeded(2, 32), seeded(2, 32, seed=2)
    with torch.no_grad():
        made = [pipe.noise_image_embeddings(vectors, noise_level=300, noise=noise) for pipe in pair()]
    assert difference(*made) == 0
    assert made[1].shape == (2, 64)


def test_latents_that_are_given_are_scaled_as_everywhere():
    """The peer, in this pipeline alone, does not bring them to the first noise level."""
    ours = pair()[1]
    set_scheduler(pair(), "EulerDiscreteScheduler")
    options = {"image": None, "image_embeds": seeded(1, 32), "generator": None}
    noise = seeded(1, 4, 32, 24)
    ours.scheduler.set_timesteps(4)
    torch.manual_seed(3)
    made = call(ours, **options, latents=noise)
    torch.manual_seed(3)
    theirs = call(pair()[0], **options, latents=noise * ours.scheduler.init_noise_sigma)
    assert difference(made, theirs) == 0


def test_what_is_written_the_peer_reads(tmp_path):
    ours = pair()[1]
    set_scheduler(pair(), "DDIMScheduler")
    ours.save_pretrained(tmp_path / "saved")
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["image_normalizer"] == ["stable_diffusion", "StableUnCLIPImageNormalizer"]
    theirs, mine = (library.DiffusionPipeline.from_pretrained(tmp_path / "saved") for library in (diffusers, suffuse))
    assert type(mine) is type(ours)
    align(theirs)
    for pipe in (theirs, mine):
        pipe.set_progress_bar_config(disable=True)
    assert difference(call(theirs), call(mine)) == 0


def test_a_run_goes_on(tmp_path):
    ours = pair()[1]
    set_scheduler(pair(), "EulerAncestralDiscreteScheduler")
    made = call(ours, prompt=None, save_run=tmp_path / "{step}.safetensors")
    assert difference(ours(resume=tmp_path / "2.safetensors")[0], made) == 0


def test_a_seed_draws_each_picture_as_it_would_alone():
    ours = pair()[1]
    set_scheduler(pair(), "DDIMScheduler")
    both = call(ours, generator=None, seed=[5, 6], num_images_per_prompt=2, noise_level=200)
    assert difference(both[1:], call(ours, generator=None, seed=6, noise_level=200)) < 1e-4


def test_arrays_show_what_pictures_show():
    ours = pair()[1]
    assert difference(call(ours, image=np.asarray(picture())), call(ours)) == 0


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no picture": ({"image": None}, "image and image_embeds are both missing"),
    "picture and vectors": ({"image_embeds": seeded(1, 32)}, "image and image_embeds are both given"),
    "a path": ({"image": "photo.png"}, "image is no picture"),
    "three pictures for two prompts": ({"image": [picture()] * 3, "prompt": ["a", "b"]}, "image: 3 pictures given for 2 prompts"),
    "a tensor of another size": ({"image": torch.zeros(1, 3, 16, 16)}, "image has the wrong shape"),
    "more noise than there is": ({"noise_level": 1000}, r"noise_level=1000 is out of range(.|\n)*at most 999"),
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


def test_a_unet_that_is_not_shown_pictures_is_refused():
    ours = pair()[1]
    other = suffuse.UNet2DConditionModel.from_config(tiny.unet(4).config)
    with pytest.raises(ConfigError, match="this UNet is not shown pictures"):
        type(ours)(**ours.components | {"unet": other})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_half_precision(dtype, tmp_path):
    ours = pair()[1]
    set_scheduler(pair(), "DDIMScheduler")
    ours.save_pretrained(tmp_path / "saved")
    half = suffuse.DiffusionPipeline.from_pretrained(tmp_path / "saved", torch_dtype=dtype)
    half.set_progress_bar_config(disable=True)
    assert difference(call(half), call(ours)) < 0.1
