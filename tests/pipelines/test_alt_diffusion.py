"""AltDiffusion equals the peer's, bit for bit: the pipelines of Stable Diffusion with an XLM-R that is projected."""

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
from diffusers.pipelines.deprecated.alt_diffusion.modeling_roberta_series import (
    RobertaSeriesConfig,
    RobertaSeriesModelWithTransformation,
)
from tasks import difference, picture, set_scheduler
from transformers import XLMRobertaTokenizer

import suffuse
from suffuse.errors import ConfigError, InputError
from suffuse.pipelines.alt_diffusion import text_encoder

TEXT, IMAGE = "AltDiffusionPipeline", "AltDiffusionImg2ImgPipeline"
CALLS: dict[str, dict[str, Any]] = {TEXT: {"height": 64, "width": 48}, IMAGE: {"image": picture(), "strength": 0.7}}


@pytest.fixture(autouse=True)
def quiet_peer():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="diffusers.*")
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


def tokenizer() -> XLMRobertaTokenizer:
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return XLMRobertaTokenizer(
        [*pieces, *((letter, -1.0) for letter in [*tiny.LETTERS, "▁", "猫"]), ("<mask>", 0.0)], model_max_length=77
    )


def encoder(**options: Any) -> Any:
    torch.manual_seed(31)
    sizes = {"hidden_size": 24, "intermediate_size": 37, "num_attention_heads": 4, "num_hidden_layers": 3}
    config = RobertaSeriesConfig(**sizes, project_dim=32, vocab_size=len(tokenizer()), max_position_embeddings=80, **options)
    return RobertaSeriesModelWithTransformation(config).eval()


@cache
def folder(**options: Any) -> tuple[dict[str, Any], Path]:
    """Components of the peer, and the checkpoint it writes of them, which it does not read itself."""
    path = Path(mkdtemp(prefix="suffuse-"))
    parts = tiny.stable_diffusion(path / "tokenizer") | {"tokenizer": tokenizer(), "text_encoder": encoder(**options)}
    diffusers.AltDiffusionPipeline(**parts, requires_safety_checker=False).save_pretrained(path / "pipeline")
    return parts, path / "pipeline"


@cache
def pair(name: str, **options: Any) -> tuple[Any, Any]:
    """(the peer's pipeline, ours, loaded from what the peer writes)."""
    parts, path = folder(**options)
    pipes = getattr(diffusers, name)(**parts, requires_safety_checker=False), getattr(suffuse, name).from_pretrained(path)
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    return pipes


def call(pipe: Any, **options: Any) -> Any:
    settings = {"prompt": "a cat", "num_inference_steps": 4, "output_type": "np", "return_dict": False}
    seeded = {"generator": torch.Generator().manual_seed(7)}
    return pipe(**{**settings, **CALLS[type(pipe).__name__], **seeded, **options})[0]


def same(name: str, scheduler: str = "DDIMScheduler", **options: Any) -> bool:
    set_scheduler(pair(name), scheduler)
    return difference(*(call(pipe, **dict(options)) for pipe in pair(name))) == 0


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "PNDMScheduler", "EulerAncestralDiscreteScheduler"])
def test_every_kind_of_scheduler(name, scheduler):
    assert same(name, scheduler)


OPTIONS: dict[str, dict[str, Any]] = {
    "no guidance": {"guidance_scale": 1.0},
    "another language": {"prompt": "猫 cat", "negative_prompt": "猫"},
    "several of two": {"prompt": ["a cat", "a dog!"], "num_images_per_prompt": 2},
    "embeddings": {"prompt": None, "prompt_embeds": torch.ones(1, 77, 32), "negative_prompt_embeds": torch.zeros(1, 77, 32)},
    "latents out": {"output_type": "latent"},
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option(name, option):
    assert same(name, **OPTIONS[option])


def test_what_the_last_layer_begins_with_is_projected_where_a_checkpoint_says_so():
    peer, ours = pair(TEXT, has_pre_transformation=True)
    assert difference(call(peer), call(ours)) == 0
    assert difference(call(ours), call(pair(TEXT)[1])) > 0


def test_the_text_encoder_shows_what_the_peers_does():
    theirs, ours = (pipe.text_encoder for pipe in pair(TEXT))
    tokens = tokenizer()(["a cat", "a"], padding=True, return_tensors="pt")
    with torch.no_grad():
        one, other = (model(**tokens, output_hidden_states=True) for model in (theirs, ours))
        assert torch.equal(ours(**tokens, return_dict=False)[0], other.projection_state)
    for name in ("projection_state", "last_hidden_state"):
        assert torch.equal(one[name], other[name])
    assert all(torch.equal(*states) for states in zip(one.hidden_states, other.hidden_states, strict=True))


def test_what_is_written_is_read(tmp_path):
    """The peer writes another library than it reads for the text encoder; what is read is what is written here."""
    ours = pair(TEXT)[1]
    ours.save_pretrained(tmp_path / "saved")
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["_class_name"] == TEXT
    assert index["text_encoder"] == ["alt_diffusion", "RobertaSeriesModelWithTransformation"]
    assert index["tokenizer"] == ["transformers", "XLMRobertaTokenizer"]
    again = suffuse.DiffusionPipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    assert type(again.text_encoder) is text_encoder.RobertaSeriesModelWithTransformation
    assert difference(call(again), call(ours)) == 0
    theirs = RobertaSeriesModelWithTransformation.from_pretrained(tmp_path / "saved" / "text_encoder")
    assert difference(theirs.transformation.weight.detach(), ours.text_encoder.transformation.weight.detach()) == 0


def test_it_takes_what_stable_diffusion_takes():
    ours = pair(TEXT)[1]
    set_scheduler(pair(TEXT), "DDIMScheduler")
    redrawn = call(ours, image=picture(), strength=0.7, height=None, width=None)
    assert difference(redrawn, call(pair(IMAGE)[1])) == 0
    other = suffuse.AltDiffusionImg2ImgPipeline.from_pipe(ours)
    other.set_progress_bar_config(disable=True)
    assert difference(call(other), redrawn) == 0


def test_long_and_weighted_prompts_are_read():
    ours = pair(TEXT)[1]
    made = call(ours, prompt=suffuse.Weighted("a (cat:1.5)"))
    assert difference(made, call(ours)) > 0


def test_the_output_has_the_name_of_the_peers():
    assert type(pair(TEXT)[1]("a", num_inference_steps=1, height=16, width=16)).__name__ == "AltDiffusionPipelineOutput"


@pytest.mark.parametrize("name", CALLS)
def test_layers_left_out_are_refused(name):
    generator = torch.Generator().manual_seed(7)
    state = generator.get_state()
    with pytest.raises(InputError, match="clip_skip=1 means nothing here"):
        call(pair(name)[1], clip_skip=1, generator=generator)
    assert torch.equal(generator.get_state(), state)


def test_a_projection_of_another_width_is_refused():
    ours = pair(TEXT)[1]
    config = text_encoder.RobertaSeriesConfig(**ours.text_encoder.config.to_dict() | {"project_dim": 24})
    other = text_encoder.RobertaSeriesModelWithTransformation(config)
    with pytest.raises(ConfigError, match="cross_attention_dim=32, hidden_size=24"):
        type(ours)(**ours.components | {"text_encoder": other}, requires_safety_checker=False)
