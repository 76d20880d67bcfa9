"""CycleDiffusion: equal to the peer bit for bit; of a batch, each picture as if it were alone."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import diffusers
import pytest
import tiny
import torch
from tasks import align, difference, picture, set_scheduler
from values import EVERY, GUIDANCE, adapted, controlled

import suffuse
from suffuse.diffusion.guidance import ClassifierFreeGuidance
from suffuse.errors import SuffuseError

sys.path.append(str(Path(__file__).parent.parent / "adapters"))
from image_weights import image_encoder, ip_adapter


@cache
def pipes():
    """(the peer's pipeline, ours) from one folder."""
    path = Path(mkdtemp(prefix="suffuse-"))
    parts = tiny.stable_diffusion(path / "tokenizer")
    diffusers.CycleDiffusionPipeline(**parts, requires_safety_checker=False).save_pretrained(path / "pipeline")
    made = tuple(library.CycleDiffusionPipeline.from_pretrained(path / "pipeline") for library in (diffusers, suffuse))
    for pipe in made:
        pipe.set_progress_bar_config(disable=True)
    align(made[0])
    return made


def draw(pipe, **options):
    told = {"prompt": "a black horse", "source_prompt": "a horse", "image": picture(), "num_inference_steps": 5}
    told |= {"output_type": "pt", "return_dict": False, "generator": torch.Generator().manual_seed(7)}
    return pipe(**{**told, **options})[0]


OPTIONS = {
    "plain": {},
    "no guidance": {"guidance_scale": 1.0, "source_guidance_scale": 3.0},
    "guided source": {"source_guidance_scale": 2.0, "guidance_scale": 3.0},
    "all the way": {"strength": 1.0},
    "much noise": {"eta": 1.0},
    "no noise": {"eta": 0.0},
    "latents": {"output_type": "latent"},
    "two prompts without guidance": {
        "prompt": ["a", "b"],
        "source_prompt": ["c", "d"],
        "image": [picture(), picture(seed=2)],
        "guidance_scale": 1.0,
    },
}


@pytest.mark.parametrize("name", OPTIONS)
def test_pictures_equal_the_peers(name):
    set_scheduler(pipes(), "DDIMScheduler")
    assert difference(*(draw(pipe, **OPTIONS[name]) for pipe in pipes())) == 0


def test_callbacks_see_what_the_peers_see():
    set_scheduler(pipes(), "DDIMScheduler")
    seen: list[list] = [[], []]
    for pipe, log in zip(pipes(), seen, strict=True):
        draw(pipe, callback=lambda index, timestep, latents, log=log: log.append((index, int(timestep), latents.sum().item())))
    assert seen[0] == seen[1]
    assert len(seen[0]) == 4


def test_each_picture_of_a_batch_is_as_alone():
    # The peer takes the first two rows of a batch for the two branches of guidance.
    set_scheduler(pipes(), "DDIMScheduler")
    told = {"generator": None, "seed": [3, 4], "image": [picture(), picture(seed=2)]}
    both = draw(pipes()[1], **told, prompt=["a cat", "a dog"], source_prompt=["a lion", "a wolf"])
    alone = draw(pipes()[1], generator=None, seed=4, image=picture(seed=2), prompt="a dog", source_prompt="a wolf")
    assert difference(both[1:], alone) < 1e-5


def test_equal_prompts_give_the_picture_back():
    set_scheduler(pipes(), "DDIMScheduler")
    clean = pipes()[1].vae.encode(pipes()[1].image_processor.preprocess(picture())).latent_dist
    told = {"prompt": "a horse", "guidance_scale": 2.0, "source_guidance_scale": 2.0, "eta": 0.5, "output_type": "latent"}
    back = draw(pipes()[1], **told)
    expected = clean.sample(torch.Generator().manual_seed(7)) * pipes()[1].vae.config.scaling_factor
    assert difference(back, expected) < 1e-4


def test_a_last_step_without_noise():
    # The peer divides by the variance, which is then zero, and draws black.
    set_scheduler(pipes(), "DDIMScheduler", set_alpha_to_one=True, steps_offset=1, timestep_spacing="trailing")
    assert bool(draw(pipes()[1]).isfinite().all())


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_other_predictions_give_the_picture_back(prediction):
    # The peer takes every prediction for noise.
    set_scheduler(pipes(), "DDIMScheduler", prediction_type=prediction)
    told = {"prompt": "a horse", "guidance_scale": 2.0, "source_guidance_scale": 2.0, "eta": 0.5, "output_type": "latent"}
    clean = pipes()[1].vae.encode(pipes()[1].image_processor.preprocess(picture())).latent_dist
    expected = clean.sample(torch.Generator().manual_seed(7)) * pipes()[1].vae.config.scaling_factor
    assert difference(draw(pipes()[1], **told), expected) < 1e-4


@pytest.mark.parametrize("noise", [{"seed": 3}, {"generator": torch.Generator().manual_seed(3)}], ids=["seed", "generator"])
def test_runs_are_kept_and_resumed(tmp_path, noise):
    set_scheduler(pipes(), "DDIMScheduler")
    whole = draw(pipes()[1], **{"generator": None, "eta": 0.7, **noise}, save_run=str(tmp_path / "{step}.run"))
    assert difference(whole, pipes()[1](resume=tmp_path / "2.run")[0]) == 0


def test_pictures_to_take_after():
    set_scheduler(pipes(), "DDIMScheduler")
    parts = pipes()[1].components | {"unet": copy.deepcopy(pipes()[1].unet), "image_encoder": image_encoder()}
    plain = suffuse.StableDiffusionPipeline(**parts, requires_safety_checker=False)
    plain.load_ip_adapter(ip_adapter(plain.unet), "", "")
    ours = suffuse.CycleDiffusionPipeline(**pipes()[1].components | {"unet": plain.unet}, requires_safety_checker=False)
    ours.set_progress_bar_config(disable=True)
    shown = plain.prepare_ip_adapter_image_embeds(picture(), None, torch.device("cpu"), 1, True)
    drawn = [draw(ours, ip_adapter_image_embeds=shown, ip_adapter_scale=scale) for scale in (0.0, 0.6)]
    assert difference(*drawn) > 1e-4
    assert difference(drawn[0], draw(pipes()[1])) == 0


# ---------------------------------------------------------------- what is shown to source and target

SHOWN = {
    "ControlNet": lambda pipe: controlled(pipe),
    "guessing, in a part of the way": lambda pipe: controlled(pipe, guess_mode=True, control_guidance_end=0.6),
    "T2I-Adapter": lambda pipe: adapted(pipe),
}
EQUAL = {"prompt": "a horse", "guidance_scale": 2.0, "source_guidance_scale": 2.0, "eta": 0.5, "output_type": "latent"}


@pytest.mark.parametrize("name", SHOWN)
def test_what_is_shown_counts(name):
    set_scheduler(pipes(), "DDIMScheduler")
    assert difference(draw(pipes()[1], **SHOWN[name](pipes()[1])), draw(pipes()[1])) > 1e-4


@pytest.mark.parametrize("name", SHOWN)
def test_source_and_target_are_shown_the_same(name):
    # Else equal prompts would not give the picture back.
    set_scheduler(pipes(), "DDIMScheduler")
    clean = pipes()[1].vae.encode(pipes()[1].image_processor.preprocess(picture())).latent_dist
    back = draw(pipes()[1], **EQUAL, **SHOWN[name](pipes()[1]))
    expected = clean.sample(torch.Generator().manual_seed(7)) * pipes()[1].vae.config.scaling_factor
    assert difference(back, expected) < 1e-4


@pytest.mark.parametrize("name", SHOWN)
def test_each_picture_of_a_batch_is_shown_its_own(name):
    set_scheduler(pipes(), "DDIMScheduler")
    told = SHOWN[name](pipes()[1])
    shown = "adapter_image" if "adapter_image" in told else "control_image"
    given = {"generator": None, "seed": [3, 4], "image": [picture(), picture(seed=2)]}
    pictures = [picture(seed=5), picture(seed=6)]
    both = draw(pipes()[1], **given, prompt=["a cat", "a dog"], source_prompt=["a lion", "a wolf"], **told | {shown: pictures})
    alone = {"generator": None, "seed": 4, "image": picture(seed=2), "prompt": "a dog", "source_prompt": "a wolf"}
    assert difference(both[1:], draw(pipes()[1], **alone, **told | {shown: pictures[1]})) < 1e-4
    assert difference(both[1:], draw(pipes()[1], **alone, **told | {shown: pictures[0]})) > 1e-3


def test_a_net_without_weight_changes_nothing():
    set_scheduler(pipes(), "DDIMScheduler")
    told = controlled(pipes()[1], controlnet_conditioning_scale=0.0)
    assert difference(draw(pipes()[1], **told), draw(pipes()[1])) == 0


@cache
def grounded():
    """A pipeline whose UNet takes boxes."""
    gated = suffuse.UNet2DConditionModel.from_config(pipes()[1].unet.config, attention_type="gated").eval()
    gated.load_state_dict(pipes()[1].unet.state_dict(), strict=False)
    torch.manual_seed(8)
    for name, parameter in gated.named_parameters():
        if "alpha_" in name:  # gates that let boxes through
            torch.nn.init.constant_(parameter, 0.7)
    parts = pipes()[1].components | {"unet": gated, "scheduler": suffuse.DDIMScheduler.from_config(tiny.scheduler().config)}
    made = suffuse.CycleDiffusionPipeline(**parts, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


BOXES = {"gligen_phrases": ["a dog"], "gligen_boxes": [[0.1, 0.1, 0.6, 0.7]], "gligen_scheduled_sampling_beta": 1.0}


def test_boxes_say_what_stands_where():
    assert difference(draw(grounded(), **BOXES), draw(grounded())) > 1e-5


# ---------------------------------------------------------------- guidance of the target


def test_a_guidance_scale_is_a_guidance():
    set_scheduler(pipes(), "DDIMScheduler")
    told = {"source_guidance_scale": 2.0}
    assert difference(draw(pipes()[1], guidance=ClassifierFreeGuidance(7.5), **told), draw(pipes()[1], **told)) == 0


@pytest.mark.parametrize("name", EVERY)
def test_the_target_is_guided_otherwise(name):
    set_scheduler(pipes(), "DDIMScheduler")
    guidance = GUIDANCE[name](pipes()[1])
    drawn = draw(pipes()[1], guidance=guidance)
    assert difference(drawn, draw(pipes()[1], guidance_scale=6.0)) > 1e-5
    both = {"generator": None, "seed": [3, 4], "image": [picture(), picture(seed=2)]}
    both |= {"prompt": ["a cat", "a dog"], "source_prompt": ["a lion", "a wolf"]}
    alone = {"generator": None, "seed": 4, "image": picture(seed=2), "prompt": "a dog", "source_prompt": "a wolf"}
    together = draw(pipes()[1], guidance=guidance, **both)
    assert difference(together[1:], draw(pipes()[1], guidance=guidance, **alone)) < 1e-4


class Anew(ClassifierFreeGuidance):
    """Asks for the target alone."""

    def __call__(self, denoiser, step):
        return super().__call__(replace(denoiser), step)


def test_the_target_alone_is_told_and_shown_what_it_is_told_beside_the_source():
    told = controlled(pipes()[1], guess_mode=True) | adapted(pipes()[1]) | BOXES
    told |= {"prompt": ["a cat", "a dog"], "source_prompt": ["a lion", "a wolf"], "image": [picture(), picture(seed=2)]}
    told["control_image"] = [picture(seed=3), picture(seed=4)]
    once, anew = (draw(grounded(), guidance=kind(5.0), **told) for kind in (ClassifierFreeGuidance, Anew))
    assert difference(once, anew) < 1e-4


@pytest.mark.parametrize("name", ["with momentum", "in an interval", "towards a concept"])
def test_what_guidance_remembers_is_kept_and_resumed(tmp_path, name):
    set_scheduler(pipes(), "DDIMScheduler")
    guidance = GUIDANCE[name](pipes()[1])
    whole = draw(pipes()[1], guidance=guidance, generator=None, seed=3, save_run=str(tmp_path / "{step}.run"))
    assert difference(whole, pipes()[1](resume=tmp_path / "2.run", guidance=guidance)[0]) == 0


# ---------------------------------------------------------------- what is wrong

BAD = {
    "no source": ({"source_prompt": None}, "source_prompt is missing"),
    "no prompt": ({"prompt": None}, "prompt and prompt_embeds are both missing"),
    "prompts of different numbers": ({"source_prompt": ["a", "b"]}, r"do not go together(.|\n)*2 of 77 tokens and 1 of 77"),
    "no picture": ({"image": None}, "image"),
    "no strength": ({"strength": 0.0}, "leaves no step"),
    "eta 2": ({"eta": 2}, "eta=2 is out of range"),
    "a text for a scale": ({"source_guidance_scale": "much"}, "source_guidance_scale must be a number"),
    "pictures of another number": ({"image": [picture()] * 2}, "image: 2 given for 1 pictures"),
    "a misspelt keyword": ({"source_guidance": 2}, "did you mean 'source_guidance_scale'"),
    "a negative prompt": ({"negative_prompt": "rain"}, "negative_prompt"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_refused_before_anything_is_drawn(name):
    options, message = BAD[name]
    set_scheduler(pipes(), "DDIMScheduler")
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    with pytest.raises(SuffuseError, match=message):
        draw(pipes()[1], **{"generator": generator, **options})
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("scheduler", ["EulerDiscreteScheduler", "PNDMScheduler", "DDPMScheduler"])
def test_another_scheduler_is_refused(scheduler):
    set_scheduler(pipes(), scheduler)
    with pytest.raises(SuffuseError, match=rf"steps by DDIM(.|\n)*{scheduler}(.|\n)*DDIMScheduler.from_config"):
        draw(pipes()[1])
