"""What may be passed to a call of a tiny pipeline: a ControlNet, a T2I-Adapter, ways to guide."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tasks import picture

import suffuse
from suffuse.diffusion.guidance import ClassifierFreeGuidance, Guidance
from suffuse.diffusion.guidance_interval import GuidanceInterval
from suffuse.diffusion.projected_guidance import AdaptiveProjectedGuidance, TangentialGuidance
from suffuse.diffusion.safe_guidance import SafeGuidance
from suffuse.diffusion.self_attention_guidance import SelfAttentionGuidance
from suffuse.diffusion.semantic_guidance import Concept, SemanticGuidance
from suffuse.diffusion.worse_guidance import AutoGuidance, Skipped, Unattended, WorseGuidance
from suffuse.diffusion.zero_star_guidance import ZeroStarGuidance


def controlnet(pipe: Any, seed: int = 5) -> Any:
    """A ControlNet for pictures of the pipeline."""
    channels = (8, 16, 16, 16)[: int(math.log2(pipe.vae_scale_factor)) + 1]
    made = suffuse.ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=channels).eval()
    torch.manual_seed(seed)
    for parameter in made.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter.data, std=0.3)
    return made


def adapter(pipe: Any) -> Any:
    """A T2I-Adapter whose features are of half as many rows and columns as latents, as a first block without attention takes."""
    torch.manual_seed(6)
    options = {"adapter_type": "full_adapter_xl", "downscale_factor": 2 * pipe.vae_scale_factor, "num_res_blocks": 1}
    return suffuse.T2IAdapter(channels=[32, 64], **options).eval()


def controlled(pipe: Any, **options: Any) -> dict[str, Any]:
    """The values of a call with a ControlNet."""
    return {"controlnet": controlnet(pipe), "control_image": picture(seed=3), **options}


def adapted(pipe: Any, **options: Any) -> dict[str, Any]:
    """The values of a call with a T2I-Adapter."""
    return {"adapter": adapter(pipe), "adapter_image": picture(seed=4), **options}


def worse(pipe: Any) -> Any:
    """A UNet like that of the pipeline, with other weights."""
    other = suffuse.UNet2DConditionModel.from_config(pipe.unet.config).eval()
    other.load_state_dict({name: tensor * 0.9 for name, tensor in pipe.unet.state_dict().items()})
    return other


GUIDANCE: dict[str, Callable[[Any], Guidance]] = {
    "rescaled": lambda pipe: ClassifierFreeGuidance(6.0, rescale=0.5),
    "projected": lambda pipe: AdaptiveProjectedGuidance(6.0, parallel=0.3, longest=15.0),
    "with momentum": lambda pipe: AdaptiveProjectedGuidance(6.0, momentum=-0.5),
    "tangential": lambda pipe: TangentialGuidance(6.0),
    "standing still": lambda pipe: ZeroStarGuidance(6.0, still=1),
    "away from a blind one": lambda pipe: WorseGuidance(6.0, worsening=Unattended(("mid_block",))),
    "away from a short one": lambda pipe: WorseGuidance(1.0, worsening=Skipped(("mid_block",))),
    "away from another": lambda pipe: AutoGuidance(2.0, worse(pipe)),
    "in an interval": lambda pipe: GuidanceInterval(AdaptiveProjectedGuidance(6.0, momentum=-0.5), 0.25, 0.75),
    "away from a blur": lambda pipe: SelfAttentionGuidance(6.0, sag_scale=0.5),
    "towards a concept": lambda pipe: SemanticGuidance(
        6.0, [Concept("a dog", warmup=1), Concept("rain", reverse=True, warmup=2)]
    ),
    "away from harm": lambda pipe: SafeGuidance(6.0, "rain", warmup=1, threshold=1.0),
}
"""Name → a guidance that draws another picture than a guidance scale does."""

QUICKLY = ("with momentum", "in an interval", "towards a concept", "away from a blind one")
"""Those in which all that a loop may get wrong of guidance is to be seen: memory, steps, branches, further questions."""
EVERY = [name if name in QUICKLY else pytest.param(name, marks=pytest.mark.slow) for name in GUIDANCE]
