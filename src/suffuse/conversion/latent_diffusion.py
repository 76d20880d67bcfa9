"""How the original code of latent diffusion names its modules, and how this library does: one table, read both ways.

Each function lists, for a network with such a configuration, the modules whose names differ: name in a single file → name in
the model. What is inside of a module keeps its name. Sources: CompVis/latent-diffusion, Stability-AI/generative-models,
lllyasviel/ControlNet, mlfoundations/open_clip.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Names = dict[str, str]
"""Module in the file → module in the model."""

UNET_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
AUTOENCODER_RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "nin_shortcut": "conv_shortcut"}
AUTOENCODER_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
OPEN_CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
QKV = ("q_proj", "k_proj", "v_proj")
"""What `in_proj_weight` and `in_proj_bias` of OpenCLIP hold, one below the other."""


def unet(config: Mapping[str, Any]) -> Names:
    """The modules of a `UNet2DConditionModel`."""
    names = {**_encoder_half(config), "out.0": "conv_norm_out", "out.2": "conv_out"}
    up: Sequence[str] = config["up_block_types"]
    layers, number = _each(config["layers_per_block"], len(up)), 0
    for level, kind in enumerate(up):
        for layer in range(layers[-1 - level] + 1):
            names |= _inside(f"output_blocks.{number}.0", f"up_blocks.{level}.resnets.{layer}", UNET_RESNET)
            if "Attn" in kind:
                names[f"output_blocks.{number}.1"] = f"up_blocks.{level}.attentions.{layer}"
            number += 1
        if level + 1 < len(up):
            place = 2 if "Attn" in kind else 1
            names[f"output_blocks.{number - 1}.{place}.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
    return names


def controlnet(config: Mapping[str, Any]) -> Names:
    """The modules of a `ControlNetModel`."""
    names = _encoder_half(config)
    widths = config["conditioning_embedding_out_channels"]
    hints = ["conv_in", *(f"blocks.{index}" for index in range(2 * (len(widths) - 1))), "conv_out"]
    names |= {f"input_hint_block.{2 * n}": f"controlnet_cond_embedding.{name}" for n, name in enumerate(hints)}
    outputs = sum(layers for _, layers in _levels(config)) + len(config["down_block_types"])
    names |= {f"zero_convs.{number}.0": f"controlnet_down_blocks.{number}" for number in range(outputs)}
    return {**names, "middle_block_out.0": "controlnet_mid_block"}


def autoencoder(config: Mapping[str, Any]) -> Names:
    """The modules of an `AutoencoderKL`; the original counts the levels of the decoder from the picture."""
    names = Names()
    levels, layers = len(config["block_out_channels"]), config["layers_per_block"]
    for half, blocks, extra, resample in (("encoder", "down", 0, "downsample"), ("decoder", "up", 1, "upsample")):
        for level in range(levels):
            there = f"{half}.{blocks}.{level if half == 'encoder' else levels - 1 - level}"
            here = f"{half}.{blocks}_blocks.{level}"
            for layer in range(layers + extra):
                names |= _inside(f"{there}.block.{layer}", f"{here}.resnets.{layer}", AUTOENCODER_RESNET)
            names[f"{there}.{resample}.conv"] = f"{here}.{resample}rs.0.conv"
        for layer in (0, 1):
            names |= _inside(f"{half}.mid.block_{layer + 1}", f"{half}.mid_block.resnets.{layer}", AUTOENCODER_RESNET)
        names |= _inside(f"{half}.mid.attn_1", f"{half}.mid_block.attentions.0", AUTOENCODER_ATTENTION)
        names[f"{half}.norm_out"] = f"{half}.conv_norm_out"
    return names


def open_clip(layers: int) -> Names:
    """The modules of a CLIP text model; for its queries, keys and values see `QKV`."""
    names = {
        "token_embedding": "embeddings.token_embedding",
        "positional_embedding": "embeddings.position_embedding.weight",
        "ln_final": "final_layer_norm",
        "text_projection": "text_projection.weight",
    }
    for layer in range(layers):
        names |= _inside(f"transformer.resblocks.{layer}", f"encoder.layers.{layer}", OPEN_CLIP_LAYER)
    return names


def renamed(name: str, modules: Mapping[str, str]) -> str:
    """A tensor's name, with the longest module of the table that it is in, or is, replaced."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        module = modules.get(".".join(parts[:count]))
        if module is not None:
            return ".".join([module, *parts[count:]])
    return name


def _encoder_half(config: Mapping[str, Any]) -> Names:
    """What UNet and ControlNet share: embeddings, the way down and the middle."""
    embedding = "add_embedding" if config.get("addition_embed_type") else "class_embedding"
    names = {"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2", "input_blocks.0.0": "conv_in"}
    if config.get("num_class_embeds"):
        names["label_emb"] = "class_embedding"
    else:
        names |= {"label_emb.0.0": f"{embedding}.linear_1", "label_emb.0.2": f"{embedding}.linear_2"}
    number = 1
    for level, (kind, layers) in enumerate(_levels(config)):
        for layer in range(layers):
            names |= _inside(f"input_blocks.{number}.0", f"down_blocks.{level}.resnets.{layer}", UNET_RESNET)
            if "Attn" in kind:
                names[f"input_blocks.{number}.1"] = f"down_blocks.{level}.attentions.{layer}"
            number += 1
        if level + 1 < len(config["down_block_types"]):
            names[f"input_blocks.{number}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
            number += 1
    names |= _inside("middle_block.0", "mid_block.resnets.0", UNET_RESNET)
    names |= _inside("middle_block.2", "mid_block.resnets.1", UNET_RESNET)
    return {**names, "middle_block.1": "mid_block.attentions.0"}


def _levels(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    kinds: Sequence[str] = config["down_block_types"]
    return zip(kinds, _each(config["layers_per_block"], len(kinds)), strict=True)


def _each(value: Any, count: int) -> list[int]:
    return list(value) if isinstance(value, (list, tuple)) else [value] * count


def _inside(there: str, here: str, modules: Mapping[str, str]) -> Names:
    return {f"{there}.{inner}": f"{here}.{name}" for inner, name in modules.items()}
