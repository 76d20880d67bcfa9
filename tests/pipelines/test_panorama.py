"""Panoramas: equal the peer's bit for bit where windows fit; windows cover every latent where they do not."""

from __future__ import annotations

import copy
import sys
from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp

import diffusers
import pytest
import tiny
import torch
from tasks import align, difference, pair, picture, set_scheduler
from values import EVERY, GUIDANCE, adapted, controlled

import suffuse
from suffuse.diffusion.guidance import ClassifierFreeGuidance
from suffuse.diffusion.windows import View, windows
from suffuse.errors import InputError, SuffuseError

sys.path.append(str(Path(__file__).parent.parent / "adapters"))
from image_weights import FEATURES, image_encoder, ip_adapter

WINDOWS = {"window_size": 16, "stride": 8}
SIZE = {"height": 192, "width": 320}  # 24 x 40 latents


@cache
def pipes():
    """(the peer's pipeline, ours) from one folder; the peer counts eight pixels to a latent, so the autoencoder has that."""
    path = Path(mkdtemp(prefix="suffuse-"))
    parts = tiny.stable_diffusion(path / "tokenizer")
    torch.manual_seed(11)
    parts["vae"] = diffusers.AutoencoderKL(
        block_out_channels=[32] * 4,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        latent_channels=4,
    )
    diffusers.StableDiffusionPanoramaPipeline(**parts, requires_safety_checker=False).save_pretrained(path / "pipeline")
    made = tuple(library.StableDiffusionPanoramaPipeline.from_pretrained(path / "pipeline") for library in (diffusers, suffuse))
    for pipe in made:
        pipe.set_progress_bar_config(disable=True)
    align(made[0])
    made[0].get_views = partial(made[0].get_views, **WINDOWS)
    return made


def draw(pipe, **options):
    ours = WINDOWS if isinstance(pipe, suffuse.DiffusionPipeline) else {}
    settings = {"prompt": "a cat", "num_inference_steps": 4, "output_type": "pt", "return_dict": False, **SIZE, **ours}
    return pipe(**{**settings, "generator": torch.Generator().manual_seed(7), **options})[0]


OPTIONS = {
    "plain": {},
    "no guidance": {"guidance_scale": 1.0},
    "views together": {"view_batch_size": 3},
    "all views together": {"view_batch_size": 100},
    "round about": {"circular_padding": True, "height": 128},
    "round about, views together": {"circular_padding": True, "height": 128, "view_batch_size": 4},
    "smaller than a window": {"height": 64, "width": 96},
    "round about, smaller than a window": {"height": 128, "width": 96, "circular_padding": True},
    "eta": {"eta": 1.0, "view_batch_size": 2},
    "negative": {"negative_prompt": "rain"},
    "latents": {"output_type": "latent"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_pictures_equal_the_peers(name):
    set_scheduler(pipes(), "DDIMScheduler")
    assert difference(*(draw(pipe, **OPTIONS[name]) for pipe in pipes())) == 0


SOLVERS = [
    "DDPMScheduler", "PNDMScheduler", "LMSDiscreteScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler", "HeunDiscreteScheduler",
]  # fmt: skip


@pytest.mark.parametrize("scheduler", SOLVERS)
def test_solvers_remember_each_window(scheduler):
    set_scheduler(pipes(), scheduler)
    assert difference(*(draw(pipe, view_batch_size=3) for pipe in pipes())) == 0


# ---------------------------------------------------------------- where the peer is not followed


def test_several_prompts_are_as_each_alone():
    # The peer lays the prompts of several pictures beside the wrong ones.
    set_scheduler(pipes(), "DDIMScheduler")
    noise, prompts = torch.randn(2, 4, 24, 40, generator=torch.Generator().manual_seed(3)), ["a cat", "a dog"]
    together = draw(pipes()[1], prompt=prompts, latents=noise, view_batch_size=3)
    for index, prompt in enumerate(prompts):
        assert difference(together[index : index + 1], draw(pipes()[1], prompt=prompt, latents=noise[index : index + 1])) < 1e-5


def test_several_rows_of_windows_go_round_about():
    # The peer fails; a picture that begins elsewhere is the same one.
    set_scheduler(pipes(), "DDIMScheduler")
    noise = torch.randn(1, 4, 24, 40, generator=torch.Generator().manual_seed(3))
    turned, straight = (
        draw(pipes()[1], latents=given, circular_padding=True, output_type="latent") for given in (noise.roll(8, 3), noise)
    )
    assert difference(turned.roll(-8, 3), straight) < 1e-4
    assert difference(draw(pipes()[1], latents=noise, output_type="latent"), straight) > 1e-3


@pytest.mark.parametrize("circular", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (17, 31), (5, 40), (24, 45), (30, 9)])
def test_windows_cover_everything(rows, columns, circular):
    # The peer leaves out what is beyond the last whole stride, which stays gray.
    covered = torch.zeros(rows, columns)
    for top, bottom, left, right in windows(rows, columns, 16, 8, circular):
        covered[top:bottom, torch.arange(left, right if circular else min(right, columns)) % columns] += 1
    assert bool((covered > 0).all())


def test_rescaled_guidance_counts():
    # The peer takes guidance_rescale and does nothing with it.
    set_scheduler(pipes(), "DDIMScheduler")
    assert difference(draw(pipes()[1], guidance_rescale=0.7), draw(pipes()[1])) > 1e-4


def test_views_are_the_peers_where_they_fit():
    for size in ((512, 2048), (768, 1024), (512, 512), (256, 1024)):
        for circular in (False, True):
            # A window that is larger than the picture says so, as the peer's does.
            theirs = diffusers.StableDiffusionPanoramaPipeline.get_views(pipes()[0], *size, circular_padding=circular)
            assert pipes()[1].get_views(*size, circular_padding=circular) == theirs


# ---------------------------------------------------------------- beside others


def test_pictures_to_take_after():
    plain = suffuse.StableDiffusionPipeline(
        **{**pipes()[1].components, "image_encoder": image_encoder()}, requires_safety_checker=False
    )
    plain.unet = copy.deepcopy(plain.unet)
    plain.load_ip_adapter(ip_adapter(plain.unet), "", "")
    ours = suffuse.StableDiffusionPanoramaPipeline.from_pipe(plain)
    ours.set_progress_bar_config(disable=True)
    shown = [draw(ours, ip_adapter_image=picture(), ip_adapter_scale=scale, view_batch_size=3) for scale in (0.0, 0.6)]
    assert difference(*shown) > 1e-4
    assert difference(shown[1], draw(ours, ip_adapter_image=picture(), ip_adapter_scale=0.6)) < 1e-5


@pytest.mark.parametrize("scheduler", ["DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler"])
def test_runs_are_kept_and_resumed(tmp_path, scheduler):
    set_scheduler(pipes(), scheduler)
    whole = draw(pipes()[1], generator=None, seed=3, num_images_per_prompt=2, save_run=str(tmp_path / "{step}.run"))
    assert difference(whole, pipes()[1](resume=tmp_path / "2.run")[0]) == 0


def test_callbacks_replace_what_the_windows_see():
    set_scheduler(pipes(), "DDIMScheduler")

    def forget(pipe, index, timestep, tensors):
        return {"prompt_embeds": torch.zeros_like(tensors["prompt_embeds"])}

    told = {"callback_on_step_end": forget, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    assert difference(draw(pipes()[1], **told), draw(pipes()[1])) > 1e-4


# ---------------------------------------------------------------- what is shown to windows


def plain_pipe():
    """A plain pipeline of the same components."""
    plain = suffuse.StableDiffusionPipeline.from_pipe(pipes()[1])
    plain.set_progress_bar_config(disable=True)
    return plain


ONE_WINDOW = {"height": 128, "width": 128}
SHOWN = {
    "ControlNet": lambda pipe: controlled(pipe),
    "a part of the way": lambda pipe: controlled(pipe, controlnet_conditioning_scale=0.7, control_guidance_end=0.5),
    "guessing": lambda pipe: controlled(pipe, guess_mode=True),
    "T2I-Adapter": lambda pipe: adapted(pipe, adapter_conditioning_factor=0.5),
    "both": lambda pipe: controlled(pipe) | adapted(pipe),
}


@pytest.mark.parametrize("prompt", ["a cat", ["a cat", "a dog"]], ids=["one", "two"])
@pytest.mark.parametrize("name", SHOWN)
def test_one_window_is_the_plain_pipeline(name, prompt):
    set_scheduler(pipes(), "DDIMScheduler")
    told = {**SHOWN[name](pipes()[1]), **ONE_WINDOW, "prompt": prompt}
    settings = {"num_inference_steps": 4, "output_type": "pt", "return_dict": False}
    plain = plain_pipe()(**settings, generator=torch.Generator().manual_seed(7), **told)[0]
    assert difference(draw(pipes()[1], **told), plain) == 0
    assert (
        difference(plain, plain_pipe()(**settings, generator=torch.Generator().manual_seed(7), **ONE_WINDOW, prompt=prompt)[0])
        > 1e-4
    )


@pytest.mark.parametrize("name", SHOWN)
def test_views_together_are_shown_what_each_is_shown_alone(name):
    set_scheduler(pipes(), "DDIMScheduler")
    told = {**SHOWN[name](pipes()[1]), "prompt": ["a cat", "a dog"], "circular_padding": True}
    assert difference(draw(pipes()[1], **told, view_batch_size=3), draw(pipes()[1], **told)) < 1e-5


def test_a_net_without_weight_changes_nothing():
    set_scheduler(pipes(), "DDIMScheduler")
    told = controlled(pipes()[1], controlnet_conditioning_scale=0.0)
    assert difference(draw(pipes()[1], **told), draw(pipes()[1])) == 0


@pytest.mark.parametrize("feature", ["ControlNet", "T2I-Adapter"])
def test_windows_see_their_part_of_a_picture(feature):
    # What is white at the right only is no news to the windows at the left.
    set_scheduler(pipes(), "DDIMScheduler")
    dark, half = torch.zeros(1, 3, SIZE["height"], SIZE["width"]), torch.zeros(1, 3, SIZE["height"], SIZE["width"])
    half[..., 256:] = 1
    told = {**SHOWN[feature](pipes()[1]), "num_inference_steps": 2, "output_type": "latent"}
    name = "control_image" if feature == "ControlNet" else "adapter_image"
    before, after = (draw(pipes()[1], **told | {name: shown}) for shown in (dark, half))
    assert difference(before[..., :8], after[..., :8]) == 0
    assert difference(before[..., 32:], after[..., 32:]) > 1e-4


def test_what_windows_are_shown_goes_round_about():
    # A picture that begins elsewhere, with what it is shown, is the same one.
    set_scheduler(pipes(), "DDIMScheduler")
    noise = torch.randn(1, 4, 24, 40, generator=torch.Generator().manual_seed(3))
    shown = torch.rand(1, 3, SIZE["height"], SIZE["width"], generator=torch.Generator().manual_seed(4))
    told = controlled(pipes()[1], circular_padding=True, output_type="latent")
    turned, straight = (
        draw(pipes()[1], **told | {"control_image": shown.roll(8 * by, 3)}, latents=noise.roll(by, 3)) for by in (8, 0)
    )
    assert difference(turned.roll(-8, 3), straight) < 1e-4


@pytest.mark.parametrize(("window", "circular"), [((8, 24, 32, 48), True), ((8, 24, 24, 40), False), ((0, 16, 0, 16), True)])
@pytest.mark.parametrize("scale", [8, 1, 0.5, 0.25])
def test_a_view_is_the_same_part_of_maps_of_all_sizes(window, circular, scale):
    top, bottom, left, right = (int(edge * scale) for edge in window)
    values = torch.rand(2, 3, int(24 * scale), int(40 * scale))
    expected = torch.cat([values] * 2, dim=3)[:, :, top:bottom, left:right]
    assert torch.equal(View(window, (24, 40), circular)(values), expected)


@pytest.mark.parametrize("scale", [8, 1, 0.5])
def test_a_view_that_is_larger_than_all_ends_with_it(scale):
    values = torch.rand(2, 3, int(6 * scale), int(10 * scale))
    assert torch.equal(View((0, 16, 0, 16), (6, 10))(values), values)


def test_windows_that_end_within_features_are_refused_before_noise_is_drawn():
    set_scheduler(pipes(), "DDIMScheduler")
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    with pytest.raises(InputError, match=r"in the midst of a feature(.|\n)*3 of 40 latents, of which there are 20 features"):
        draw(pipes()[1], **adapted(pipes()[1]), stride=3, generator=generator)
    assert torch.equal(generator.get_state(), before)


def test_a_guidance_scale_is_a_guidance():
    set_scheduler(pipes(), "DDIMScheduler")
    assert difference(draw(pipes()[1], guidance=ClassifierFreeGuidance(7.5)), draw(pipes()[1])) == 0


@pytest.mark.parametrize("name", EVERY)
def test_guidance_remembers_each_window(name):
    set_scheduler(pipes(), "DDIMScheduler")
    guidance = GUIDANCE[name](pipes()[1])
    settings = {"num_inference_steps": 4, "output_type": "pt", "return_dict": False, "guidance": guidance, **ONE_WINDOW}
    plain = plain_pipe()("a cat", generator=torch.Generator().manual_seed(7), **settings)[0]
    assert difference(draw(pipes()[1], **settings), plain) == 0
    together, alone = (draw(pipes()[1], guidance=guidance, view_batch_size=size) for size in (3, 1))
    assert difference(together, alone) < 1e-4
    assert difference(alone, draw(pipes()[1])) > 1e-4


# ---------------------------------------------------------------- what is wrong

BAD = {
    "gaps": ({"stride": 24}, "stride=24 leaves gaps between windows(.|\n)*at most window_size=16"),
    "no window": ({"window_size": 0}, "window_size=0 is out of range"),
    "no stride": ({"stride": 0}, "stride=0 is out of range"),
    "half a view": ({"view_batch_size": 1.5}, "view_batch_size must be a whole number"),
    "no views": ({"view_batch_size": 0}, "view_batch_size=0 is out of range"),
    "a text for a flag": ({"circular_padding": "yes"}, "circular_padding has the wrong type"),
    "latents of another shape": ({"latents": torch.zeros(1, 4, 8, 8)}, r"\(1, 4, 8, 8\)(.|\n)*\(1, 4, 24, 40\)"),
    "a misspelt keyword": ({"view_batchsize": 2}, "did you mean 'view_batch_size'"),
    "generators of another number": ({"generator": [torch.Generator()] * 3}, "generator: 3 given for 1 pictures"),
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


def test_masks_of_pictures_are_refused():
    pipe = copy.deepcopy(suffuse.StableDiffusionPanoramaPipeline.from_pipe(pair("text")[1]))
    pipe.load_ip_adapter(ip_adapter(pair("text")[0].unet), "", "", image_encoder_folder=None)
    shown = {"ip_adapter_image_embeds": [torch.randn(2, 1, FEATURES)]}
    with pytest.raises(InputError, match="ip_adapter_masks say where in a picture, and a panorama is seen in windows"):
        pipe("a cat", cross_attention_kwargs={"ip_adapter_masks": [torch.ones(1, 1, 8, 8)]}, **shown)
