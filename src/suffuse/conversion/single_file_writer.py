"""The components of a pipeline under the names of a single file: the tables of `latent_diffusion`, read the other way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from suffuse.conversion import latent_diffusion
from suffuse.conversion.architecture import AUTOENCODER, CLIP, CONTROLNET, OPEN_CLIP, UNET
from suffuse.conversion.latent_diffusion import QKV, renamed
from suffuse.errors import InputError
from suffuse.memory.offload import gathered_weights

Tensors = Iterator[tuple[str, Tensor]]


def single_file_tensors(components: Mapping[str, Any]) -> dict[str, Tensor]:
    """Name in a single file → tensor, of the components that such files hold.

    Args:
        components: Of a pipeline of Stable Diffusion 1, 2 or XL, by name; others are left out: tokenizers, schedulers.

    Raises:
        InputError: A component has no place in a single file.
    """
    xl = "text_encoder_2" in components
    tensors: dict[str, Tensor] = {}
    for name, model in components.items():
        if isinstance(model, torch.nn.Module):
            write = WRITERS.get(name)
            if write is None:
                raise InputError(
                    f"a single file has no place for the {name}", expected=", ".join(WRITERS), remedy="set it to None"
                )
            tensors.update(write(model, xl))
    return tensors


def _unet(model: Any, xl: bool) -> Tensors:
    return _behind(UNET, model, latent_diffusion.unet(model.config))


def _controlnet(model: Any, xl: bool) -> Tensors:
    return _behind(CONTROLNET, model, latent_diffusion.controlnet(model.config))


def _autoencoder(model: Any, xl: bool) -> Tensors:
    for name, tensor in _behind(AUTOENCODER, model, latent_diffusion.autoencoder(model.config)):
        matrix = ".mid.attn_1." in name and tensor.ndim == 2
        yield name, tensor[:, :, None, None] if matrix else tensor


def _text_encoder(model: Any, xl: bool) -> Tensors:
    # OpenAI's CLIP computes GELU the quick way, and that is how the two are told apart.
    if model.config.hidden_act == "quick_gelu":
        prefix = CLIP[2] if xl else CLIP[0]
        return ((prefix + name, tensor) for name, tensor in _text_tensors(model))
    return _open_clip(model, OPEN_CLIP[0])


def _second_text_encoder(model: Any, xl: bool) -> Tensors:
    return _open_clip(model, OPEN_CLIP[1])


def _open_clip(model: Any, prefix: str) -> Tensors:
    tensors, layers = dict(_text_tensors(model)), model.config.num_hidden_layers
    projected = "text_projection.weight" in tensors
    if not projected:  # the last layer, which is never used, has a place all the same
        last = f"encoder.layers.{layers - 1}."
        tensors |= {
            f"encoder.layers.{layers}.{n.removeprefix(last)}": torch.zeros_like(t)
            for n, t in tensors.items()
            if n.startswith(last)
        }
        layers += 1
    back = {here: there for there, here in latent_diffusion.open_clip(layers).items()}
    for layer in range(layers):
        for kind in ("weight", "bias"):
            thirds = [tensors.pop(f"encoder.layers.{layer}.self_attn.{part}.{kind}") for part in QKV]
            yield f"{prefix}transformer.resblocks.{layer}.attn.in_proj_{kind}", torch.cat(thirds)
    for name, tensor in tensors.items():
        yield prefix + renamed(name, back), tensor.t() if name == "text_projection.weight" else tensor


def _text_tensors(model: Any) -> Tensors:
    for name, tensor in gathered_weights(model).items():
        yield name.removeprefix("text_model."), tensor


def _behind(prefix: str, model: Any, modules: Mapping[str, str]) -> Tensors:
    back = {here: there for there, here in modules.items()}
    for name, tensor in gathered_weights(model).items():
        yield prefix + renamed(name, back), tensor


WRITERS: dict[str, Callable[[Any, bool], Tensors]] = {
    "unet": _unet,
    "vae": _autoencoder,
    "text_encoder": _text_encoder,
    "text_encoder_2": _second_text_encoder,
    "controlnet": _controlnet,
}
"""Component → its tensors under the names of a single file."""
