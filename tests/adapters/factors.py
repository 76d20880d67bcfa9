"""Random adapters for the layers of tiny models, in the dialects that files have."""

from __future__ import annotations

import re

import torch
from torch import nn

ATTENTION = r"attn\d\.to_(q|k|v|out\.0)|self_attn\.\w+_proj|mlp\.fc\d"
EVERY_LAYER = r"."


def factors(model: nn.Module, rank: int = 4, seed: int = 0, where: str = ATTENTION, scale: float = 0.2) -> dict:
    """Layer.lora_A.weight and layer.lora_B.weight → tensor, for the layers whose names match."""
    made, generator = {}, torch.Generator().manual_seed(seed)
    for name, layer in model.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and re.search(where, name):
            outputs, *inputs = layer.weight.shape
            ones = [1] * (len(inputs) - 1)
            made[f"{name}.lora_A.weight"] = torch.randn(rank, *inputs, generator=generator) * scale
            made[f"{name}.lora_B.weight"] = torch.randn(outputs, rank, *ones, generator=generator) * scale
    return made


def adapter(
    pipe, rank: int = 4, seed: int = 0, where: str = ATTENTION, components=("unet", "text_encoder", "text_encoder_2")
) -> dict:
    """An adapter for all of these models that a pipeline has, in the dialect of PEFT."""
    made = {}
    for number, name in enumerate(components):
        model = getattr(pipe, name, None)
        if model is not None:
            own = factors(model, rank, 10 * seed + number, where if name == "unet" else ATTENTION)
            made |= {f"{name}.{key}": tensor for key, tensor in own.items()}
    return made


def early_diffusers(peft: dict) -> dict:
    """The same as diffusers wrote it at first: attention processors, and projections of the text encoder called like those."""
    made = {}
    for key, tensor in peft.items():
        key = key.replace("lora_A", "down").replace("lora_B", "up")
        if key.startswith("unet."):
            key = re.sub(r"(attn\d)\.(to_[qkv]|to_out)(\.0)?\.(down|up)", r"\1.processor.\2_lora.\4", key)
            key = re.sub(r"(?<!_lora)\.(down|up)\.weight", r".lora.\1.weight", key)
        else:
            key = re.sub(r"self_attn\.(q|k|v|out)_proj", r"self_attn.to_\1_lora", key)
            key = re.sub(r"(mlp\.fc\d)", r"\1.lora_linear_layer", key)
        made[key] = tensor
    return made


def kohya(peft: dict, alpha: float | None = 2.0, first: str = "te") -> dict:
    """The same as kohya-ss writes it."""
    starts = {"unet": "lora_unet", "text_encoder": f"lora_{first}", "text_encoder_2": "lora_te2"}
    made = {}
    for key, tensor in peft.items():
        component, _, layer = key.removesuffix(".weight").partition(".")
        layer, _, part = layer.rpartition(".")
        if component != "unet" and not layer.startswith("text_model."):
            layer = f"text_model.{layer}"
        name = f"{starts[component]}_{layer.replace('.', '_')}"
        made[f"{name}.{'lora_down' if part == 'lora_A' else 'lora_up'}.weight"] = tensor
        if alpha is not None:
            made[f"{name}.alpha"] = torch.tensor(alpha)
    return made


def original_blocks(flat: dict, config) -> dict:
    """Keys of kohya-ss with the block names of the original code, as SDXL was trained with them."""
    from suffuse.conversion import latent_diffusion

    names = {here: there for there, here in latent_diffusion.unet(config).items()}
    modules = {here.replace(".", "_"): there.replace(".", "_") for here, there in names.items()}
    made = {}
    for key, tensor in flat.items():
        layer, _, part = key.removeprefix("lora_unet_").partition(".")
        longest = max((here for here in modules if layer == here or layer.startswith(f"{here}_")), key=len, default=None)
        if key.startswith("lora_unet_") and longest is not None:
            key = f"lora_unet_{modules[longest]}{layer.removeprefix(longest)}.{part}"
        made[key] = tensor
    return made
