"""Latents to pictures."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from suffuse.errors import NonFiniteError


def decode_latents(vae: Any, latents: Tensor, generator: Any = None, **conditions: Tensor) -> Tensor:
    """Decode scaled latents.

    Half precision overflows in some autoencoders; where that happens the picture is decoded once more in float32 (the
    autoencoder itself stays as it is), so that a black picture is never returned.

    Args:
        vae: An autoencoder.
        latents: (batch, latent channels, height, width).
        generator: For decoders that draw noise.
        **conditions: What further the decoder sees; an asymmetric autoencoder takes `image` and `mask`.

    Returns:
        (batch, 3, height · factor, width · factor), about [-1, 1].

    Raises:
        NonFiniteError: The autoencoder gave NaN or infinity in float32 too.
    """
    scaled = (latents / vae.config.scaling_factor).to(vae.dtype)
    image = vae.decode(scaled, return_dict=False, generator=generator, **conditions)[0]
    if not bool(torch.isfinite(image).all()) and image.dtype in (torch.float16, torch.bfloat16):
        warnings.warn(f"the autoencoder overflowed in {image.dtype}: decoding once more in float32", stacklevel=4)
        image = _in_float32(vae, scaled, generator, conditions)
    if not bool(torch.isfinite(image).all()):
        raise NonFiniteError(
            "the autoencoder gave NaN or infinity", found=f"vae in {image.dtype}", remedy="check the weights of the vae"
        )
    return image


def _in_float32(vae: Any, latents: Tensor, generator: Any, conditions: dict[str, Tensor]) -> Tensor:
    weights = {name: tensor.float() for name, tensor in vae.state_dict().items()}
    inputs = {name: tensor.float() for name, tensor in conditions.items()}
    decode = _Decode(vae)
    return torch.func.functional_call(
        decode, {f"vae.{name}": tensor for name, tensor in weights.items()}, (latents.float(), generator), inputs
    )


class _Decode(torch.nn.Module):
    """`vae.decode` as a forward, so that `functional_call` can lend it other weights."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor, generator: Any, **conditions: Tensor) -> Tensor:
        return self.vae.decode(latents, return_dict=False, generator=generator, **conditions)[0]
