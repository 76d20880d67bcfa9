"""Runs that go on with the features they were begun with: their scales and memory are kept, and other nets are told of."""

from __future__ import annotations

import copy
import inspect
import json
import warnings

import pytest
import torch
from PIL import Image
from random_checkpoints import random_checkpoint
from safetensors import safe_open
from safetensors.torch import save_file
from tasks import call, difference, pair, picture, set_scheduler
from test_composition import adapter, net, parts, pictures_adapter, t2i
from typer.testing import CliRunner

import suffuse
from suffuse.checkpoints.safetensors_file import SAVED_RUN
from suffuse.cli.main import app
from suffuse.errors import InputError
from suffuse.pipelines.beside import fingerprint
from suffuse.pipelines.saved_run import SavedRun
from suffuse.public_names import PUBLIC

STEPS = 6


# ---------------------------------------------------------------- guidance


def worse():
    """The UNet, with less to say."""
    made = copy.deepcopy(pair("text")[1].unet)
    with torch.no_grad():
        made.conv_out.weight.mul_(0.5)
    return made


GUIDES = {
    "AdaptiveProjectedGuidance": lambda: suffuse.AdaptiveProjectedGuidance(6.0, parallel=0.3, longest=15.0, momentum=-0.5),
    "AutoGuidance": lambda: suffuse.AutoGuidance(2.0, worse()),
    "ClassifierFreeGuidance": lambda: suffuse.ClassifierFreeGuidance(6.0, rescale=0.3),
    "GuidanceInterval": lambda: suffuse.GuidanceInterval(GUIDES["AdaptiveProjectedGuidance"](), 0.2, 0.9),
    "SafeGuidance": lambda: suffuse.SafeGuidance(6.0, "a dog", warmup=1, threshold=1.0),
    "SelfAttentionGuidance": lambda: suffuse.SelfAttentionGuidance(6.0),
    "SemanticGuidance": lambda: suffuse.SemanticGuidance(6.0, [suffuse.Concept("a dog", warmup=1)]),
    "TangentialGuidance": lambda: suffuse.TangentialGuidance(6.0),
    "WorseGuidance": lambda: suffuse.WorseGuidance(6.0),
    "ZeroStarGuidance": lambda: suffuse.ZeroStarGuidance(6.0),
}


def begun(guidance, path, task="text", **options):
    """A pipeline, and what it makes where each step is kept."""
    set_scheduler(pair(task), "DDIMScheduler")
    pipe = pair(task)[1]
    files = path / "{step}.safetensors"
    return pipe, call(pipe, task, guidance=guidance, num_inference_steps=STEPS, save_run=files, **options)


def test_every_public_guidance_is_here():
    classes = {name for name in PUBLIC if isinstance(own := getattr(suffuse, name), type) and issubclass(own, suffuse.Guidance)}
    assert {name for name in classes if not inspect.isabstract(getattr(suffuse, name))} == GUIDES.keys()


@pytest.mark.parametrize("held", [False, True], ids=["alone", "in an interval"])
@pytest.mark.parametrize("name", GUIDES)
def test_a_run_that_a_value_guides_goes_on(name, held, tmp_path):
    def value():
        return suffuse.GuidanceInterval(GUIDES[name](), 0.1, 0.8) if held else GUIDES[name]()

    pipe, made = begun(value(), tmp_path)
    for step in (0, 3):
        assert difference(pipe(resume=tmp_path / f"{step}.safetensors", guidance=value())[0], made) == 0, step


def test_what_guidance_remembers_decides(tmp_path):
    value = GUIDES["AdaptiveProjectedGuidance"]()
    pipe, made = begun(suffuse.GuidanceInterval(value), tmp_path)
    run = SavedRun.load(tmp_path / "3.safetensors")
    assert set(run.guidance) == {"guidance.average"}
    assert run.guided_by["guidance."] == [
        "AdaptiveProjectedGuidance",
        {"scale": 6.0, "rescale": 0.0, "parallel": 0.3, "longest": 15.0, "momentum": -0.5},
    ]
    run.guidance.clear()
    assert difference(pipe(resume=run, guidance=suffuse.GuidanceInterval(value))[0], made) > 1e-4
    assert value.average is None  # what a run remembers is not in the value that was passed


def test_numbers_that_are_passed_count_from_there_on(tmp_path):
    pipe, made = begun(suffuse.AdaptiveProjectedGuidance(6.0, momentum=-0.5), tmp_path)
    forked = pipe(resume=tmp_path / "3.safetensors", guidance=suffuse.AdaptiveProjectedGuidance(2.0, momentum=-0.5))[0]
    assert difference(forked, made) > 1e-4


def test_a_run_without_a_value_may_go_on_with_one(tmp_path):
    pipe, _ = begun(None, tmp_path, guidance_scale=6.0)
    value = suffuse.ClassifierFreeGuidance(3.0)
    forks = (
        pipe(resume=tmp_path / "3.safetensors", guidance=value)[0],
        pipe(resume=tmp_path / "3.safetensors", guidance_scale=3.0)[0],
    )
    assert difference(*forks) == 0


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (None, r"guided by GuidanceInterval\(start=0.2, stop=0.9\) of AdaptiveProjectedGuidance\(scale=6.0(.|\n)*no guidance="),
        (suffuse.TangentialGuidance(6.0), r"guided by GuidanceInterval(.|\n)*found: guidance=TangentialGuidance\(scale=6.0"),
        (suffuse.GuidanceInterval(suffuse.TangentialGuidance(6.0)), r"of AdaptiveProjected(.|\n)*of TangentialGuidance"),
    ],
)
def test_another_class_cannot_go_on(other, message, tmp_path):
    pipe, _ = begun(GUIDES["GuidanceInterval"](), tmp_path)
    with pytest.raises(InputError, match=message):
        pipe(resume=tmp_path / "3.safetensors", **({} if other is None else {"guidance": other}))


def test_guidance_that_rescales_nothing_says_so():
    set_scheduler(pair("text"), "DDIMScheduler")

    def change(pipe, index, timestep, tensors):
        assert pipe.guidance_rescale == 0
        pipe._guidance_rescale = 0.5

    for value in (suffuse.AutoGuidance(2.0, worse()), suffuse.GuidanceInterval(suffuse.SafeGuidance(6.0, "a dog", warmup=0))):
        kind = type(value).__name__
        with pytest.raises(InputError, match=f"guidance_rescale cannot be set: {kind} has no rescale"):
            call(pair("text")[1], "text", guidance=value, callback_on_step_end=change)


def test_the_command_goes_on_too(tmp_path):
    def generate(*words):
        made = CliRunner().invoke(app, ["generate", *map(str, words), "-o", str(tmp_path / "out.png")])
        return made.exit_code, made.stderr, (tmp_path / "out.png").read_bytes()

    guide, half = ["--guide", "projected:momentum=-0.5", "--guide-part", "0-0.9"], tmp_path / "2.safetensors"
    words = ["a red door", "-m", random_checkpoint(), "--steps", 4, "--size", "64x64", "--seed", 7, *guide]
    assert generate(*words, "--save-run", tmp_path / "{step}.safetensors")[0] == 0
    with Image.open(tmp_path / "out.png") as picture:
        whole = picture.tobytes()
    assert generate("--resume", half, *guide)[0] == 0
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.tobytes() == whole
    code, said, _ = generate("--resume", half)
    assert code == 1
    assert "the run is guided by GuidanceInterval(start=0.0, stop=0.9) of AdaptiveProjectedGuidance(scale=" in said


# ---------------------------------------------------------------- pictures to take after


@pytest.fixture
def pipe():
    made = suffuse.StableDiffusionPipeline(**parts(False))
    yield made
    made.unload_ip_adapter()
    made.unload_lora_weights()
    made.unload_textual_inversion()


def draw(pipe, **options):
    settings = {"num_inference_steps": 4, "output_type": "pt", "seed": 3, "return_dict": False}
    return pipe(**{"prompt": "a cat", **settings, **options})[0]


@pytest.mark.parametrize("scale", [0.3, {"up": 0.4}, [0.6]], ids=str)
@pytest.mark.parametrize("way", ["set", "passed"])
def test_a_run_goes_on_at_its_own_scale(pipe, way, scale, tmp_path):
    pipe.load_ip_adapter(pictures_adapter(False))
    file, shown = tmp_path / "{step}.safetensors", {"ip_adapter_image": picture(seed=5)}
    if way == "set":
        pipe.set_ip_adapter_scale(scale)
    made = draw(pipe, save_run=file, **shown, **({} if way == "set" else {"ip_adapter_scale": scale}))
    pipe.set_ip_adapter_scale(1.0)
    half = tmp_path / "2.safetensors"
    assert difference(pipe(resume=half)[0], made) == 0
    assert difference(pipe(resume=half, ip_adapter_scale=1.0)[0], made) > 1e-4


def test_a_fork_may_be_shown_something_else_or_nothing(pipe, tmp_path):
    pipe.load_ip_adapter(pictures_adapter(False))
    said = pipe.prepare_ip_adapter_image_embeds(picture(seed=5), None, "cpu", 1, True)
    made = draw(pipe, save_run=tmp_path / "{step}.safetensors", ip_adapter_image=picture(seed=5))
    half = tmp_path / "2.safetensors"
    assert difference(pipe(resume=half, ip_adapter_image_embeds=said)[0], made) == 0
    pipe.unload_ip_adapter()
    pipe.register_modules(image_encoder=parts(False)["image_encoder"], feature_extractor=parts(False)["feature_extractor"])
    with pytest.warns(UserWarning, match="no IP-Adapter"):
        assert difference(pipe(resume=half, ip_adapter_image=None)[0], made) > 1e-4


# ---------------------------------------------------------------- what stands beside a run


def other(model):
    """The same model with other weights."""
    made = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(1.01)
    return made


def resumed(pipe, file, **options):
    """What is said when a run goes on."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        pipe(resume=file, **options)
    return [str(warning.message) for warning in told]


@pytest.mark.parametrize(
    ("given", "changed", "label"),
    [
        (lambda: {"controlnet": net(False), "control_image": picture()}, lambda: {"controlnet": other(net(False))}, "ControlNet"),
        (lambda: {"adapter": t2i(False), "adapter_image": picture()}, lambda: {"adapter": other(t2i(False))}, "T2I-Adapter"),
        (
            lambda: {"guidance": suffuse.AutoGuidance(2.0, parts(False)["unet"])},
            lambda: {"guidance": suffuse.AutoGuidance(2.0, other(parts(False)["unet"]))},
            "worse model",
        ),
    ],
    ids=["ControlNet", "T2I-Adapter", "worse model"],
)
def test_other_nets_are_told_of(pipe, given, changed, label, tmp_path):
    own = given()
    draw(pipe, save_run=tmp_path / "{step}.safetensors", **own)
    again = {name: value for name, value in own.items() if name in ("controlnet", "adapter", "guidance")}
    assert resumed(pipe, tmp_path / "2.safetensors", **again) == []
    assert resumed(pipe, tmp_path / "2.safetensors", **changed()) == [
        f"the run is resumed with another {label}: it was begun otherwise"
    ]


def test_a_net_of_a_pipeline_is_told_of_too(tmp_path):
    set_scheduler(pair("control text"), "DDIMScheduler")
    pipe = pair("control text")[1]
    call(pipe, "control text", save_run=tmp_path / "{step}.safetensors")
    own = type(pipe)(**{**pipe.components, "controlnet": other(pipe.controlnet)}, requires_safety_checker=False)
    assert resumed(pipe, tmp_path / "2.safetensors") == []
    assert "with another ControlNet:" in resumed(own, tmp_path / "2.safetensors")[0]


def test_adapters_and_words_that_are_loaded_are_told_of(pipe, tmp_path):
    file, style = tmp_path / "{step}.safetensors", adapter(pipe, components=("unet",))
    pipe.load_lora_weights(style, adapter_name="style")
    pipe.load_ip_adapter(pictures_adapter(False))
    pipe.load_textual_inversion({"<cat>": torch.ones(32)})
    pipe.set_adapters("style", 0.5)
    draw(pipe, prompt="a <cat>", save_run=file, ip_adapter_image=picture(seed=5))
    half = tmp_path / "2.safetensors"
    assert resumed(pipe, half) == []
    pipe.set_adapters("style", 0.7)
    assert resumed(pipe, half) == ["the run is resumed with another scale of LoRA 'style': it was begun otherwise"]
    pipe.delete_adapters("style")
    pipe.load_lora_weights({key: 2 * tensor for key, tensor in style.items()}, adapter_name="style")
    pipe.load_lora_weights(style, adapter_name="more")
    pipe.set_adapters(["style", "more"], 0.5)
    pipe.unload_textual_inversion()
    pipe.load_textual_inversion({"<cat>": torch.zeros(32)})
    pipe.load_ip_adapter({key: 2 * tensor for key, tensor in pictures_adapter(False).items()})
    (told,) = resumed(pipe, half)
    for part in ("another LoRA 'style'", "a LoRA 'more' on top", "another learnt word '<cat>'", "another IP-Adapter"):
        assert part in told
    pipe.unload_lora_weights()
    pipe.unload_textual_inversion()
    (told,) = resumed(pipe, half)
    assert "no LoRA 'style'" in told
    assert "no learnt word '<cat>'" in told
    (told,) = resumed(pipe, half, prompt="a dog")
    assert "learnt word" not in told  # another prompt does not ask for it


def test_a_lora_that_does_not_count_is_none(pipe, tmp_path):
    pipe.load_lora_weights(adapter(pipe, components=("unet",)), adapter_name="style")
    pipe.disable_lora()
    draw(pipe, save_run=tmp_path / "{step}.safetensors")
    pipe.unload_lora_weights()
    assert resumed(pipe, tmp_path / "2.safetensors") == []


def test_fingerprints():
    weight = torch.randn(3, 4, 5, 6)
    mark = fingerprint({"a": weight})
    assert fingerprint({"a": weight.to(memory_format=torch.channels_last)}) == mark
    assert fingerprint({"a": weight.half()}) != mark
    assert fingerprint({"b": weight}) != mark
    assert fingerprint({"a": weight * 1.001}) != mark
    assert fingerprint({"a": weight.to("meta")}) == f"{mark.partition(':')[0]}:"
    assert fingerprint({"a": torch.zeros(0), "b": torch.tensor(2)}) != fingerprint({"a": torch.zeros(0), "b": torch.tensor(3)})


def test_files_of_the_first_format_are_read(tmp_path):
    pipe, made = begun(None, tmp_path)
    with safe_open(tmp_path / "3.safetensors", "pt") as opened:
        told = json.loads(opened.metadata()[SAVED_RUN])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    first = {name: value for name, value in told.items() if name not in ("guided_by", "beside")} | {"format": 1}
    save_file(tensors, tmp_path / "first.safetensors", {SAVED_RUN: json.dumps(first)})
    assert difference(pipe(resume=tmp_path / "first.safetensors")[0], made) == 0


# ---------------------------------------------------------------- steps that are too few

FEW = {
    "boxes": (
        {"gligen_phrases": ["dog"], "gligen_boxes": [[0.1, 0.1, 0.6, 0.7]], "gligen_scheduled_sampling_beta": 0.2},
        r"no step of 4 is told the boxes \(gligen_scheduled_sampling_beta=0.2\): pass more steps, or a wider part",
    ),
    "adapter": (
        {"adapter": t2i, "adapter_image": picture(), "adapter_conditioning_factor": 0.2},
        r"no step of 4 is told what the adapter sees \(adapter_conditioning_factor=0.2\)",
    ),
    "control": (
        {"controlnet": net, "control_image": picture(), "control_guidance_start": 0.3, "control_guidance_end": 0.4},
        r"told what the ControlNet sees \(control_guidance_start=0.3, control_guidance_end=0.4\)",
    ),
}


@pytest.mark.parametrize("case", FEW)
def test_a_part_with_no_step_in_it_is_told_of(pipe, case):
    options, message = FEW[case]
    plain = draw(pipe)
    with pytest.warns(UserWarning, match=message) as told:
        made = draw(pipe, **{name: value(False) if callable(value) else value for name, value in options.items()})
    assert len(told) == 1
    assert difference(made, plain) == 0


def test_several_parts_are_told_of_at_once(pipe):
    options = {name: value for case in ("boxes", "control") for name, value in FEW[case][0].items()}
    with pytest.warns(
        UserWarning, match=r"told the boxes \(.*\) nor what the ControlNet|the ControlNet sees \(.*\) nor the boxes"
    ) as told:
        draw(pipe, **options | {"controlnet": net(False)})
    assert len(told) == 1


def test_a_part_of_nothing_and_a_scale_of_nothing_are_meant(pipe):
    boxes = FEW["boxes"][0] | {"gligen_scheduled_sampling_beta": 0.0}
    draw(pipe, **boxes, **FEW["control"][0] | {"controlnet": net(False), "controlnet_conditioning_scale": 0.0})
