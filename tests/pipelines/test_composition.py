"""Features are values: any pipeline that draws takes them, together, and equals the class that has them built in."""

from __future__ import annotations

import copy
import inspect
import random
import runpy
import sys
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest
import tiny
import torch
from tasks import CONTROLLED, call, difference, mask, pair, picture

import suffuse
from suffuse.diffusion.guidance import ClassifierFreeGuidance
from suffuse.errors import ConfigError, InputError, UnknownArgumentError
from suffuse.pipelines.features import COMPOSED, EXCLUSIVE, FEATURES

sys.path.append(str(Path(__file__).parent.parent / "adapters"))
from factors import adapter
from image_weights import FEATURES as SIZE
from image_weights import image_encoder, ip_adapter

PLAIN = {
    "text": {False: "StableDiffusionPipeline", True: "StableDiffusionXLPipeline"},
    "image": {False: "StableDiffusionImg2ImgPipeline", True: "StableDiffusionXLImg2ImgPipeline"},
    "inpaint": {False: "StableDiffusionInpaintPipeline", True: "StableDiffusionXLInpaintPipeline"},
}


def plain(task: str, kind: str):
    """A pipeline of one of the plain classes with the parts of a task that has a ControlNet, and that ControlNet."""
    ours = pair(task)[1]
    pipe = getattr(suffuse, PLAIN[kind]["xl" in task]).from_pipe(ours)
    pipe.set_progress_bar_config(disable=True)
    return pipe, ours.controlnet


def as_values(task: str) -> dict:
    """The call of a task with a ControlNet, as values of a plain pipeline."""
    given = dict(CONTROLLED[task].call)
    return given if "control_image" in given else {"control_image": given.pop("image"), "image": None} | given


SCALED = {"controlnet_conditioning_scale": 0.7, "guess_mode": True, "control_guidance_end": 0.8}


@pytest.mark.parametrize("settings", [{"controlnet_conditioning_scale": 1.0}, SCALED], ids=["plain", "scaled"])
@pytest.mark.parametrize("task", [task for task in CONTROLLED if "9" not in task])
def test_text_to_image_with_values_is_every_class_with_a_controlnet(task, settings):
    pipe, net = plain(task, "text")
    theirs = call(pair(task)[0], task, **settings)
    given = as_values(task)
    mine = pipe(
        "a cat",
        num_inference_steps=4,
        output_type="pt",
        generator=torch.Generator().manual_seed(7),
        guidance_scale=inspect.signature(pair(task)[0].__call__).parameters["guidance_scale"].default,
        controlnet=net,
        **({"strength": inspect.signature(pair(task)[0].__call__).parameters["strength"].default} if "inpaint" in task else {}),
        **given,
        **settings,
    ).images
    assert difference(theirs, mine) == 0


@pytest.mark.parametrize("task", [task for task in CONTROLLED if "text" not in task])
def test_plain_classes_take_a_controlnet_too(task):
    pipe, net = plain(task, "inpaint" if "inpaint" in task else "image")
    size = {"height": 64, "width": 64} if "inpaint" in task else {}
    settings = {"controlnet_conditioning_scale": 0.7, "guidance_scale": 5.0, "strength": 0.7}
    theirs = call(pair(task)[0], task, **settings)
    mine = pipe(
        "a cat",
        num_inference_steps=4,
        output_type="pt",
        generator=torch.Generator().manual_seed(7),
        controlnet=net,
        **CONTROLLED[task].call | size | settings,
    ).images
    assert difference(theirs, mine) == 0


def test_depth_takes_a_controlnet_too():
    pipe = pair("depth")[1]
    net = pair("control text")[1].controlnet
    given = {"image": picture(), "strength": 0.8, "num_inference_steps": 2, "output_type": "np"}
    with_depth, with_both = (
        pipe("a cat", generator=torch.Generator().manual_seed(7), **given, **more).images
        for more in ({}, {"controlnet": net, "control_image": picture(seed=3)})
    )
    assert difference(with_depth, with_both) > 1e-4


def test_text_to_image_with_values_is_the_class_with_an_adapter():
    plain = suffuse.StableDiffusionPipeline(**parts(False))
    built_in = suffuse.StableDiffusionAdapterPipeline.from_pipe(plain, adapter=t2i(False))
    given = {"num_inference_steps": 3, "output_type": "np", "adapter_conditioning_scale": 0.7}
    theirs = built_in("a cat", image=picture(), generator=torch.Generator().manual_seed(7), **given).images
    values = {"adapter": t2i(False), "adapter_image": picture(), **given}
    assert difference(theirs, plain("a cat", generator=torch.Generator().manual_seed(7), **values).images) == 0


# ---------------------------------------------------------------- all of them with all of them


BLOCKS = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}


@cache
def parts(xl: bool) -> dict:
    """Components of a tiny pipeline whose UNet takes the features of every kind of adapter."""
    made = pair("xl text" if xl else "text")[1].components
    if not xl:
        unet = tiny.unet(**BLOCKS, attention_type="gated")
        made["unet"] = suffuse.UNet2DConditionModel.from_config(unet.config).eval()
        made["unet"].load_state_dict(unet.state_dict())
        for name, parameter in made["unet"].named_parameters():
            if "alpha_" in name:  # gates that let boxes through
                torch.nn.init.constant_(parameter, 0.7)
        made |= {"safety_checker": None, "requires_safety_checker": False}
    made["scheduler"] = suffuse.DDIMScheduler.from_config(tiny.scheduler().config)  # whatever other tests left there
    # One of its own: for adapters that are loaded onto it, and no other test sees.
    made |= {"unet": copy.deepcopy(made["unet"]), "image_encoder": image_encoder(), "feature_extractor": tiny.image_processor()}
    return made


@cache
def ungated(xl: bool):
    """The same UNet, not trained for boxes: for it others were made."""
    if xl:
        return parts(xl)["unet"]
    made = suffuse.UNet2DConditionModel.from_config(tiny.unet(**BLOCKS).config)
    made.load_state_dict(tiny.unet(**BLOCKS).state_dict())
    return made


@cache
def net(xl: bool):
    """A ControlNet that says something."""
    made = suffuse.ControlNetModel.from_unet(ungated(xl), conditioning_embedding_out_channels=(8, 16))
    torch.manual_seed(5)
    for parameter in made.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter.data, std=0.1)
    return made.eval()


@cache
def t2i(xl: bool):
    """A T2I-Adapter."""
    torch.manual_seed(6)
    kind = {"adapter_type": "full_adapter_xl", "downscale_factor": 4} if xl else {"downscale_factor": 2}
    return suffuse.T2IAdapter(channels=[32, 64], num_res_blocks=1, **kind).eval()


def loaded_lora(pipe, given):
    pipe.load_lora_weights(adapter(pipe, components=("unet",)))
    return pipe.unload_lora_weights


@cache
def pictures_adapter(xl: bool):
    """The tensors of an IP-Adapter."""
    return ip_adapter(pair("xl text")[0].unet if xl else tiny.unet(**BLOCKS))


def image_adapter(pipe, given):
    pipe.load_ip_adapter(pictures_adapter("XL" in type(pipe).__name__))
    given["ip_adapter_image"] = picture(seed=5)
    return pipe.unload_ip_adapter


def image_embeddings(pipe, given):
    if "ip_adapter_image" not in given:
        pipe.load_ip_adapter(pictures_adapter("XL" in type(pipe).__name__))
    given["ip_adapter_image_embeds"] = [torch.randn(2, 1, SIZE, generator=torch.Generator().manual_seed(4))]
    return pipe.unload_ip_adapter


def learnt_word(pipe, given):
    pipe.load_textual_inversion({"<cat>": torch.randn(32, generator=torch.Generator().manual_seed(3))})
    given["prompt"] += " <cat>"
    return pipe.unload_textual_inversion


def freeu(pipe, given):
    pipe.enable_freeu(s1=0.5, s2=0.2, b1=1.4, b2=1.6)
    return pipe.disable_freeu


def weighted(pipe, given):
    given["prompt"] = suffuse.Weighted(f"({given['prompt']}:1.5)")


def values(**more):
    """A feature that is keywords; those that are functions are asked whether the pipeline is for XL."""

    def switch(pipe, given):
        xl = "XL" in type(pipe).__name__
        given.update({name: value(xl) if callable(value) else value for name, value in more.items()})

    return switch


def noise(xl):
    return torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(9))


SWITCHES = {
    "given noise": values(latents=noise),
    "image to image": values(image=picture(), strength=0.8),
    "inpainting": values(image=picture(), mask_image=mask()),
    "ControlNet": values(controlnet=net, control_image=picture(seed=3)),
    "T2I-Adapter": values(adapter=t2i, adapter_image=picture(seed=4)),
    "IP-Adapter": image_adapter,
    "IP-Adapter embeddings": image_embeddings,
    "GLIGEN": values(gligen_boxes=[[0.1, 0.1, 0.6, 0.7]], gligen_phrases=["dog"], gligen_scheduled_sampling_beta=1.0),
    "guidance": values(guidance=lambda xl: ClassifierFreeGuidance(2.0, rescale=0.3)),
    "LoRA": loaded_lora,
    "textual inversion": learnt_word,
    "FreeU": freeu,
    "weighted prompts": weighted,
    "clip skip": values(clip_skip=1),
}
"""Feature → how to ask for it: changes the keywords of a call, and returns what takes it off the pipeline again."""


def drawn(xl: bool, *names: str) -> torch.Tensor:
    """A picture with these features."""
    pipe = getattr(suffuse, PLAIN["text"][xl])(**parts(xl))
    pipe.set_progress_bar_config(disable=True)
    given = {"prompt": "a cat", "num_inference_steps": 2, "output_type": "pt", "height": 64, "width": 64}
    undo = [SWITCHES[name](pipe, given) for name in SWITCHES if name in names]
    try:
        return pipe(**given, generator=torch.Generator().manual_seed(7)).images
    finally:
        for take_off in filter(None, undo):
            take_off()


@cache
def alone(xl: bool, *names: str) -> torch.Tensor:
    return drawn(xl, *names)


def check_that_each_counts(xl: bool, *names: str) -> None:
    """Features that work together make a picture none of them is missing from; others are refused with both names."""
    if "inpainting" in names:  # which has a picture, and begins with noise too
        names = tuple(name for name in names if name != "image to image")
    asked = [feature for feature in FEATURES if feature.name in names]
    asked = [feature for feature in asked if not any(feature.unless == other.asked_by for other in asked)]
    both = {one.name for one in asked for other in asked if one is not other and one.writes & other.writes & EXCLUSIVE.keys()}
    if xl and "GLIGEN" in names:  # whose text encoder makes no vectors that its UNet takes
        with pytest.raises(InputError, match=r"no gated attention|cannot work together"):
            drawn(xl, *names)
        return
    if both:
        with pytest.raises(InputError, match="cannot work together") as told:
            drawn(xl, *names)
        assert all(name in str(told.value) for name in both)
        return
    together = drawn(xl, *names)
    assert bool(torch.isfinite(together).all())
    for name in names:
        assert difference(together, alone(xl, *(other for other in names if other != name))) > 1e-4, f"{name} does nothing"


def test_every_feature_is_tried():
    assert [*SWITCHES] == [feature.name for feature in FEATURES]


@pytest.mark.parametrize("xl", [False, True], ids=["", "XL"])
@pytest.mark.parametrize(("one", "other"), [*combinations(SWITCHES, 2)])
def test_all_pairs(xl, one, other):
    check_that_each_counts(xl, one, other)


@pytest.mark.parametrize("names", random.Random(0).sample([*combinations(SWITCHES, 3)], 50), ids=" + ".join)
def test_random_triples(names):
    check_that_each_counts(False, *names)


def test_the_page_of_features_is_what_they_say():
    made = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "features.py"))
    assert made["PAGE"].read_text(encoding="utf-8") == made["page"](), "run scripts/features.py"


# ---------------------------------------------------------------- what is wrong


REFUSED = {
    "a picture for no net": ({"control_image": picture()}, "control_image is given and no controlnet"),
    "a net and no picture": ({"controlnet": net}, "controlnet is given and no control_image"),
    "a setting of no net": ({"guess_mode": True}, "guess_mode is given and no control_image"),
    "a picture for no adapter": ({"adapter_image": picture()}, "adapter_image is given and no adapter"),
    "a mask and no picture": ({"mask_image": mask()}, "mask_image is given and no image"),
    "a strength and no picture": ({"strength": 0.5}, "strength is given and no image or mask_image"),
    "a part of no adapter": ({"adapter_conditioning_factor": 0.5}, "adapter_conditioning_factor is given and no adapter_image"),
    "two beginnings": (
        {"image": picture(), "latents": noise},
        r"given noise \(latents\) and image to image \(image\) cannot work together(.|\n)*leave out latents or image",
    ),
    "a net of another kind": ({"controlnet": t2i, "control_image": picture()}, "controlnet is no ControlNet"),
    "an adapter of another kind": ({"adapter": net, "adapter_image": picture()}, "adapter is no T2I-Adapter"),
    "no guidance": ({"guidance": 7.5}, "guidance combines no predictions"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_means_nothing_is_refused_before_anything_is_computed(name, monkeypatch):
    given, message = REFUSED[name]
    pipe = suffuse.StableDiffusionPipeline(**parts(False))
    for model in (pipe.unet, pipe.text_encoder, pipe.vae):
        monkeypatch.setattr(model, "forward", None)
    generator = torch.Generator().manual_seed(7)
    before = generator.get_state()
    with pytest.raises(InputError, match=message):
        pipe("a cat", generator=generator, **{key: value(False) if callable(value) else value for key, value in given.items()})
    assert torch.equal(before, generator.get_state())


def test_a_keyword_of_another_pipeline_is_named():
    pipe = pair("control text")[1]
    with pytest.raises(UnknownArgumentError, match="controlnet"):
        pipe("a cat", image=picture(), controlnet=net(False))


def test_signatures_show_the_keywords_of_features():
    parameters = inspect.signature(suffuse.StableDiffusionPipeline.__call__).parameters
    assert set(COMPOSED) <= parameters.keys()
    assert "values" not in parameters
    assert parameters["controlnet_conditioning_scale"].default == 1.0


def test_a_net_elsewhere_is_refused():
    away = suffuse.ControlNetModel.from_config(net(False).config).to("meta")
    with pytest.raises(InputError, match=r"controlnet is on another device(.|\n)*meta and cpu"):
        suffuse.StableDiffusionPipeline(**parts(False))("a cat", controlnet=away, control_image=picture())


def test_a_run_with_a_net_goes_on_when_it_is_given_again(tmp_path):
    pipe, given = suffuse.StableDiffusionPipeline(**parts(False)), {"control_image": picture(seed=3)}
    whole = pipe("a cat", num_inference_steps=3, seed=7, output_type="np", controlnet=net(False), **given).images
    path = tmp_path / "{step}.run"
    pipe("a cat", num_inference_steps=3, seed=7, output_type="np", controlnet=net(False), save_run=path, **given)
    again = pipe(resume=tmp_path / "1.run", controlnet=net(False)).images
    assert difference(whole, again) == 0
    with pytest.raises(InputError, match="control_image is given and no controlnet"):
        pipe(resume=tmp_path / "1.run")


def test_a_net_for_another_autoencoder_is_refused():
    wrong = suffuse.ControlNetModel.from_unet(ungated(False), conditioning_embedding_out_channels=(8, 16, 24))
    with pytest.raises(ConfigError, match=r"made 4 times smaller, and latents are 2 times smaller"):
        suffuse.StableDiffusionPipeline(**parts(False))("a cat", controlnet=wrong, control_image=picture())


WRONG_GUIDANCE = {
    "not a number": (lambda: ClassifierFreeGuidance(float("nan")), "ClassifierFreeGuidance.scale=nan is out of range"),
    "too much rescale": (lambda: ClassifierFreeGuidance(7.5, rescale=5.0), "ClassifierFreeGuidance.rescale=5.0 is out of range"),
    "a text": (lambda: ClassifierFreeGuidance("7"), "ClassifierFreeGuidance.scale must be a number"),
    "a class": (lambda: ClassifierFreeGuidance, "guidance combines no predictions"),
    "a class inside": (lambda: suffuse.GuidanceInterval(ClassifierFreeGuidance), "guidance combines no predictions"),
    "a number inside": (
        lambda: suffuse.GuidanceInterval(ClassifierFreeGuidance(float("inf"))),
        "ClassifierFreeGuidance.scale=inf",
    ),
    "no model": (lambda: suffuse.AutoGuidance(2.0, torch.nn.Linear(2, 2)), "the worse model is no UNet"),
    "another type": (lambda: suffuse.AutoGuidance(2.0, copy.deepcopy(parts(False)["unet"]).half()), "compute in two types"),
}


@pytest.mark.parametrize("name", WRONG_GUIDANCE)
def test_guidance_that_cannot_be_is_refused(name):
    make, message = WRONG_GUIDANCE[name]
    with pytest.raises(InputError, match=message):
        suffuse.StableDiffusionPipeline(**parts(False))("a cat", guidance=make())


def test_guidance_cannot_begin_on_the_way():
    pipe = suffuse.StableDiffusionPipeline(**parts(False))

    def guide(pipe, index, timestep, tensors):
        pipe._guidance_scale = 7.0

    with pytest.raises(InputError, match="the run was begun without the branch 'uncond'"):
        pipe("a cat", guidance_scale=1.0, num_inference_steps=3, callback_on_step_end=guide)


def test_words_of_features_are_not_for_callers():
    with pytest.raises(InputError, match="cross_attention_kwargs: watched is told by features"):
        suffuse.StableDiffusionPipeline(**parts(False))("a cat", cross_attention_kwargs={"watched": {}})


def test_latents_are_painted_at_their_size():
    pipe = suffuse.StableDiffusionPipeline(**parts(False))
    given = {"image": noise(False)[..., :16, :16], "mask_image": mask(32, 32), "num_inference_steps": 1}
    assert pipe("a cat", output_type="latent", **given).images.shape == (1, 4, 16, 16)
