"""Panoramas: equal the peer's bit for bit where windows fit; windows cover every latent where they do not."""

from __future__ import annotations

from functools import cache, partial
from tempfile import mkdtemp
from pathlib import Path

import diffusers
import pytest
import tiny
import torch
from tasks import align, difference, set_scheduler, picture

import suffuse
from suffuse.diffusion.windows import windows
from suffuse.errors import InputError

WINDOWS = {"window_size": 16, "stride": 8}
SIZE = {"height": 48, "width": 80}  # 24 x 40 latents


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


SIZE = {"height": 192, "width": 320}


def draw(pipe, **options):
    ours = WINDOWS if isinstance(pipe, suffuse.DiffusionPipeline) else {}
    settings = {"prompt": "a cat", "num_inference_steps": 4, "output_type": "pt", "return_dict": False, **SIZE, **ours}
    return pipe(**{**settings, "generator": torch.Generator().manual_seed(7), **options})[0]


OPTIONS = {
    "plain": {},
    "no guidance": {"guidance_scale": 1.0},
    "views together": {"view_batch_size": 3},
    "all views together": {"view_batch_size": 100},
    "round about": {"circular_padding": True},
    "round about, views together": {"circular_padding": True, "view_batch_size": 4},
    "smaller than a window": {"height": 64, "width": 96},
    "round about, smaller than a window": {"width": 96, "circular_padding": True},
    "eta": {"eta": 1.0, "view_batch_size": 2},
    "negative": {"negative_prompt": "rain", "clip_skip": 1},
    "latents": {"output_type": "latent"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_pictures_equal_the_peers(name):
    set_scheduler(pipes(), "DDIMScheduler")
    assert difference(*(draw(pipe, **OPTIONS[name]) for pipe in pipes())) == 0
