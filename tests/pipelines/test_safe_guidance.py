"""Safe Stable Diffusion: latents equal the peer's bit for bit; what the checker objects to is kept beside the pictures."""

from __future__ import annotations

import json
import warnings

import pytest
import tiny
import torch
from diffusers.pipelines.deprecated.stable_diffusion_safe import SafetyConfig as PeerConfig
from diffusers.pipelines.deprecated.stable_diffusion_safe import StableDiffusionPipelineSafe as Peer
from diffusers.pipelines.deprecated.stable_diffusion_safe.safety_checker import SafeStableDiffusionSafetyChecker as PeerChecker
from tasks import align, difference, set_scheduler

import suffuse
from suffuse.errors import InputError
from suffuse.pipelines.safe.safety_checker import SafeStableDiffusionSafetyChecker
from suffuse.pipelines.safe.stable_diffusion import SafetyConfig, StableDiffusionSafePipelineOutput


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("safe")
    plain = tiny.safety_checker()
    checker = PeerChecker(plain.config).eval()
    checker.load_state_dict(plain.state_dict())
    parts = tiny.stable_diffusion(path / "tokenizer") | {"safety_checker": checker, "feature_extractor": tiny.image_processor()}
    Peer(**parts).save_pretrained(path / "pipeline")
    return path / "pipeline"


@pytest.fixture(scope="module")
def pipes(folder):
    """(the peer's pipeline, ours) from one folder, without the checker."""
    made = []
    for kind in (Peer, suffuse.StableDiffusionPipelineSafe):
        pipe = kind.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        pipe.safety_concept = "harm, cruelty"
        made.append(pipe)
    align(made[0])
    return tuple(made)


@pytest.fixture(autouse=True)
def ddim(pipes):
    set_scheduler(pipes, "DDIMScheduler")


def draw(pipe, **options):
    """(what is returned, the latents of each step)"""
    seen = []
    settings = {
        "prompt": "a cat",
        "num_inference_steps": 5,
        "output_type": "np",
        "sld_warmup_steps": 1,
        "height": 64,
        "width": 48,
    }
    seeded = {"generator": torch.Generator().manual_seed(7), "callback": lambda index, timestep, latents: seen.append(latents)}
    return pipe(**{**settings, **seeded, **options}), seen


OPTIONS = {
    "plain": {},
    "weak": SafetyConfig.WEAK | {"sld_warmup_steps": 2},
    "strong": SafetyConfig.STRONG | {"sld_warmup_steps": 2},
    "strongest": dict(SafetyConfig.MAX),
    "never warm": {"sld_warmup_steps": 10},
    "several": {"prompt": ["a cat", "a dog"], "num_images_per_prompt": 2, "negative_prompt": ["rain", "fog"]},
}


@pytest.mark.filterwarnings("ignore:no step of 5 is told what to keep away from")
@pytest.mark.parametrize("name", OPTIONS)
def test_every_step_equals_the_peers(pipes, name):
    (theirs, steps), (mine, own) = (draw(pipe, **OPTIONS[name]) for pipe in pipes)
    assert len(steps) == len(own) == 5
    assert all(difference(*pair) == 0 for pair in zip(steps, own, strict=True))
    assert difference(theirs.images, mine.images) < 1e-5  # the peer multiplies by an inverse before it decodes
    assert theirs.applied_safety_concept == mine.applied_safety_concept == "harm, cruelty"


@pytest.mark.filterwarnings("ignore:Safety checker disabled")
@pytest.mark.parametrize("off", [{"sld_guidance_scale": 1.0}, {"guidance_scale": 1.0}])
def test_without_safety_guidance_it_warns(pipes, off):
    theirs, steps = draw(pipes[0], **off)
    with pytest.warns(UserWarning, match="nothing guides the pictures away"):
        mine, own = draw(pipes[1], **off)
    assert difference(steps[-1], own[-1]) == 0
    assert theirs.applied_safety_concept is mine.applied_safety_concept is None


@pytest.mark.parametrize("scheduler", ["PNDMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_with_other_schedulers(pipes, scheduler):
    set_scheduler(pipes, scheduler)
    (_, steps), (_, own) = (draw(pipe) for pipe in pipes)
    assert difference(steps[-1], own[-1]) == 0


def test_the_concept_is_a_value_of_the_call_too(pipes):
    ours = pipes[1]
    other, changed = draw(ours, safety_concept="a dog")[0], draw(ours)[0]
    assert difference(other.images, changed.images) > 1e-4
    assert other.applied_safety_concept == "a dog"
    assert ours.safety_concept == "harm, cruelty"
    assert "violence" in suffuse.StableDiffusionPipelineSafe.safety_concept
    assert suffuse.StableDiffusionPipelineSafe.safety_concept == " ".join(Peer(**peer_parts(pipes[0])).safety_concept.split())


def peer_parts(peer):
    return {**peer.components, "requires_safety_checker": False}


@pytest.mark.parametrize("name", ["WEAK", "MEDIUM", "STRONG", "MAX"])
def test_settings_are_those_of_the_paper(name):
    assert getattr(SafetyConfig, name) == getattr(PeerConfig, name)


# ---------------------------------------------------------------- the checker


@pytest.fixture
def checked(folder):
    pipe = suffuse.StableDiffusionPipelineSafe.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.safety_concept = "harm"
    return pipe


def test_a_checkpoint_names_its_checker(checked, tmp_path):
    # As 0.26.3 and the checkpoints of the authors do; later releases write a name that they do not read.
    assert type(checked.safety_checker) is SafeStableDiffusionSafetyChecker
    checked.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["safety_checker"] == ["stable_diffusion_safe", "SafeStableDiffusionSafetyChecker"]
    again = suffuse.StableDiffusionPipelineSafe.from_pretrained(tmp_path).safety_checker
    assert type(again) is SafeStableDiffusionSafetyChecker
    assert all(
        torch.equal(one, other) for one, other in zip(again.parameters(), checked.safety_checker.parameters(), strict=True)
    )


@pytest.mark.filterwarnings("ignore:the safety checker blanked")
@pytest.mark.parametrize("output_type", ["np", "pil", "pt"])
def test_what_the_checker_objects_to_is_kept(checked, output_type):
    options = {"prompt": ["a cat", "a dog"], "output_type": output_type}
    with torch.no_grad():
        checked.safety_checker.concept_embeds_weights.fill_(-1.0)
    made, _ = draw(checked, **options)
    with torch.no_grad():
        checked.safety_checker.concept_embeds_weights.fill_(2.0)
    clean, _ = draw(checked, **options)
    assert made.nsfw_content_detected == [True, True]
    assert clean.nsfw_content_detected == [False, False]
    assert clean.unsafe_images is None
    assert difference(made.images, clean.images * 0 if output_type != "pil" else made.images) == 0
    assert difference(made.unsafe_images, clean.images) == 0


def test_without_a_checker_nobody_says(pipes):
    made, _ = draw(pipes[1])
    assert isinstance(made, StableDiffusionSafePipelineOutput)
    assert (made.nsfw_content_detected, made.unsafe_images) == (None, None)
    images, flagged, concept, unsafe = draw(pipes[1], return_dict=False)[0]
    assert (flagged, concept, unsafe) == (None, "harm, cruelty", None)
    assert difference(images, made.images) == 0
    latents, own = draw(pipes[1], output_type="latent")
    assert difference(latents.images, own[-1]) == 0


def test_the_checker_decides_as_the_peers():
    plain = tiny.safety_checker()
    ours, peer = (kind(plain.config).eval() for kind in (SafeStableDiffusionSafetyChecker, PeerChecker))
    for checker in (ours, peer):
        checker.load_state_dict(plain.state_dict())
    pixels = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    for threshold in (-0.3, 0.0, 0.1, 0.3):
        for checker in (ours, peer):
            checker.concept_embeds_weights.data.fill_(threshold)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert ours(pixels, pixels)[1] == peer(pixels, pixels)[1]
            assert ours(pixels, pixels)[0] is pixels


# ---------------------------------------------------------------- runs, and what is wrong


def test_runs_are_kept_with_what_guidance_remembers(pipes, tmp_path):
    ours = pipes[1]
    whole, _ = draw(ours, generator=None, seed=3, save_run=str(tmp_path / "{step}.run"), sld_momentum_scale=0.9)
    ours.safety_concept = "another"
    try:
        for step in (0, 2, 4):
            assert difference(ours(resume=tmp_path / f"{step}.run").images, whole.images) == 0, step
    finally:
        ours.safety_concept = "harm, cruelty"


def test_encoded_prompts_are_taken(pipes):
    ours = pipes[1]
    cond, uncond = ours.encode_prompt("a cat", torch.device("cpu"), 1, True)
    made, _ = draw(ours, prompt=None, prompt_embeds=cond, negative_prompt_embeds=uncond)
    assert difference(made.images, draw(ours)[0].images) == 0
    alone = suffuse.StableDiffusionPipelineSafe.from_pipe(ours, text_encoder=None, tokenizer=None)
    with pytest.raises(InputError, match="this pipeline has no text encoder"):
        draw(alone, prompt=None, prompt_embeds=cond, negative_prompt_embeds=uncond)


BAD = {
    "a threshold above 1": ({"sld_threshold": 1.5}, r"sld_threshold=1.5 is out of range(.|\n)*\[0, 1\]"),
    "a momentum below 0": ({"sld_momentum_scale": -0.1}, "sld_momentum_scale=-0.1 is out of range"),
    "beta": ({"sld_mom_beta": 2}, "sld_mom_beta=2 is out of range"),
    "a scale below 0": ({"sld_guidance_scale": -5}, "sld_guidance_scale=-5 is out of range"),
    "steps that are no number": ({"sld_warmup_steps": "3"}, "sld_warmup_steps must be a whole number"),
    "a concept that is no text": ({"safety_concept": 3}, "safety_concept has the wrong type"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_told_and_spends_nothing(pipes, name):
    options, message = BAD[name]
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    with pytest.raises(InputError, match=message):
        draw(pipes[1], generator=generator, **options)
    assert torch.equal(generator.get_state(), before)
