"""Time of calls of families that bend Stable Diffusion, peer and suffuse in turn in one process, with the same random weights.

    python benchmarks/families.py [NAME …] [--shape tiny] [--size 256] [--steps 8] [--repeats 5]

The models are those of the tests; `--shape full` gives the UNet the shape of Stable Diffusion 1.5, `--shape wide` the same with a
quarter of its channels. Needs the test extra, and diffusers, which it compares with.
"""

from __future__ import annotations

import argparse
import inspect
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image

import suffuse

sys.path.append(str(Path(__file__).parent.parent / "tests"))
import tiny

BLOCKS = {
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "layers_per_block": 2,
    "attention_head_dim": 8,
}
SHAPES = {
    "tiny": {},
    "wide": {**BLOCKS, "block_out_channels": (80, 160, 320, 320), "norm_num_groups": 16},
    "full": {**BLOCKS, "block_out_channels": (320, 640, 1280, 1280), "norm_num_groups": 32},
}
"""What is different from the UNet of the tests."""
LARGE = {"block_out_channels": (64, 128, 256), "down_block_types": ("DownBlock2D",) + ("AttnDownBlock2D",) * 2}
LARGE |= {"up_block_types": ("AttnUpBlock2D",) * 2 + ("UpBlock2D",), "layers_per_block": 2}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8))


Parts = dict[str, Any]


def stable_diffusion(folder: Path, shape: str, unet: Parts) -> Parts:
    """Components of Stable Diffusion."""
    parts = tiny.stable_diffusion(folder / "tokenizer")
    # Windows of panoramas are counted in latents of eight pixels.
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    parts["vae"] = diffusers.AutoencoderKL(block_out_channels=[8] * 4, norm_num_groups=8, **blocks)
    parts["unet"] = tiny.unet(**{**SHAPES[shape], **unet})
    return parts


def with_inverse(folder: Path, shape: str, unet: Parts) -> Parts:
    """With a scheduler that goes from pictures to noise, too."""
    return stable_diffusion(folder, shape, unet) | {"inverse_scheduler": diffusers.DDIMInverseScheduler(**BETAS)}


def with_low_resolution(folder: Path, shape: str, unet: Parts) -> Parts:
    """With a scheduler that puts noise onto small pictures, too."""
    return stable_diffusion(folder, shape, unet) | {"low_res_scheduler": diffusers.DDPMScheduler()}


def pixels(folder: Path, shape: str, unet: Parts) -> Parts:
    """A UNet alone."""
    return {"unet": tiny.unconditional_unet(**{**({} if shape == "tiny" else LARGE), **unet})}


def quantized(folder: Path, shape: str, unet: Parts) -> Parts:
    """A UNet and an autoencoder that quantizes."""
    return {"vqvae": tiny.vq_model(), **pixels(folder, shape, unet)}


def classes(folder: Path, shape: str, unet: Parts) -> Parts:
    """A transformer of classes."""
    large = {"num_attention_heads": 6, "attention_head_dim": 64, "num_layers": 6, "sample_size": 32}
    return {"transformer": tiny.transformer(out_channels=8, **({} if shape == "tiny" else large)), "vae": tiny.vae()}


@dataclass(frozen=True)
class Family:
    """A class, what it is made of, and what is to be said to it."""

    pipeline: str
    call: dict[str, Any] = field(default_factory=dict)
    unet: dict[str, Any] = field(default_factory=dict)
    scheduler: str = "DDIMScheduler"
    pictured: bool = False
    parts: Callable[[Path, str, Parts], Parts] = stable_diffusion
    run: Callable[..., Any] = lambda pipe, **call: pipe(**call)


def edited(pipe: Any, **call: Any) -> Any:
    """A mask, an inversion and an edit."""
    seeded, image = call.pop("generator"), call.pop("image")
    common = {"generator": seeded, "num_inference_steps": call["num_inference_steps"]}
    mask = pipe.generate_mask(image=image, source_prompt="a cat", target_prompt="a dog", num_maps_per_mask=2, **common)
    inverted = pipe.invert(image=image, prompt="a cat", **common).latents
    return pipe(mask_image=mask, image_latents=inverted, generator=seeded, **call)


def unprompted(pipe: Any, **call: Any) -> Any:
    """Pictures of nothing in particular."""
    return pipe(generator=call["generator"], num_inference_steps=call["num_inference_steps"], output_type="np")


def classified(pipe: Any, **call: Any) -> Any:
    """Pictures of classes."""
    return pipe([1, 2], generator=call["generator"], num_inference_steps=call["num_inference_steps"], output_type="np")


FAMILIES = {
    "text to image": Family("StableDiffusionPipeline"),
    "InstructPix2Pix": Family("StableDiffusionInstructPix2PixPipeline", unet={"in_channels": 8}, pictured=True),
    "latent consistency": Family("LatentConsistencyModelPipeline", unet={"time_cond_proj_dim": 32}, scheduler="LCMScheduler"),
    "self-attention guidance": Family("StableDiffusionSAGPipeline", {"sag_scale": 0.75}),
    "semantic guidance": Family(
        "SemanticStableDiffusionPipeline",
        {"editing_prompt": ["a hat", "a beard"], "edit_guidance_scale": [4.0, 5.0], "edit_warmup_steps": [1, 1]},
    ),
    "safe": Family("StableDiffusionPipelineSafe"),
    "attend and excite": Family(
        "StableDiffusionAttendAndExcitePipeline", {"token_indices": [2], "max_iter_to_alter": 4, "thresholds": {}}
    ),
    "panorama": Family("StableDiffusionPanoramaPipeline", {"height": 512, "width": 576, "view_batch_size": 2}),
    "DiffEdit": Family("StableDiffusionDiffEditPipeline", pictured=True, parts=with_inverse, run=edited),
    "CycleDiffusion": Family("CycleDiffusionPipeline", {"source_prompt": "a cat", "strength": 1.0}, pictured=True),
    "ParaDiGMS": Family("StableDiffusionParadigmsPipeline", {"parallel": 4}, scheduler="DDIMParallelScheduler"),
    "legacy inpainting": Family("StableDiffusionInpaintPipelineLegacy", {"mask_image": PICTURE}, pictured=True),
    "model editing": Family("StableDiffusionModelEditingPipeline"),
    "upscaling by four": Family(
        "StableDiffusionUpscalePipeline",
        {"image": PICTURE.resize((64, 64))},
        unet={"in_channels": 7, "num_class_embeds": 1000},
        pictured=True,
        parts=with_low_resolution,
    ),
    "boxes": Family(
        "StableDiffusionGLIGENPipeline",
        {"gligen_boxes": [[0.1, 0.1, 0.6, 0.7]], "gligen_phrases": ["a dog"], "gligen_scheduled_sampling_beta": 1.0},
        unet={"attention_type": "gated"},
    ),
    "DDPM": Family("DDPMPipeline", scheduler="DDPMScheduler", parts=pixels, run=unprompted),
    "DDIM": Family("DDIMPipeline", parts=pixels, run=unprompted),
    "PNDM": Family("PNDMPipeline", scheduler="PNDMScheduler", parts=pixels, run=unprompted),
    "consistency models": Family(
        "ConsistencyModelPipeline", scheduler="CMStochasticIterativeScheduler", parts=pixels, run=unprompted
    ),
    "unconditional latents": Family("LDMPipeline", parts=quantized, run=unprompted),
    "DiT": Family("DiTPipeline", parts=classes, run=classified),
}


def pipelines(family: Family, options: argparse.Namespace, folder: Path) -> list[Any]:
    """The peer's pipeline and ours, of one checkpoint."""
    parts, scheduler = family.parts(folder, options.shape, family.unet), getattr(diffusers, family.scheduler)
    known = inspect.signature(scheduler).parameters
    parts["scheduler"] = scheduler(**{name: value for name, value in BETAS.items() if name in known})
    known = inspect.signature(getattr(diffusers, family.pipeline)).parameters
    without = {"requires_safety_checker": False, "safety_checker": None, "image_encoder": None}
    without = {name: value for name, value in without.items() if name in known}
    getattr(diffusers, family.pipeline)(**parts | without).save_pretrained(folder / "pipeline")
    made = [getattr(library, family.pipeline).from_pretrained(folder / "pipeline", **without) for library in (diffusers, suffuse)]
    for pipe in made:
        pipe.set_progress_bar_config(disable=True)
    return made


def seconds(pipe: Any, family: Family, options: argparse.Namespace) -> float:
    """How long one call takes."""
    call: dict[str, Any] = {"prompt": "a cat with a hat", "num_inference_steps": options.steps, "output_type": "latent"}
    if family.pictured:
        call["image"] = PICTURE.resize((options.size, options.size))
    else:
        call |= {"height": options.size, "width": options.size}
    call |= family.call
    began = time.perf_counter()
    family.run(pipe, generator=torch.Generator().manual_seed(0), **call)
    return time.perf_counter() - began


def one_round(peer: Any, ours: Any, family: Family, options: argparse.Namespace, turn: int) -> tuple[float, float]:
    """How long the peer and we take; who begins, changes from turn to turn."""
    theirs = seconds(peer, family, options) if turn % 2 else None
    mine = seconds(ours, family, options)
    return seconds(peer, family, options) if theirs is None else theirs, mine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(FAMILIES), metavar="NAME", help=", ".join(FAMILIES))
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in options.names:
        family = FAMILIES[name]
        with tempfile.TemporaryDirectory() as folder:
            try:
                peer, ours = pipelines(family, options, Path(folder))
                rounds = [one_round(peer, ours, family, options, turn) for turn in range(options.repeats + 1)][1:]
            except AttributeError as error:
                print(f"{name:26} {error}")
                continue
        ratios = [mine / theirs for theirs, mine in rounds]
        theirs, mine = (statistics.median(times) for times in zip(*rounds, strict=True))
        print(f"{name:26} {theirs:7.3f} s  {mine:7.3f} s   ratio {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
