"""Semantic guidance: pictures that are edited by concepts equal the peer's, bit for bit."""

from __future__ import annotations

import pytest
import tiny
import torch
from diffusers.pipelines.deprecated.semantic_stable_diffusion import SemanticStableDiffusionPipeline as Peer
from tasks import align, difference, picture, set_scheduler

import suffuse
from suffuse.diffusion.semantic_guidance import Concept, SemanticGuidance
from suffuse.errors import InputError
from suffuse.pipelines.semantic import SemanticStableDiffusionPipelineOutput


@pytest.fixture(scope="module")
def pipes(tmp_path_factory):
    """(the peer's pipeline, ours) from one folder."""
    path = tmp_path_factory.mktemp("semantic")
    Peer(**tiny.stable_diffusion(path / "tokenizer"), requires_safety_checker=False).save_pretrained(path / "pipeline")
    made = tuple(kind.from_pretrained(path / "pipeline") for kind in (Peer, suffuse.SemanticStableDiffusionPipeline))
    for pipe in made:
        pipe.set_progress_bar_config(disable=True)
    align(made[0])
    return made


@pytest.fixture(autouse=True)
def ddim(pipes):
    set_scheduler(pipes, "DDIMScheduler")


def draw(pipe, **options):
    settings = {"prompt": "a cat", "num_inference_steps": 5, "output_type": "pt", "return_dict": False}
    seeded = {"height": 64, "width": 48, "generator": torch.Generator().manual_seed(7)}
    return pipe(**{**settings, **seeded, **options})[0]


TWO = {"editing_prompt": ["a hat", "snow"], "edit_warmup_steps": [1, 3]}
OPTIONS = {
    "no edit": {},
    "one": {"editing_prompt": "a hat", "edit_warmup_steps": 2},
    "at once": {"editing_prompt": ["a hat"], "edit_warmup_steps": 0, "edit_threshold": 0.5},
    "two, one after another": TWO,
    "away": {**TWO, "reverse_editing_direction": [True, False], "edit_guidance_scale": [8.0, 3.0]},
    "for a while": {**TWO, "edit_cooldown_steps": [4, 9], "edit_warmup_steps": 1},
    "weighed": {**TWO, "edit_weights": [0.7, 1.6], "edit_warmup_steps": 0},
    "one weighs nothing": {**TWO, "edit_weights": [1.0, -2.0]},
    "momentum": {**TWO, "edit_momentum_scale": 0.8, "edit_mom_beta": 0.9},
    "five": {"editing_prompt": [*"abcde"], "edit_warmup_steps": [0, 1, 2, 3, 4], "edit_weights": [0.1, 0.2, 0.3, 0.4, 0.5]},
    "several pictures": {**TWO, "prompt": ["a cat", "a dog"], "num_images_per_prompt": 2, "negative_prompt": ["rain", "fog"]},
    "no guidance": {"guidance_scale": 1.0},
    "latents": {**TWO, "output_type": "latent"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_pictures_equal_the_peers(pipes, name):
    assert difference(*(draw(pipe, **OPTIONS[name]) for pipe in pipes)) == 0


@pytest.mark.parametrize("scheduler", ["PNDMScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_with_other_schedulers(pipes, scheduler):
    # The peer keeps no more edits than there are inference steps.
    set_scheduler(pipes, scheduler, **({"skip_prk_steps": True} if scheduler == "PNDMScheduler" else {}))
    assert difference(*(draw(pipe, **TWO) for pipe in pipes)) == 0


def test_embeddings_of_concepts(pipes):
    states = torch.randn(2, 77, 32, generator=torch.Generator().manual_seed(2))
    given = {"editing_prompt_embeddings": states, "edit_warmup_steps": 0}
    assert difference(*(draw(pipe, **given) for pipe in pipes)) == 0


def test_of_several_prompts_each_is_told_every_concept(pipes):
    # Of two prompts and two embeddings, the peer tells each prompt one of them twice.
    ours, several = pipes[1], {"prompt": ["a cat", "a dog"]}
    read = ours.encode_prompt(["a hat", "snow"], torch.device("cpu"), 1, False)[0]
    by_text, by_embedding = (
        draw(ours, **several, **TWO | how) for how in ({}, {"editing_prompt": None, "editing_prompt_embeddings": read})
    )
    assert difference(by_text, by_embedding) < 1e-5
    assert (
        difference(draw(pipes[0], **several, **TWO | {"editing_prompt": None, "editing_prompt_embeddings": read}), by_text) > 0.01
    )


def test_edits_are_replayed(pipes):
    ours = pipes[1]
    edited = [draw(pipe, **TWO) for pipe in pipes]
    applied = [pipe.sem_guidance for pipe in pipes]
    assert applied[1].shape == (6, 1, 4, 32, 24)
    assert difference(*edited) == difference(*applied) == 0
    replayed = [draw(pipe, sem_guidance=[*edits]) for pipe, edits in zip(pipes, applied, strict=True)]
    assert difference(*replayed) == 0
    assert difference(replayed[1], draw(ours, sem_guidance=applied[1])) == 0
    assert difference(replayed[1], edited[1]) < 1e-4
    assert difference(*(draw(pipe, sem_guidance=[*applied[0]], **TWO) for pipe in pipes)) == 0


def test_a_concept_that_has_ended_before_others_begin_is_no_nan(pipes):
    # The peer divides zero by zero there.
    ended = {"editing_prompt": ["a hat", "snow"], "edit_warmup_steps": [0, 4], "edit_cooldown_steps": [1, 9]}
    peer, ours = (draw(pipe, output_type="latent", **ended) for pipe in pipes)
    assert bool(peer.isnan().any())
    assert bool(ours.isfinite().all())


def test_callbacks_see_what_the_peers_see(pipes):
    seen = [[], []]
    for pipe, log in zip(pipes, seen, strict=True):
        draw(pipe, callback=lambda index, timestep, latents, log=log: log.append((index, int(timestep), latents)), **TWO)
    assert [entry[:2] for entry in seen[0]] == [entry[:2] for entry in seen[1]]
    assert all(difference(one[2], other[2]) == 0 for one, other in zip(*seen, strict=True))


def test_the_result_has_a_name(pipes):
    made = pipes[1]("a cat", num_inference_steps=1, output_type="np", height=64, width=64)
    assert isinstance(made, SemanticStableDiffusionPipelineOutput)
    assert made.images.shape == (1, 64, 64, 3)


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_runs_are_kept_with_what_guidance_remembers(pipes, tmp_path, scheduler):
    set_scheduler(pipes, scheduler)
    ours = pipes[1]
    whole = draw(ours, **TWO, generator=None, seed=3, edit_momentum_scale=0.8, save_run=str(tmp_path / "{step}.run"))
    edits = ours.sem_guidance
    for step in (0, 2, 4):
        assert difference(ours(resume=tmp_path / f"{step}.run")[0], whole) == 0, step
        assert difference(ours.sem_guidance, edits) == 0, step


def test_calls_do_not_remember_each_other(pipes):
    ours = pipes[1]
    first, second = (draw(ours, **TWO, edit_momentum_scale=0.8) for _ in range(2))
    assert difference(first, second) == 0


def test_any_pipeline_takes_it_as_a_value_without_concepts(pipes):
    plain = suffuse.StableDiffusionPipeline.from_pipe(pipes[1], image_encoder=None)
    plain.set_progress_bar_config(disable=True)
    assert difference(draw(plain, guidance=SemanticGuidance(7.5)), draw(plain)) == 0


def test_pictures_to_take_after_and_control_compose(pipes):
    from tasks import pair

    net = pair("control text")[1].controlnet
    with_net = draw(pipes[1], **TWO, controlnet=net, control_image=picture(64, 48, seed=3))
    assert difference(with_net, draw(pipes[1], **TWO)) > 1e-3


BAD = {
    "scales of another number": ({**TWO, "edit_guidance_scale": [1.0]}, "edit_guidance_scale: 1 given for 2 editing prompts"),
    "weights of another number": ({**TWO, "edit_weights": [1.0] * 3}, "edit_weights: 3 given for 2 editing prompts"),
    "directions of another number": (
        {"editing_prompt": "a", "reverse_editing_direction": [True, True]},
        "2 given for 1 editing prompt",
    ),
    "a threshold above 1": ({**TWO, "edit_threshold": 1.2}, r"edit_threshold=1.2 is out of range(.|\n)*\[0, 1\]"),
    "a threshold below 0": ({**TWO, "edit_threshold": [0.5, -0.1]}, r"edit_threshold\[1\]=-0.1 is out of range"),
    "steps that are no number": ({**TWO, "edit_warmup_steps": 1.5}, "edit_warmup_steps must be a whole number"),
    "steps below 0": ({**TWO, "edit_cooldown_steps": -1}, "edit_cooldown_steps=-1 is out of range"),
    "a direction that is none": ({**TWO, "reverse_editing_direction": "yes"}, "reverse_editing_direction has the wrong type"),
    "beta": ({**TWO, "edit_mom_beta": 2.0}, "edit_mom_beta=2.0 is out of range"),
    "text and embeddings": ({**TWO, "editing_prompt_embeddings": torch.zeros(2, 77, 32)}, "are both given"),
    "no text": ({"editing_prompt": [3]}, r"editing_prompt\[0\] is no text"),
    "embeddings that fit no prompt": (
        {"editing_prompt_embeddings": torch.zeros(2, 50, 32)},
        r"edit_0 is told has the wrong shape(.|\n)*\(1, 50, 32\)(.|\n)*\(1, 77, 32\)",
    ),
    "edits without guidance": ({**TWO, "guidance_scale": 1.0}, "guidance_scale=1.0 guides nothing"),
    "replayed without guidance": ({"sem_guidance": torch.zeros(5, 1, 4, 32, 24), "guidance_scale": 1.0}, "guides nothing"),
    "too few to replay": ({"sem_guidance": torch.zeros(3, 1, 4, 32, 24)}, "sem_guidance: 3 edits for 5 steps"),
    "replayed of another size": (
        {"sem_guidance": [torch.zeros(1, 4, 32, 32)] * 5},
        r"sem_guidance\[0\] has the wrong shape(.|\n)*\(1, 4, 32, 24\)",
    ),
    "replayed that is no tensor": ({"sem_guidance": [1, 2]}, r"sem_guidance\[0\] has the wrong type"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_told_and_spends_nothing(pipes, name):
    options, message = BAD[name]
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    with pytest.raises(InputError, match=message):
        draw(pipes[1], generator=generator, **options)
    assert torch.equal(generator.get_state(), before)


def test_concepts_that_cancel_say_nothing():
    toward, away = Concept("a hat", threshold=0.0), Concept("a hat", reverse=True, threshold=0.0)
    one, other = torch.randn(2, 1, 4, 8, 8)
    assert difference(toward.direction(one, other), -away.direction(one, other)) == 0
