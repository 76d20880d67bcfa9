"""Pipelines that draw from noise, classes or small pictures: equal to the peer's bit for bit, saved, seeded, refused."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import diffusers
import pytest
import tiny
import torch
from PIL import Image
from tasks import align, difference, mask, picture

import suffuse
from suffuse.errors import ConfigError, InputError, UnknownArgumentError
from suffuse.noise import CounterNoise


@pytest.fixture(autouse=True)
def quiet_peer():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="diffusers.*")
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


def deep_vae() -> diffusers.AutoencoderKL:
    """Of a factor of 8, which the peer's text to image takes for granted."""
    torch.manual_seed(22)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    return diffusers.AutoencoderKL(block_out_channels=[32] * 4, **blocks).eval()


@dataclass(frozen=True)
class Kind:
    name: str
    parts: Callable[[Path], dict[str, Any]]
    scheduler: str = "DDIMScheduler"
    call: dict[str, Any] = field(default_factory=dict)
    two: dict[str, Any] = field(default_factory=lambda: {"batch_size": 2})
    """What makes two pictures."""
    tensors_out: bool = True
    """Whether the peer gives tensors out."""


def pixels(**options) -> Callable[[Path], dict[str, Any]]:
    return lambda folder: {"unet": tiny.unconditional_unet(**options)}


def latents(**options) -> Callable[[Path], dict[str, Any]]:
    return lambda folder: {"vqvae": tiny.vq_model(), "unet": tiny.unconditional_unet(**options)}


def words(folder: Path) -> dict[str, Any]:
    return {"vqvae": deep_vae(), "bert": tiny.bert(), "tokenizer": tiny.bert_tokenizer(folder), "unet": tiny.unet()}


def labels(**options) -> Callable[[Path], dict[str, Any]]:
    names = {1: "a cat, cat", 2: "dog"}
    return lambda folder: {"transformer": tiny.transformer(**options), "vae": tiny.vae(), "id2label": names}


CONSISTENCY = ("ConsistencyModelPipeline", pixels(), "CMStochasticIterativeScheduler")
PAINTED = {"image": picture(32, 32), "mask_image": mask(32, 32), "jump_length": 2, "jump_n_sample": 2, "num_inference_steps": 6}
TWO_IMAGES = {"image": torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1}
TWO_MASKS = (torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(2)) > 0.5).float()
SUPER = {"image": picture(40, 72)}
KINDS = {
    "ddpm": Kind("DDPMPipeline", pixels(), "DDPMScheduler"),
    "ddpm, not square": Kind("DDPMPipeline", pixels(sample_size=(32, 16)), "DDPMScheduler"),
    "ddpm, gray": Kind("DDPMPipeline", pixels(in_channels=1, out_channels=1), "DDPMScheduler"),
    "ddim": Kind("DDIMPipeline", pixels()),
    "ddim from ddpm": Kind("DDIMPipeline", pixels(), "DDPMScheduler"),
    "pndm": Kind("PNDMPipeline", pixels(), "PNDMScheduler", {"num_inference_steps": 6}, tensors_out=False),
    "score": Kind("ScoreSdeVePipeline", pixels(time_embedding_type="fourier"), "ScoreSdeVeScheduler", tensors_out=False),
    "karras": Kind("KarrasVePipeline", pixels(), "KarrasVeScheduler", tensors_out=False),
    "consistency": Kind(*CONSISTENCY),
    "consistency, class": Kind(
        CONSISTENCY[0],
        pixels(num_class_embeds=10),
        CONSISTENCY[2],
        {"class_labels": 3},
        {"batch_size": 2, "class_labels": torch.tensor([0, 9])},
    ),
    "repaint": Kind(
        "RePaintPipeline",
        pixels(),
        "RePaintScheduler",
        PAINTED,
        {"image": [picture(32, 32, 1), picture(32, 32, 2)], "mask_image": TWO_MASKS},
        tensors_out=False,
    ),
    "ldm": Kind("LDMPipeline", latents(sample_size=16), tensors_out=False),
    "ldm text": Kind(
        "LDMTextToImagePipeline", words, call={"prompt": "a cat", "height": 64, "width": 48}, two={"prompt": ["a cat", "dog"]}
    ),
    "ldm text, guided": Kind(
        "LDMTextToImagePipeline", words, call={"prompt": "a cat", "guidance_scale": 6.0}, two={"prompt": ["a cat", "dog"]}
    ),
    "ldm super": Kind("LDMSuperResolutionPipeline", latents(in_channels=6), call=SUPER, two=TWO_IMAGES),
    "dit": Kind("DiTPipeline", labels(out_channels=4), call={"class_labels": [3]}, two={"class_labels": [0, 999]}),
    "dit, variance": Kind("DiTPipeline", labels(out_channels=8), call={"class_labels": [3]}, two={"class_labels": [0, 999]}),
}


@cache
def pair(kind: str) -> tuple[Any, Any]:
    """(the peer's pipeline, ours), loaded from one folder that the peer wrote."""
    made, path = KINDS[kind], Path(mkdtemp(prefix="suffuse-"))
    parts = made.parts(path / "tokenizer")
    settings = {name: parts.pop(name) for name in ("id2label",) if name in parts}
    peer = getattr(diffusers, made.name)(**parts, scheduler=getattr(diffusers, made.scheduler)())
    peer.save_pretrained(path / "pipeline")
    align(peer)
    return peer, getattr(suffuse, made.name).from_pretrained(path / "pipeline", **settings)


def call(pipe: Any, kind: str, **options: Any) -> Any:
    settings = {"num_inference_steps": 3, "output_type": "np", "return_dict": False}
    torch.manual_seed(5)
    return pipe(**{**settings, "generator": torch.Generator().manual_seed(7), **KINDS[kind].call, **options})[0]


# ---------------------------------------------------------------- equal to the peer


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "what all calls share": {"generator": None},
    "pictures out": {"output_type": "pil"},
    "tensors out": {"output_type": "pt"},
    "one step": {"num_inference_steps": 1},
    "eta": {"eta": 0.6},
    "clipped": {"use_clipped_model_output": True, "eta": 0.3},
    "latents in": {"latents": torch.randn(1, 4, 8, 6, generator=torch.Generator().manual_seed(5))},
    "samples in": {"latents": torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(5))},
    "timesteps": {"timesteps": [22, 0]},
    "no guidance": {"guidance_scale": 1.0},
    "guidance below 1": {"guidance_scale": 0.4},
    "guidance below 0": {"guidance_scale": -2.0},
}
NOT_FOR = {
    # With a generator and noise in each step, the peer's latent diffusion draws that noise from what all calls share.
    "eta": ("ldm", "ldm text", "ldm text, guided", "ldm super"),
    "one step": ("karras", "repaint", "pndm"),
    "latents in": tuple(kind for kind in KINDS if kind != "ldm text"),
}


def takes(kind: str, option: str) -> bool:
    if option == "tensors out" and not KINDS[kind].tensors_out:
        return False
    parameters = inspect.signature(getattr(suffuse, KINDS[kind].name).__call__).parameters
    return kind not in NOT_FOR.get(option, ()) and all(name in parameters for name in OPTIONS[option])


CASES = [(kind, option) for kind in KINDS for option in OPTIONS if takes(kind, option)]
CASES = [case for case in CASES if case[1] != "samples in" or case[0].startswith("consistency")]


@pytest.mark.parametrize(("kind", "option"), CASES)
def test_pictures_equal_the_peers(kind, option):
    peer, ours = pair(kind)
    assert difference(call(peer, kind, **OPTIONS[option]), call(ours, kind, **OPTIONS[option])) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_two_pictures_equal_the_peers(kind):
    peer, ours = pair(kind)
    two = KINDS[kind].two
    made = call(ours, kind, **two)
    assert len(made) == 2
    assert difference(call(peer, kind, **two), made) == 0


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("repaint", "score", "karras")])
def test_a_generator_for_each_picture(kind):
    peer, ours = pair(kind)
    made = [
        call(pipe, kind, **KINDS[kind].two, generator=[torch.Generator().manual_seed(s) for s in (3, 4)]) for pipe in (peer, ours)
    ]
    assert difference(*made) == 0


@pytest.mark.parametrize("kind", ["ldm", "ldm text", "ldm super"])
def test_noise_of_each_step_comes_from_the_generator_too(kind):
    # The peer's latent diffusion takes it from what all calls share, whatever generator it is given: equal without one.
    peer, ours = pair(kind)
    shared = {"eta": 1.0, "generator": None}
    assert difference(call(peer, kind, **shared), call(ours, kind, **shared)) == 0
    torch.manual_seed(1)
    one = ours(**{"num_inference_steps": 3, "output_type": "np", **KINDS[kind].call}, eta=1.0, seed=4).images
    torch.manual_seed(2)
    assert (
        difference(one, ours(**{"num_inference_steps": 3, "output_type": "np", **KINDS[kind].call}, eta=1.0, seed=4).images) == 0
    )


OTHERS = ["DDPMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler"]
UNSCALED = ["PNDMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"]
"""Whose samples the model sees as they are."""


@pytest.mark.parametrize(
    ("kind", "scheduler"),
    [(kind, name) for kind in ("ldm", "ldm super") for name in OTHERS] + [(k, n) for k in ("ldm text", "dit") for n in UNSCALED],
)
def test_other_schedulers(kind, scheduler):
    pipes = tuple(type(pipe)(**pipe.components) for pipe in pair(kind))
    for pipe, library in zip(pipes, (diffusers, suffuse), strict=True):
        pipe.scheduler = getattr(library, scheduler)()
    call(pipes[0], kind, num_inference_steps=6)  # the peer scales noise by what the scheduler was set to before: by the last run
    made = [call(pipe, kind, num_inference_steps=6, generator=None) for pipe in pipes]
    assert difference(*made) == 0


@pytest.mark.parametrize("kind", ["ldm text", "dit", "dit, variance"])
def test_schedulers_that_scale_what_the_model_sees(kind):
    # The peer scales neither noise nor sample for text, and steps from the scaled sample for classes. DDIM is Euler's method in
    # sigma (Song et al., 2021, equation 14), so both must lead to one picture.
    made = list[Any]()
    for scheduler in (suffuse.DDIMScheduler(clip_sample=False), suffuse.EulerDiscreteScheduler(timestep_spacing="leading")):
        pipe = type(pair(kind)[1]).from_pipe(pair(kind)[1], scheduler=scheduler)
        made.append(call(pipe, kind, num_inference_steps=20))
    assert difference(*made) < 0.01


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "karras"])  # the peer loads none of its own
def test_the_peer_loads_our_folders(kind, tmp_path):
    peer, ours = pair(kind)
    ours.save_pretrained(tmp_path)
    again = getattr(diffusers, KINDS[kind].name).from_pretrained(tmp_path)
    align(again)
    assert difference(call(again, kind), call(ours, kind)) == 0
    assert difference(call(diffusers.DiffusionPipeline.from_pretrained(tmp_path), kind), call(peer, kind)) < 1e-5
    loaded = suffuse.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded) is type(ours)
    assert difference(call(loaded, kind), call(ours, kind)) == 0


def test_the_older_name_of_the_transformer_loads(tmp_path):
    torch.manual_seed(20)
    older = diffusers.Transformer2DModel(**tiny.DIT).eval()
    older.save_pretrained(tmp_path)
    ours = [cls.from_pretrained(tmp_path) for cls in (suffuse.Transformer2DModel, suffuse.DiTTransformer2DModel)]
    sample, told = torch.randn(2, 4, 16, 16), {"timestep": torch.tensor([1, 7]), "class_labels": torch.tensor([1, 2])}
    with torch.no_grad():
        wanted = older(sample, **told).sample
        assert all(torch.equal(model(sample, **told).sample, wanted) for model in ours)


# ---------------------------------------------------------------- what is the same everywhere


@pytest.mark.parametrize("noise", ["generator", "seed"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_after_any_step(kind, noise, tmp_path):
    _, ours = pair(kind)
    source = {"generator": None, "seed": 3} if noise == "seed" else {}
    made = call(ours, kind, **source, save_run=tmp_path / "{step}.safetensors")
    assert difference(made, call(ours, kind, **source)) == 0
    files = sorted(tmp_path.iterdir())
    assert len(files) == ours.num_timesteps + 1
    for file in files:
        assert difference(ours(resume=file)[0], made) == 0, file.name


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "score"])  # the size of its steps is the batch's
def test_each_picture_has_the_noise_of_its_number(kind):
    _, ours = pair(kind)
    two = call(ours, kind, **KINDS[kind].two, generator=None, seed=3)
    second = {name: value[1:2] for name, value in KINDS[kind].two.items() if name != "batch_size"}
    alone = call(ours, kind, **second, generator=CounterNoise(3, 1))
    assert difference(two[1:], alone) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_a_callback_sees_and_replaces_the_latents(kind):
    _, ours = pair(kind)
    seen = []

    def watch(pipe, index, timestep, tensors):
        seen.append(index)
        return {"latents": torch.zeros_like(tensors["latents"])}

    call(ours, kind, callback_on_step_end=watch)
    assert seen == list(range(ours.num_timesteps))

    def end(pipe, index, timestep, tensors):
        seen.append(index)
        pipe._interrupt = True

    seen.clear()
    call(ours, kind, callback_on_step_end=end)
    assert seen == [0]


def test_the_older_callback():
    _, ours = pair("consistency")
    seen = []
    call(ours, "consistency", callback=lambda *told: seen.append(told[0]), callback_steps=2)
    assert seen == [0, 2]


@pytest.mark.parametrize("kind", ["ddpm", "ddim", "pndm", "consistency", "repaint", "ldm", "ldm text", "ldm super", "dit"])
def test_half_precision(kind):
    _, ours = pair(kind)
    half = type(ours).from_pipe(ours)
    half = half.from_pretrained(ours.name_or_path, torch_dtype=torch.bfloat16)
    assert difference(call(half, kind), call(ours, kind)) < 0.6
    assert all(isinstance(image, Image.Image) for image in call(half, kind, output_type="pil"))


def test_an_unnamed_class_is_drawn_from_the_generator_of_the_call():
    # The peer draws it from what all calls share, after the noise: equal without a generator.
    peer, ours = pair("consistency, class")
    shared = {"class_labels": None, "generator": None}
    assert difference(call(peer, "consistency, class", **shared), call(ours, "consistency, class", **shared)) == 0
    torch.manual_seed(0)
    made = [ours(class_labels=None, seed=seed, output_type="np").images for seed in (1, 1, 2)]
    assert difference(made[0], made[1]) == 0
    assert difference(made[0], made[2]) > 0


def test_repainting_draws_each_picture_with_its_own_generator():
    # The peer draws all steps of all pictures with the first.
    _, ours = pair("repaint")
    two = KINDS["repaint"].two
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    made = call(ours, "repaint", **two, generator=generators, eta=0.5)
    alone = call(
        ours, "repaint", image=two["image"][1], mask_image=TWO_MASKS[1:], generator=torch.Generator().manual_seed(4), eta=0.5
    )
    assert difference(made[1:], alone) < 1e-4


def test_repainting_keeps_what_the_mask_shows_white():
    _, ours = pair("repaint")
    kept = torch.ones(1, 1, 32, 32)
    made = call(ours, "repaint", mask_image=kept, output_type="pt")
    assert difference(made, ours.image_processor.preprocess(picture(32, 32)) / 2 + 0.5) < 0.05


@pytest.mark.parametrize("kind", ["repaint", "score", "ldm text, guided", "dit"])
def test_threads_share_a_pipeline(kind):
    _, ours = pair(kind)
    settings = {"num_inference_steps": 6, "output_type": "np", **KINDS[kind].call}
    serial = [ours(**settings, seed=seed).images for seed in range(3)]
    with ThreadPoolExecutor(3) as threads:
        together = list(threads.map(lambda seed: ours(**settings, seed=seed).images, range(3)))
    assert difference(serial, together) == 0


def test_the_schedulers_of_a_run_are_its_own():
    _, ours = pair("repaint")
    before = ours.scheduler.eta
    call(ours, "repaint", eta=0.9)
    assert ours.scheduler.eta == before


def test_names_of_classes():
    _, ours = pair("dit")
    assert ours.get_label_ids(["cat", "dog"]) == [1, 2]
    assert ours.get_label_ids("a cat") == [1]  # the peer asks for "a", " ", "c", …
    with pytest.raises(InputError, match=r"no class is called 'dgo'(.|\n)*did you mean 'dog'"):
        ours.get_label_ids("dgo")
    assert ours.config.id2label == {1: "a cat, cat", 2: "dog"}


# ---------------------------------------------------------------- refused


BAD: dict[str, tuple[str, dict[str, Any], type[Exception], str]] = {
    "no pictures": ("ddpm", {"batch_size": 0}, InputError, "batch_size=0 is out of range"),
    "a part of a picture": ("ddim", {"batch_size": 1.5}, InputError, "batch_size must be a whole number"),
    "more steps than timesteps": ("ddpm", {"num_inference_steps": 2000}, InputError, "num_inference_steps"),
    "one step of two": ("karras", {"num_inference_steps": 1}, InputError, "2 or more"),
    "generators for other pictures": ("ddpm", {"generator": [torch.Generator()] * 3}, InputError, "3 given for 1 pictures"),
    "seeds for other pictures": ("ddpm", {"generator": None, "seed": [1, 2]}, InputError, "seed: 2 given for 1 pictures"),
    "seed and generator": ("ldm", {"seed": 1}, InputError, "seed and generator are both given"),
    "eta": ("ddim", {"eta": 2}, InputError, "eta=2 is out of range"),
    "clipping": ("ddim", {"use_clipped_model_output": "yes"}, InputError, "use_clipped_model_output has the wrong type"),
    "an unknown keyword": ("pndm", {"steps": 3}, UnknownArgumentError, "'steps'"),
    "an unknown output": ("score", {"output_type": "jpg"}, InputError, "output_type"),
    "a tensor that is not there": (
        "ddpm",
        {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]},
        InputError,
        "no tensor 'prompt_embeds'",
    ),
    "classes it does not know": ("consistency", {"class_labels": 1}, InputError, "this UNet knows no classes"),
    "a class too high": ("consistency, class", {"class_labels": 10}, InputError, r"out of range(.|\n)*0 to 9"),
    "too many classes": ("consistency, class", {"class_labels": [1, 2]}, InputError, "2 given for 1 pictures"),
    "classes as text": ("consistency, class", {"class_labels": "cat"}, InputError, "no numbers"),
    "parts of classes": ("consistency, class", {"class_labels": [0.5]}, InputError, "no whole numbers"),
    "latents of another shape": ("consistency", {"latents": torch.zeros(1, 3, 8, 8)}, InputError, "latents has the wrong shape"),
    "no jump": ("repaint", {"jump_length": 0}, InputError, "jump_length=0 is out of range"),
    "no sample of a jump": ("repaint", {"jump_n_sample": 0}, InputError, "jump_n_sample=0 is out of range"),
    "no picture": ("repaint", {"image": None}, InputError, "image"),
    "a mask of another size": ("repaint", {"mask_image": mask()}, InputError, "mask_image and image differ in size"),
    "masks for other pictures": ("repaint", {"mask_image": [mask(32, 32)] * 3}, InputError, "mask_image: 3 given for 1 pictures"),
    "no small picture": ("ldm super", {"image": None}, InputError, "image"),
    "a batch of other pictures": ("ldm super", {"batch_size": 3}, InputError, "batch_size=3 for 1 pictures"),
    "no prompt": ("ldm text", {"prompt": None}, InputError, "prompt is missing"),
    "no text": ("ldm text", {"prompt": 3}, InputError, "prompt is no text"),
    "a size between latents": ("ldm text", {"height": 60}, InputError, "not divisible by 8"),
    "no class": ("dit", {"class_labels": []}, InputError, "class_labels must be a list"),
    "one class": ("dit", {"class_labels": 3}, InputError, "class_labels must be a list"),
    "the class of none": ("dit", {"class_labels": [1000]}, InputError, r"0 to 999"),
    "guidance": ("dit", {"guidance_scale": float("nan")}, InputError, "guidance_scale=nan is out of range"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused(case):
    kind, options, error, message = BAD[case]
    _, ours = pair(kind)
    generator = torch.Generator().manual_seed(7)
    before = generator.get_state()
    with pytest.raises(error, match=message):
        call(ours, kind, **{"generator": generator, **options})
    assert torch.equal(generator.get_state(), before)


def test_an_unet_that_does_not_say_how_large_pictures_are():
    _, ours = pair("ddpm")
    unet = suffuse.UNet2DModel.from_config(ours.unet.config, sample_size=None)
    with pytest.raises(ConfigError, match=r"no sample_size(.|\n)*register_to_config"):
        suffuse.DDPMPipeline(unet, ours.scheduler)()


@pytest.mark.parametrize(("kind", "part"), [("ldm", "vqvae"), ("ldm text", "bert"), ("dit", "transformer")])
def test_what_is_no_component(kind, part):
    _, ours = pair(kind)
    with pytest.raises(ConfigError, match=f"the {part} of a pipeline cannot be this"):
        type(ours)(**ours.components | {part: torch.nn.Linear(1, 1)})
