"""From control pictures to conditioners: what a call with ControlNets asks for, whatever the pipeline (Zhang et al., 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from suffuse.checkpoints.layout import numbered
from suffuse.diffusion.control import Control
from suffuse.errors import ConfigError, InputError
from suffuse.models.controlnet import MultiControlNetModel
from suffuse.models.side_by_side import parts_of
from suffuse.pipelines.arguments import check_place, one_for_each, prompt_count
from suffuse.processing.image import Frame, ImageInput, VaeImageProcessor
from suffuse.processing.pixels import edges, flattened, listed

AGREED = {
    "cross_attention_dim": "cross_attention_dim",
    "in_channels": "out_channels",
    "block_out_channels": "block_out_channels",
    "layers_per_block": "layers_per_block",
    "addition_embed_type": "addition_embed_type",
    "projection_class_embeddings_input_dim": "projection_class_embeddings_input_dim",
}
"""Entries in which a ControlNet must be as its UNet is: what both are given, and what the one adds to the other."""
PER_NET = ("controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end")
"""Arguments that may be a list of one for each ControlNet."""


def one_model(controlnet: Any) -> Any:
    """A ControlNet as one component: of a list of several, one that holds them side by side."""
    return MultiControlNetModel(controlnet) if isinstance(controlnet, (list, tuple)) else controlnet


def controls(pipe: Any, controlnet: Any, name: str, frame: Frame) -> list[Control]:
    """A conditioner for each ControlNet of a call.

    Args:
        pipe: The pipeline that is called.
        controlnet: A ControlNet, or several that are one component.
        name: The argument that holds the control pictures.
        frame: What the call fills. Control pictures are brought to the height and width that were asked for, and have the right
            size already if none were.

    Raises:
        ConfigError: A net was made for another UNet.
        InputError: Pictures, scales or parts of the way are not one for each net; or a picture does not fit.
    """
    nets, several = parts_of(controlnet), isinstance(controlnet, MultiControlNetModel)
    check_nets(pipe.unet, nets)
    run, device = pipe._run, pipe._execution_device
    arguments = run.arguments
    settings = [one_for_each(key, arguments[key], len(nets), "ControlNet") for key in PER_NET]
    check_parts(*settings[1:])
    asked = frame[:2] if frame.crops_coords else (arguments.get("height"), arguments.get("width"))
    if frame.crops_coords:
        check_crops(arguments, name)
    made = list[Control]()
    per_net = zip(nets, images_of_nets(arguments[name], len(nets) if several else None, name), *settings, strict=True)
    for index, (net, image, scale, start, end) in enumerate(per_net):
        place = f"{name}[{index}]" if several else name
        check_count(image, prompt_count(arguments), place)
        processor = control_processor(pipe.vae_scale_factor)
        pictures = processor.preprocess(image, *asked, *frame[2:], place).float()
        check_shrinking(net, pipe.vae_scale_factor)
        check_size(place, pictures, (net.config.conditioning_channels, *frame[:2]))
        check_place(f"controlnet[{index}]" if several else "controlnet", net, pipe)
        times = 1 if len(pictures) == 1 else arguments["num_images_per_prompt"]
        pictures = pictures.repeat_interleave(times, dim=0).to(device, net.dtype)
        guess = arguments["guess_mode"] or net.config.global_pool_conditions
        made.append(Control(net, pictures, run.scheduler, scale, start, end, guess))
    return made


def control_processor(vae_scale_factor: int) -> VaeImageProcessor:
    """Control pictures to tensors in [0, 1]."""
    return VaeImageProcessor(vae_scale_factor=vae_scale_factor, do_normalize=False)


def images_of_nets(image: Any, count: int | None, name: str) -> list[Any]:
    """Control pictures, those of each of `count` nets for themselves; of one net that is no list of one, if None."""
    if count is None:
        return [image]
    by_prompt = isinstance(image, list) and any(isinstance(item, (list, tuple)) for item in image)
    for entry in image if by_prompt else [image]:
        if not isinstance(entry, (list, tuple)) or len(entry) != count:
            found = f"{len(entry)} pictures" if isinstance(entry, (list, tuple)) else type(entry).__name__
            raise InputError(f"{name} does not go with {count} ControlNets", found=found, expected=f"a list of {count}")
    return [list(pictures) for pictures in zip(*image, strict=True)] if by_prompt else image


# ---------------------------------------------------------------- what must fit together


def check_nets(unet: Any, nets: Sequence[Any]) -> None:
    """Raise `ConfigError` if a ControlNet was made for another UNet."""
    if unet is None:
        return
    for index, net in enumerate(nets):
        own = net.config
        told = {key: (own[key], unet.config[other]) for key, other in AGREED.items() if own[key] is not None}
        unlike = {key: pair for key, pair in told.items() if not _alike(*pair)}
        if unlike:
            raise ConfigError(
                f"{numbered('controlnet', index)}/config.json and unet/config.json disagree",
                found="; ".join(f"{key} {one!r} and {other!r}" for key, (one, other) in unlike.items()),
                expected="a ControlNet that was trained for this UNet",
            )


def check_shrinking(net: Any, factor: int) -> None:
    """Raise `ConfigError` if a ControlNet brings pictures to another size than that of the latents of `factor`."""
    own = 2 ** (len(net.config.conditioning_embedding_out_channels) - 1)
    if own != factor:
        raise ConfigError(
            "controlnet/config.json and vae/config.json disagree",
            found=f"pictures are made {own} times smaller, and latents are {factor} times smaller",
            remedy="a ControlNet has one of conditioning_embedding_out_channels more than the autoencoder halves pictures",
        )


def check_count(image: ImageInput, prompts: int, name: str) -> None:
    """Raise `InputError` unless control pictures are one for all prompts, or one for each."""
    given = sum(len(item) if getattr(item, "ndim", 3) == 4 else 1 for item in listed(image, name))
    if given not in (1, prompts):
        raise InputError(
            f"{name}: {given} pictures given for {prompts} prompt{'s' * (prompts != 1)}",
            expected="one for all, or one for each prompt",
        )


def check_crops(arguments: Any, name: str) -> None:
    """Raise `InputError` unless control pictures, of which the same is cropped as of the picture, have its size."""
    own, sizes = edges(arguments["image"], "image"), {edges(image, name) for image in flattened(arguments[name])}
    if sizes != {own}:
        raise InputError(
            f"padding_mask_crop needs a {name} of the size of image",
            found=f"(height, width) of {', '.join(map(str, sizes))} and {own}",
        )


def check_parts(starts: list[float], ends: list[float]) -> None:
    """Raise `InputError` if a ControlNet would begin to act no earlier than it ends."""
    for start, end in zip(starts, ends, strict=True):
        if start >= end:
            raise InputError(
                f"control_guidance_start={start} is not before control_guidance_end={end}", remedy="for none, use a scale of 0"
            )


def check_size(name: str, pictures: Tensor, expected: tuple[int, int, int]) -> None:
    """Raise `InputError` unless control pictures are of this many channels, rows and columns."""
    if tuple(pictures.shape[1:]) != expected:
        raise InputError(
            f"{name} does not fit",
            found="{} channels, {} x {} pixels".format(*_columns_first(pictures.shape[1:])),
            expected="{} channels, {} x {} pixels".format(*_columns_first(expected)),
            remedy="pass height=… and width=…, to which all are brought",
        )


def _columns_first(shape: Sequence[int]) -> tuple[int, int, int]:
    channels, height, width = shape
    return channels, width, height


def _alike(one: Any, other: Any) -> bool:
    """Whether two entries say the same, though one may say it for all blocks and the other for each."""
    lists = [list(value) if isinstance(value, (list, tuple)) else None for value in (one, other)]
    if lists[0] is None and lists[1] is None:
        return one == other
    length = len(lists[0] or lists[1] or [])
    return (lists[0] or [one] * length) == (lists[1] or [other] * length)
