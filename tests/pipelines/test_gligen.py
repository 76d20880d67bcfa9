"""Things in boxes: equal to the peer's, bit for bit, for phrases, pictures, and a picture kept around them."""

from __future__ import annotations

import copy
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import torch
from diffusers.pipelines.stable_diffusion import CLIPImageProjection as PeersProjection
from tasks import align, difference, picture, set_scheduler
from transformers import CLIPProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

import suffuse
from suffuse.diffusion.conditioning import Conditioning, ModelCall
from suffuse.diffusion.grounding import Grounding, around_boxes
from suffuse.diffusion.loop import Step
from suffuse.errors import ConfigError, InputError, LimitError
from suffuse.pipelines.gligen.boxes import centre

CLASSES = {
    "phrases": "StableDiffusionGLIGENPipeline",
    "inpainting": "StableDiffusionGLIGENPipeline",
    "pictures": "StableDiffusionGLIGENTextImagePipeline",
    "pictures inpainting": "StableDiffusionGLIGENTextImagePipeline",
}
BOXES = [[0.1, 0.2, 0.5, 0.6], [0.5, 0.3, 0.9, 0.75]]
SHOWN = {"gligen_images": [picture(40, 40, seed=5), picture(32, 48, seed=6)]}
AROUND = {"gligen_inpaint_image": picture(64, 64, seed=8)}


@pytest.fixture(autouse=True)
def quiet_peer():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="diffusers.*")
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


def gated(channels: int = 4, pictured: bool = False) -> diffusers.UNet2DConditionModel:
    """A UNet whose gates are open."""
    unet = tiny.unet(channels, attention_type="gated-text-image" if pictured else "gated")
    torch.manual_seed(20)
    for name, parameter in unet.named_parameters():
        if "alpha_" in name or "null_" in name:
            torch.nn.init.normal_(parameter, std=0.7)
    return unet


@cache
def folder(kind: str) -> Path:
    path, pictured = Path(mkdtemp(prefix="suffuse-")), "pictures" in kind
    parts = tiny.stable_diffusion(path / "tokenizer")
    parts["unet"] = gated(9 if "inpainting" in kind else 4, pictured)
    parts["vae"].register_to_config(sample_size=64)
    parts["vae"].sample_size = 64
    if pictured:
        torch.manual_seed(21)
        sizes = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
        vision = CLIPVisionConfig(**sizes, image_size=32, patch_size=8, projection_dim=32)
        parts |= {
            "image_encoder": CLIPVisionModelWithProjection(vision).eval(),
            "image_project": PeersProjection(32),
            "processor": CLIPProcessor(tiny.image_processor(), parts["tokenizer"]),
        }
    getattr(diffusers, CLASSES[kind])(**parts, requires_safety_checker=False).save_pretrained(path / "pipeline")
    return path / "pipeline"


@cache
def pair(kind: str) -> tuple[Any, Any]:
    """(the peer's pipeline, ours), loaded from one folder."""
    pipes = tuple(getattr(library, CLASSES[kind]).from_pretrained(folder(kind)) for library in (diffusers, suffuse))
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    align(pipes[0])
    return pipes


def call(pipe: Any, **options: Any) -> Any:
    if options.get("generator") == "list":
        options["generator"] = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    told = {"gligen_phrases": ["a cat", "one big dog"], "gligen_boxes": BOXES, "height": 64, "width": 48}
    settings = {"prompt": "two animals", "num_inference_steps": 4, "output_type": "np", "return_dict": False, **told}
    return pipe(**{**settings, "generator": torch.Generator().manual_seed(7), **options})[0]


def same(kind: str, scheduler: str = "DDIMScheduler", **options: Any) -> bool:
    set_scheduler(pair(kind), scheduler)
    return difference(*(call(pipe, **copy.copy(options)) for pipe in pair(kind))) == 0


@pytest.mark.parametrize(
    "scheduler", ["DDIMScheduler", "PNDMScheduler", "HeunDiscreteScheduler", "EulerAncestralDiscreteScheduler"]
)
@pytest.mark.parametrize("kind", ["phrases", "pictures"])
def test_every_kind_of_scheduler(kind, scheduler):
    assert same(kind, scheduler, gligen_scheduled_sampling_beta=0.6, **SHOWN if kind == "pictures" else {})


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no guidance": {"guidance_scale": 1.0},
    "negative prompt": {"negative_prompt": "a bird"},
    "several": {"num_images_per_prompt": 2},
    "two prompts": {"prompt": ["two animals", "a zoo"], "num_images_per_prompt": 2},
    "a generator a picture": {"num_images_per_prompt": 2, "generator": "list"},
    "one box": {"gligen_phrases": ["a cat"], "gligen_boxes": BOXES[:1]},
    "as many boxes as there may be": {"gligen_phrases": ["a cat"] * 30, "gligen_boxes": BOXES[:1] * 30},
    "the trained size": {"height": None, "width": None},
    "latents in": {"latents": torch.randn(1, 4, 32, 24, generator=torch.Generator().manual_seed(1))},
    "latents out": {"output_type": "latent"},
    "pictures out": {"output_type": "pil"},
}
PARTS: dict[str, dict[str, Any]] = {
    f"boxes in {part} of the steps": {"gligen_scheduled_sampling_beta": part} for part in (0, 0.5, 1)
}
PICTURED: dict[str, dict[str, Any]] = {
    "pictures": SHOWN,
    "pictures alone": SHOWN | {"gligen_phrases": None},
    "a phrase here, a picture there": {"gligen_phrases": ["a cat", None], "gligen_images": [None, picture(40, 40, seed=5)]},
    "phrases that do not count": SHOWN | {"input_phrases_mask": 0},
    "one picture that does not count": SHOWN | {"input_images_mask": [0, 1]},
    "longer vectors": SHOWN | {"gligen_normalize_constant": 40.0},
    "no guidance with pictures": SHOWN | {"guidance_scale": 1.0},
}
CASES = [("phrases", name, options) for name, options in (OPTIONS | PARTS).items()]
CASES += [("pictures", name, options) for name, options in (OPTIONS | PICTURED).items()]


@pytest.mark.parametrize(("kind", "name", "options"), CASES, ids=[f"{kind}: {name}" for kind, name, _ in CASES])
def test_every_option(kind, name, options):
    assert same(kind, **options)


def test_boxes_are_told_in_the_first_part_of_the_steps():
    ours = pair("phrases")[1]
    set_scheduler(pair("phrases"), "DDIMScheduler")
    made = [call(ours, gligen_scheduled_sampling_beta=part) for part in (0, 0.5, 1)]
    assert difference(made[0], made[1]) > 0
    assert difference(made[1], made[2]) > 0
    plain = suffuse.StableDiffusionPipeline.from_pipe(ours, image_encoder=None)
    plain.set_progress_bar_config(disable=True)
    asked = {"prompt": "two animals", "height": 64, "width": 48, "num_inference_steps": 4, "output_type": "np"}
    assert difference(plain(**asked, generator=torch.Generator().manual_seed(7)).images, made[0]) == 0


def test_a_call_leaves_nothing_in_the_model_nor_in_what_it_was_given():
    """The peer switches gates in the model, and puts boxes into the dictionary it is given."""
    ours = pair("phrases")[1]
    given: dict[str, Any] = {"scale": 1.0}
    call(ours, cross_attention_kwargs=given)
    assert given == {"scale": 1.0}
    gates = [module for module in ours.unet.modules() if type(module).__name__ == "GatedSelfAttentionDense"]
    assert gates
    assert not any(hasattr(gate, "enabled") for gate in gates)


def test_threads_share_a_pipeline_with_other_parts_of_the_steps():
    """The peer's switch in the model is one for all."""
    ours = pair("phrases")[1]
    set_scheduler(pair("phrases"), "DDIMScheduler")
    parts = [0.0, 0.25, 0.5, 1.0]
    alone = [call(ours, gligen_scheduled_sampling_beta=part) for part in parts]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda part: call(ours, gligen_scheduled_sampling_beta=part), parts))
    assert all(difference(one, other) == 0 for one, other in zip(alone, together, strict=True))


def test_the_part_of_the_steps_has_no_effect_where_there_are_pictures():
    """Neither here nor with the peer."""
    ours = pair("pictures")[1]
    assert difference(call(ours, gligen_scheduled_sampling_beta=0.0), call(ours, gligen_scheduled_sampling_beta=1.0)) == 0


# ------------------------------------------------------------ inpainting


@pytest.fixture
def in_plain_order(monkeypatch):
    """Let noise that the peer draws "like" latents not depend on how these lie in memory."""
    monkeypatch.setattr(torch, "randn_like", lambda like: torch.randn(like.shape))


def kept(kind: str, scheduler: str = "DDIMScheduler", **options: Any) -> bool:
    """The peer draws what it needs for the picture from what all calls share; ours from the generator of the call."""
    set_scheduler(pair(kind), scheduler)
    latents = torch.randn(options.get("num_images_per_prompt", 1), 4, 32, 32, generator=torch.Generator().manual_seed(1))
    settings = {"height": 64, "width": 64, "latents": latents, **AROUND, **options}
    peer, ours = pair(kind)
    torch.manual_seed(11)
    theirs = call(peer, **settings)
    return difference(theirs, call(ours, **settings, generator=torch.Generator().manual_seed(11))) == 0


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler"])
@pytest.mark.parametrize("kind", ["inpainting", "pictures inpainting"])
def test_a_picture_is_kept_around_the_boxes(kind, scheduler, in_plain_order):
    assert kept(kind, scheduler)


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scale": 1.0},
        {"num_images_per_prompt": 2},
        {"gligen_inpaint_image": picture(90, 71)},
        {"gligen_inpaint_image": picture(48, 112)},
        {"gligen_scheduled_sampling_beta": 1.0},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_of_inpainting(options, in_plain_order):
    assert kept("inpainting", **options)


def test_what_is_around_the_boxes_is_of_any_size():
    """The peer can keep squares of the size the autoencoder was trained on."""
    ours = pair("inpainting")[1]
    assert call(ours, **AROUND, height=48, width=80).shape == (1, 48, 80, 3)
    assert centre(picture(50, 80), 24, 40).size == (40, 24)
    wide = around_boxes([[0.5, 0.0, 1.0, 0.5]], 4, 8)
    assert wide.tolist() == [[1] * 4 + [0] * 4] * 2 + [[1] * 8] * 2


def test_a_generator_alone_decides_what_is_kept():
    ours = pair("inpainting")[1]
    made = [call(ours, **AROUND) for _ in range(2)]
    assert difference(*made) == 0
    seeds = [
        call(ours, **AROUND, generator=None, seed=[5, 6], num_images_per_prompt=2),
        call(ours, **AROUND, generator=None, seed=6),
    ]
    assert difference(seeds[0][1:], seeds[1]) < 1e-4
    call(ours, **AROUND, generator="list", num_images_per_prompt=2)


def test_a_unet_that_sees_latents_alone_keeps_a_picture_too():
    """The peer's fails."""
    ours = pair("phrases")[1]
    assert difference(call(ours, **AROUND), call(ours)) > 0


# ------------------------------------------------------------ a value for other pipelines


def test_any_pipeline_of_the_family_can_be_given_boxes():
    ours = pair("phrases")[1]
    set_scheduler(pair("phrases"), "DDIMScheduler")

    plain = suffuse.StableDiffusionPipeline.from_pipe(ours, image_encoder=None)
    plain.set_progress_bar_config(disable=True)
    asked = {"prompt": "two animals", "height": 64, "width": 48, "num_inference_steps": 4, "output_type": "np"}
    told = {"gligen_phrases": ["a cat", "one big dog"], "gligen_boxes": BOXES, "gligen_scheduled_sampling_beta": 0.3}
    made = plain(**asked, **told, generator=torch.Generator().manual_seed(7)).images
    assert difference(made, call(ours)) == 0


def test_branches_without_text_are_told_no_boxes():
    branches = ("cond", "image", "uncond")
    asked = ModelCall(torch.zeros(3, 4, 8, 8), torch.tensor(1), branches, Conditioning(1, branches, {}))
    Grounding({"boxes": torch.ones(1, 30, 4), "masks": torch.ones(1, 30)})(asked, Step(torch.zeros(1), total=4))
    assert asked.kwargs["cross_attention_kwargs"]["gligen"]["masks"][:, 0].tolist() == [1, 0, 0]


# ------------------------------------------------------------ files and runs


@pytest.mark.parametrize("kind", CLASSES)
def test_what_is_written_the_peer_reads(kind, tmp_path):
    ours = pair(kind)[1]
    ours.save_pretrained(tmp_path / "saved")
    theirs, mine = (library.DiffusionPipeline.from_pretrained(tmp_path / "saved") for library in (diffusers, suffuse))
    assert type(mine) is type(ours)
    if "inpainting" in kind:
        return
    align(theirs)
    for pipe in (theirs, mine):
        pipe.set_progress_bar_config(disable=True)
    options = SHOWN if kind == "pictures" else {}
    assert difference(call(theirs, **options), call(mine, **options)) == 0


@pytest.mark.parametrize("kind", CLASSES)
def test_a_run_goes_on(kind, tmp_path):
    ours = pair(kind)[1]
    set_scheduler(pair(kind), "EulerAncestralDiscreteScheduler")
    options = (SHOWN if "pictures" in kind else {}) | (AROUND if "inpainting" in kind else {})
    made = call(ours, **options, save_run=tmp_path / "{step}.safetensors")
    for step in (1, 3):
        assert difference(ours(resume=tmp_path / f"{step}.safetensors")[0], made) == 0


def test_callbacks_may_look_at_prompts():
    ours, seen = pair("phrases")[1], []

    def look(pipe, index, timestep, tensors):
        seen.append(tuple(tensors["prompt_embeds"].shape))

    call(ours, callback_on_step_end=look, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert seen == [(2, 77, 32)] * 4


def test_weights_of_half_precision():
    half = suffuse.DiffusionPipeline.from_pretrained(folder("inpainting"), torch_dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    assert np.isfinite(call(half, **AROUND)).all()


# ------------------------------------------------------------ what cannot be meant

BAD: dict[str, tuple[str, dict[str, Any], type[Exception], str]] = {
    "no boxes": ("phrases", {"gligen_boxes": None}, InputError, "gligen_boxes are missing"),
    "an empty list of boxes": ("phrases", {"gligen_boxes": []}, InputError, "gligen_boxes are missing"),
    "no phrases": ("phrases", {"gligen_phrases": None}, InputError, "nothing to put there"),
    "nothing to put anywhere": ("pictures", {"gligen_phrases": None}, InputError, "nothing to put there"),
    "a phrase too many": ("phrases", {"gligen_phrases": ["a"] * 3}, InputError, "gligen_phrases: 3 given for 2 gligen_boxes"),
    "pictures of another number": (
        "pictures",
        {"gligen_images": [picture()]},
        InputError,
        "gligen_images: 1 given for 2 gligen_boxes",
    ),
    "masks of another number": (
        "pictures",
        SHOWN | {"input_images_mask": [1]},
        InputError,
        "input_images_mask: 1 given for 2 gligen_boxes",
    ),
    "a mask that is no mask": (
        "pictures",
        SHOWN | {"input_images_mask": [1, 2]},
        InputError,
        r"input_images_mask\[1\]=2 is out of",
    ),
    "31 boxes": (
        "phrases",
        {"gligen_boxes": BOXES[:1] * 31, "gligen_phrases": ["a"] * 31},
        LimitError,
        r"gligen_boxes: 31 given(.|\n)*at most 30",
    ),
    "a box over the edge": (
        "phrases",
        {"gligen_boxes": [[0, 0, 1, 1.2], BOXES[1]]},
        InputError,
        r"gligen_boxes\[0\]=1.2 is out of",
    ),
    "a box of nothing": (
        "phrases",
        {"gligen_boxes": [[0.5, 0, 0.5, 1], BOXES[1]]},
        InputError,
        r"gligen_boxes\[0\] holds nothing",
    ),
    "a box of three numbers": ("phrases", {"gligen_boxes": [[0, 0, 1], BOXES[1]]}, InputError, r"gligen_boxes\[0\] is no box"),
    "one box that is in no list": ("phrases", {"gligen_boxes": [0.1, 0.2, 0.5, 0.6]}, InputError, r"gligen_boxes\[0\] is no box"),
    "a number for a phrase": ("phrases", {"gligen_phrases": ["a", 3]}, InputError, r"gligen_phrases\[1\] has the wrong type"),
    "a text for phrases": ("phrases", {"gligen_phrases": "a cat"}, InputError, "gligen_phrases has the wrong type"),
    "no phrase where only phrases are told": ("phrases", {"gligen_phrases": ["a", None]}, InputError, "told phrases alone"),
    "a path for a picture": (
        "pictures",
        {"gligen_images": ["a.png", None]},
        InputError,
        r"gligen_images\[0\] has the wrong type",
    ),
    "a long phrase": ("phrases", {"gligen_phrases": ["a", "ab" * 50]}, InputError, "one has 102 tokens"),
    "nothing around boxes for a UNet that sees it": ("inpainting", {}, InputError, "pass gligen_inpaint_image"),
    "an array around boxes": (
        "inpainting",
        {"gligen_inpaint_image": np.zeros((64, 64, 3))},
        InputError,
        "gligen_inpaint_image has the wrong type",
    ),
    "a part of more than all steps": ("phrases", {"gligen_scheduled_sampling_beta": 2}, InputError, "out of range"),
    "latents of another shape": ("phrases", {"latents": torch.zeros(1, 4, 8, 8)}, InputError, "latents has the wrong shape"),
}


@pytest.mark.parametrize("name", BAD)
def test_is_told_and_draws_nothing(name):
    kind, options, error, message = BAD[name]
    generator = torch.Generator().manual_seed(7)
    state = generator.get_state()
    with pytest.raises(error, match=message):
        call(pair(kind)[1], **{"generator": generator} | options)
    assert torch.equal(generator.get_state(), state)


@pytest.mark.parametrize("name", ["StableDiffusionGLIGENPipeline", "StableDiffusionPipeline"])
def test_a_unet_without_gates_is_refused(name):
    ours = pair("phrases")[1]
    other = suffuse.UNet2DConditionModel.from_config(tiny.unet().config)
    message = r"gligen_boxes: this UNet was not trained for boxes(.|\n)*no gated attention(.|\n)*attention_type=\"gated\""
    with pytest.raises(InputError, match=message):
        call(getattr(suffuse, name)(**ours.components | {"unet": other}, requires_safety_checker=False))


def test_a_unet_that_is_told_phrases_is_shown_no_pictures():
    ours = pair("phrases")[1]
    swapped = type(pair("pictures")[1])(**pair("pictures")[1].components | {"unet": ours.unet}, requires_safety_checker=False)
    with pytest.raises(InputError, match="told phrases alone"):
        call(swapped, **SHOWN)


def test_phrases_need_a_text_encoder():
    ours = pair("phrases")[1]
    without = type(ours)(**ours.components | {"text_encoder": None}, requires_safety_checker=False)
    with pytest.raises(InputError, match="no text_encoder, which this call needs"):
        call(without)
    plain = suffuse.StableDiffusionPipeline.from_pipe(ours, image_encoder=None, text_encoder=None)
    told = {"gligen_phrases": ["a cat"], "gligen_boxes": BOXES[:1], "height": 64, "width": 64}
    embeds = {"prompt_embeds": torch.zeros(1, 77, 32), "negative_prompt_embeds": torch.zeros(1, 77, 32)}
    with pytest.raises(InputError, match="no text encoder, which gligen_phrases need"):
        plain(**embeds, **told)


def test_components_of_another_kind_are_refused():
    ours = pair("pictures")[1]
    with pytest.raises(ConfigError, match="the image_project of a pipeline cannot be this"):
        type(ours)(**ours.components | {"image_project": torch.nn.Linear(1, 1)}, requires_safety_checker=False)
    without = type(ours)(**ours.components | {"image_encoder": None}, requires_safety_checker=False)
    with pytest.raises(InputError, match="no image_encoder, which this call needs"):
        call(without, **SHOWN)
    narrow = type(ours)(**ours.components | {"image_project": suffuse.CLIPImageProjection(32)}, requires_safety_checker=False)
    assert isinstance(narrow.image_project, suffuse.CLIPImageProjection)


def test_a_controlnet_comes_along():
    ours = pair("phrases")[1]
    set_scheduler(pair("phrases"), "DDIMScheduler")
    net = suffuse.ControlNetModel.from_config(tiny.controlnet().config).eval()
    net.load_state_dict(tiny.controlnet().state_dict())
    control = {"controlnet": net, "control_image": picture(64, 48, seed=3)}
    assert difference(call(ours), call(ours, **control, controlnet_conditioning_scale=0.0)) == 0
    assert difference(call(ours), call(ours, **control)) > 0


@pytest.mark.parametrize("phrases", [[None, None], ["a cat", None]])
def test_phrases_that_are_none_are_refused_wherever_boxes_are_values(phrases):
    plain = suffuse.StableDiffusionPipeline.from_pipe(pair("phrases")[1], image_encoder=None)
    with pytest.raises(InputError, match=r"gligen_phrases: this UNet is told phrases alone(.|\n)*a text for each box"):
        call(plain, gligen_phrases=phrases)
