"""What a call tells the outside while it runs, and what the outside may change."""

from __future__ import annotations

import warnings

import pytest
import torch
from tasks import call, difference, pair, set_scheduler

SCHEDULERS = ["DDIMScheduler", "HeunDiscreteScheduler", "PNDMScheduler"]


@pytest.fixture(autouse=True)
def quiet_peer():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="diffusers.*")
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


def both(task, scheduler, make_options):
    """Results and recordings of the peer and of ours."""
    pipes, made = pair(task), []
    set_scheduler(pipes, scheduler)
    for pipe in pipes:
        record: list = []
        made.append((call(pipe, task, **make_options(record)), record))
    return made


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_callback_sees_what_the_peers_sees(scheduler):
    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]

    def options(record):
        def look(pipe, index, timestep, tensors):
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            record.append(
                (index, int(timestep), shapes, tensors["latents"].sum().item(), pipe.guidance_scale, pipe.num_timesteps)
            )
            return tensors

        return {"callback_on_step_end": look, "callback_on_step_end_tensor_inputs": names}

    (peer, seen_by_peer), (ours, seen) = both("text", scheduler, options)
    assert seen == seen_by_peer
    assert difference(peer, ours) == 0


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_callback_may_cut_guidance_on_the_way(scheduler):
    def options(record):
        def cut(pipe, index, timestep, tensors):
            if index == 1:
                pipe._guidance_scale = 0.0
                tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
            return tensors

        return {"callback_on_step_end": cut, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}

    (peer, _), (ours, _) = both("text", scheduler, options)
    assert difference(peer, ours) == 0


def test_the_callback_may_raise_guidance_and_replace_latents_and_masks():
    def options(record):
        def change(pipe, index, timestep, tensors):
            pipe._guidance_scale += 1
            return {"latents": tensors["latents"] * 0.9, "mask": tensors["mask"] * 0.5}

        return {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": ["latents", "mask"]}

    (peer, _), (ours, _) = both("inpaint9", "DDIMScheduler", options)
    assert difference(peer, ours) == 0


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_interrupting_ends_after_the_step(scheduler):
    def options(record):
        def stop(pipe, index, timestep, tensors):
            record.append(index)
            pipe._interrupt = index == 1
            return tensors

        return {"callback_on_step_end": stop}

    (peer, peer_steps), (ours, steps) = both("text", scheduler, options)
    assert steps == peer_steps == [0, 1]
    assert difference(peer, ours) == 0


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_older_callback_counts_as_it_did(scheduler, every):
    def options(record):
        def look(step, timestep, latents):
            record.append((step, int(timestep), latents.sum().item()))

        return {"callback": look, "callback_steps": every, "num_inference_steps": 5}

    (_, seen_by_peer), (_, seen) = both("image", scheduler, options)
    assert seen == seen_by_peer


def test_a_callback_that_returns_nothing_changes_nothing():
    _, ours = pair("text")
    assert difference(call(ours, "text", callback_on_step_end=lambda *_: None), call(ours, "text")) == 0


def test_a_callback_that_raises_leaves_the_pipeline_as_it_was():
    _, ours = pair("text")
    before = call(ours, "text")

    def fail(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call(ours, "text", callback_on_step_end=fail)
    assert difference(call(ours, "text"), before) == 0


def test_a_run_inside_a_callback_of_another_does_not_disturb_it():
    _, ours = pair("text")
    set_scheduler(pair("text"), "DPMSolverMultistepScheduler")
    expected = call(ours, "text")

    def nested(pipe, index, timestep, tensors):
        if index == 1:
            assert difference(call(pipe, "text", num_inference_steps=3), call(pipe, "text", num_inference_steps=3)) == 0

    assert difference(call(ours, "text", callback_on_step_end=nested), expected) == 0


def test_the_progress_bar_shows_every_inference_step_once(monkeypatch):
    _, ours = pair("text")
    set_scheduler(pair("text"), "HeunDiscreteScheduler")
    bars = []
    original = ours.progress_bar
    monkeypatch.setattr(type(ours), "progress_bar", lambda self, **kwargs: bars.append(original(**kwargs)) or bars[-1])
    ours.set_progress_bar_config(disable=False)
    updates = []
    monkeypatch.setattr("tqdm.std.tqdm.update", lambda self, n=1: updates.append(n))
    call(ours, "text")
    ours.set_progress_bar_config(disable=True)
    assert bars[0].total == 4
    assert sum(updates) == 4


def test_the_last_run_of_a_thread_is_told():
    _, ours = pair("text")
    set_scheduler(pair("text"), "DDIMScheduler")
    call(ours, "text", guidance_scale=3.0, guidance_rescale=0.2, num_inference_steps=5)
    assert (ours.guidance_scale, ours.guidance_rescale, ours.num_timesteps) == (3.0, 0.2, 5)
    assert ours.do_classifier_free_guidance
    assert torch.equal(ours.scheduler.timesteps, torch.tensor([801, 601, 401, 201, 1]))
