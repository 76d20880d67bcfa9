"""Random IP-Adapters for tiny UNets, of every kind, as files hold them; and a tiny image encoder."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import torch
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

FEATURES, STATES, FACE = 24, 32, 20
"""Size of what the image encoder says of a picture, and of each of its hidden states; and of what tells a face."""


@cache
def image_encoder() -> CLIPVisionModelWithProjection:
    torch.manual_seed(18)
    config = CLIPVisionConfig(
        hidden_size=STATES,
        intermediate_size=37,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        projection_dim=FEATURES,
    )
    return CLIPVisionModelWithProjection(config).eval()


def linear(name: str, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def resampler(width: int, inner: int = 48) -> dict[str, tuple[int, ...]]:
    shapes = {
        "latents": (1, 5, inner),
        **linear("proj_in", inner, STATES),
        **linear("proj_out", width, inner),
        **norm("norm_out", width),
    }
    for layer in range(4):
        start = f"layers.{layer}"
        shapes |= norm(f"{start}.0.norm1", inner) | norm(f"{start}.0.norm2", inner) | norm(f"{start}.1.0", inner)
        shapes |= {
            f"{start}.0.to_q.weight": (64, inner),
            f"{start}.0.to_kv.weight": (128, inner),
            f"{start}.0.to_out.weight": (inner, 64),
        }
        shapes |= {f"{start}.1.1.weight": (inner * 4, inner), f"{start}.1.3.weight": (inner, inner * 4)}
    return shapes


OTHER_NAMES = {"0.norm1": "ln0", "0.norm2": "ln1", "0": "attn", "1.0": "ff.0", "1.1": "ff.1.net.0.proj", "1.3": "ff.1.net.2"}
"""What is called so inside a layer of a resampler, and how some files call it."""


def other_names(name: str) -> str:
    layer = re.fullmatch(r"(layers\.\d+)\.(0\.norm\d|0|1\.\d)\.(.+)", name)
    return f"{layer[1]}.{OTHER_NAMES[layer[2]]}.{layer[3]}" if layer else name


KINDS = {
    "plain": lambda width: {**linear("proj", 4 * width, FEATURES), **norm("norm", width)},
    "full": lambda width: {**linear("proj.0", STATES, STATES), **linear("proj.2", width, STATES), **norm("proj.3", width)},
    "plus": resampler,
    "plus of other names": lambda width: {other_names(name): shape for name, shape in resampler(width).items()},
    "face": lambda width: {**linear("proj.0", FACE * 2, FACE), **linear("proj.2", 4 * width, FACE * 2), **norm("norm", width)},
}


def ip_adapter(unet: Any, kind: str = "plain", seed: int = 0, width: int | None = None, rank: int = 0) -> dict[str, torch.Tensor]:
    """The tensors of an adapter for a UNet of the peer; with low-rank factors if `rank` is not 0."""
    width = width or unet.config.cross_attention_dim
    shapes = {f"image_proj.{name}": shape for name, shape in KINDS[kind](width).items()}
    for number, name in enumerate(unet.attn_processors):
        layer = unet.get_submodule(name.removesuffix(".processor"))
        outputs, context = layer.to_q.out_features, layer.to_k.in_features
        if number % 2:
            shapes |= {f"ip_adapter.{number}.to_{part}_ip.weight": (outputs, width) for part in "kv"}
        for part, inputs in (("q", outputs), ("k", context), ("v", context), ("out", outputs)) if rank else ():
            start = f"ip_adapter.{number}.to_{part}_lora"
            shapes |= {f"{start}.down.weight": (rank, inputs), f"{start}.up.weight": (outputs, rank)}
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) * shape[-1] ** -0.5 + ("norm" in name and name.endswith("weight"))
        for name, shape in shapes.items()
    }


def nested(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """The same as pickles hold them."""
    parts = ("image_proj", "ip_adapter")
    return {
        part: {name.removeprefix(f"{part}."): t.clone() for name, t in tensors.items() if name.startswith(part)} for part in parts
    }
