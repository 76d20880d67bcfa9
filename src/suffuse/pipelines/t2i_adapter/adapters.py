"""From pictures to the features of T2I-Adapters: what a call with adapters asks for, whatever the pipeline (Mou et al., 2023)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from suffuse.diffusion.adapter_features import AdapterFeatures
from suffuse.errors import ConfigError, InputError
from suffuse.models.side_by_side import parts_of
from suffuse.models.t2i_adapter import MultiAdapter
from suffuse.pipelines.arguments import check_place, one_for_each, prompt_count
from suffuse.processing.image import Frame, VaeImageProcessor


def one_adapter(adapter: Any) -> Any:
    """An adapter as one component: of a list of several, one that holds them side by side."""
    return MultiAdapter(adapter) if isinstance(adapter, (list, tuple)) else adapter


def adapter_features(pipe: Any, adapter: Any, name: str, frame: Frame) -> AdapterFeatures:
    """What adapters make of the pictures of a call, as a conditioner.

    Args:
        pipe: The pipeline that is called.
        adapter: An adapter, or several that are one component.
        name: The argument that holds the pictures.
        frame: What the call fills.

    Raises:
        ConfigError: An adapter makes other features than the UNet takes.
        InputError: Pictures or scales are not one for each adapter, or a picture does not fit.
    """
    check_adapter(pipe.unet, adapter)
    check_place("adapter", adapter, pipe)
    run, image, count = pipe._run, pipe._run.arguments[name], len(parts_of(adapter))
    several = isinstance(adapter, MultiAdapter)
    if several and (not isinstance(image, list) or len(image) != count):
        found = f"{len(image)} pictures" if isinstance(image, list) else type(image).__name__
        raise InputError(f"{name} does not go with {count} adapters", found=found, expected=f"a list of {count}")
    scales = one_for_each("adapter_conditioning_scale", run.arguments["adapter_conditioning_scale"], count, "adapter")
    processor, factor = adapter_processor(adapter), adapter.downscale_factor
    if any(edge % factor for edge in frame[:2]):
        found = f"{frame.width} x {frame.height} pixels"
        raise InputError("the picture does not fit the adapter", found=found, expected=f"multiples of {factor} both")
    seen = [
        processor.preprocess(each, *frame, name).to(pipe._execution_device, adapter.dtype)
        for each in (image if several else [image])
    ]
    with torch.no_grad():
        maps = adapter(seen, scales) if several else [each * scales[0] for each in adapter(seen[0])]
    check_maps(pipe, maps, frame)
    prompts, images = prompt_count(run.arguments), run.arguments["num_images_per_prompt"]
    if len(maps[0]) not in (1, prompts):
        raise InputError(f"{name}: {len(maps[0])} given for {prompts} prompts", expected="one for all, or one for each prompt")
    times = prompts * images if len(maps[0]) == 1 else images
    maps = [each.repeat_interleave(times, dim=0) if times > 1 else each for each in maps]
    return AdapterFeatures(maps, lambda: run.num_inference_steps, run.arguments.get("adapter_conditioning_factor"))


def adapter_processor(adapter: Any) -> VaeImageProcessor:
    """Pictures for an adapter to tensors in [0, 1], gray where it sees gray."""
    gray = parts_of(adapter)[0].config.in_channels == 1
    return VaeImageProcessor(vae_scale_factor=adapter.downscale_factor, do_normalize=False, do_convert_grayscale=gray)


def check_maps(pipe: Any, maps: Sequence[Tensor], frame: Frame) -> None:
    """Raise `InputError` unless features have the sizes that the blocks of the UNet take them at."""
    edges, blocks = [edge // pipe.vae_scale_factor for edge in frame[:2]], pipe.unet.config.down_block_types
    for level, (block, features) in enumerate(zip(blocks, maps, strict=False)):
        # A block with attention takes features before it halves the picture, one without after; the last does not halve.
        halved = level + (block == "DownBlock2D" and level < len(blocks) - 1)
        wanted = tuple(math.ceil(edge / 2**halved) for edge in edges)
        if features.shape[-2:] != wanted:
            found = f"{tuple(features.shape[-2:])} for the block {level}, which has {wanted}"
            raise InputError("the adapter makes features of other sizes than this UNet takes", found=found)


def check_adapter(unet: Any, adapter: Any) -> None:
    """Raise `ConfigError` if an adapter makes other features than the UNet takes."""
    if unet is None:
        return
    wanted = list(unet.config.block_out_channels)
    for one in parts_of(adapter):
        own = list(one.config.channels)
        if not set(own) <= {*wanted}:
            raise ConfigError(
                "adapter/config.json and unet/config.json disagree",
                found=f"channels={own}, block_out_channels={wanted}",
                expected="an adapter that was trained for this UNet",
            )
