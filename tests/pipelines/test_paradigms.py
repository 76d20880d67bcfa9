"""ParaDiGMS: equal to the peer bit for bit; with no tolerance, what one step after another gives."""

from __future__ import annotations

import copy
import sys
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import diffusers
import pytest
import tiny
import torch
from tasks import align, difference, pair, picture, set_scheduler
from values import EVERY, GUIDANCE, adapted, controlled, controlnet

import suffuse
from suffuse.diffusion.guidance import ClassifierFreeGuidance
from suffuse.errors import SuffuseError

sys.path.append(str(Path(__file__).parent.parent / "adapters"))
from image_weights import image_encoder, ip_adapter

SIZE = {"height": 64, "width": 48}
SCHEDULERS = ["DDIMParallelScheduler", "DDPMParallelScheduler"]


@cache
def pipes():
    """(the peer's pipeline, ours) from one folder."""
    path = Path(mkdtemp(prefix="suffuse-"))
    parts = tiny.stable_diffusion(path / "tokenizer")
    parts["scheduler"] = diffusers.DDIMParallelScheduler.from_config(parts["scheduler"].config)
    diffusers.StableDiffusionParadigmsPipeline(**parts, requires_safety_checker=False).save_pretrained(path / "pipeline")
    made = tuple(library.StableDiffusionParadigmsPipeline.from_pretrained(path / "pipeline") for library in (diffusers, suffuse))
    for pipe in made:
        pipe.set_progress_bar_config(disable=True)
    align(made[0])
    return made


def draw(pipe, **options):
    told = {"prompt": "a cat", "num_inference_steps": 8, "parallel": 4, "output_type": "pt", "return_dict": False, **SIZE}
    return pipe(**{**told, "generator": torch.Generator().manual_seed(7), **options})[0]


OPTIONS = {
    "plain": {},
    "no guidance": {"guidance_scale": 1.0},
    "all at once": {"parallel": 20},
    "one by one": {"parallel": 1},
    "exact": {"tolerance": 0.0},
    "rough": {"tolerance": 5.0},
    "summed on the CPU": {"debug": True},
    "latents": {"output_type": "latent"},
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("name", OPTIONS)
def test_pictures_equal_the_peers(name, scheduler):
    set_scheduler(pipes(), scheduler)
    assert difference(*(draw(pipe, **OPTIONS[name]) for pipe in pipes())) == 0


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_pictures_of_a_batch_equal_the_peers(scheduler):
    set_scheduler(pipes(), scheduler)
    told = {"prompt": ["a cat", "a dog"], "num_images_per_prompt": 2, "negative_prompt": ["rain", "snow"]}
    assert difference(*(draw(pipe, **told) for pipe in pipes())) == 0


def test_large_variances():
    set_scheduler(pipes(), "DDPMParallelScheduler", variance_type="fixed_large")
    assert difference(*(draw(pipe) for pipe in pipes())) == 0


def test_without_tolerance_it_is_one_step_after_another():
    set_scheduler(pipes(), "DDIMParallelScheduler", set_alpha_to_one=True)
    set_scheduler(pair("text"), "DDIMScheduler", set_alpha_to_one=True)
    plain = pair("text")[1](
        "a cat", **SIZE, num_inference_steps=8, generator=torch.Generator().manual_seed(7), output_type="pt", return_dict=False
    )[0]
    assert difference(draw(pipes()[1], tolerance=0.0), plain) < 1e-4


def test_there_are_fewer_rounds_than_steps():
    set_scheduler(pipes(), "DDIMParallelScheduler")
    rounds = []
    draw(pipes()[1], parallel=8, tolerance=5.0, callback=lambda index, timestep, latents: rounds.append((index, int(timestep))))
    assert 1 <= len(rounds) < 8
    assert rounds[0] == (0, 876)
    assert [timestep for _, timestep in rounds] == sorted((timestep for _, timestep in rounds), reverse=True)


def test_another_model_takes_wide_windows():
    set_scheduler(pipes(), "DDIMParallelScheduler")
    ours, seen = pipes()[1], []

    class Wrapped(torch.nn.Module):
        def forward(self, sample, **options):
            seen.append(len(sample))
            return ours.unet(sample, **options)

    plain = draw(ours)
    ours.wrapped_unet = Wrapped()
    try:
        assert difference(draw(ours), plain) == 0
    finally:
        ours.wrapped_unet = None
    assert seen
    assert min(seen) == 8


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("noise", [{"seed": 3}, {"generator": torch.Generator().manual_seed(3)}], ids=["seed", "generator"])
def test_runs_are_kept_and_resumed(tmp_path, noise, scheduler):
    set_scheduler(pipes(), scheduler)
    whole = draw(pipes()[1], **{"generator": None, **noise}, save_run=str(tmp_path / "{step}.run"))
    assert difference(whole, pipes()[1](resume=tmp_path / "2.run")[0]) == 0


def test_pictures_to_take_after():
    set_scheduler(pipes(), "DDIMParallelScheduler")
    parts = pipes()[1].components | {"unet": copy.deepcopy(pipes()[1].unet), "image_encoder": image_encoder()}
    plain = suffuse.StableDiffusionPipeline(**parts, requires_safety_checker=False)
    plain.load_ip_adapter(ip_adapter(plain.unet), "", "")
    ours = suffuse.StableDiffusionParadigmsPipeline(**pipes()[1].components | {"unet": plain.unet}, requires_safety_checker=False)
    ours.set_progress_bar_config(disable=True)
    shown = plain.prepare_ip_adapter_image_embeds(picture(), None, torch.device("cpu"), 1, True)
    drawn = [draw(ours, ip_adapter_image_embeds=shown, ip_adapter_scale=scale) for scale in (0.0, 0.6)]
    assert difference(*drawn) > 1e-4
    assert difference(drawn[0], draw(pipes()[1])) == 0


# ---------------------------------------------------------------- what is shown to steps that are taken at once

SHOWN = {
    "ControlNet": lambda pipe: controlled(pipe),
    "weak": lambda pipe: controlled(pipe, controlnet_conditioning_scale=0.4),
    "from the middle": lambda pipe: controlled(pipe, control_guidance_start=0.3, control_guidance_end=0.8),
    "guessing": lambda pipe: controlled(pipe, guess_mode=True, control_guidance_end=0.6),
    "two nets": lambda pipe: {
        "controlnet": [controlnet(pipe, 5), controlnet(pipe, 6)],
        "control_image": [picture(seed=3), picture(seed=4)],
        "control_guidance_start": [0.0, 0.5],
        "control_guidance_end": [0.5, 1.0],
    },
    "T2I-Adapter": lambda pipe: adapted(pipe, adapter_conditioning_factor=0.4),
    "both": lambda pipe: controlled(pipe, control_guidance_start=0.5) | adapted(pipe),
}


TOLD = {"num_inference_steps": 8, "output_type": "pt", "return_dict": False, **SIZE}


def plain_pipe():
    """A pipeline of the same components that takes one step after another."""
    plain = suffuse.StableDiffusionPipeline.from_pipe(pipes()[1])
    plain.scheduler = suffuse.DDIMScheduler.from_config(plain.scheduler.config)
    plain.set_progress_bar_config(disable=True)
    return plain


@pytest.mark.parametrize("prompt", ["a cat", pytest.param(["a cat", "a dog"], marks=pytest.mark.slow)], ids=["one", "two"])
@pytest.mark.parametrize("name", SHOWN)
def test_each_step_is_shown_what_it_is_shown_one_after_another(name, prompt):
    set_scheduler(pipes(), "DDIMParallelScheduler", set_alpha_to_one=True)
    told = {**SHOWN[name](pipes()[1]), **TOLD, "prompt": prompt}
    one_by_one = plain_pipe()(**told, generator=torch.Generator().manual_seed(7))[0]
    assert difference(draw(pipes()[1], **told, tolerance=0.0), one_by_one) < 1e-4
    assert difference(one_by_one, draw(pipes()[1], prompt=prompt, tolerance=0.0)) > 1e-3


def test_a_net_without_weight_changes_nothing():
    set_scheduler(pipes(), "DDIMParallelScheduler")
    told = controlled(pipes()[1], controlnet_conditioning_scale=0.0)
    assert difference(draw(pipes()[1], **told), draw(pipes()[1])) == 0


def test_another_model_is_told_what_nets_say():
    set_scheduler(pipes(), "DDIMParallelScheduler")
    ours, seen = pipes()[1], []

    class Wrapped(torch.nn.Module):
        def forward(self, sample, **options):
            seen.append(options["mid_block_additional_residual"])
            return ours.unet(sample, **options)

    plain = draw(ours, **controlled(ours))
    ours.wrapped_unet = Wrapped()
    try:
        assert difference(draw(ours, **controlled(ours)), plain) == 0
    finally:
        ours.wrapped_unet = None
    assert seen


def test_a_guidance_scale_is_a_guidance():
    set_scheduler(pipes(), "DDIMParallelScheduler")
    assert difference(draw(pipes()[1], guidance=ClassifierFreeGuidance(7.5)), draw(pipes()[1])) == 0


@pytest.mark.parametrize("name", EVERY)
def test_each_step_is_guided_as_one_after_another(name):
    set_scheduler(pipes(), "DDIMParallelScheduler", set_alpha_to_one=True)
    guidance = GUIDANCE[name](pipes()[1])
    plain = plain_pipe()("a cat", **TOLD, guidance=guidance, generator=torch.Generator().manual_seed(7))[0]
    assert difference(draw(pipes()[1], guidance=guidance, tolerance=0.0), plain) < 1e-4
    assert difference(draw(pipes()[1], tolerance=0.0), plain) > 1e-4


@pytest.mark.parametrize("name", ["with momentum", "in an interval", "towards a concept"])
def test_what_guidance_remembers_is_kept_and_resumed(tmp_path, name):
    set_scheduler(pipes(), "DDIMParallelScheduler")
    guidance = GUIDANCE[name](pipes()[1])
    whole = draw(pipes()[1], guidance=guidance, generator=None, seed=3, save_run=str(tmp_path / "{step}.run"))
    assert difference(whole, pipes()[1](resume=tmp_path / "2.run", guidance=guidance)[0]) == 0


# ---------------------------------------------------------------- what is wrong

BAD = {
    "no steps at once": ({"parallel": 0}, "parallel=0 is out of range"),
    "a tolerance below none": ({"tolerance": -1.0}, "tolerance=-1.0 is out of range"),
    "noise in each step": ({"eta": 0.5}, "eta=0.5 is noise that DDIMParallelScheduler does not draw beforehand"),
    "a text for a flag": ({"debug": "yes"}, "debug has the wrong type"),
    "a misspelt keyword": ({"paralel": 2}, "did you mean 'parallel'"),
    "latents of another shape": ({"latents": torch.zeros(1, 4, 8, 8)}, r"\(1, 4, 8, 8\)"),
    "generators of another number": ({"generator": [torch.Generator()] * 3}, "generator: 3 given for 1 pictures"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_refused_before_anything_is_drawn(name):
    options, message = BAD[name]
    set_scheduler(pipes(), "DDIMParallelScheduler")
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    with pytest.raises(SuffuseError, match=message):
        draw(pipes()[1], **{"generator": generator, **options})
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize(
    ("scheduler", "options", "message"),
    [
        ("DDIMScheduler", {}, r"DDIMScheduler cannot take several steps at once(.|\n)*DDIMParallelScheduler.from_config"),
        ("EulerDiscreteScheduler", {}, "EulerDiscreteScheduler cannot take"),
        ("DDPMParallelScheduler", {"variance_type": "fixed_small_log"}, "need a fixed variance(.|\n)*fixed_small_log"),
    ],
)
def test_schedulers_that_do_not_fit_are_refused(scheduler, options, message):
    set_scheduler(pipes(), scheduler, **options)
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    with pytest.raises(SuffuseError, match=message):
        draw(pipes()[1], generator=generator)
    assert torch.equal(generator.get_state(), before)
