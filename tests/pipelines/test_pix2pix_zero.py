"""Pix2Pix Zero: inversions and edited pictures equal the peer's, bit for bit."""

from __future__ import annotations

import warnings

import diffusers
import pytest
import tiny
import torch
from diffusers.pipelines.deprecated.stable_diffusion_variants.pipeline_stable_diffusion_pix2pix_zero import (
    StableDiffusionPix2PixZeroPipeline as Peer,
)
from tasks import align, difference, picture, set_scheduler
from transformers import BlipConfig, BlipForConditionalGeneration, BlipImageProcessorPil, BlipProcessor

import suffuse
from suffuse.errors import InputError, UnknownArgumentError


def caption_processor(folder) -> BlipProcessor:
    return BlipProcessor(BlipImageProcessorPil(size={"height": 32, "width": 32}), tiny.bert_tokenizer(folder))


def caption_generator() -> BlipForConditionalGeneration:
    torch.manual_seed(31)
    sizes = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4, "projection_dim": 32}
    ends = {"bos_token_id": 2, "sep_token_id": 3, "eos_token_id": 3, "pad_token_id": 0}
    text = {**sizes, **ends, "vocab_size": 89, "encoder_hidden_size": 32}
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    return BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision, projection_dim=32)).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("zero")
    captions = {"caption_generator": caption_generator(), "caption_processor": caption_processor(path / "words")}
    inverse = diffusers.DDIMInverseScheduler.from_config(tiny.scheduler().config)
    parts = tiny.stable_diffusion(path / "tokenizer") | captions | {"inverse_scheduler": inverse}
    Peer(**parts, requires_safety_checker=False).save_pretrained(path / "pipeline")
    return path / "pipeline"


def load(folder):
    """(the peer's pipeline, ours): the peer changes its UNet, so each test has its own."""
    made = tuple(kind.from_pretrained(folder) for kind in (Peer, suffuse.StableDiffusionPix2PixZeroPipeline))
    for pipe in made:
        pipe.set_progress_bar_config(disable=True)
    align(made[0])
    return made


@pytest.fixture(scope="module")
def pipes(folder):
    return load(folder)


@pytest.fixture(autouse=True)
def ddim(pipes):
    set_scheduler(pipes, "DDIMScheduler")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


def states(seed: int, count: int = 1):
    return torch.randn(count, 77, 32, generator=torch.Generator().manual_seed(seed))


def draw(pipe, **options):
    settings = {"prompt": "a cat", "num_inference_steps": 4, "output_type": "pt", "return_dict": False}
    words = {"source_embeds": states(1, 2), "target_embeds": states(2, 3)}
    seeded = {"height": 64, "width": 48, "generator": torch.Generator().manual_seed(7)}
    return pipe(**{**settings, **words, **seeded, **options})[0]


def invert(pipe, **options):
    settings = {"prompt": "a cat", "image": picture(64, 48), "num_inference_steps": 4, "output_type": "pt", "num_reg_steps": 2}
    return pipe.invert(**{**settings, "generator": torch.Generator().manual_seed(7), **options})


OPTIONS = {
    "plain": {},
    "far": {"cross_attention_guidance_amount": 1.0},
    "not at all": {"cross_attention_guidance_amount": 0.0},
    "eta": {"eta": 1.0},
    "negative": {"negative_prompt": "rain"},
    "latents": {"output_type": "latent"},
    "given noise": {"latents": torch.randn(1, 4, 32, 24, generator=torch.Generator().manual_seed(5))},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_pictures_equal_the_peers(pipes, name):
    assert difference(*(draw(pipe, **OPTIONS[name]) for pipe in pipes)) == 0


@pytest.mark.parametrize("scheduler", ["DDPMScheduler", "DPMSolverMultistepScheduler"])
def test_with_other_schedulers(pipes, scheduler):
    set_scheduler(pipes, scheduler)
    assert difference(*(draw(pipe) for pipe in pipes)) == 0


@pytest.mark.parametrize("scheduler", ["EulerAncestralDiscreteScheduler", "LMSDiscreteScheduler", "PNDMScheduler"])
def test_with_schedulers_that_the_peer_gets_wrong(pipes, scheduler):
    # It takes scaled latents for latents, and pops what it kept of a timestep that comes twice.
    set_scheduler(pipes, scheduler)
    made = draw(pipes[1], output_type="latent", cross_attention_guidance_amount=0.0)
    plain = suffuse.StableDiffusionPipeline.from_pipe(pipes[1], image_encoder=None)
    plain.set_progress_bar_config(disable=True)
    same = {"source_embeds": states(1), "target_embeds": states(1)}
    unmoved = draw(pipes[1], output_type="latent", cross_attention_guidance_amount=0.0, **same)
    assert difference(made, unmoved) > 1e-3
    if scheduler != "EulerAncestralDiscreteScheduler":  # its noise is drawn in two runs here
        seeded = {"generator": torch.Generator().manual_seed(7), "height": 64, "width": 48, "num_inference_steps": 4}
        expected = plain("a cat", output_type="latent", return_dict=False, **seeded)[0]
        assert difference(unmoved, expected) < 1e-4 * expected.abs().max()


def test_several_pictures_are_each_edited(pipes):
    # The peer edits what the second picture should not show.
    ours, two = pipes[1], torch.randn(2, 4, 32, 24, generator=torch.Generator().manual_seed(5))
    together = draw(ours, num_images_per_prompt=2, latents=two, output_type="latent")
    apart = [draw(ours, latents=one[None], output_type="latent") for one in two]
    assert difference(together, torch.cat(apart)) < 0.01


def test_without_guidance_the_prompt_is_edited_too(pipes):
    # The peer edits nothing there.
    ours = pipes[1]
    same = {"source_embeds": states(1), "target_embeds": states(1)}
    assert difference(draw(ours, guidance_scale=1.0), draw(ours, guidance_scale=1.0, **same)) > 1e-3


INVERSIONS = {
    "plain": ({}, 1e-4),
    "guided": ({"guidance_scale": 3.0}, 1e-4),
    "not moved": ({"num_reg_steps": 0}, 0),
    "against correlation alone": ({"lambda_kl": 0.0}, 0),
    "against divergence alone": ({"lambda_auto_corr": 0.0}, 1e-4),
}
"""What is asked for, and how far from the peer: it takes the variance once here, and twice in DiffEdit."""


@pytest.mark.parametrize("name", INVERSIONS)
def test_inversions_equal_the_peers(pipes, name):
    options, limit = INVERSIONS[name]
    theirs, mine = (invert(pipe, **options) for pipe in pipes)
    assert difference(theirs.latents, mine.latents) <= limit
    assert difference(theirs.images, mine.images) <= limit


def test_an_inverted_picture_is_edited(pipes):
    made = [
        draw(
            pipe,
            latents=invert(pipe, lambda_kl=0.0).latents,
            source_embeds=pipe.get_embeds(["a cat", "cats"]),
            target_embeds=pipe.get_embeds(["a dog"]),
        )
        for pipe in pipes
    ]
    assert difference(*made) == 0


@pytest.mark.parametrize("size", [1, 2, 16])
def test_embeddings_equal_the_peers(pipes, size):
    assert difference(*(pipe.get_embeds(["a cat", "cats", "my cat"], size) for pipe in pipes)) == 0


def test_it_leaves_nothing_in_the_model(folder):
    ours = load(folder)[1]
    before = ours.unet.attn_processors
    draw(ours)
    invert(ours)
    assert ours.unet.attn_processors == before
    assert all(parameter.grad is None and parameter.requires_grad for parameter in ours.unet.parameters())


def test_callbacks_see_the_picture_that_is_returned(pipes):
    seen = []
    made = draw(pipes[1], callback=lambda index, timestep, latents: seen.append(latents), output_type="latent")
    assert len(seen) == 4
    assert difference(seen[-1], made) == 0


@pytest.mark.parametrize("noise", ["generator", "seed"])
def test_runs_are_kept_and_resumed(pipes, tmp_path, noise):
    ours = pipes[1]
    source = {"generator": torch.Generator().manual_seed(3)} if noise == "generator" else {"generator": None, "seed": 3}
    whole = draw(ours, **source, eta=1.0, save_run=str(tmp_path / "{step}.run"))
    for step in (0, 2):
        assert difference(ours(resume=tmp_path / f"{step}.run")[0], whole) == 0, step


def test_captions_equal_the_peers(pipes):
    theirs, mine = (pipe.generate_caption(picture()) for pipe in pipes)
    assert theirs == mine
    assert mine.startswith("a photography of")
    alone = suffuse.StableDiffusionPix2PixZeroPipeline.from_pipe(pipes[1], caption_generator=None)
    with pytest.raises(InputError, match="no caption_generator and caption_processor"):
        alone.generate_caption(picture())


BAD = {
    "no source": ({"source_embeds": None}, r"source_embeds is missing(.|\n)*get_embeds"),
    "no target": ({"target_embeds": None}, "target_embeds is missing"),
    "of another width": ({"source_embeds": torch.zeros(1, 77, 8)}, r"source_embeds has the wrong shape(.|\n)*\(1, 77, 32\)"),
    "of another length": ({"target_embeds": torch.zeros(2, 7, 32)}, r"target_embeds has the wrong shape(.|\n)*\(2, 77, 32\)"),
    "an amount below 0": ({"cross_attention_guidance_amount": -1}, "cross_attention_guidance_amount=-1 is out of range"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_told_and_spends_nothing(pipes, name):
    options, message = BAD[name]
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    with pytest.raises(InputError, match=message):
        draw(pipes[1], generator=generator, **options)
    assert torch.equal(generator.get_state(), before)


BAD_INVERSIONS = {
    "no picture": ({"image": None}, "image is missing"),
    "no prompt": ({"prompt": None}, "prompt and prompt_embeds are both missing"),
    "moves below 0": ({"num_reg_steps": -1}, "num_reg_steps=-1 is out of range"),
    "a number below 0": ({"lambda_kl": -1.0}, "lambda_kl=-1.0 is out of range"),
}


@pytest.mark.parametrize("name", BAD_INVERSIONS)
def test_inversions_that_cannot_be_are_told(pipes, name):
    options, message = BAD_INVERSIONS[name]
    with pytest.raises(InputError, match=message):
        invert(pipes[1], **options)


def test_its_guidance_is_its_own(pipes):
    with pytest.raises(UnknownArgumentError, match="guidance"):
        draw(pipes[1], guidance=suffuse.ClassifierFreeGuidance(5.0))


def test_what_is_missing_is_told(folder):
    ours = suffuse.StableDiffusionPix2PixZeroPipeline.from_pretrained(folder, inverse_scheduler=None)
    with pytest.raises(InputError, match="no inverse_scheduler"):
        invert(ours)
    with pytest.raises(InputError, match="a list of texts"):
        ours.get_embeds("a cat")
    ours.text_encoder = None
    with pytest.raises(InputError, match="no text encoder"):
        ours.get_embeds(["a cat"])
