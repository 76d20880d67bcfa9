"""DiffEdit: masks, inversions and pictures equal the peer's bit for bit; what is inverted once serves every call."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import diffusers
import numpy as np
import pytest
import tiny
import torch
from tasks import align, difference, picture, set_scheduler

import suffuse
from suffuse.diffusion.inversion import auto_correlation, divergence
from suffuse.errors import InputError, SuffuseError
from suffuse.noise import CounterNoise

INVERSES = {"DDIMScheduler": "DDIMInverseScheduler", "DPMSolverMultistepScheduler": "DPMSolverMultistepInverseScheduler"}


@cache
def pipes():
    """(the peer's pipeline, ours) from one folder."""
    path = Path(mkdtemp(prefix="suffuse-"))
    parts = tiny.stable_diffusion(path / "tokenizer")
    parts["inverse_scheduler"] = diffusers.DDIMInverseScheduler.from_config(parts["scheduler"].config)
    diffusers.StableDiffusionDiffEditPipeline(**parts, requires_safety_checker=False).save_pretrained(path / "pipeline")
    made = tuple(library.StableDiffusionDiffEditPipeline.from_pretrained(path / "pipeline") for library in (diffusers, suffuse))
    for pipe in made:
        pipe.set_progress_bar_config(disable=True)
    align(made[0])
    return made


def solve_by(name: str, **options) -> None:
    set_scheduler(pipes(), name, **options)
    for pipe, library in zip(pipes(), (diffusers, suffuse), strict=True):
        pipe.inverse_scheduler = getattr(library, INVERSES[name]).from_config(tiny.scheduler().config, **options)


def find(pipe, **options):
    told = {"image": picture(), "source_prompt": "a bowl", "target_prompt": "a pear", "num_maps_per_mask": 3}
    return pipe.generate_mask(**{**told, "num_inference_steps": 4, "generator": torch.Generator().manual_seed(5), **options})


def invert(pipe, **options):
    told = {"image": picture(), "prompt": "a bowl", "num_inference_steps": 5, "generator": torch.Generator().manual_seed(6)}
    return pipe.invert(**{**told, "return_dict": False, **options})


@cache
def mask() -> torch.Tensor:
    made = torch.zeros(1, 32, 32)
    made[:, 8:24, 4:20] = 1
    return made


@cache
def inverted() -> torch.Tensor:
    solve_by("DDIMScheduler")
    return invert(pipes()[1])[0]


def draw(pipe, **options):
    told = {"prompt": "a pear", "mask_image": mask(), "image_latents": inverted(), "num_inference_steps": 5}
    told |= {"output_type": "pt", "return_dict": False, "generator": torch.Generator().manual_seed(7)}
    return pipe(**{**told, **options})[0]


def pil_to_tensor(image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).long()


# ---------------------------------------------------------------- equal to the peer

MASKS = {
    "plain": {},
    "several": {"image": [picture(), picture(seed=2)], "source_prompt": ["a", "b"], "target_prompt": ["c", "d"]},
    "other numbers": {"mask_encode_strength": 0.8, "mask_thresholding_ratio": 1.5, "num_maps_per_mask": 2},
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_equal_the_peers(name):
    solve_by("DDIMScheduler")
    theirs, ours = (find(pipe, **MASKS[name]) for pipe in pipes())
    assert ours.dtype == theirs.dtype
    assert (ours == theirs).all()
    assert 0 < ours.mean() < 1


def test_negative_prompts_are_negative():
    # The peer takes prompts for negative ones and the reverse, which shows where both sides have another negative prompt.
    solve_by("DDIMScheduler")
    peer, ours = pipes()
    turned = {
        "source_prompt": "rain",
        "source_negative_prompt": "a bowl",
        "target_prompt": "snow",
        "target_negative_prompt": "a pear",
    }
    mine = find(ours, source_negative_prompt="rain", target_negative_prompt="snow")
    assert (find(peer, **turned) == mine).all()
    assert (find(ours, guidance_scale=1.0) == find(ours, guidance_scale=3.0)).mean() > 0.9  # the peer fails without guidance


def test_masks_as_pictures_and_tensors():
    # The peer makes no pictures of masks.
    solve_by("DDIMScheduler")
    array = torch.from_numpy(find(pipes()[1]))
    assert torch.equal(find(pipes()[1], output_type="pt"), array)
    assert torch.equal(pil_to_tensor(find(pipes()[1], output_type="pil")[0]), array[0] * 255)


INVERSIONS = {
    "plain": {},
    "no guidance": {"guidance_scale": 1.0},
    "several": {"prompt": ["a", "b"], "image": [picture(), picture(seed=2)], "negative_prompt": ["x", "y"]},
    "one picture for two prompts": {"prompt": ["a", "b"]},
    "all the way": {"inpaint_strength": 1.0},
    "half the way": {"inpaint_strength": 0.5},
    "shown": {"decode_latents": True, "output_type": "np"},
    "like noise": {"num_reg_steps": 2, "num_auto_corr_rolls": 2, "num_inference_steps": 3},
    "uncorrelated": {"num_reg_steps": 1, "num_inference_steps": 3, "lambda_kl": 0.0},
    "of the right variance": {"num_reg_steps": 1, "num_inference_steps": 3, "lambda_auto_corr": 0.0},
}


@pytest.mark.parametrize("scheduler", INVERSES)
@pytest.mark.parametrize("name", INVERSIONS)
def test_inversions_equal_the_peers(name, scheduler):
    solve_by(scheduler)
    theirs, ours = (invert(pipe, **INVERSIONS[name]) for pipe in pipes())
    assert difference(*(one[0] for one in (theirs, ours))) == 0
    assert (ours[1] is None) == (theirs[1] is None)
    # The peer multiplies with the inverse of the scale, here and nowhere else.
    assert ours[1] is None or difference(theirs[1], ours[1]) < 1e-5


@pytest.mark.parametrize("prediction", ["sample", "v_prediction"])
def test_other_predictions_are_moved_as_the_peers(prediction):
    # With guidance the peer compares with two copies of the latents.
    solve_by("DDIMScheduler", prediction_type=prediction)
    moved = {"num_reg_steps": 1, "num_inference_steps": 3, "guidance_scale": 1.0, "num_auto_corr_rolls": 1}
    assert difference(*(invert(pipe, **moved)[0] for pipe in pipes())) == 0


OPTIONS = {
    "plain": {},
    "no guidance": {"guidance_scale": 1.0},
    "several of each": {"num_images_per_prompt": 2, "negative_prompt": "rain"},
    "eta": {"eta": 1.0},
    "a flat list of latents": {"image_latents": lambda: list(inverted()[0].split(1))},
    "latents": {"output_type": "latent"},
}


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"])
@pytest.mark.parametrize("name", OPTIONS)
def test_pictures_equal_the_peers(name, scheduler):
    told = {key: value() if callable(value) else value for key, value in OPTIONS[name].items()}
    inverted()
    set_scheduler(pipes(), scheduler)
    assert difference(*(draw(pipe, **{**told, "mask_image": mask().clone()}) for pipe in pipes())) == 0


def test_pictures_of_several_prompts_equal_the_peers():
    solve_by("DDIMScheduler")
    ways = invert(pipes()[1], prompt=["a", "b"], image=[picture(), picture(seed=2)])[0]
    told = {"prompt": ["c", "d"], "image_latents": ways, "num_images_per_prompt": 2}
    # The peer lays masks of several prompts beside all pictures of the first; one mask is the same for all.
    assert difference(*(draw(pipe, **told, mask_image=mask().clone()) for pipe in pipes())) == 0


def test_the_three_together():
    solve_by("DDIMScheduler")
    pictures = []
    for pipe in pipes():
        told = {"mask_image": find(pipe), "image_latents": invert(pipe)[0]}
        pictures.append(draw(pipe, **told))
    assert difference(*pictures) == 0


# ---------------------------------------------------------------- what it is for


def test_outside_of_the_mask_the_inversion_comes_back():
    solve_by("DDIMScheduler")
    clean = draw(pipes()[1], output_type="latent")
    assert difference(clean[:, :, :8], inverted()[:, -1, :, :8]) == 0
    assert difference(clean[:, :, 8:24, 4:20], inverted()[:, -1, :, 8:24, 4:20]) > 1e-3


def test_equal_prompts_have_no_difference():
    # The peer divides zero by zero, and says that all of the picture changes.
    solve_by("DDIMScheduler")
    assert find(pipes()[1], target_prompt="a bowl").sum() == 0


def test_each_prompt_has_its_mask():
    solve_by("DDIMScheduler")
    ways = invert(pipes()[1], prompt=["a", "b"], image=[picture(), picture(seed=2)])[0]
    masks = torch.cat([mask(), 1 - mask()])[:, None]
    told = {"prompt": ["c", "d"], "image_latents": ways, "num_images_per_prompt": 2}
    together = draw(pipes()[1], **told, mask_image=masks)
    alone = draw(pipes()[1], **{**told, "prompt": "d", "image_latents": ways[1:]}, mask_image=1 - mask())
    assert difference(together[2:], alone) < 1e-5


def test_the_scheduler_of_the_pipeline_is_as_before():
    solve_by("DDIMScheduler")
    pipe = pipes()[1]
    scheduler, inverse = pipe.scheduler, pipe.inverse_scheduler
    invert(pipe)
    assert (pipe.scheduler, pipe.inverse_scheduler) == (scheduler, inverse)
    assert pipe.inverse_scheduler.timesteps[0] < pipe.inverse_scheduler.timesteps[-1]
    draw(pipe)
    assert pipe.scheduler.timesteps[0] > pipe.scheduler.timesteps[-1]


def test_seeds_are_for_pictures():
    solve_by("DDIMScheduler")
    seeded = {"generator": None, "seed": 3}
    one, both = find(pipes()[1], **seeded), find(pipes()[1], **seeded, source_prompt=["a bowl"] * 2, target_prompt=["a pear"] * 2)
    assert both.shape == (2, *one.shape[1:])
    way, again = (invert(pipes()[1], **seeded, num_reg_steps=1, num_inference_steps=2)[0] for _ in range(2))
    assert difference(way, again) == 0


def test_runs_are_kept_and_resumed(tmp_path):
    solve_by("DDIMScheduler")
    whole = draw(pipes()[1], generator=None, seed=3, eta=0.5, save_run=str(tmp_path / "{step}.run"))
    assert difference(whole, pipes()[1](resume=tmp_path / "2.run")[0]) == 0


def test_callbacks_are_told_of_the_inversion():
    solve_by("DDIMScheduler")
    seen: list[list] = [[], []]
    for pipe, log in zip(pipes(), seen, strict=True):
        invert(pipe, callback=lambda index, timestep, latents, log=log: log.append((index, int(timestep), latents.sum().item())))
    assert seen[0] == seen[1]
    assert len(seen[0]) == 4


def test_a_controlnet_beside():
    solve_by("DDIMScheduler")
    net = suffuse.ControlNetModel.from_unet(pipes()[1].unet, conditioning_embedding_out_channels=(8, 16))
    torch.manual_seed(4)
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    assert difference(draw(pipes()[1], controlnet=net, control_image=picture(seed=3)), draw(pipes()[1])) > 1e-4


def test_correlation_is_drawn_from_the_source_of_the_picture():
    noise = torch.randn(2, 1, 16, 16)
    alone = [auto_correlation(noise[i : i + 1], CounterNoise(3, i)) for i in range(2)]
    assert torch.allclose(auto_correlation(noise, [CounterNoise(3, 0), CounterNoise(3, 1)]), sum(alone))
    assert divergence(torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(0))).abs() < 0.01


# ---------------------------------------------------------------- what is wrong

BAD = {
    "no mask": (draw, {"mask_image": None}, r"mask_image is missing(.|\n)*generate_mask\(\)"),
    "no inverted latents": (draw, {"image_latents": None}, r"image_latents is missing(.|\n)*invert\(…\)\.latents"),
    "latents of fewer steps": (
        draw,
        {"num_inference_steps": 10},
        r"image_latents(.|\n)*\(1, 4, 4, 32, 32\)(.|\n)*\(1, 8, 4, 32, 32\)",
    ),
    "latents of another size": (draw, {"image_latents": torch.zeros(1, 4, 4, 8, 8)}, r"image_latents(.|\n)*\(1, 4, 4, 8, 8\)"),
    "latents that are none": (draw, {"image_latents": "noise"}, "image_latents has the wrong type"),
    "latents with NaN": (draw, {"image_latents": torch.full((1, 4, 4, 32, 32), torch.nan)}, "not finite"),
    "a mask of three colours": (draw, {"mask_image": torch.zeros(1, 2, 32, 32)}, "mask_image"),
    "masks of another number": (draw, {"mask_image": torch.zeros(3, 1, 32, 32)}, "mask_image: 3 given for 1 pictures"),
    "no strength": (draw, {"inpaint_strength": 0.0}, "leaves no step"),
    "strength 2": (draw, {"inpaint_strength": 2}, "inpaint_strength=2 is out of range"),
    "no way to noise": (invert, {"inpaint_strength": 0.1}, "strength=0.1 leaves no step"),
    "nothing to invert": (invert, {"image": None}, "image is missing"),
    "no prompt to invert": (invert, {"prompt": None}, "prompt and prompt_embeds are both missing"),
    "steps below none": (invert, {"num_reg_steps": -1}, "num_reg_steps=-1 is out of range"),
    "no picture for a mask": (find, {"image": None}, "image is missing"),
    "no source": (find, {"source_prompt": None}, "prompt and prompt_embeds are both missing"),
    "sides of different numbers": (find, {"source_prompt": ["a", "b"]}, r"do not go together(.|\n)*2 of 77 tokens and 1 of 77"),
    "no maps": (find, {"num_maps_per_mask": 0}, "num_maps_per_mask=0 is out of range"),
    "no ratio": (find, {"mask_thresholding_ratio": 0}, "mask_thresholding_ratio=0 is out of range"),
    "a misspelt keyword": (find, {"num_maps": 3}, "did you mean 'num_maps_per_mask'"),
    "generators of another number": (find, {"generator": [torch.Generator()] * 2}, "generator: 2 given for 3 pictures"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_refused_before_anything_is_drawn(name):
    function, options, message = BAD[name]
    inverted()
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    with pytest.raises(SuffuseError, match=message):
        function(pipes()[1], **{"generator": generator, **options})
    assert torch.equal(generator.get_state(), before)


def test_without_an_inverse_scheduler_only_the_inversion_is_missing():
    solve_by("DDIMScheduler")
    plain = suffuse.StableDiffusionPipeline.from_pipe(pipes()[1], safety_checker=None, requires_safety_checker=False)
    pipe = suffuse.StableDiffusionDiffEditPipeline.from_pipe(plain)
    pipe.set_progress_bar_config(disable=True)
    assert find(pipe).shape == (1, 32, 32)
    with pytest.raises(InputError, match="no inverse_scheduler"):
        invert(pipe)
