"""Guidance is a value of every pipeline that guides: said as one, the scale is what it was; another way draws otherwise."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pytest
import test_alt_diffusion
import test_blip_diffusion
import test_controlnet_xs_pipelines
import test_cycle_diffusion
import test_diffedit
import test_gligen
import test_image_variation
import test_latent_upscaling
import test_ldm3d
import test_paint_by_example
import test_panorama
import test_paradigms
import test_stable_unclip
import test_stable_unclip_text
import test_unconditional_pipelines
import test_upscaling
import torch
from tasks import call, difference, mask, pair, picture, set_scheduler
from test_composition import net, parts, t2i

import suffuse
from suffuse.diffusion.guidance import ClassifierFreeGuidance
from suffuse.diffusion.guidance_interval import GuidanceInterval
from suffuse.diffusion.projected_guidance import AdaptiveProjectedGuidance
from suffuse.diffusion.safe_guidance import SafeGuidance
from suffuse.diffusion.two_scale_guidance import TwoScaleGuidance
from suffuse.diffusion.worse_guidance import AutoGuidance, Skipped, Unattended, WorseGuidance
from suffuse.errors import InputError
from suffuse.pipelines.pipeline import DiffusionPipeline
from suffuse.public_names import PUBLIC, resolve

OWN_WAY = {
    "SemanticStableDiffusionPipeline": "is its guidance: suffuse.SemanticGuidance",
    "StableDiffusionInstructPix2PixPipeline": "guides by text and picture, two scales",
    "StableDiffusionPipelineSafe": "is its guidance: suffuse.SafeGuidance",
    "StableDiffusionPix2PixZeroPipeline": "guides attention by that of another picture",
    "StableDiffusionSAGPipeline": "is its guidance: suffuse.SelfAttentionGuidance",
    "StableDiffusionXLInstructPix2PixPipeline": "guides by text and picture, two scales",
}
"""Pipelines that have a `guidance_scale` and take no `guidance`, and why."""


def guiding() -> dict[str, bool]:
    """Public pipelines with a `guidance_scale`, and whether they take `guidance`."""
    kinds = {name: resolve(name) for name, module in PUBLIC.items() if module.startswith("suffuse.pipelines.")}
    pipes = [kind for kind in kinds.values() if isinstance(kind, type) and issubclass(kind, DiffusionPipeline)]
    keywords = {kind.__name__: inspect.signature(kind.__call__).parameters for kind in pipes}
    return {name: "guidance" in known for name, known in keywords.items() if "guidance_scale" in known}


def test_who_guides_takes_guidance_or_says_why_not():
    assert {name for name, takes in guiding().items() if not takes} == OWN_WAY.keys()


# ---------------------------------------------------------------- a call of each

PICTURE, MASK, CONTROL = {"image": picture()}, {"mask_image": mask()}, {"control_image": picture(seed=3)}
FAMILY: dict[str, tuple[bool, dict[str, Callable[[bool], Any]], dict[str, Any]]] = {
    "StableDiffusionPipeline": (False, {}, {}),
    "StableDiffusionImg2ImgPipeline": (False, {}, PICTURE),
    "StableDiffusionInpaintPipeline": (False, {}, PICTURE | MASK | {"height": 64, "width": 64}),
    "StableDiffusionInpaintPipelineLegacy": (False, {}, PICTURE | MASK),
    "StableDiffusionModelEditingPipeline": (False, {}, {"height": 64, "width": 64}),
    "LatentConsistencyModelPipeline": (False, {}, {"height": 64, "width": 64}),
    "LatentConsistencyModelImg2ImgPipeline": (False, {}, PICTURE),
    "StableDiffusionXLPipeline": (True, {}, {}),
    "StableDiffusionXLImg2ImgPipeline": (True, {}, PICTURE | {"strength": 0.7}),
    "StableDiffusionXLInpaintPipeline": (True, {}, PICTURE | MASK | {"height": 64, "width": 64}),
    "StableDiffusionControlNetPipeline": (False, {"controlnet": net}, {"image": picture(seed=3)}),
    "StableDiffusionControlNetImg2ImgPipeline": (False, {"controlnet": net}, PICTURE | CONTROL),
    "StableDiffusionControlNetInpaintPipeline": (False, {"controlnet": net}, PICTURE | MASK | CONTROL),
    "StableDiffusionXLControlNetPipeline": (True, {"controlnet": net}, {"image": picture(seed=3)}),
    "StableDiffusionXLControlNetImg2ImgPipeline": (True, {"controlnet": net}, PICTURE | CONTROL),
    "StableDiffusionXLControlNetInpaintPipeline": (True, {"controlnet": net}, PICTURE | MASK | CONTROL),
    "StableDiffusionAdapterPipeline": (False, {"adapter": t2i}, PICTURE),
    "StableDiffusionXLAdapterPipeline": (True, {"adapter": t2i}, PICTURE),
    "StableDiffusionGLIGENPipeline": (
        False,
        {},
        {"gligen_boxes": [[0.1, 0.1, 0.6, 0.7]], "gligen_phrases": ["dog"], "height": 64, "width": 64},
    ),
    "StableDiffusionKDiffusionPipeline": (False, {}, {"height": 64, "width": 64}),
    "StableDiffusionXLKDiffusionPipeline": (True, {}, {"height": 64, "width": 64}),
    "StableDiffusionAttendAndExcitePipeline": (
        False,
        {},
        {"token_indices": [2], "max_iter_to_alter": 1, "thresholds": {}, "attn_res": (16, 16), "height": 64, "width": 64},
    ),
}
"""Class → whether it is one of XL, components besides those of text to image, keywords of a call."""


@cache
def of_family(name: str) -> Any:
    xl, components, _ = FAMILY[name]
    plain = getattr(suffuse, "StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline")(**parts(xl))
    made = getattr(suffuse, name).from_pipe(plain, **{own: make(xl) for own, make in components.items()})
    made.set_progress_bar_config(disable=True)
    return made


def drawn_by(name: str, **options: Any) -> Any:
    given = {"prompt": "a cat", "num_inference_steps": 4, "output_type": "pt", "return_dict": False, **FAMILY[name][2]}
    return of_family(name)(**{**given, "generator": torch.Generator().manual_seed(7), **options})[0]


def of_module(module: Any, *which: str) -> Callable[..., Any]:
    return lambda **options: module.call(module.pair(*which)[1], **options)


def of_kind(kind: str) -> Callable[..., Any]:
    module = test_unconditional_pipelines
    return lambda **options: module.call(module.pair(kind)[1], kind, **options)


def by_ddim(module: Any, **options: Any) -> Any:
    set_scheduler(module.pipes(), "DDIMScheduler")
    return module.draw(module.pipes()[1], **options)


DRAWN: dict[str, Callable[..., Any]] = {
    **{name: partial(drawn_by, name) for name in FAMILY},
    "StableDiffusionDepth2ImgPipeline": lambda **options: call(pair("depth")[1], "depth", **options),
    "CycleDiffusionPipeline": lambda **options: by_ddim(test_cycle_diffusion, **options),
    "StableDiffusionDiffEditPipeline": lambda **options: test_diffedit.draw(test_diffedit.pipes()[1], **options),
    "StableDiffusionPanoramaPipeline": lambda **options: test_panorama.draw(test_panorama.pipes()[1], **options),
    "StableDiffusionParadigmsPipeline": lambda **options: test_paradigms.draw(test_paradigms.pipes()[1], **options),
    "StableDiffusionLDM3DPipeline": lambda **options: test_ldm3d.draw(test_ldm3d.pipes()[1], **options).rgb,
    "StableDiffusionGLIGENTextImagePipeline": of_module(test_gligen, "pictures"),
    "StableDiffusionControlNetXSPipeline": of_module(test_controlnet_xs_pipelines, "text"),
    "StableDiffusionXLControlNetXSPipeline": of_module(test_controlnet_xs_pipelines, "xl text"),
    "StableDiffusionImageVariationPipeline": of_module(test_image_variation),
    "PaintByExamplePipeline": of_module(test_paint_by_example),
    "StableDiffusionUpscalePipeline": of_module(test_upscaling),
    "StableDiffusionLatentUpscalePipeline": of_module(test_latent_upscaling),
    "StableUnCLIPImg2ImgPipeline": of_module(test_stable_unclip),
    "StableUnCLIPPipeline": of_module(test_stable_unclip_text),
    "LDMTextToImagePipeline": of_kind("ldm text"),
    "DiTPipeline": of_kind("dit, variance"),
}
DRAWN |= {name: of_module(test_alt_diffusion, name) for name in ("AltDiffusionPipeline", "AltDiffusionImg2ImgPipeline")}
DRAWN |= {name: of_module(test_blip_diffusion, name) for name in ("BlipDiffusionPipeline", "BlipDiffusionControlNetPipeline")}


@pytest.fixture(autouse=True)
def quiet_peer():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="diffusers.*")
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


def test_every_one_is_tried():
    assert DRAWN.keys() == guiding().keys() - OWN_WAY.keys()


@pytest.mark.parametrize("name", DRAWN)
def test_said_as_a_value_the_scale_is_what_it_was(name):
    draw = DRAWN[name]
    plain = draw(guidance_scale=60.0)  # as prompts say little to tiny models
    assert difference(draw(guidance=ClassifierFreeGuidance(60.0)), plain) == 0
    assert difference(draw(guidance=AdaptiveProjectedGuidance(60.0, longest=1e-3)), plain) > 1e-4


# ---------------------------------------------------------------- where guidance has a form of its own

NEW = [
    "DiTPipeline",
    "LDMTextToImagePipeline",
    "BlipDiffusionPipeline",
    "StableDiffusionUpscalePipeline",
    "PaintByExamplePipeline",
]
"""Pipelines of other kinds of models and of what they are told."""
BELOW = {"DiTPipeline": ["transformer_blocks.0"]}


@pytest.mark.parametrize("name", NEW)
def test_a_part_out_of_use_is_guided_away_from(name):
    draw, below = DRAWN[name], BELOW.get(name, ["mid_block"])
    made = [draw(guidance=WorseGuidance(6.0, worsening=kind(below))) for kind in (Unattended, Skipped)]
    made += [draw(guidance_scale=6.0), draw(guidance=GuidanceInterval(ClassifierFreeGuidance(6.0), 0.0, 0.5))]
    assert all(difference(one, other) > 1e-4 for index, one in enumerate(made) for other in made[:index])
    nothing = draw(guidance=WorseGuidance(6.0, worse_scale=0.0, worsening=Skipped(below)))
    assert difference(nothing, made[2]) == 0


def model_of(name: str) -> Any:
    """The model that predicts in a pipeline that `DRAWN` calls by a module of tests."""
    kinds = {"LDMTextToImagePipeline": "ldm text", "DiTPipeline": "dit, variance"}
    pipe = (
        test_unconditional_pipelines.pair(kinds[name])[1]
        if name in kinds
        else test_blip_diffusion.pair(name)[1]
        if "Blip" in name
        else (test_upscaling if "Upscale" in name else test_paint_by_example).pair()[1]
    )
    return pipe.transformer if name == "DiTPipeline" else pipe.unet


@pytest.mark.parametrize("name", NEW)
def test_a_worse_model_is_guided_away_from(name):
    draw, worse = DRAWN[name], copy.deepcopy(model_of(name))
    plain = draw(guidance_scale=1.0)
    assert difference(draw(guidance=AutoGuidance(3.0, worse)), plain) < 1e-4
    with torch.no_grad():
        for parameter in worse.parameters():
            parameter.mul_(0.8)
    assert difference(draw(guidance=AutoGuidance(3.0, worse)), plain) > 1e-4


@pytest.mark.parametrize("kind", ["ddpm", "ddim", "pndm"])
def test_models_that_are_told_nothing_are_guided_by_worse_ones(kind):
    draw, worse = of_kind(kind), copy.deepcopy(test_unconditional_pipelines.pair(kind)[1].unet)
    plain = draw()
    assert difference(draw(guidance=AutoGuidance(3.0, worse)), plain) < 1e-4
    with torch.no_grad():
        for parameter in worse.parameters():
            parameter.mul_(0.8)
    assert difference(draw(guidance=AutoGuidance(3.0, worse)), plain) > 1e-4
    with pytest.raises(InputError, match="needs one that is told something"):
        draw(guidance=ClassifierFreeGuidance(3.0))


def test_below_one_what_is_unlike_the_prompt_is_only_drawn_by_the_pipelines_own_way():
    draw = DRAWN["LDMTextToImagePipeline"]
    alone = draw(guidance_scale=1.0)
    assert difference(draw(guidance_scale=0.3), alone) > 1e-4
    assert difference(draw(guidance=ClassifierFreeGuidance(0.3)), alone) == 0


@dataclass
class Reversed(ClassifierFreeGuidance):
    """Asks for its branches in another order."""

    @property
    def branches(self) -> tuple[str, ...]:
        return super().branches[::-1]


@pytest.mark.parametrize("name", NEW[:3])
def test_branches_have_names_and_no_places(name):
    draw = DRAWN[name]
    assert difference(draw(guidance=Reversed(6.0)), draw(guidance_scale=6.0)) < 1e-4


# ---------------------------------------------------------------- what cannot be

WRONG = {
    "a text where none is read": ("PaintByExamplePipeline", lambda: SafeGuidance(6.0), "PaintByExamplePipeline reads none"),
    "a text for a class": ("DiTPipeline", lambda: SafeGuidance(6.0), "DiTPipeline reads none"),
    "a branch that nobody tells": (
        "StableDiffusionUpscalePipeline",
        lambda: TwoScaleGuidance(6.0, 1.5),
        r"a branch that nothing is told(.|\n)*image",
    ),
    "a part that is not there": (
        "DiTPipeline",
        lambda: WorseGuidance(6.0),
        r"no transformer block is below 'mid_block'(.|\n)*transformer_blocks.0",
    ),
    "another model": (
        "DiTPipeline",
        lambda: AutoGuidance(2.0, parts(False)["unet"]),
        "the worse model is no .*Transformer2DModel",
    ),
    "a number": ("BlipDiffusionPipeline", lambda: 6.0, "guidance combines no predictions"),
}


@pytest.mark.parametrize("name", WRONG)
def test_guidance_that_cannot_be_is_refused_before_anything_is_drawn(name):
    pipeline, make, message = WRONG[name]
    generator = torch.Generator().manual_seed(7)
    before = generator.get_state()
    with pytest.raises(InputError, match=message):
        DRAWN[pipeline](guidance=make(), generator=generator)
    assert torch.equal(before, generator.get_state())
