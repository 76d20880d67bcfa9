"""Arguments that cannot be meant: each gets an error that says what came and what is allowed, and nothing changes."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from tasks import TASKS, call, difference, folder, mask, pair, picture, set_scheduler

from suffuse.errors import (
    ConfigError,
    HubError,
    InputError,
    LimitError,
    MissingFileError,
    NonFiniteError,
    SuffuseError,
    UnknownArgumentError,
)

EMBEDS = torch.zeros(1, 77, 32)
LATENTS = torch.zeros(1, 4, 32, 32)


def returning(**tensors):
    """A callback that hands these back."""
    return {"callback_on_step_end": lambda *_: tensors, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}


BAD: dict[str, tuple[str, dict, type[Exception], str]] = {
    "no prompt": ("text", {"prompt": None}, InputError, "prompt and prompt_embeds are both missing"),
    "a number for a prompt": ("text", {"prompt": 7}, InputError, r"prompt is no text(.|\n)*7 \(int\)"),
    "an empty list of prompts": ("text", {"prompt": []}, InputError, "prompt is an empty list"),
    "None among prompts": ("text", {"prompt": ["a", None]}, InputError, r"prompt\[1\] is no text"),
    "a lone surrogate": ("text", {"prompt": "a\ud800"}, InputError, "no valid Unicode(.|\n)*character 1"),
    "prompt and embeddings": ("text", {"prompt_embeds": EMBEDS}, InputError, "both given"),
    "negative of another length": (
        "text",
        {"prompt": ["a"], "negative_prompt": ["a", "b"]},
        InputError,
        "2 entries for 1 prompt",
    ),
    "embeddings of other shapes": (
        "text",
        {"prompt": None, "prompt_embeds": EMBEDS, "negative_prompt_embeds": EMBEDS[:, :5]},
        InputError,
        r"\(1, 77, 32\) and \(1, 5, 32\)",
    ),
    "embeddings of another width": (
        "text",
        {"prompt": None, "prompt_embeds": EMBEDS[..., :8]},
        InputError,
        r"expected: \(1, 77, 32\)",
    ),
    "embeddings of no prompt": ("text", {"prompt": None, "prompt_embeds": EMBEDS[:0]}, InputError, r"\(0, 77, 32\)"),
    "embeddings of no token": ("text", {"prompt": None, "prompt_embeds": EMBEDS[:, :0]}, InputError, r"\(1, 0, 32\)"),
    "embeddings without storage": ("text", {"prompt": None, "prompt_embeds": EMBEDS.to("meta")}, InputError, "on meta"),
    "sparse embeddings": ("text", {"prompt": None, "prompt_embeds": EMBEDS.to_sparse()}, InputError, "sparse_coo on cpu"),
    "negative embeddings that fit no prompt": (
        "text",
        {"negative_prompt_embeds": EMBEDS[:, :5]},
        InputError,
        r"negative_prompt_embeds(.|\n)*\(1, 5, 32\)(.|\n)*\(1, 77, 32\)",
    ),
    "more tokens than the encoder has positions": (
        "text",
        {"prompt": None, "prompt_embeds": torch.zeros(1, 200, 32)},
        InputError,
        "no text of 200 tokens(.|\n)*at most 77",
    ),
    "embeddings with NaN": ("text", {"prompt": None, "prompt_embeds": EMBEDS * math.nan}, InputError, "not finite"),
    "height 100": ("text", {"height": 100}, InputError, r"height=100 is not divisible by 8(.|\n)*use 96 or 104"),
    "height 0": ("text", {"height": 0}, InputError, "height=0 is out of range"),
    "width -64": ("text", {"width": -64}, InputError, "width=-64 is out of range"),
    "width as text": ("text", {"width": "64"}, InputError, r"width must be a whole number(.|\n)*'64' \(str\)"),
    "height 8e6": ("text", {"height": 8_000_000, "width": 8_000_000}, LimitError, "at most"),
    "more pixels than fit": ("text", {"height": 80_000, "width": 80_000}, LimitError, "at most 64000000 pixels"),
    "no steps": ("text", {"num_inference_steps": 0}, InputError, "num_inference_steps=0 is out of range"),
    "-1 steps": ("text", {"num_inference_steps": -1}, InputError, "at least 1"),
    "1.5 steps": ("text", {"num_inference_steps": 1.5}, InputError, "must be a whole number"),
    "steps as text": ("text", {"num_inference_steps": "2"}, InputError, r"'2' \(str\)"),
    "guidance beyond floats": ("text", {"guidance_scale": 10**400}, InputError, "out of range"),
    "10^9 pictures": ("text", {"num_images_per_prompt": 10**9}, InputError, "at most 1024"),
    "timesteps that are no numbers": ("text", {"timesteps": "abc"}, InputError, "takes no custom timesteps"),
    "no generators": ("text", {"generator": []}, InputError, "generator has the wrong type"),
    "attention keywords that nobody takes": (
        "text",
        {"cross_attention_kwargs": {"foo": 1}},
        UnknownArgumentError,
        r"cross_attention_kwargs\(\)(.|\n)*'foo'(.|\n)*scale, gligen",
    ),
    "attention keywords that are no names": ("text", {"cross_attention_kwargs": {1: 2}}, UnknownArgumentError, "argument 1"),
    "boxes for a model without": ("inpaint", {"cross_attention_kwargs": {"gligen": {}}}, InputError, "no gated attention"),
    "more steps than were trained": ("text", {"num_inference_steps": 1001}, SuffuseError, "1000"),
    "guidance NaN": ("text", {"guidance_scale": math.nan}, InputError, "guidance_scale=nan is out of range"),
    "guidance infinite": ("text", {"guidance_scale": math.inf}, InputError, "a finite number"),
    "guidance as text": ("text", {"guidance_scale": "7"}, InputError, r"'7' \(str\)"),
    "eta 2": ("text", {"eta": 2}, InputError, r"eta=2 is out of range(.|\n)*\[0, 1\]"),
    "rescale -1": ("text", {"guidance_rescale": -1}, InputError, r"\[0, 1\]"),
    "strength 1.5": ("image", {"strength": 1.5}, InputError, r"strength=1.5 is out of range(.|\n)*\[0, 1\]"),
    "strength that leaves no step": ("image", {"strength": 0.1}, InputError, "num_inference_steps=10 or more"),
    "0 pictures": ("text", {"num_images_per_prompt": 0}, InputError, "at least 1"),
    "-1 pictures": ("text", {"num_images_per_prompt": -1}, InputError, "at least 1"),
    "latents of another shape": (
        "text",
        {"latents": torch.zeros(1, 4, 8, 8)},
        InputError,
        r"\(1, 4, 8, 8\)(.|\n)*\(1, 4, 32, 24\)",
    ),
    "latents with infinity": ("text", {"latents": torch.full((1, 4, 32, 24), math.inf)}, InputError, "not finite"),
    "generators of another number": (
        "text",
        {"generator": [torch.Generator()] * 3},
        InputError,
        "generator: 3 given for 1 pictures",
    ),
    "a seed for a generator": ("text", {"generator": 7}, InputError, r"torch.Generator\(device\).manual_seed"),
    "clip_skip -1": ("text", {"clip_skip": -1}, InputError, "at least 0"),
    "clip_skip of all layers": ("text", {"clip_skip": 3}, InputError, "less than 3"),
    "output_type 'jpg'": ("text", {"output_type": "jpg"}, InputError, "pil, np, pt, latent"),
    "a misspelt keyword": ("text", {"guidence_scale": 7}, UnknownArgumentError, "did you mean 'guidance_scale'"),
    "no function": ("text", {"callback_on_step_end": 3}, InputError, "cannot be called"),
    "a tensor that is not there": (
        "text",
        {"callback_on_step_end": print, "callback_on_step_end_tensor_inputs": ["latent"]},
        InputError,
        "no tensor 'latent'(.|\n)*did you mean 'latents'",
    ),
    "a callback that returns a tensor": (
        "text",
        {"callback_on_step_end": lambda *_: torch.zeros(1)},
        InputError,
        "returned no dictionary",
    ),
    "a callback that returns None for a tensor": ("text", returning(prompt_embeds=None), InputError, "'prompt_embeds'"),
    "a callback that misspells a tensor": (
        "text",
        returning(latent=LATENTS),
        InputError,
        "'latent' that replaces no tensor(.|\n)*latents, prompt_embeds",
    ),
    "timesteps for a scheduler without": ("text", {"timesteps": [1, 0]}, InputError, "takes no custom timesteps"),
    "an adapter picture without adapter": ("text", {"ip_adapter_image": picture()}, InputError, "no IP-Adapter is loaded"),
    "no picture": ("image", {"image": None}, InputError, "image is no picture"),
    "a path for a picture": ("image", {"image": "photo.png"}, InputError, "image is no picture(.|\n)*str"),
    "no mask": ("inpaint", {"mask_image": None}, InputError, "mask_image is no picture"),
    "a mask of another aspect": ("inpaint", {"mask_image": mask(64, 128)}, InputError, "128 x 64 and 64 x 64"),
    "a mask of another aspect, as an array": (
        "inpaint",
        {"mask_image": np.zeros((64, 128), np.uint8)},
        InputError,
        "128 x 64 and 64 x 64",
    ),
    "latents of a masked picture of another size": (
        "inpaint",
        {"masked_image_latents": LATENTS[..., :16]},
        InputError,
        r"masked_image_latents(.|\n)*\(1, 4, 32, 16\)(.|\n)*\(1, 4, 32, 32\)",
    ),
    "three masked pictures": (
        "inpaint9",
        {"masked_image_latents": LATENTS.repeat(3, 1, 1, 1)},
        InputError,
        "masked_image_latents: 3 given for 1 pictures",
    ),
    "latents of a picture that nobody masked": ("inpaint9", {"image": LATENTS}, InputError, "of which no masked picture"),
    "a crop of tensors": (
        "inpaint",
        {"padding_mask_crop": 4, "image": torch.zeros(1, 3, 64, 64)},
        InputError,
        "needs a PIL picture",
    ),
    "a crop by a mask of another size": (
        "inpaint",
        {"padding_mask_crop": 4, "mask_image": mask(32, 32), "output_type": "pil"},
        InputError,
        r"\(32, 32\) and \(64, 64\)",
    ),
    "a crop of nothing": (
        "inpaint",
        {"padding_mask_crop": 4, "mask_image": Image.new("L", (64, 64)), "output_type": "pil"},
        InputError,
        "is black",
    ),
    "a flat depth map": ("depth", {"depth_map": torch.ones(1, 8, 8)}, InputError, "depth_map is flat"),
    "a complex depth map": ("depth", {"depth_map": torch.ones(1, 8, 8) * 1j}, InputError, "finite real numbers"),
    "a depth map of nothing": ("depth", {"depth_map": torch.ones(0, 8, 8)}, InputError, r"\(0, 8, 8\)"),
    "a depth map with a hole": (
        "depth",
        {"depth_map": torch.full((1, 8, 8), math.nan)},
        InputError,
        "depth_map(.|\n)*not finite",
    ),
    "latents without a depth map": ("depth", {"image": torch.zeros(1, 4, 32, 32)}, InputError, "cannot be estimated"),
    "latents of another shape for inpainting": ("inpaint", {"latents": torch.zeros(1, 4, 8, 8)}, InputError, r"\(1, 4, 32, 32\)"),
    "more pictures than prompts": ("image", {"image": [picture(), picture(seed=1)]}, InputError, "2 given for 1 pictures"),
}


@pytest.mark.parametrize("name", BAD)
def test_is_told_and_changes_nothing(name):
    task, options, error, message = BAD[name]
    _, pipe = pair(task)
    set_scheduler(pair(task), "DDIMScheduler")
    expected = call(pipe, task)
    generator = torch.Generator().manual_seed(7)
    state = generator.get_state()
    with pytest.raises(error, match=message) as raised:
        call(pipe, task, **{"generator": generator} | options)
    assert isinstance(raised.value, SuffuseError)
    if "callback" not in name:
        assert torch.equal(generator.get_state(), state), "the generator was used"
    assert difference(call(pipe, task), expected) == 0


@pytest.mark.parametrize(
    ("given", "same"),
    [
        ({"prompt": ("a cat", "a dog")}, {"prompt": ["a cat", "a dog"]}),
        ({"negative_prompt": ("blurry",)}, {"negative_prompt": ["blurry"]}),
        ({"guidance_scale": np.float16(7.5), "num_inference_steps": np.int32(4)}, {}),
        ({"num_images_per_prompt": np.int64(2), "eta": np.float32(0.5)}, {"num_images_per_prompt": 2, "eta": 0.5}),
        ({"latents": torch.ones(1, 4, 32, 24, dtype=torch.float64)}, {"latents": torch.ones(1, 4, 32, 24)}),
    ],
)
def test_what_says_the_same_draws_the_same(given, same):
    _, pipe = pair("text")
    set_scheduler(pair("text"), "DDIMScheduler")
    assert difference(call(pipe, "text", **given), call(pipe, "text", **same)) == 0


def test_a_tuple_of_generators_is_a_list_of_them():
    _, pipe = pair("text")
    made = call(pipe, "text", generator=(torch.Generator().manual_seed(7),))
    assert difference(made, call(pipe, "text", generator=[torch.Generator().manual_seed(7)])) == 0


def test_one_edge_given_leaves_the_other_to_the_model():
    """The peer, unlike its release 0.26.3, draws another size than was asked for: it drops the edge that was given."""
    _, pipe = pair("text")
    made = call(pipe, "text", height=48, width=None, num_inference_steps=1)
    assert made.shape[-2:] == (48, pipe.unet.config.sample_size * pipe.vae_scale_factor)
    unsized = type(pipe).from_pipe(pipe, unet=type(pipe.unet).from_config(pipe.unet.config, sample_size=None))
    with pytest.raises(InputError, match=r"no sample_size(.|\n)*pass both"):
        call(unsized, "text", height=48, width=None)
    huge = type(pipe).from_pipe(pipe, unet=type(pipe.unet).from_config(pipe.unet.config, sample_size=90_000))
    with pytest.raises(LimitError, match="at most 64000000 pixels"):
        call(huge, "text", height=None, width=None)


@pytest.mark.parametrize("name", ["unet", "vae", "scheduler"])
def test_a_component_that_is_not_there_is_missed_before_anything_is_computed(name):
    _, pipe = pair("image")
    without = type(pipe).from_pipe(pipe, **{name: None})
    with pytest.raises(InputError, match=f"no {name}, which this call needs"):
        call(without, "image")


def test_latents_need_no_autoencoder():
    _, pipe = pair("text")
    without = type(pipe).from_pipe(pipe, vae=None)
    without.set_progress_bar_config(disable=True)
    assert call(without, "text", output_type="latent", height=128, width=128).shape == (1, 4, 16, 16)


@pytest.mark.parametrize(
    ("component", "value"),
    [
        ("unet", 3),
        ("unet", pair("text")[1].vae),
        ("vae", torch.nn.Linear(1, 1)),
        ("vae", pair("text")[1].unet),
        ("scheduler", pair("text")[0].scheduler),
        ("scheduler", type(pair("text")[1].scheduler)),
        ("tokenizer", "a tokenizer"),
        ("text_encoder", pair("text")[1].unet),
        ("safety_checker", 3),
    ],
)
def test_a_component_of_the_wrong_kind_is_refused(component, value):
    _, pipe = pair("text")
    with pytest.raises(ConfigError, match=f"the {component} of a pipeline cannot be this"):
        type(pipe).from_pipe(pipe, **{component: value})
    other = type(pipe).from_pipe(pipe)
    with pytest.raises(ConfigError, match=f"the {component} of a pipeline cannot be this"):
        setattr(other, component, value)
    assert getattr(other, component) is getattr(pipe, component)


def test_arguments_that_are_too_many_or_given_twice():
    _, pipe = pair("text")
    with pytest.raises(UnknownArgumentError, match=r"StableDiffusionPipeline\(\): too many positional"):
        pipe(*["a"] * 40)
    with pytest.raises(UnknownArgumentError, match="multiple values for argument 'prompt'"):
        pipe("a", prompt="b")


def test_a_pipeline_in_inference_mode_draws_the_same():
    _, pipe = pair("text")
    set_scheduler(pair("text"), "DDIMScheduler")
    expected = call(pipe, "text")
    with torch.inference_mode():
        assert difference(call(pipe, "text"), expected) == 0
    assert difference(call(pipe, "text"), expected) == 0


@pytest.mark.parametrize("task", ["text", "image", "inpaint"])
def test_a_copied_or_pickled_pipeline_draws_the_same(task):
    # Loaded anew: once transformers was asked for hidden states, its hooks keep a text encoder from being pickled.
    pipe = TASKS[task].ours.from_pretrained(folder(task))
    expected = call(pipe, task)
    for other in (copy.copy(pipe), copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        assert difference(call(other, task), expected) == 0


def test_a_prompt_longer_than_the_encoder_reads_is_told_in_numbers():
    _, pipe = pair("text")
    with pytest.warns(
        UserWarning, match=r"prompt 0 has 202 tokens and the text encoder reads 77: the last 125 are ignored"
    ) as seen:
        call(pipe, "text", prompt="ab" * 100)
    assert all("abab" not in str(warning.message) for warning in seen)


def test_strength_0_returns_the_picture():
    for task in ("image", "depth", "inpaint"):
        _, pipe = pair(task)
        made = call(pipe, task, strength=0, output_type="pil")
        assert np.array_equal(np.asarray(made[0]), np.asarray(picture()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_autoencoder_that_overflows_decodes_in_float32(dtype):
    _, pipe = pair("text")
    vae = copy.deepcopy(pipe.vae)
    vae.decoder.conv_out.register_forward_hook(lambda module, args, out: out * 1e6 if out.dtype == torch.float16 else out)
    vae.decoder.conv_in.register_forward_hook(lambda module, args, out: out / 0 if out.dtype == dtype else out)
    half = type(pipe).from_pipe(pipe, vae=vae.to(dtype))
    half.set_progress_bar_config(disable=True)
    with pytest.warns(UserWarning, match=f"overflowed in {dtype}: decoding once more in float32"):
        made = call(half, "text", output_type="pt")
    assert made.isfinite().all()
    assert made.std() > 0.01
    assert half.vae.dtype == dtype


@pytest.mark.parametrize(("dtype", "where"), [(torch.bfloat16, "after step 2 of 4"), (torch.float32, "after the last step")])
def test_latents_that_overflow_are_told_and_never_become_a_picture(dtype, where):
    _, pipe = pair("text")
    set_scheduler(pair("text"), "DDIMScheduler")
    pipe = type(pipe)(**copy.deepcopy(pipe.components), requires_safety_checker=False).to(dtype)
    pipe.set_progress_bar_config(disable=True)
    calls = []
    pipe.unet.conv_out.register_forward_hook(
        lambda module, args, out: calls.append(1) or (out * math.inf if len(calls) == 2 else out)
    )
    with pytest.raises(NonFiniteError, match=f"the latents are not finite {where}(.|\\n)*{dtype}"):
        call(pipe, "text")


def test_a_text_encoder_that_is_not_there_is_missed_when_it_is_needed():
    _, pipe = pair("text")
    without = type(pipe).from_pipe(pipe, text_encoder=None, tokenizer=None)
    without.set_progress_bar_config(disable=True)
    with pytest.raises(InputError, match="has no text encoder"):
        call(without, "text")
    call(without, "text", prompt=None, prompt_embeds=EMBEDS, negative_prompt_embeds=EMBEDS)


def test_no_folder():
    import suffuse

    with pytest.raises(MissingFileError, match="is not a folder here"):
        suffuse.DiffusionPipeline.from_pretrained("./nowhere/at-all")
    with pytest.raises(HubError, match="is no folder here, and the cache does not hold all of it"):
        suffuse.DiffusionPipeline.from_pretrained("nowhere/at-all")
