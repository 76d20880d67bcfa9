"""How files name the factors of low-rank adapters: dialects of many trainers, read by one pattern and a few tables.

    unet.mid_block.attentions.0.proj_in.lora_A.weight                     PEFT, diffusers
    unet.mid_block….attn1.processor.to_q_lora.down.weight                 diffusers before 2023-10
    text_encoder.text_model….q_proj.lora_linear_layer.down.weight         diffusers, text encoders
    lora_unet_mid_block_attentions_0_proj_in.lora_down.weight             kohya-ss, as A1111 reads it
    lora_unet_middle_block_1_proj_in.lora_down.weight                     the same, with the block names of the original SDXL
    lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha                    kohya-ss, text encoders

A key is read as component, layer and part. Layers come out under the names of the models here; nothing is read but names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from suffuse.conversion import latent_diffusion

_KEY = re.compile(
    r"(?P<layer>.+?)(?:[._]lora|\.lora_linear_layer)?"
    r"\.(?P<part>lora_A|lora_B|lora_down|lora_up|lora_mid|down|up|alpha)(?:\.default)?(?:\.weight)?"
)
_PARTS = {"lora_A": "down", "lora_down": "down", "lora_B": "up", "lora_up": "up", "lora_mid": "middle"}
"""What a part is called → what it is, where these differ."""

_FLAT = {"lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}
"""How keys begin whose layers are spelt with underscores only → the component."""

_DOTTED = {
    "unet.": "unet",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "transformer.": "transformer",
    "diffusion_model.": "unet",
    "base_model.model.": "unet",
    "": "unet",
}
"""How other keys begin → the component."""

_WORDS = re.compile(
    "|".join([
        "down_blocks", "mid_block", "up_blocks", "transformer_blocks", "conv_in", "conv_out", "conv_shortcut", "proj_in",
        "proj_out", "time_emb_proj", "time_embedding", "add_embedding", "linear_[12]", "to_(?:q|k|v|out)",
        "input_blocks", "middle_block", "output_blocks", "in_layers", "out_layers", "emb_layers", "skip_connection",
        "time_embed", "label_emb", "text_model", "self_attn", "[qkv]_proj", "out_proj", "text_projection", "[^_]+",
    ])
)  # fmt: skip
"""Parts of layers' names, those that have underscores of their own first."""

_FORMERLY = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
"""How early files call the projections of text encoders → their names."""

OTHER_KINDS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_w": "LoHa",
    "lokr_w": "LoKr",
    "oft_": "OFT",
    "lora_B.bias": "LoRA with biases",
    "diff_b": "a difference of whole weights",
}
"""What the keys of adapters hold that are not low-rank ones alone → what these are."""

_WIDTHS = {
    768: "Stable Diffusion 1",
    1024: "Stable Diffusion 2",
    2048: "Stable Diffusion XL",
    1280: "the refiner of Stable Diffusion XL",
}
"""Width of a context token → what has it."""

_CONTEXT = re.compile(r"attn2[._](processor\.)?to_[kv]\b.*(lora_A|down)|attn2[._](processor\.)?to_[kv]_lora.down")
"""The factor that reads context tokens."""

_TRANSFORMERS = {
    "single_transformer_blocks": "FLUX",
    "double_blocks": "FLUX",
    "joint_blocks": "Stable Diffusion 3",
    "transformer.transformer_blocks": "a diffusion transformer",
}
"""What names of layers hold → the models that have such layers."""


@dataclass(frozen=True)
class Parts:
    """The keys under which a file holds what it has for one layer."""

    down: str = ""
    up: str = ""
    middle: str = ""
    alpha: str = ""


def read_keys(keys: Iterable[str], unet: Mapping[str, Any] | None = None) -> tuple[dict[str, dict[str, Parts]], list[str]]:
    """What a file holds, told from its keys.

    Args:
        keys: Those of the file.
        unet: The configuration of the UNet, to which the block names of the original code are translated.

    Returns:
        Component → layer → keys; and the keys that are in no dialect.
    """
    found: dict[str, dict[str, Parts]] = {}
    unread: list[str] = []
    blocks = latent_diffusion.unet(unet) if unet is not None else {}
    for key in keys:
        match = _KEY.fullmatch(key)
        if match is None:
            unread.append(key)
            continue
        component, layer = _place(match["layer"], blocks)
        part = _PARTS.get(match["part"], match["part"])
        layers = found.setdefault(component, {})
        if getattr(layers.get(layer), part, ""):
            unread.append(key)  # two dialects for one layer: which is meant?
            continue
        layers[layer] = replace(layers.get(layer, Parts()), **{part: key})
    return found, unread


def _place(layer: str, blocks: Mapping[str, str]) -> tuple[str, str]:
    """(component, name of the layer there) for a layer as a file names it."""
    for prefix, component in _FLAT.items():
        if layer.startswith(prefix):
            return component, _settled(component, ".".join(_WORDS.findall(layer.removeprefix(prefix))), blocks)
    prefix = next(prefix for prefix in _DOTTED if layer.startswith(prefix))
    component, layer = _DOTTED[prefix], layer.removeprefix(prefix).replace(".processor", "")
    if not prefix and layer.startswith("text_model."):
        component = "text_encoder"
    return component, _settled(component, layer, blocks)


def _settled(component: str, layer: str, blocks: Mapping[str, str]) -> str:
    if not component.startswith("text_encoder"):
        named = latent_diffusion.renamed(layer, blocks) if component == "unet" else layer
        return named + (".0" if layer.endswith(".to_out") else "")
    start, _, last = layer.rpartition(".")
    return f"{start}.{_FORMERLY.get(last, last)}" if start else layer


def described(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What an adapter with tensors of such names and shapes seems to be."""
    kind = next((kind for sign, kind in OTHER_KINDS.items() if any(f".{sign}" in key for key in shapes)), None)
    if kind is not None:
        return f"{kind}, which is not supported"
    model = next((model for sign, model in _TRANSFORMERS.items() if any(sign in key for key in shapes)), None)
    if model is not None:
        return f"a LoRA for {model}"
    width = next((shape[1] for key, shape in shapes.items() if _CONTEXT.search(key) and len(shape) > 1), None)
    if width is not None:
        return f"a LoRA for {_WIDTHS.get(width, f'a model with context tokens of width {width}')}"
    return "a LoRA for another model" if any("lora" in key for key in shapes) else "no LoRA at all"
