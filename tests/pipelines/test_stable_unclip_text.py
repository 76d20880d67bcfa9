"""Stable unCLIP with a prior equals the peer's, bit for bit."""

from __future__ import annotations

import json
import warnings
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import diffusers
import pytest
import tiny
import torch
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from tasks import align, difference, set_scheduler

import suffuse
from suffuse.errors import ConfigError, InputError

NAME = "StableUnCLIPPipeline"


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
    torch.manual_seed(24)
    normalizer = StableUnCLIPImageNormalizer(32)
    normalizer.mean.data, normalizer.std.data = torch.randn(1, 32) * 0.2, torch.rand(1, 32) + 0.5
    prior = diffusers.PriorTransformer(num_attention_heads=2, attention_head_dim=12, num_layers=1, embedding_dim=32).eval()
    for parameter in prior.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.5)
    imagining = {
        "prior_tokenizer": tiny.tokenizer(path / "prior_tokenizer"),
        "prior_text_encoder": tiny.text_encoder_2(),
        "prior": prior,
        "prior_scheduler": diffusers.UnCLIPScheduler(prediction_type="sample", clip_sample_range=5.0),
        "image_normalizer": normalizer,
        "image_noising_scheduler": diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    }
    getattr(diffusers, NAME)(**told, **imagining, unet=unet).save_pretrained(path / "pipeline")
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
    settings = {"prompt": "a cat", "height": 64, "width": 48, "num_inference_steps": 4, "prior_num_inference_steps": 4}
    seeded = {"output_type": "np", "return_dict": False, "generator": torch.Generator().manual_seed(7)}
    return pipe(**{**settings, **seeded, **options})[0]


def seeded(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def same(scheduler: str = "DDIMScheduler", **options: Any) -> bool:
    set_scheduler(pair(), scheduler)
    return difference(*(call(pipe, **dict(options)) for pipe in pair())) == 0


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "PNDMScheduler", "EulerAncestralDiscreteScheduler"])
def test_every_kind_of_scheduler(scheduler):
    assert same(scheduler)


@pytest.mark.parametrize("prior", ["DDPMScheduler", "DDIMScheduler", "HeunDiscreteScheduler", "EulerDiscreteScheduler"])
def test_every_kind_of_scheduler_of_the_prior(prior):
    theirs, ours = pair()
    before = theirs.prior_scheduler, ours.prior_scheduler
    for pipe, library in ((theirs, diffusers), (ours, suffuse)):
        pipe.prior_scheduler = getattr(library, prior)(beta_schedule="squaredcos_cap_v2", prediction_type="sample")
    try:
        assert same()
    finally:
        theirs.prior_scheduler, ours.prior_scheduler = before


TWO = {"prompt": ["a cat", "a dog!"]}
OPTIONS: dict[str, dict[str, Any]] = {
    "no guidance": {"guidance_scale": 1.0},
    "no guidance of the prior": {"prior_guidance_scale": 1.0},
    "negative prompt": {"negative_prompt": "a dog"},
    "more noise": {"noise_level": 500},
    "several": {"num_images_per_prompt": 2},
    "several of two": TWO | {"num_images_per_prompt": 2},
    "a generator a picture": TWO | {"generator": "list"},
    "latents in": {"latents": seeded(1, 4, 32, 24)},
    "vectors in": {"prior_latents": seeded(1, 32)},
    "latents out": {"output_type": "latent"},
    "the trained size": {"height": None, "width": None},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option(option):
    assert same(**OPTIONS[option])


def test_the_older_callback_is_told_what_the_peers_is():
    told: list[list[Any]] = [[], []]
    set_scheduler(pair(), "DDIMScheduler")
    for pipe, heard in zip(pair(), told, strict=True):
        call(pipe, callback=lambda *step, heard=heard: heard.append(step), callback_steps=2)
    assert [(step, int(timestep), latents.shape) for step, timestep, latents in told[0]] == [
        (step, int(timestep), latents.shape) for step, timestep, latents in told[1]
    ]


def test_what_is_written_the_peer_reads(tmp_path):
    ours = pair()[1]
    set_scheduler(pair(), "DDIMScheduler")
    ours.save_pretrained(tmp_path / "saved")
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["prior"] == ["diffusers", "PriorTransformer"]
    theirs, mine = (library.DiffusionPipeline.from_pretrained(tmp_path / "saved") for library in (diffusers, suffuse))
    assert type(mine) is type(ours)
    align(theirs)
    for pipe in (theirs, mine):
        pipe.set_progress_bar_config(disable=True)
    assert difference(call(theirs), call(mine)) == 0


@pytest.mark.parametrize("source", [{"seed": 5, "generator": None}, {}])
def test_a_run_goes_on(source, tmp_path):
    ours = pair()[1]
    set_scheduler(pair(), "EulerAncestralDiscreteScheduler")
    made = call(ours, save_run=tmp_path / "{step}.safetensors", **source)
    assert difference(ours(resume=tmp_path / "2.safetensors")[0], made) == 0


def test_a_seed_draws_each_picture_as_it_would_alone():
    ours = pair()[1]
    set_scheduler(pair(), "DDIMScheduler")
    both = call(ours, generator=None, seed=[5, 6], num_images_per_prompt=2, noise_level=200)
    assert difference(both[1:], call(ours, generator=None, seed=6, noise_level=200)) < 1e-4


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no prompt": ({"prompt": None}, "prompt and prompt_embeds are both missing"),
    "embeddings alone": ({"prompt": None, "prompt_embeds": seeded(1, 77, 32)}, r"no prompt(.|\n)*a prior that reads words"),
    "vectors of another size": ({"prior_latents": seeded(1, 16)}, "prior_latents has the wrong shape"),
    "no step of the prior": ({"prior_num_inference_steps": 0}, "prior_num_inference_steps=0 is out of range"),
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


def test_components_of_other_widths_are_refused():
    ours = pair()[1]
    narrow = suffuse.PriorTransformer(num_attention_heads=2, attention_head_dim=12, num_layers=1, embedding_dim=16)
    with pytest.raises(ConfigError, match=r"prior_text_encoder/config.json and prior/config.json disagree"):
        type(ours)(**ours.components | {"prior": narrow})
    other = type(ours.image_normalizer)(16)
    with pytest.raises(ConfigError, match=r"prior/config.json and image_normalizer/config.json disagree"):
        type(ours)(**ours.components | {"image_normalizer": other})
    with pytest.raises(ConfigError, match="the prior_scheduler of a pipeline cannot be this"):
        ours.prior_scheduler = object()


def test_the_pipeline_with_a_picture_shares_what_it_has():
    ours = pair()[1]
    own = {"image_encoder": None, "feature_extractor": None}
    other = suffuse.StableUnCLIPImg2ImgPipeline.from_pipe(ours, **own)
    assert other.unet is ours.unet
    assert other.image_normalizer is ours.image_normalizer
    other.set_progress_bar_config(disable=True)
    made = call_with_vectors(other)
    assert made.shape == (1, 64, 48, 3)


def call_with_vectors(pipe: Any) -> Any:
    settings = {"height": 64, "width": 48, "num_inference_steps": 2, "output_type": "np", "return_dict": False}
    return pipe(image_embeds=seeded(1, 32), prompt="a", **settings)[0]
