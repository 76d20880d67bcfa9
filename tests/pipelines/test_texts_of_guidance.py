"""What branches of guidance are told beside the prompts: it is heard, callbacks do not see it, and all else is as for prompts."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from random_checkpoints import random_checkpoint
from tasks import call, difference, folder, pair, set_scheduler

import suffuse
from suffuse import (
    AutoGuidance,
    ClassifierFreeGuidance,
    Concept,
    Guidance,
    GuidanceInterval,
    SafeGuidance,
    SemanticGuidance,
    ZeroStarGuidance,
)
from suffuse.errors import InputError

QUICK = {"num_inference_steps": 3}
TOLD = {
    "safe": SafeGuidance(6.0, "harm", warmup=0),
    "two concepts": SemanticGuidance(6.0, [Concept("a hat", warmup=0), Concept("snow", warmup=0)]),
}


def conditional_only(pipe, index, timestep, tensors):
    """As people write it who want the prompt alone from some step on."""
    pipe._guidance_scale = 0.0
    return {name: value.chunk(2)[-1] for name, value in tensors.items() if name != "latents"}


@pytest.mark.parametrize("told", TOLD)
@pytest.mark.parametrize("task", ["text", "xl text"])
@pytest.mark.parametrize("prompt", ["a cat", ["a cat", "a dog"]], ids=["one", "two"])
def test_callbacks_see_the_prompts_alone(task, told, prompt):
    pipe = pair(task)[1]
    set_scheduler(pair(task), "DDIMScheduler")
    names = ["latents", "prompt_embeds", *(["add_text_embeds", "add_time_ids"] if task == "xl text" else [])]
    seen = []
    for guidance in (TOLD[told], ClassifierFreeGuidance(6.0)):
        shapes = {}

        def look(pipe, index, timestep, tensors, shapes=shapes):
            shapes |= {name: tuple(value.shape) for name, value in tensors.items()}
            return conditional_only(pipe, index, timestep, tensors) if index == 0 else {}

        options = {"callback_on_step_end": look, "callback_on_step_end_tensor_inputs": names}
        call(pipe, task, prompt=prompt, guidance=guidance, **options, **QUICK)
        seen.append(shapes)
    assert seen[0] == seen[1]


def test_what_is_drawn_when_guidance_ends_is_the_prompt():
    pipe = pair("text")[1]
    set_scheduler(pair("text"), "DDIMScheduler")
    states = []

    def look(pipe, index, timestep, tensors):
        states.append(tensors["prompt_embeds"])
        return conditional_only(pipe, index, timestep, tensors)

    options = {"callback_on_step_end": look, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    call(pipe, "text", prompt="a cat", guidance=TOLD["safe"], **options, num_inference_steps=1)
    read = pipe.encode_prompt("a cat", torch.device("cpu"), 1, False)[0]
    assert difference(states[0].chunk(2)[-1], read) == 0


def test_a_concept_that_is_the_prompt_is_the_prompt():
    """With nothing left alone, a concept counts as the prompt does: their scales are one."""
    for task in ("text", "depth", "inpaint9", "xl text"):
        pipe = pair(task)[1]
        set_scheduler(pair(task), "DDIMScheduler")
        for options in ({}, {"clip_skip": 1}):
            concept = Concept("a cat", scale=3.0, warmup=0, threshold=0.0)
            guidance = SemanticGuidance(4.0, [concept], momentum_scale=0.0)
            made = call(pipe, task, prompt="a cat", guidance=guidance, **options, **QUICK)
            plain = call(pipe, task, prompt="a cat", guidance=ClassifierFreeGuidance(7.0), **options, **QUICK)
            assert difference(made, plain) < 1e-3, (task, options)


UNHEARD = {
    "safe": (SafeGuidance(6.0, "harm"), r"no step of 3 is told what to keep away from \(warmup=10\)"),
    "a concept": (SemanticGuidance(6.0, [Concept("a hat", warmup=3)]), r"no step of 3 is told a concept \(warmup=3\)"),
    "between steps": (GuidanceInterval(ClassifierFreeGuidance(6.0), 0.1, 0.3), r"told guidance \(from 0.1 to 0.3\)"),
    "within": (GuidanceInterval(SafeGuidance(6.0, "harm"), 0.0, 0.9), "told what to keep away from"),
    "still": (ZeroStarGuidance(6.0, still=3), r"told anything \(still=3\)"),
}


@pytest.mark.parametrize("name", UNHEARD)
def test_what_no_step_is_told_is_warned_of(name):
    guidance, message = UNHEARD[name]
    with pytest.warns(UserWarning, match=message):
        call(pair("text")[1], "text", guidance=guidance, **QUICK)


@dataclass
class Own(Guidance):
    """One that tells a branch which is told already."""

    branches = ("cond", "image")
    texts = {"image": "a dog"}

    def __call__(self, denoiser, step):
        return denoiser(step, self.branches)["cond"]


def test_branches_that_are_told_already_have_no_texts():
    with pytest.raises(InputError, match="guidance has a text for the branch 'image'"):
        pair("text")[1]("a cat", guidance=Own())


def test_a_worse_model_inside_is_checked_as_one_that_is_not():
    pipe, generator = pair("text")[1], torch.Generator().manual_seed(1)
    before = generator.get_state()
    xl = pair("xl text")[1].unet
    half = suffuse.UNet2DConditionModel.from_pretrained(folder("text"), subfolder="unet", torch_dtype=torch.bfloat16)
    for worse, message in ((xl, "cross_attention_dim="), (None, "NoneType"), (pipe.vae, "AutoencoderKL"), (half, "bfloat16")):
        with pytest.raises(InputError, match=message):
            pipe("a cat", guidance=GuidanceInterval(AutoGuidance(2.0, worse)), generator=generator)
    assert torch.equal(before, generator.get_state())


def test_a_model_that_is_told_the_scale_is_told_that_of_the_call():
    parts = suffuse.StableDiffusionPipeline.from_pretrained(
        random_checkpoint(), safety_checker=None, requires_safety_checker=False
    )
    torch.manual_seed(1)
    unet = suffuse.UNet2DConditionModel.from_config(parts.unet.config, time_cond_proj_dim=16)
    pipe = suffuse.StableDiffusionPipeline(**{**parts.components, "unet": unet}, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)

    def draw(**options):
        return pipe("a cat", output_type="pt", seed=3, **options, **QUICK).images

    told = draw(guidance_scale=8.0)
    assert difference(draw(guidance_scale=8.0, guidance=ClassifierFreeGuidance(1.0)), told) == 0
    assert difference(draw(guidance_scale=3.0, guidance=ClassifierFreeGuidance(1.0)), told) > 1e-5


@pytest.mark.parametrize("kind", ["paradigms", "cycle_diffusion"])
def test_what_a_loop_remembers_is_kept_when_guidance_becomes_a_value(kind, tmp_path):
    module = __import__(f"test_{kind}")
    pipe = module.pipes()[1]
    set_scheduler(module.pipes(), "DDIMParallelScheduler" if kind == "paradigms" else "DDIMScheduler")
    whole = module.draw(pipe, guidance_scale=5.0, save_run=tmp_path / "at-{step}.safetensors")
    steps = sorted(tmp_path.iterdir(), key=lambda path: int(path.stem[3:]))
    resumed = pipe(resume=steps[len(steps) // 2], guidance=ClassifierFreeGuidance(5.0), output_type="pt", return_dict=False)[0]
    assert difference(resumed, whole) == 0


def test_edits_are_kept_for_the_class_that_shows_them_alone():
    pipe = pair("text")[1]
    set_scheduler(pair("text"), "DDIMScheduler")
    call(pipe, "text", guidance=TOLD["two concepts"], **QUICK)
    assert pipe._run.guidance.applied is None
