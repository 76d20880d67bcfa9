"""Attend-and-Excite: pictures equal the peer's bit for bit, and each word is attended to."""

from __future__ import annotations

import warnings

import pytest
import tiny
import torch
from diffusers.pipelines.deprecated.stable_diffusion_attend_and_excite import StableDiffusionAttendAndExcitePipeline as Peer
from tasks import align, difference, picture, set_scheduler

import suffuse
from suffuse.diffusion.attend_and_excite import AttendAndExcite, attention_sizes
from suffuse.diffusion.conditioning import Conditioning, Denoiser
from suffuse.diffusion.loop import Step
from suffuse.errors import InputError


@pytest.fixture(scope="module")
def pipes(tmp_path_factory):
    """(the peer's pipeline, ours) from one folder."""
    path = tmp_path_factory.mktemp("excite")
    Peer(**tiny.stable_diffusion(path / "tokenizer"), requires_safety_checker=False).save_pretrained(path / "pipeline")
    made = tuple(kind.from_pretrained(path / "pipeline") for kind in (Peer, suffuse.StableDiffusionAttendAndExcitePipeline))
    for pipe in made:
        pipe.set_progress_bar_config(disable=True)
    align(made[0])
    return made


@pytest.fixture(autouse=True)
def ddim(pipes):
    set_scheduler(pipes, "DDIMScheduler")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.meshgrid")
        yield


def draw(pipe, **options):
    settings = {"prompt": "a cat", "token_indices": [2, 4], "num_inference_steps": 4, "output_type": "pt", "return_dict": False}
    few = {"max_iter_to_alter": 2, "thresholds": {0: 0.02, 1: 0.5}, "attn_res": (16, 12)}
    seeded = {"height": 64, "width": 48, "generator": torch.Generator().manual_seed(7)}
    return pipe(**{**settings, **few, **seeded, **options})[0]


OPTIONS = {
    "plain": {},
    "never moved": {"max_iter_to_alter": 0, "thresholds": {}},
    "moved once": {"max_iter_to_alter": 1, "thresholds": {}},
    "refined later": {"max_iter_to_alter": 0, "thresholds": {2: 0.3}},
    "high thresholds": {"thresholds": {0: 0.9, 1: 1.0}},
    "far": {"scale_factor": 200},
    "one word": {"token_indices": [1]},
    "a list of a list": {"token_indices": [[2, 3]]},
    "no guidance": {"guidance_scale": 1.0},
    "square": {"height": 64, "width": 64, "attn_res": (16, 16)},
    "latents": {"output_type": "latent"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_pictures_equal_the_peers(pipes, name):
    assert difference(*(draw(pipe, **OPTIONS[name]) for pipe in pipes)) == 0


def test_several_pictures_are_moved_together(pipes):
    # The peer moves one after another; one batch rounds differently.
    several = {"prompt": ["a cat", "a dog"], "token_indices": [[2], [1, 3]], "num_images_per_prompt": 2}
    moved = {"max_iter_to_alter": 2, "thresholds": {0: 0.02}, "output_type": "latent"}
    theirs, mine = (draw(pipe, **several, **moved) for pipe in pipes)
    assert difference(theirs, mine) < 1e-4


@pytest.mark.parametrize("scheduler", ["PNDMScheduler", "DPMSolverMultistepScheduler"])
def test_with_other_schedulers(pipes, scheduler):
    set_scheduler(pipes, scheduler)
    assert difference(*(draw(pipe) for pipe in pipes)) == 0


def test_where_latents_are_scaled_for_the_model_words_are_looked_for_as_the_model_sees(pipes):
    # The peer shows the model unscaled latents there.
    set_scheduler(pipes, "EulerDiscreteScheduler")
    theirs, mine = (draw(pipe, output_type="latent") for pipe in pipes)
    assert difference(theirs, mine) > 1e-3
    assert bool(mine.isfinite().all())


def test_words_are_attended_to_more(pipes):
    ours, step = pipes[1], Step(torch.randn(2, 4, 32, 24, generator=torch.Generator().manual_seed(1)), 4)
    states = ours.encode_prompt(["a cat", "a dog"], torch.device("cpu"), 1, False)[0]
    ours.scheduler.set_timesteps(4)
    step.timestep = ours.scheduler.timesteps[0]
    denoiser = Denoiser(ours.unet, ours.scheduler, Conditioning(2, ("cond",), {"prompt_embeds": states}))
    excite = AttendAndExcite(denoiser, [[2, 4], [3]], (16, 12), [20.0] * 4, moved=1, thresholds={})
    with torch.no_grad():
        before = excite.losses(step, step.latents)
        excite.before(step)
        assert bool((excite.losses(step, step.latents) < before).all())


def test_it_leaves_nothing_in_the_model(pipes):
    ours = pipes[1]
    before = ours.unet.attn_processors
    draw(ours)
    assert ours.unet.attn_processors == before
    assert all(parameter.grad is None for parameter in ours.unet.parameters())


def test_positions_are_those_of_the_peer(pipes):
    theirs, mine = (pipe.get_indices("a cat, red") for pipe in pipes)
    assert theirs == mine
    assert mine[1].startswith("a")


def test_runs_are_kept_and_resumed(pipes, tmp_path):
    ours = pipes[1]
    whole = draw(ours, generator=None, seed=3, save_run=str(tmp_path / "{step}.run"))
    for step in (0, 1, 3):
        assert difference(ours(resume=tmp_path / f"{step}.run")[0], whole) == 0, step


def test_the_size_is_told_by_the_latents(pipes):
    ours = pipes[1]
    assert attention_sizes(ours.unet, 32, 24) == [(16, 12)]
    with pytest.raises(InputError, match=r"attn_res=\(8, 6\)(.|\n)*\(16, 12\)"):
        draw(ours, attn_res=None)


def test_control_composes(pipes):
    from tasks import pair

    net = pair("control text")[1].controlnet
    with_net = draw(pipes[1], controlnet=net, control_image=picture(64, 48, seed=3))
    assert difference(with_net, draw(pipes[1])) > 1e-3


BAD = {
    "the first token": ({"token_indices": [0]}, "token_indices=0 is out of range|out of range"),
    "beyond the prompt": ({"token_indices": [2, 40]}, r"token_indices: 40 is the position of no word(.|\n)*get_indices"),
    "no word": ({"token_indices": []}, "token_indices names no word"),
    "a word by name": ({"token_indices": ["cat"]}, r"token_indices\[0\] must be a whole number"),
    "lists for other prompts": ({"token_indices": [[1], [2]]}, "token_indices: 2 lists for 1 prompts"),
    "a threshold above 1": ({"thresholds": {0: 1.5}}, r"thresholds\[0\]=1.5 is out of range(.|\n)*\[0, 1\]"),
    "a step that is none": ({"thresholds": {"first": 0.5}}, "a step of thresholds must be a whole number"),
    "thresholds in a list": ({"thresholds": [0.5]}, "thresholds has the wrong type"),
    "moves below 0": ({"max_iter_to_alter": -1}, "max_iter_to_alter=-1 is out of range"),
    "a length below 0": ({"scale_factor": -1}, "scale_factor=-1 is out of range"),
    "a size no layer has": ({"attn_res": (32, 24)}, r"attn_res=\(32, 24\): no feature map(.|\n)*\(16, 12\)"),
    "a size that is one number": ({"attn_res": 16}, "attn_res must be two whole numbers"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_told_and_spends_nothing(pipes, name):
    options, message = BAD[name]
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    with pytest.raises(InputError, match=message):
        draw(pipes[1], generator=generator, **options)
    assert torch.equal(generator.get_state(), before)


def test_positions_among_embeddings(pipes):
    ours = pipes[1]
    cond, uncond = ours.encode_prompt("a cat", torch.device("cpu"), 1, True)
    embeds = {"prompt": None, "prompt_embeds": cond, "negative_prompt_embeds": uncond}
    assert difference(draw(ours, **embeds), draw(ours)) == 0
    with pytest.raises(InputError, match=r"76 is the position of no word(.|\n)*1 to 75"):
        draw(ours, **embeds, token_indices=[76])
