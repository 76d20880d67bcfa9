"""The keywords of pipelines: each described once and checked once.

A pipeline's `__call__` says which keywords it has; what they mean and what they may be stands in the table here. `recipe` binds a
call to its signature, checks every argument by its name before anything is computed, and fills the docstring.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import torch
from PIL import Image
from torch import Tensor

from suffuse.diffusion.checked import Check, is_a, number, optional, shown, tensor, texts, whole
from suffuse.diffusion.guidance import is_guidance
from suffuse.errors import InputError, LimitError, UnknownArgumentError, nearest, unknown_argument
from suffuse.noise import CounterNoise, Source, fresh
from suffuse.pipelines.saved_run import PICTURES, RunWriter, SavedRun
from suffuse.processing.image import MAX_PIXELS, check_output_type

_Call = TypeVar("_Call", bound=Callable[..., Any])


# ---------------------------------------------------------------- what a value may be


def anything(name: str, value: Any) -> None:
    """Checked where it is used."""


def size(name: str, value: Any) -> None:
    """None, or a positive multiple of 8."""
    if value is None:
        return
    whole(1)(name, value)
    if value % 8:
        below = value - value % 8
        raise InputError(
            f"{name}={value} is not divisible by 8",
            remedy=f"use {f'{below} or ' if below else ''}{below + 8}: one latent stands for 8 pixels",
        )
    if value > MAX_PIXELS // 8:
        raise LimitError(f"{name}={value} is too large", expected=f"at most {MAX_PIXELS} pixels a picture")


def two(low: int) -> Check:
    """Two whole numbers of at least `low`: rows and columns, or top and left."""

    def check(name: str, value: Any) -> None:
        if not isinstance(value, list) or len(value) != 2:
            raise InputError(f"{name} must be two whole numbers", found=shown(value), expected="(rows, columns)")
        for item in value:
            whole(low)(name, item)

    return check


def fraction(name: str, value: Any) -> None:
    """None, or a part of the way: a number above 0 and at most 1."""
    if value is not None:
        number(0, 1)(name, value)
        if value == 0:
            raise InputError(f"{name}=0 is no part of the way", expected="a number above 0 and at most 1, or None")


def generators(name: str, value: Any) -> None:
    """None, a torch.Generator or a CounterNoise, or a list of them."""
    items = value if isinstance(value, list) and value else [value]
    if value is not None and not all(isinstance(item, Source) for item in items):
        raise InputError(
            f"{name} has the wrong type",
            found=shown(value),
            expected="a torch.Generator, or a list of one for each picture",
            remedy="pass seed=7, or generator=torch.Generator(device).manual_seed(7)",
        )


def seeds(name: str, value: Any) -> None:
    """None, a whole number of 64 bits, or a list of them."""
    for item in value if isinstance(value, list) and value else [value]:
        optional(whole(0, 2**64 - 1))(name, item)


def saved_run(name: str, value: Any) -> None:
    """None, the path of a file, or a `SavedRun`."""
    optional(is_a(str, os.PathLike, SavedRun, spelled="the path of a file"))(name, value)


def each(check: Check) -> Check:
    """What `check` allows, or a list of it."""

    def check_each(name: str, value: Any) -> None:
        items = enumerate(cast(list[Any], value)) if isinstance(value, list) else ()
        for index, item in items:
            check(f"{name}[{index}]", item)
        if not isinstance(value, list):
            check(name, value)

    return check_each


def guides(name: str, value: Any) -> None:
    """Something that asks for branches and combines their predictions, and is what it may be, as is what it holds."""
    is_guidance(name, value)
    value.check_values(name)
    if not isinstance(value.branches, tuple):
        raise InputError(f"{name}.branches are no tuple", found=shown(value.branches), expected="names, ('uncond', 'cond')")


def replayed(name: str, value: Any) -> None:
    """None, or tensors of (batch, channels, rows, columns), as a list or as one of five dimensions."""
    if isinstance(value, Tensor):
        tensor(dimensions=5)(name, value)
        return
    optional(is_a(list, spelled="a list of tensors, one for each step"))(name, value)
    for index, edit in enumerate(cast(list[Any], value or [])):
        is_a(Tensor, spelled="a torch.Tensor")(f"{name}[{index}]", edit)
        tensor(dimensions=4)(f"{name}[{index}]", edit)


def positions(name: str, value: Any) -> None:
    """A whole number of at least 1, or a list of them."""
    for item in cast(list[Any], value) if isinstance(value, (list, tuple)) else [value]:
        whole(1)(name, item)


def by_step(name: str, value: Any) -> None:
    """A dictionary from steps, counted from 0, to numbers in [0, 1]."""
    is_a(dict, spelled="a dictionary")(name, value)
    for step, threshold in cast(dict[Any, Any], value).items():
        whole(0)(f"a step of {name}", step)
        number(0, 1)(f"{name}[{step}]", threshold)


def each_or_none(check: Check) -> Check:
    """None, or a list of what `check` allows or None."""

    def check_list(name: str, value: Any) -> None:
        optional(is_a(list, spelled="a list"))(name, value)
        each(optional(check))(name, value or [])

    return check_list


def phrase(name: str, value: Any) -> None:
    """One text."""
    is_a(str, spelled="a text")(name, value)
    texts(name, value)


def inverted(name: str, value: Any) -> None:
    """None, or tensors of 3, 4 or 5 dimensions, as a list or one."""
    for index, one in enumerate(cast(list[Any], value) if isinstance(value, list) else [value]):
        where = f"{name}[{index}]" if isinstance(value, list) else name
        optional(is_a(Tensor, spelled="a torch.Tensor, or a list"))(where, one)
        tensor(dimensions=min(max(one.ndim, 3), 5) if isinstance(one, Tensor) else 4)(where, one)


def pil(name: str, value: Any) -> None:
    """A PIL picture."""
    is_a(Image.Image, spelled="a PIL picture")(name, value)


def boxes(name: str, value: Any) -> None:
    """None, or a list of (left, top, right, bottom), each from 0 to 1."""
    optional(is_a(list, spelled="a list of (left, top, right, bottom)"))(name, value)
    for index, box in enumerate(cast(list[Any], value or [])):
        where = f"{name}[{index}]"
        if not isinstance(box, (list, tuple)) or len(cast(list[Any], box)) != 4:
            raise InputError(f"{where} is no box", found=shown(box), expected="(left, top, right, bottom), from 0 to 1")
        for corner in cast(list[Any], box):
            number(0, 1)(where, corner)
        left, top, right, bottom = cast(list[float], box)
        if left >= right or top >= bottom:
            raise InputError(f"{where} holds nothing", found=box, expected="left before right, top above bottom")


def callback(name: str, value: Any) -> None:
    """None, or something that can be called."""
    if value is not None and not callable(value):
        raise InputError(f"{name} cannot be called", found=shown(value), expected="a function, or None")


def _listed(value: Any) -> Any:
    """A tuple says what a list says."""
    return list(value) if isinstance(value, tuple) else value


# ---------------------------------------------------------------- the table


@dataclass(frozen=True)
class Argument:
    """What a keyword means, what it may be, and what it is where a recipe does not say."""

    description: str
    check: Check = anything
    default: Any = None


ARGUMENTS: dict[str, Argument] = {
    "prompt": Argument("What the picture should show: a text, or a list with one for each picture.", texts),
    "negative_prompt": Argument("What it should not show; a text, or one for each prompt. Used with guidance only.", texts),
    "prompt_embeds": Argument("(batch, tokens, width): encoded prompts, instead of `prompt`.", tensor(dimensions=3)),
    "negative_prompt_embeds": Argument("(batch, tokens, width): encoded negative prompts.", tensor(dimensions=3)),
    "prompt_2": Argument("What the second text encoder reads; `prompt`, if None.", texts),
    "negative_prompt_2": Argument("What the second text encoder reads as negative prompt; `negative_prompt`, if None.", texts),
    "pooled_prompt_embeds": Argument("(batch, width): the prompts' one vector each, with `prompt_embeds`.", tensor(dimensions=2)),
    "negative_pooled_prompt_embeds": Argument("(batch, width): the same of `negative_prompt_embeds`.", tensor(dimensions=2)),
    "image": Argument(
        "The picture to start from; or, with a ControlNet and nothing to start from, what `control_image` is elsewhere: PIL, "
        "array in [0, 1] or uint8, tensor in [0, 1], or a list of one kind."
    ),
    "control_image": Argument(
        "What the ControlNet sees, one for all prompts or one for each; for several nets a list with an entry for each net, or "
        "for each prompt a list of such entries."
    ),
    "controlnet": Argument("A ControlNet for this call, or a list of several; where the pipeline computes."),
    "controlnet_conditioning_scale": Argument(
        "Multiplies what the ControlNet adds; for several nets a number, or one for each.", each(number()), 1.0
    ),
    "guess_mode": Argument(
        "Let the ControlNet find out what the control picture shows: it acts on the conditional branch only.",
        is_a(bool, spelled="True or False"),
        False,
    ),
    "control_guidance_start": Argument(
        "The part of the way after which the ControlNet begins to act, in [0, 1]; or one for each net.", each(number(0, 1)), 0.0
    ),
    "control_guidance_end": Argument("The part of the way after which it no longer acts, likewise.", each(number(0, 1)), 1.0),
    "mask_image": Argument("Where to paint: white is painted anew, black is kept. Of the aspect of `image`."),
    "masked_image_latents": Argument(
        "(batch, 4, height / 8, width / 8): latents of the masked picture, if they were made before.", tensor(dimensions=4)
    ),
    "depth_map": Argument(
        "(batch, height, width): depth, in any range; estimated from `image` if None.", tensor(dimensions=3, kind="real")
    ),
    "adapter": Argument("A T2I-Adapter for this call, or a list of several; where the pipeline computes."),
    "adapter_image": Argument(
        "What the T2I-Adapter sees, one for all prompts or one for each; for several a list of one for each."
    ),
    "adapter_conditioning_scale": Argument(
        "Multiplies the features of the T2I-Adapter; for several a number, or one for each.", each(number()), 1.0
    ),
    "adapter_conditioning_factor": Argument("The part of the steps, from the first, in which they are added.", number(0, 1), 1.0),
    "guidance": Argument(
        "How predictions are combined, instead of `guidance_scale`: a value of `suffuse.diffusion.guidance`.", optional(guides)
    ),
    "height": Argument("Rows of the picture, a multiple of 8; what the model was trained on, if None.", size),
    "width": Argument("Columns of the picture, likewise.", size),
    "padding_mask_crop": Argument(
        "Paint only a crop around the mask, this many pixels wider, at full size, and lay it back.", optional(whole(0))
    ),
    "strength": Argument("How far from `image` to go, in [0, 1]: 1 leaves nothing of it, 0 returns it.", number(0, 1)),
    "num_inference_steps": Argument("Steps of denoising: more take longer and follow the model closer.", whole(1)),
    "original_inference_steps": Argument(
        "How many timesteps the model was distilled on, of which the steps are chosen; what the scheduler says, if None.",
        optional(whole(1)),
    ),
    "timesteps": Argument("The timesteps themselves, descending, instead of their number.", anything),
    "guidance_scale": Argument("How much to favour the prompt over the unconditional picture; 1 or less: not at all.", number()),
    "guidance_rescale": Argument("Bring guided predictions back to their natural contrast, in [0, 1].", number(0, 1)),
    "num_images_per_prompt": Argument("Pictures for each prompt, 1 to 1024.", whole(1, 1024)),
    "denoising_start": Argument(
        "The part of the way, in (0, 1], that another pipeline has gone already: `image` is what it left.", fraction
    ),
    "denoising_end": Argument("The part of the way, in (0, 1], to go; the rest is another pipeline's.", fraction),
    "original_size": Argument(
        "(height, width) the picture is to look as if it had before it was scaled; its own, if None.", optional(two(1))
    ),
    "crops_coords_top_left": Argument("(top, left) it is to look as if it was cropped at; (0, 0) for well centred.", two(0)),
    "target_size": Argument("(height, width) it is to look as if it was scaled to; its own, if None.", optional(two(1))),
    "negative_original_size": Argument("The same as `original_size`, of what it should not look like.", optional(two(1))),
    "negative_crops_coords_top_left": Argument(
        "The same as `crops_coords_top_left`, of what it should not look like; counts once it or a negative size is given.",
        two(0),
    ),
    "negative_target_size": Argument("The same as `target_size`, of what it should not look like.", optional(two(1))),
    "aesthetic_score": Argument("How much people should like the picture, about 0 to 10; for refiners.", number()),
    "negative_aesthetic_score": Argument("How little they like what it should not look like.", number()),
    "eta": Argument("Noise added in each step, for schedulers that take it: 0 DDIM, 1 DDPM.", number(0, 1)),
    "generator": Argument(
        "The source of noise; the same seed gives the same picture. One, or a list of one a picture.", generators
    ),
    "seed": Argument(
        "Instead of `generator`: noise that depends on (seed, image, step) alone, not on batch, device or type. A whole number, "
        "or a list of one a picture.",
        seeds,
    ),
    "save_run": Argument(
        "A file to write the run to, before the first step and after each; `{step}` in its name keeps them all.",
        optional(is_a(str, os.PathLike, spelled="the path of a file")),
    ),
    "resume": Argument(
        "A file that `save_run` wrote: go on from there. All arguments are those of the run; those given change it from here on.",
        saved_run,
    ),
    "latents": Argument("(batch, channels, height / 8, width / 8): the noise to start from.", tensor(dimensions=4)),
    "ip_adapter_image": Argument(
        "A picture to take after, for pipelines with an IP-Adapter loaded; for several adapters a list of one for each, for "
        "several pictures of one adapter a list in the list."
    ),
    "ip_adapter_image_embeds": Argument(
        "What `prepare_ip_adapter_image_embeds` returned, instead of `ip_adapter_image`.",
        optional(is_a(list, spelled="a list of a tensor for each IP-Adapter")),
    ),
    "ip_adapter_scale": Argument(
        "How much of the IP-Adapters in this call, as `set_ip_adapter_scale` takes it; what that was told last, if None."
    ),
    "output_type": Argument('"pil", "np", "pt", or "latent".', lambda name, value: check_output_type(value)),
    "return_dict": Argument("Whether to return the output object or a plain tuple.", anything),
    "cross_attention_kwargs": Argument(
        "Keywords handed to the attention of the model.", optional(is_a(dict, spelled="a dictionary"))
    ),
    "clip_skip": Argument("How many of the last layers of the text encoder to leave out.", optional(whole(0))),
    "callback_on_step_end": Argument(
        "`function(pipe, step, timestep, tensors)`, called after each step; may return replacements, or set `pipe._interrupt`.",
        callback,
    ),
    "callback_on_step_end_tensor_inputs": Argument(
        "Names of the tensors that function is given.", is_a(list, tuple, spelled="a list of names")
    ),
    "callback": Argument("The older kind: `callback(step, timestep, latents)`, every `callback_steps` steps.", callback),
    "callback_steps": Argument("How often to call the older kind.", optional(whole(1))),
    # ---- what is drawn from noise alone, or from classes
    "batch_size": Argument("Pictures made at once, 1 to 1024.", whole(1, 1024)),
    "class_labels": Argument("What class each picture is of: a whole number, or one for each; where None may be, at random."),
    "use_clipped_model_output": Argument(
        "Take the direction of a step from the clipped prediction too; for schedulers that can.",
        optional(is_a(bool, spelled="True, False or None")),
    ),
    "jump_length": Argument("How many timesteps a jump goes back up.", whole(1)),
    "jump_n_sample": Argument("How often the timesteps of a jump are gone through.", whole(1)),
    # ---- the subject of a picture
    "reference_image": Argument("A picture of the subject, or one for each prompt."),
    "condtioning_image": Argument("What the ControlNet sees, one for all prompts or one for each."),
    "source_subject_category": Argument('What the subject of `reference_image` is, "dog" say; one for each prompt.', texts),
    "target_subject_category": Argument("What it is to become; one for each prompt.", texts),
    "neg_prompt": Argument("What no picture should show; a text.", optional(is_a(str, spelled="a text"))),
    "prompt_strength": Argument("Multiplies `prompt_reps`.", number(0)),
    "prompt_reps": Argument("How often the prompt is said, so that it weighs beside the subject.", whole(1, 100)),
    # Editing by instruction.
    "image_guidance_scale": Argument("How much to favour likeness to the picture; below 1: no guidance at all.", number()),
    # Painting by example.
    "example_image": Argument(
        "A picture of what to paint, one for all or one for each `image`; a tensor is what the feature extractor makes."
    ),
    # Things in boxes.
    "gligen_phrases": Argument("What stands in each of `gligen_boxes`; None for what a picture shows.", each_or_none(phrase)),
    "gligen_images": Argument("What stands in each of them, as PIL pictures; None for what a phrase says.", each_or_none(pil)),
    "gligen_boxes": Argument("(left, top, right, bottom) of each thing, from 0 to 1; at most 30.", boxes),
    "gligen_inpaint_image": Argument("A picture to keep around the boxes, of which the middle is taken.", optional(pil)),
    "gligen_scheduled_sampling_beta": Argument(
        "The part of the steps, from the first, in which boxes are told.", number(0, 1), 0.3
    ),
    "gligen_normalize_constant": Argument("How long the vector of a picture is made.", number(0)),
    "input_phrases_mask": Argument("Whether phrases count, 1 or 0; or for each.", optional(each(whole(0, 1)))),
    "input_images_mask": Argument("Whether pictures count, 1 or 0; or for each.", optional(each(whole(0, 1)))),
    # Larger pictures.
    "noise_level": Argument(
        "How much noise to put on the picture first, in steps of training: more leaves more to invent.", whole(0)
    ),
    "image_embeds": Argument("(batch, width): what the image encoder makes of pictures, instead of them.", tensor(dimensions=2)),
    # Attention that is watched.
    "sag_scale": Argument("How much to favour what the model looks at over a blur of it; 0: not at all.", number(0)),
    # Editing by concepts.
    "editing_prompt": Argument("A concept to go towards: a text, or a list of several.", texts),
    "editing_prompt_embeddings": Argument("(concepts, tokens, width): encoded concepts.", tensor(dimensions=3)),
    "reverse_editing_direction": Argument("Go away from the concept; or for each.", each(is_a(bool, spelled="True or False"))),
    "edit_guidance_scale": Argument("How far to go towards the concept; or for each.", each(number())),
    "edit_warmup_steps": Argument("Steps before the concept counts; or for each.", each(whole(0))),
    "edit_cooldown_steps": Argument("Steps after which it no longer counts, if any; or for each.", optional(each(whole(0)))),
    "edit_threshold": Argument("Which part of the picture it leaves alone, in [0, 1]; or for each.", each(number(0, 1))),
    "edit_momentum_scale": Argument("How much of the edits of the steps before is added.", number()),
    "edit_mom_beta": Argument("How much of them is kept from step to step, in [0, 1].", number(0, 1)),
    "edit_weights": Argument("How much each concept weighs among the others; 1 each, if None.", optional(each(number()))),
    "sem_guidance": Argument("`pipe.sem_guidance` of another call, to do the same edits.", replayed),
    # Away from what should not be shown.
    "sld_guidance_scale": Argument("How soon nearness to the concept counts in full; 1 or less: not at all.", number(0)),
    "sld_warmup_steps": Argument("Steps before it counts.", whole(0)),
    "sld_threshold": Argument("How far from the concept predictions must be to be left alone, in [0, 1].", number(0, 1)),
    "sld_momentum_scale": Argument("How much of the steps before is added, in [0, 1].", number(0, 1)),
    "sld_mom_beta": Argument("How much of them is kept from step to step, in [0, 1].", number(0, 1)),
    "safety_concept": Argument("What pictures are guided away from; `pipe.safety_concept`, if None.", optional(phrase)),
    # From one thing to another, where it is.
    "source_embeds": Argument("(texts, tokens, width): what `pipe.get_embeds` says of what is there.", tensor(dimensions=3)),
    "target_embeds": Argument("The same of what should be there.", tensor(dimensions=3)),
    "cross_attention_guidance_amount": Argument("How far latents are moved so that words stay where they are.", number(0)),
    # No word left out.
    "token_indices": Argument(
        "Positions of the words, as `pipe.get_indices(prompt)` counts, that must be seen; for several prompts a list for each.",
        each(positions),
    ),
    "max_iter_to_alter": Argument("How many steps, from the first, latents are moved before.", whole(0)),
    "thresholds": Argument("Step → how much each word must be attended to before it goes on, in [0, 1].", by_step),
    "scale_factor": Argument("How far latents are moved.", number(0)),
    "attn_res": Argument(
        "(rows, columns) of the feature maps whose attention counts; a quarter of the latents, if None.", optional(two(1))
    ),
    # Wide pictures, by windows.
    "view_batch_size": Argument("How many windows the UNet sees at once: more take more memory.", whole(1)),
    "circular_padding": Argument(
        "Whether the picture goes on at the left where it leaves at the right.", is_a(bool, spelled="True or False")
    ),
    "window_size": Argument("Rows and columns of a window in latents; what the UNet was trained on is best.", whole(1)),
    "stride": Argument("From one window to the next, in latents: less makes windows agree better, and takes longer.", whole(1)),
    # Where two prompts differ.
    "source_prompt": Argument("What the picture shows: a text, or one for each picture.", texts),
    "source_negative_prompt": Argument("What it does not show, likewise.", texts),
    "source_prompt_embeds": Argument("(batch, tokens, width): `source_prompt`, encoded.", tensor(dimensions=3)),
    "source_negative_prompt_embeds": Argument("(batch, tokens, width): `source_negative_prompt`.", tensor(dimensions=3)),
    "target_prompt": Argument("What it should show: a text, or one for each picture.", texts),
    "target_negative_prompt": Argument("What it should not show, likewise.", texts),
    "target_prompt_embeds": Argument("(batch, tokens, width): `target_prompt`, encoded.", tensor(dimensions=3)),
    "target_negative_prompt_embeds": Argument("(batch, tokens, width): `target_negative_prompt`.", tensor(dimensions=3)),
    "num_maps_per_mask": Argument("Of how many noises a mask is made.", whole(1, 1024)),
    "mask_encode_strength": Argument("How much noise is on the picture meanwhile, in [0, 1].", number(0, 1)),
    "mask_thresholding_ratio": Argument(
        "Differences are cut off at so many times their mean; half of that counts as changed.", number(1e-6)
    ),
    # To the noise a picture comes from.
    "image_latents": Argument("What `pipe.invert(…)` returned as `latents`.", inverted),
    "inpaint_strength": Argument("How far towards noise, in [0, 1]; in a call as in the inversion.", number(0, 1)),
    "decode_latents": Argument("Whether to show the latents of all steps.", is_a(bool, spelled="True or False")),
    "num_reg_steps": Argument("How often each prediction is moved towards what noise looks like.", whole(0)),
    "lambda_auto_corr": Argument("How far, against correlation between neighbours.", number(0)),
    "num_auto_corr_rolls": Argument("By how many random distances correlation is measured.", whole(1)),
    "lambda_kl": Argument("How far, against another mean and variance than those of noise.", number(0)),
    "clip_ckip": Argument("`clip_skip`, as diffusers spells it here.", optional(whole(0))),
    # What a prior imagines, and samplers of k-diffusion.
    "prior_num_inference_steps": Argument("Steps of the prior.", whole(1)),
    "prior_guidance_scale": Argument("How much the prior favours the prompt; 1 or less: not at all.", number()),
    "prior_latents": Argument("(batch, size): the noise the prior starts from.", tensor(dimensions=2)),
    "use_karras_sigmas": Argument(
        "Noise levels as Karras et al. (2022) space them, equation 5; as the scheduler does, if False.",
        optional(is_a(bool, spelled="True or False")),
    ),
    "noise_sampler_seed": Argument(
        "A seed for the noise of a sampler that takes a Brownian path; drawn from `generator`, if None.", seeds
    ),
    # With the noise of the picture itself.
    "source_guidance_scale": Argument("How much to favour `source_prompt` where the noise of the picture is found.", number()),
    # Many steps at once.
    "parallel": Argument("How many steps are taken at once: more take more memory, and fewer rounds.", whole(1)),
    "tolerance": Argument("How much of the deviation of its noise a step may still change and count as settled.", number(0)),
    "debug": Argument(
        "Whether sums are taken in float32 on the CPU, where their order is always the same.", is_a(bool, spelled="True or False")
    ),
    # Inpainting as it was first done.
    "add_predicted_noise": Argument(
        "Whether the known part gets the noise that is predicted without a prompt, and not that of the beginning.",
        is_a(bool, spelled="True or False"),
    ),
}
"""Keyword → what it means and may be. Docstrings, checks and the documentation are filled from here."""


# ---------------------------------------------------------------- what must fit together


def prompt_count(arguments: Mapping[str, Any]) -> int:
    """How many prompts a call has."""
    prompt, embeds = arguments["prompt"], arguments["prompt_embeds"]
    return len(prompt) if isinstance(prompt, list) else 1 if embeds is None else len(embeds)


def check_components(pipe: Any, arguments: Mapping[str, Any]) -> None:
    """Raise `InputError` if a component that this call needs is not there."""
    for name in pipe.needed_components(arguments):
        if getattr(pipe, name) is None:
            raise InputError(f"this pipeline has no {name}, which this call needs", remedy=f"set pipe.{name}")


def check_prompts(arguments: Mapping[str, Any]) -> None:
    """Raise `InputError` unless prompts and embeddings say one thing each, for the same number of pictures."""
    prompt, embeds = arguments["prompt"], arguments["prompt_embeds"]
    negative, negative_embeds = arguments.get("negative_prompt"), arguments.get("negative_prompt_embeds")
    if (prompt is None) == (embeds is None):
        raise InputError(
            "prompt and prompt_embeds are both " + ("missing" if prompt is None else "given"), remedy="pass one of the two"
        )
    if negative is not None and negative_embeds is not None:
        raise InputError("negative_prompt and negative_prompt_embeds are both given", remedy="pass one of the two")
    if embeds is not None and negative_embeds is not None and embeds.shape != negative_embeds.shape:
        raise InputError(
            "prompt_embeds and negative_prompt_embeds differ in shape",
            found=f"{tuple(embeds.shape)} and {tuple(negative_embeds.shape)}",
            expected="the same shape",
        )
    count = prompt_count(arguments)
    given = negative if isinstance(negative, list) else negative_embeds
    if given is not None and len(given) != count:
        name = "negative_prompt" if given is negative else "negative_prompt_embeds"
        raise InputError(
            f"{name} has {len(given)} entries for {count} prompts", remedy="pass one for each prompt, or one text for all"
        )


def check_second_prompts(arguments: Mapping[str, Any]) -> None:
    """Raise `InputError` unless what a second text encoder is told goes with what the first is told."""
    count = prompt_count(arguments)
    for sign in ("", "negative_"):
        second, states = arguments.get(f"{sign}prompt_2"), arguments.get(f"{sign}prompt_embeds")
        pooled = arguments.get(f"{sign}pooled_prompt_embeds")
        if second is not None and states is not None:
            raise InputError(f"{sign}prompt_2 and {sign}prompt_embeds are both given", remedy="pass one of the two")
        if f"{sign}pooled_prompt_embeds" in arguments and states is not None and pooled is None:
            raise InputError(
                f"{sign}prompt_embeds are given without {sign}pooled_prompt_embeds",
                remedy="pass both, as encode_prompt returns them",
            )
        for name, value in ((f"{sign}prompt_2", second), (f"{sign}pooled_prompt_embeds", pooled)):
            if value is not None and not isinstance(value, str) and len(value) != count:
                raise InputError(f"{name} has {len(value)} entries for {count} prompts", remedy="pass one for each prompt")


def check_callback_names(pipe: Any, arguments: Mapping[str, Any]) -> None:
    """Raise `InputError` if a callback asks for a tensor the pipeline does not show."""
    known = pipe._callback_tensor_inputs
    for name in arguments["callback_on_step_end_tensor_inputs"]:
        if name not in known:
            close = nearest(str(name), known)
            raise InputError(
                f"callback_on_step_end_tensor_inputs: no tensor {name!r}",
                expected=", ".join(known),
                remedy=f"did you mean {close}?" if close else "",
            )


def check_pixels(height: int, width: int) -> None:
    """Raise `LimitError` if the picture would be larger than any that is decoded."""
    if height * width > MAX_PIXELS:
        raise LimitError(f"height={height} x width={width} is too large", expected=f"at most {MAX_PIXELS} pixels")


def check_batch(name: str, value: Sequence[Any] | Tensor | None, batch: int) -> None:
    """Raise `InputError` unless a list has one entry for each picture."""
    if isinstance(value, (list, Tensor)) and len(value) != batch:
        raise InputError(
            f"{name}: {len(value)} given for {batch} pictures", expected=f"{batch}", remedy="pass one for each picture"
        )


def one_for_each(name: str, value: Any, count: int, what: str) -> list[float]:
    """A setting for each of `count` models of a kind, of one for all or a list.

    Raises:
        InputError: The list has another length.
    """
    if isinstance(value, list) and len(cast(list[Any], value)) != count:
        raise InputError(
            f"{name}: {len(cast(list[Any], value))} given for {count} {what}{'s' * (count != 1)}",
            expected="a number, or a list of one for each",
        )
    return cast(list[float], value) if isinstance(value, list) else [value] * count


def predictor(pipe: Any) -> Any:
    """The model of a pipeline that predicts."""
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def check_place(name: str, model: Any, pipe: Any) -> None:
    """Raise `InputError` if a model computes in another type than the UNet, or one that came with the call elsewhere."""
    if model.dtype != predictor(pipe).dtype:
        types = f"{model.dtype} and {predictor(pipe).dtype}"
        raise InputError(f"{name} and UNet compute in two types", found=types, remedy="pipe.to(…) with one for all")
    held = any(model is own for own in pipe._modules_by_name.values())  # an offloaded one waits elsewhere, and comes
    if not held and model.device != pipe._execution_device:
        raise InputError(
            f"{name} is on another device than the pipeline",
            found=f"{model.device} and {pipe._execution_device}",
            remedy=f"{name}.to({str(pipe._execution_device)!r}), or make it a component of the pipeline",
        )


def check_shape(name: str, value: Tensor | None, expected: tuple[int, ...]) -> None:
    """Raise `InputError` unless a tensor, if given, has this shape."""
    if value is not None and tuple(value.shape) != expected:
        raise InputError(f"{name} has the wrong shape", found=tuple(value.shape), expected=expected)


# ---------------------------------------------------------------- noise, and runs that were begun


INSTEAD = {"seed": "generator", "generator": "seed", "prompt": "prompt_embeds", "prompt_embeds": "prompt"}
"""Argument → the one of a run that it takes the place of."""


BESIDE: Mapping[str, Any] = {
    **dict.fromkeys(("seed", "save_run", "resume", "callback_on_step_end"), None),
    "callback_on_step_end_tensor_inputs": [],
}
"""What a run asks for, and what it is for recipes that do not offer it: those of another name than `__call__`."""


def copied(value: Any) -> Any:
    """The value; of generators another one in the same state, so that a call that draws from it leaves the run as it is."""
    if isinstance(value, list):
        return [copied(item) for item in cast(list[Any], value)]
    if not isinstance(value, torch.Generator):
        return value
    twin = torch.Generator(value.device)
    twin.set_state(value.get_state())
    return twin


def begun_run(pipe: Any, given: dict[str, Any]) -> SavedRun | None:
    """The run that a call goes on with; of its arguments, none contradicts one that is given.

    Raises:
        InputError: It is a run of another pipeline.
    """
    resume = given.get("resume")
    saved_run("resume", resume)
    if resume is None:
        return None
    run = resume if isinstance(resume, SavedRun) else SavedRun.load(resume)
    run.check(type(pipe).__name__, pipe.name_or_path)
    for name in [name for name in INSTEAD if given.get(name, run) is None]:
        del given[name]  # None beside what the run has says nothing
    dropped = {INSTEAD[name] for name in given if name in INSTEAD}
    # A value that is passed has its own numbers; what the steps change is in the run.
    dropped_numbers = {"scale", "rescale"} if given.get("guidance") is not None and not run.guided_by else set[str]()
    guidance = {
        name: value for name, value in run.guidance.items() if f"guidance_{name}" not in given and name not in dropped_numbers
    }
    if given.keys() & {*PICTURES}:
        dropped |= {*PICTURES} | ({"ip_adapter_scale"} if all(given.get(name) is None for name in PICTURES) else set[str]())
    kept = {name: copied(value) for name, value in run.arguments.items() if name not in dropped}
    states = [] if given.keys() & {"seed", "generator"} else run.generators
    return replace(run, arguments=kept, generators=states, guidance=guidance)


def seed_of(arguments: Mapping[str, Any], count: int) -> Any:
    """The seed of a call that makes `count` pictures; one is drawn if the run is to be saved, as the generator that all calls
    share is not to be found again.

    Raises:
        InputError: A generator is given too, or seeds for another number of pictures.
    """
    seed, generator = arguments["seed"], arguments["generator"]
    if seed is not None and generator is not None:
        raise InputError("seed and generator are both given", remedy="pass one of the two")
    if arguments["save_run"] is not None and seed is None and generator is None:
        return int(torch.randint(2**63 - 1, ()))
    check_batch("seed", seed, count)
    return seed


def sources_of_noise(arguments: Mapping[str, Any], count: int) -> Any:
    """What a call that makes `count` pictures draws noise from: its `generator`, or of its `seed` one source for each."""
    seed = arguments["seed"]
    if seed is None:
        return fresh(arguments["generator"])
    if isinstance(seed, list):
        return [CounterNoise(one) for one in cast(list[int], seed)]
    return [CounterNoise(seed, image) for image in range(count)]


# ---------------------------------------------------------------- the decorator


def written_out(call: Callable[..., Any]) -> tuple[inspect.Signature, tuple[str, ...]]:
    """The signature of a recipe, with the keywords of `**values: Unpack[…]` one by one; and the names of those."""
    signature = inspect.signature(call)
    *own, last = signature.parameters.values()
    if last.kind is not last.VAR_KEYWORD:
        return signature, ()
    kinds: dict[str, Any] = call.__globals__[last.annotation.removeprefix("Unpack[").removesuffix("]")].__annotations__
    further = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=ARGUMENTS[name].default, annotation=kind)
        for name, kind in kinds.items()
    ]
    return signature.replace(parameters=[*own, *further]), tuple(kinds)


def recipe(call: _Call) -> _Call:
    """Make a method a pipeline's `__call__`, or another of its runs: arguments checked, a run begun, docstring filled.

    Raises:
        UnknownArgumentError: A keyword the pipeline does not have; the message names the nearest.
        InputError: An argument outside of what it may be. Nothing was computed, no generator was used.
    """
    signature, values = written_out(call)
    names = [name for name in signature.parameters if name != "self"]

    @functools.wraps(call)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        for name in kwargs:
            if name not in signature.parameters:
                raise unknown_argument(type(self).__name__, name, names)
        try:
            # A run that is gone on with has all arguments, those without a default too.
            bind = signature.bind if kwargs.get("resume") is None else signature.bind_partial
            bound = bind(self, *args, **kwargs)
        except TypeError as error:
            raise UnknownArgumentError(f"{type(self).__name__}(): {error}", expected=", ".join(names)) from None
        given = {name: value for name, value in bound.arguments.items() if name != "self"}
        begun = begun_run(self, given)
        bound.apply_defaults()
        if begun is not None:
            bound.arguments |= begun.arguments | given | {"resume": begun}
        arguments = {**BESIDE, **{name: _listed(bound.arguments[name]) for name in names}}
        for name, value in arguments.items():
            if name not in values or value is not ARGUMENTS[name].default:
                ARGUMENTS[name].check(name, value)
        check_components(self, arguments)
        self.check_call(arguments)
        check_callback_names(self, arguments)
        count = self.pictures_of(arguments)
        arguments["seed"] = seed_of(arguments, count)
        if begun is not None:
            begun.check_call(self, arguments)
        writer = RunWriter.of(self, arguments)
        arguments["generator"] = sources_of_noise(arguments, count)
        with self.running(arguments) as run, torch.no_grad():
            run.writer = writer
            return call(self, **{name: arguments[name] for name in names})

    lines = [f"    {name}: {ARGUMENTS[name].description}" for name in names]
    checked.__doc__ = "\n".join([inspect.cleandoc(call.__doc__ or ""), "", "Args:", *lines])
    vars(checked).update(__signature__=signature, values=values)
    return checked  # pyright: ignore[reportReturnType]
