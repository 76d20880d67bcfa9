"""From phrases, pictures and boxes to what gated attention is told, whatever the pipeline (Li et al., 2023, "GLIGEN")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from suffuse.diffusion.conditioning import Conditioning
from suffuse.diffusion.grounding import OBJECTS, Grounding, KeepAround, around_boxes, padded
from suffuse.diffusion.latents import encode_image
from suffuse.diffusion.weighted_prompts import TOKENIZING
from suffuse.errors import InputError, LimitError
from suffuse.processing.image import Frame

PER_BOX = ("gligen_phrases", "gligen_images")
"""Arguments with an entry for each box."""
PER_BOX_MASKS = ("input_phrases_mask", "input_images_mask")
"""Arguments that say for each box whether its phrase, or its picture, counts."""
PICTURED = "gated-text-image"
"""The kind of attention of a UNet that is told pictures of objects beside phrases."""
UNPICTURED = "this UNet is told phrases alone"


def check_boxes(pipe: Any, arguments: Mapping[str, Any]) -> None:
    """Raise `InputError` or `LimitError` unless there are boxes, and an entry for each box where there are entries; and a UNet
    that was trained to be told them.
    """
    if pipe.unet.config.get("attention_type", "default") == "default":
        raise InputError(
            "gligen_boxes: this UNet was not trained for boxes",
            found="it has no gated attention",
            expected='a GLIGEN checkpoint, whose unet/config.json says attention_type="gated"',
        )
    boxes = arguments["gligen_boxes"]
    if not boxes:
        raise InputError("gligen_boxes are missing", expected="a list with (left, top, right, bottom) of each object")
    if len(boxes) > OBJECTS:
        raise LimitError(f"gligen_boxes: {len(boxes)} given", expected=f"at most {OBJECTS}, which the model was trained for")
    given = {name: arguments.get(name) for name in (*PER_BOX, *PER_BOX_MASKS)}
    for name, value in given.items():
        if isinstance(value, list) and len(value) != len(boxes):
            raise InputError(f"{name}: {len(value)} given for {len(boxes)} gligen_boxes", expected="one for each")
    if all(given[name] is None for name in PER_BOX):
        raise InputError("gligen_boxes are given and nothing to put there", remedy="pass gligen_phrases")
    if "gligen_images" not in arguments and None in (given["gligen_phrases"] or []):
        raise InputError(f"gligen_phrases: {UNPICTURED}", found="None among them", remedy="pass a text for each box")


def grounding(pipe: Any, part: float) -> Grounding:
    """The objects of a call, as a conditioner.

    Args:
        pipe: The pipeline that is called.
        part: The part of the steps in which they are told.

    Raises:
        InputError: The gated attention of the UNet is told other things, or its features have another size.
    """
    arguments, unet = pipe._run.arguments, pipe.unet
    pictured = unet.config.attention_type == PICTURED
    if not pictured and (arguments.get("gligen_images") is not None or None in (arguments["gligen_phrases"] or [None])):
        raise InputError(UNPICTURED, remedy="pass gligen_phrases, and no gligen_images")
    if pipe.text_encoder is None or pipe.tokenizer is None:
        raise InputError("this pipeline has no text encoder, which gligen_phrases need", remedy="load it with its text_encoder")
    corners = torch.tensor(arguments["gligen_boxes"], dtype=pipe.text_encoder.dtype, device=pipe._execution_device)
    objects = {"boxes": padded(corners), "masks": padded(corners.new_ones(len(corners)))}
    if not pictured:
        features = checked(phrase_features(pipe, arguments["gligen_phrases"]), unet, "phrases")
        return Grounding(objects | {"positive_embeddings": padded(features)}, part)
    kinds = {"phrases": ("gligen_phrases", phrase_feature), "image": ("gligen_images", picture_feature)}
    for kind, (name, feature) in kinds.items():
        features = corners.new_zeros(len(corners), unet.config.cross_attention_dim)
        there = corners.new_zeros(len(corners))
        for index, value in enumerate(arguments.get(name) or ()):
            if value is not None:
                features[index], there[index] = checked(feature(pipe, value), unet, kind), 1
        counts = arguments.get(PER_BOX_MASKS[kind == "image"])
        there = there if counts is None else there * there.new_tensor(counts)
        objects |= {f"{kind}_embeddings": padded(features), f"{kind}_masks": padded(there)}
    return Grounding(objects, part)


def inpainted(pipe: Any, frame: Frame) -> Tensor | None:
    """The picture around the boxes of a call, (1, 3, height, width) in [-1, 1]; None if there is none.

    Raises:
        InputError: It is no PIL picture; or there is none, and the UNet sees one.
    """
    image, channels = pipe._run.arguments["gligen_inpaint_image"], pipe.latent_channels
    if image is None and pipe.unet.config.in_channels != channels:
        raise InputError("this UNet was trained for inpainting", remedy="pass gligen_inpaint_image=…")
    if image is None:
        return None
    if not isinstance(image, Image.Image):
        raise InputError("gligen_inpaint_image is no PIL picture", found=type(image).__name__)
    whole = pipe.image_processor.convert_to_rgb(image)
    return pipe.image_processor.preprocess(centre(whole, frame.height, frame.width), name="gligen_inpaint_image")


def keep_around(pipe: Any, pictures: Tensor, conditioning: Conditioning) -> KeepAround:
    """The hook that keeps a picture around the boxes of a call.

    What a UNet for inpainting sees of it is added to the tensors of the run as "gligen_inpaint".
    """
    arguments, scheduler, batch = pipe._run.arguments, pipe._run.scheduler, conditioning.batch
    pictures = pictures.to(pipe._execution_device, pipe.vae.dtype)
    generator = arguments["generator"]
    pictures = pictures.expand(batch, -1, -1, -1) if isinstance(generator, list) else pictures
    known = encode_image(pipe.vae, pictures, generator, pipe.upcasts("encode")).to(pipe.unet.dtype)
    kept = around_boxes(arguments["gligen_boxes"], *known.shape[-2:]).to(known.device, known.dtype)[None, None]
    seen = torch.cat([known * kept, kept.expand(len(known), -1, -1, -1)], dim=1)
    conditioning.share(gligen_inpaint=seen.expand(batch, -1, -1, -1))
    return KeepAround(scheduler, known, kept, generator)


# ---------------------------------------------------------------- features


def phrase_features(pipe: Any, phrases: Sequence[str]) -> Tensor:
    """One vector for each phrase, (phrases, width), as the text encoder makes it.

    Raises:
        InputError: A phrase is longer than the text encoder reads.
    """
    with TOKENIZING:
        tokens = pipe.tokenizer(list(phrases), padding=True, truncation=False, verbose=False, return_tensors="pt")
    length, longest = int(pipe.tokenizer.model_max_length), tokens.input_ids.shape[1]
    if longest > length:
        raise InputError(f"gligen_phrases: one has {longest} tokens", expected=f"at most {length}, which the text encoder reads")
    return pipe.text_encoder(**tokens.to(pipe._execution_device)).pooler_output


def phrase_feature(pipe: Any, phrase: str) -> Tensor:
    """One vector for a phrase, (width,)."""
    return phrase_features(pipe, [phrase])[0]


def picture_feature(pipe: Any, image: Image.Image) -> Tensor:
    """One vector for a picture, (width,), in the space of phrases and as long as the call says."""
    picture = pipe.image_processor.convert_to_rgb(image)
    pixels = pipe.processor(images=[picture], return_tensors="pt").pixel_values
    seen = pipe.image_encoder(pixels.to(pipe._execution_device, pipe.image_encoder.dtype)).image_embeds
    feature = pipe.image_project(seen).squeeze(0)
    return (feature / feature.norm()) * pipe._run.arguments["gligen_normalize_constant"]


def checked(features: Tensor, unet: Any, kind: str) -> Tensor:
    """Features (…, width); raises `InputError` unless they are as wide as the UNet takes them."""
    if features.shape[-1] != unet.config.cross_attention_dim:
        raise InputError(
            f"features of {kind} have another width than this UNet takes",
            found=features.shape[-1],
            expected=unet.config.cross_attention_dim,
        )
    return features


def centre(image: Image.Image, height: int, width: int) -> Image.Image:
    """The middle of a picture, as large as it can be in this aspect, at this size."""
    if image.size == (width, height):
        return image
    across, down = image.size
    if across * height > down * width:
        across = down * width / height
    else:
        down = across * height / width
    left, right = (round((image.width + sign * across) / 2) for sign in (-1, 1))
    top, bottom = (round((image.height + sign * down) / 2) for sign in (-1, 1))
    return image.crop((left, top, right, bottom)).resize((width, height), Image.Resampling.LANCZOS)
