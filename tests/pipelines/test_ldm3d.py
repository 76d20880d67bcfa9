"""LDM3D: colours equal the peer's bit for bit; depth has the sixteen bits of its two channels."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import diffusers
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from tasks import align, difference, picture, set_scheduler

import suffuse
from suffuse.diffusion.guidance import ClassifierFreeGuidance
from suffuse.errors import SuffuseError
from suffuse.pipelines.ldm3d import LDM3DPipelineOutput
from suffuse.processing.depth_image import VaeImageProcessorLDM3D

SIZE = {"height": 64, "width": 48}


def made(channels: int = 6, **parts):
    """(the peer's pipeline, ours) from one folder."""
    path = Path(mkdtemp(prefix="suffuse-"))
    components = tiny.stable_diffusion(path / "tokenizer") | {"image_encoder": None} | parts
    torch.manual_seed(11)
    components["vae"] = diffusers.AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        block_out_channels=[32, 64],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
    )
    checked = components["safety_checker"] is not None
    diffusers.StableDiffusionLDM3DPipeline(**components, requires_safety_checker=checked).save_pretrained(path / "pipeline")
    both = tuple(library.StableDiffusionLDM3DPipeline.from_pretrained(path / "pipeline") for library in (diffusers, suffuse))
    for pipe in both:
        pipe.set_progress_bar_config(disable=True)
    align(both[0])
    return both


@cache
def pipes():
    return made()


def draw(pipe, **options):
    told = {"prompt": "a cat", "num_inference_steps": 4, "output_type": "np", **SIZE}
    return pipe(**{**told, "generator": torch.Generator().manual_seed(7), **options})


OPTIONS = {
    "plain": {},
    "no guidance": {"guidance_scale": 1.0},
    "several": {"prompt": ["a cat", "a dog"], "num_images_per_prompt": 2, "negative_prompt": ["rain", "snow"]},
    "rescaled": {"guidance_rescale": 0.7},
    "eta": {"eta": 1.0},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_colours_equal_the_peers(name):
    set_scheduler(pipes(), "DDIMScheduler")
    theirs, ours = (draw(pipe, **OPTIONS[name]) for pipe in pipes())
    assert difference(theirs.rgb, ours.rgb) == 0


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated:DeprecationWarning")
def test_four_channels_equal_the_peers():
    both = made(channels=4)
    theirs, ours = (draw(pipe) for pipe in both)
    assert difference(theirs.rgb, ours.rgb) == 0
    assert difference(theirs.depth, ours.depth) == 0
    first = draw(both[1], output_type="pil").depth[0]
    assert np.array_equal(np.asarray(first), (ours.depth[0, ..., 0] * 65535).astype(np.uint16))


def test_depth_has_sixteen_bits():
    # The peer puts both bytes into one; what six channels say is taken from the decoder here.
    set_scheduler(pipes(), "DDIMScheduler")
    pipe = pipes()[1]
    latents = draw(pipe, output_type="latent").rgb
    decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample.detach()
    channels = (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    octets = (channels * 255).round().astype(np.int64)
    pictures = draw(pipe, output_type="pil")
    assert pictures.depth[0].mode == "I;16"
    assert np.array_equal(np.asarray(pictures.depth[0]), octets[0, ..., 4] * 256 + octets[0, ..., 5])
    assert np.array_equal(np.asarray(pictures.rgb[0]), octets[0, ..., :3])
    assert difference(draw(pipe).depth, channels[..., 4] * 256 + channels[..., 5]) == 0
    tensors = draw(pipe, output_type="pt")
    assert tensors.rgb.shape == (1, 3, 64, 48)
    assert difference(tensors.depth, draw(pipe).depth) == 0


def test_results_are_named():
    set_scheduler(pipes(), "DDIMScheduler")
    assert isinstance(draw(pipes()[1]), LDM3DPipelineOutput)
    (rgb, depth), flagged = draw(pipes()[1], return_dict=False)
    assert rgb.shape == (1, 64, 48, 3)
    assert depth.shape == (1, 64, 48)
    assert flagged is None


@pytest.mark.filterwarnings("ignore:.*NSFW.*", "ignore:.*nsfw.*", "ignore:.*safety.*")
def test_the_safety_checker_sees_the_colours():
    both = made(safety_checker=tiny.safety_checker(), feature_extractor=tiny.image_processor())
    pipe = both[1]
    seen = draw(pipe)
    assert len(seen.nsfw_content_detected) == 1
    for name in ("concept_embeds_weights", "special_care_embeds_weights"):
        getattr(pipe.safety_checker, name).data.fill_(-1)
    blanked = draw(pipe)
    assert blanked.nsfw_content_detected == [True]
    assert (blanked.rgb.max(), blanked.depth.max()) == (0, 0)


def test_features_beside():
    set_scheduler(pipes(), "DDIMScheduler")
    value = draw(pipes()[1], guidance=ClassifierFreeGuidance(5.0)).rgb
    assert difference(value, draw(pipes()[1]).rgb) == 0
    net = suffuse.ControlNetModel.from_unet(pipes()[1].unet, conditioning_embedding_out_channels=(8, 16))
    torch.manual_seed(4)
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    assert difference(draw(pipes()[1], controlnet=net, control_image=picture(64, 48)).rgb, value) > 1e-4


def test_runs_are_kept_and_resumed(tmp_path):
    set_scheduler(pipes(), "DDIMScheduler")
    whole = draw(pipes()[1], generator=None, seed=3, save_run=str(tmp_path / "{step}.run"))
    assert difference(whole.depth, pipes()[1](resume=tmp_path / "2.run").depth) == 0


# ---------------------------------------------------------------- the processor


def test_pictures_of_depth_come_back():
    processor, depth = VaeImageProcessorLDM3D(vae_scale_factor=2), np.arange(64 * 48, dtype=np.uint16).reshape(64, 48) * 21
    rgb, values = processor.preprocess(picture(64, 48), Image.fromarray(depth))
    assert (rgb.shape, values.shape) == ((1, 3, 64, 48), (1, 1, 64, 48))
    assert np.abs((values.numpy()[0, 0] / 2 + 0.5) * 65535 - depth).max() < 1
    assert processor.config.vae_scale_factor == 2


def test_bytes_become_sixteen_bits():
    octets = np.zeros((1, 2, 3), np.uint8)
    octets[0, :, 1:] = [[255, 255], [1, 2]]
    assert VaeImageProcessorLDM3D.rgblike_to_depthmap(octets).tolist() == [[65535, 258]]
    assert VaeImageProcessorLDM3D.rgblike_to_depthmap(torch.from_numpy(octets)).tolist() == [[65535, 258]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda processor: processor.preprocess([picture()] * 2, [Image.new("I;16", (64, 64))]), "depth: 1 given for 2 pictures"),
        (lambda processor: processor.preprocess(picture(), np.zeros((8, 8), np.float32)), "another size"),
        (lambda processor: processor.postprocess(torch.zeros(1, 3, 8, 8)), "no depth among the channels"),
        (lambda processor: processor.postprocess(torch.zeros(1, 6, 8, 8), "jpg"), "pil, np, pt, latent"),
    ],
)
def test_what_cannot_be_meant_is_refused(call, message):
    with pytest.raises(SuffuseError, match=message):
        call(VaeImageProcessorLDM3D())


BAD = {
    "another format": ({"output_type": "exr"}, "pil, np, pt, latent"),
    "a size that is none": ({"height": 63}, "height=63 is not divisible by 8"),
    "a misspelt keyword": ({"guidance": 3}, "guidance combines no predictions"),
    "a picture to begin with": ({"image": picture()}, "image"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_refused_before_anything_is_drawn(name):
    options, message = BAD[name]
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    with pytest.raises(SuffuseError, match=message):
        draw(pipes()[1], **{"generator": generator, **options})
    assert torch.equal(generator.get_state(), before)
