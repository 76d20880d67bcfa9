"""Self-attention guidance: pictures equal the peer's bit for bit, in its own pipeline; a value that any pipeline takes."""

from __future__ import annotations

import copy
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import diffusers
import pytest
import tiny
import torch
from tasks import align, call, difference, folder, pair, picture, set_scheduler

import suffuse
from suffuse import SelfAttentionGuidance
from suffuse.errors import InputError

sys.path.append(str(Path(__file__).parent.parent / "adapters"))
from image_weights import image_encoder, ip_adapter, nested

SIZE = {"height": 64, "width": 48}


@cache
def pipes():
    """(the peer's pipeline, ours) from one folder."""
    made = tuple(library.StableDiffusionSAGPipeline.from_pretrained(folder("text")) for library in (diffusers, suffuse))
    for pipe in made:
        pipe.set_progress_bar_config(disable=True)
    align(made[0])
    return made


def draw(pipe, **options):
    settings = {"prompt": "a cat", "num_inference_steps": 4, "output_type": "pt", "return_dict": False, **SIZE}
    return pipe(**{**settings, "generator": torch.Generator().manual_seed(7), **options})[0]


OPTIONS = {
    "plain": {},
    "no classifier-free guidance": {"guidance_scale": 1.0},
    "strong": {"sag_scale": 3.0, "guidance_scale": 3.0},
    "several": {"prompt": ["a cat", "a dog"], "num_images_per_prompt": 2, "negative_prompt": ["rain", "snow"]},
    "odd size": {"height": 88, "width": 40},
    "eta": {"eta": 1.0},
    "latents": {"output_type": "latent"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_pictures_equal_the_peers(name):
    set_scheduler(pipes(), "DDIMScheduler")
    assert difference(*(draw(pipe, **OPTIONS[name]) for pipe in pipes())) == 0


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(
    "scheduler",
    ["PNDMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"],
)
def test_with_every_scheduler_of_whole_timesteps(scheduler, prediction):
    if (scheduler, prediction) == ("PNDMScheduler", "sample"):
        pytest.skip("PNDM solves for no sample")
    set_scheduler(pipes(), scheduler, prediction_type=prediction)
    assert difference(*(draw(pipe) for pipe in pipes())) == 0


def test_no_scale_is_the_plain_pipeline():
    set_scheduler(pair("text"), "DDIMScheduler")
    ours = suffuse.StableDiffusionSAGPipeline.from_pipe(pair("text")[1])
    ours.set_progress_bar_config(disable=True)
    assert difference(draw(ours, sag_scale=0.0), draw(pair("text")[1])) == 0


def test_it_leaves_nothing_in_the_model():
    set_scheduler(pipes(), "DDIMScheduler")
    ours = pipes()[1]
    before = ours.unet.attn_processors
    draw(ours)
    assert ours.unet.attn_processors == before
    assert not any(module._forward_hooks for module in ours.unet.modules())


def test_threads_that_share_a_model_watch_each_their_own():
    set_scheduler(pipes(), "DDIMScheduler")
    ours, prompts = pipes()[1], ["a cat", "a dog", "a red fox"]
    alone = [draw(ours, prompt=prompt) for prompt in prompts]
    with ThreadPoolExecutor(3) as threads:
        together = list(threads.map(lambda prompt: draw(ours, prompt=prompt), prompts))
    assert [difference(*pair) for pair in zip(alone, together, strict=True)] == [0, 0, 0]


def test_callbacks_see_what_the_peers_see():
    set_scheduler(pipes(), "DDIMScheduler")
    seen = [[], []]
    for pipe, log in zip(pipes(), seen, strict=True):
        draw(
            pipe, callback=lambda index, timestep, latents, log=log: log.append((index, int(timestep), latents)), callback_steps=2
        )
    assert [entry[:2] for entry in seen[0]] == [entry[:2] for entry in seen[1]]
    assert all(difference(one[2], other[2]) == 0 for one, other in zip(*seen, strict=True))


@pytest.mark.parametrize("task", ["text", "image", "inpaint", "depth", "xl text", "control text", "control xl image"])
def test_any_pipeline_takes_it(task):
    set_scheduler(pair(task), "DDIMScheduler")
    pipe, few = pair(task)[1], {"num_inference_steps": 2, "num_images_per_prompt": 2}
    guided = call(pipe, task, guidance=SelfAttentionGuidance(5.0), **few)
    plain = call(pipe, task, guidance_scale=5.0, **few)
    assert difference(guided, plain) > 1e-4
    assert difference(call(pipe, task, guidance=SelfAttentionGuidance(5.0, sag_scale=0.0), **few), plain) == 0


def test_as_a_value_it_is_the_pipeline():
    set_scheduler(pair("text"), "DDIMScheduler")
    set_scheduler(pipes(), "DDIMScheduler")
    value = draw(pair("text")[1], guidance=SelfAttentionGuidance(7.5, sag_scale=0.75))
    assert difference(value, draw(pipes()[1])) == 0


def test_runs_are_kept_and_resumed(tmp_path):
    set_scheduler(pipes(), "DDIMScheduler")
    ours = pipes()[1]
    whole = draw(ours, generator=None, seed=3, save_run=str(tmp_path / "{step}.run"))
    assert difference(whole, ours(resume=tmp_path / "2.run")[0]) == 0


# ---------------------------------------------------------------- shared parts


def test_pipelines_that_share_an_ip_adapter_do_not_disturb_each_other():
    plain = suffuse.StableDiffusionPipeline.from_pretrained(folder("text"), image_encoder=image_encoder())
    plain.load_ip_adapter(ip_adapter(plain.unet), "", "")
    plain.set_ip_adapter_scale(0.6)
    guided = suffuse.StableDiffusionSAGPipeline.from_pipe(plain)
    for pipe in (plain, guided):
        pipe.set_progress_bar_config(disable=True)
    assert all(getattr(plain, name) is part for name, part in guided.components.items() if isinstance(part, torch.nn.Module))
    shown = {"ip_adapter_image": picture()}
    apart = [draw(pipe, **shown) for pipe in (plain, guided)]
    assert difference(*apart) > 1e-4
    for _ in range(2):
        assert [difference(draw(pipe, **shown), alone) for pipe, alone in zip((plain, guided), apart, strict=True)] == [0, 0]
    plain.set_ip_adapter_scale(0.1)
    other = draw(guided, **shown)
    assert difference(other, apart[1]) > 1e-4
    guided.set_ip_adapter_scale(0.6)
    assert [difference(draw(pipe, **shown), alone) for pipe, alone in zip((plain, guided), apart, strict=True)] == [0, 0]


@pytest.fixture
def shown():
    """(the peer's pipeline, ours) with an IP-Adapter."""
    weights, made = ip_adapter(pipes()[0].unet), pipes.__wrapped__()
    for pipe, given in zip(made, (nested(weights), weights), strict=True):
        pipe.register_modules(image_encoder=copy.deepcopy(image_encoder()), feature_extractor=tiny.image_processor())
        pipe.load_ip_adapter(given, "", "")
        pipe.set_ip_adapter_scale(0.6)
    align(made[0])
    set_scheduler(made, "DDIMScheduler")
    return made


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_with_an_ip_adapter_it_equals_the_peers(shown):
    assert difference(*(draw(pipe, ip_adapter_image=picture(), guidance_scale=1.0) for pipe in shown)) == 0


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_both_branches_are_shown_what_is_theirs(shown):
    # The peer shows the unconditional branch one half of the picture's tokens, and the conditional one the other.
    peer, ours = shown
    plain = suffuse.StableDiffusionPipeline.from_pipe(ours)
    plain.set_progress_bar_config(disable=True)
    theirs, mine, expected = (
        draw(p, ip_adapter_image=picture(), **sag)
        for p, sag in ((peer, {"sag_scale": 0.0}), (ours, {"sag_scale": 0.0}), (plain, {}))
    )
    assert difference(mine, expected) == 0
    assert difference(theirs, mine) > 0.01


# ---------------------------------------------------------------- what is wrong


@pytest.mark.parametrize("scheduler", ["EulerDiscreteScheduler", "LMSDiscreteScheduler", "HeunDiscreteScheduler"])
def test_timesteps_between_those_of_training_are_refused(scheduler):
    set_scheduler(pipes(), scheduler)
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    with pytest.raises(InputError, match=rf"does not work with {scheduler}(.|\n)*whole timesteps(.|\n)*DDIMScheduler"):
        draw(pipes()[1], generator=generator)
    assert torch.equal(generator.get_state(), before)


BAD = {
    "below zero": ({"sag_scale": -1.0}, "sag_scale=-1.0 is out of range"),
    "a text": ({"sag_scale": "much"}, "sag_scale must be a number"),
    "too small": ({"height": 8, "width": 8}, "too small to be blurred(.|\n)*at least 5 x 5"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_told(name):
    set_scheduler(pipes(), "DDIMScheduler")
    options, message = BAD[name]
    with pytest.raises(InputError, match=message):
        draw(pipes()[1], **options)


def test_a_model_without_attention_there_is_told():
    set_scheduler(pair("text"), "DDIMScheduler")
    with pytest.raises(InputError, match=r"no transformer block is below 'down_blocks.0'(.|\n)*mid_block.attentions.0"):
        draw(pair("text")[1], guidance=SelfAttentionGuidance(5.0, layer="down_blocks.0"))


def test_a_processor_that_shows_nothing_is_told():
    class Foreign:
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
            return hidden_states

    set_scheduler(pipes(), "DDIMScheduler")
    ours = pipes()[1]
    before = ours.unet.attn_processors
    try:
        ours.unet.set_attn_processor(Foreign())
        with pytest.raises(InputError, match=r"a processor shows nothing(.|\n)*Foreign"):
            draw(ours)
    finally:
        ours.unet.set_attn_processor(before)
