"""Latents to pictures."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from suffuse.diffusion.latents import statistic
from suffuse.diffusion.precision import in_float32
from suffuse.errors import NonFiniteError


def decode_latents(vae: Any, latents: Tensor, generator: Any = None, upcast: bool = False, **conditions: Tensor) -> Tensor:
    """Decode scaled latents.

    Half precision overflows in some autoencoders; where that happens the picture is decoded once more in float32 (the
    autoencoder itself stays as it is), so that a black picture is never returned.

    Args:
        vae: An autoencoder.
        latents: (batch, latent channels, height, width).
        generator: For decoders that draw noise.
        upcast: Decode in float32 at once, where the autoencoder is known to overflow.
        **conditions: What further the decoder sees; an asymmetric autoencoder takes `image` and `mask`.

    Returns:
        (batch, 3, height · factor, width · factor), about [-1, 1].

    Raises:
        NonFiniteError: The autoencoder gave NaN or infinity in float32 too.
    """
    return decode(vae, _unscaled(vae, latents.float() if upcast else latents), generator, upcast, **conditions)


def decode(vae: Any, latents: Tensor, generator: Any = None, upcast: bool = False, **conditions: Tensor) -> Tensor:
    """`decode_latents` of latents as the autoencoder made them, which are not scaled."""
    scaled = latents.to(torch.float32 if upcast else vae.dtype)
    told: dict[str, Any] = {"generator": generator, **conditions}
    if upcast and vae.dtype != torch.float32:
        image = in_float32(vae, "decode", scaled, return_dict=False, **told)[0]
    else:
        image = vae.decode(scaled, return_dict=False, **told)[0]
    if not bool(torch.isfinite(image).all()) and image.dtype in (torch.float16, torch.bfloat16):
        warnings.warn(f"the autoencoder overflowed in {image.dtype}: decoding once more in float32", stacklevel=5)
        image = in_float32(vae, "decode", scaled, return_dict=False, **told)[0]
    if not bool(torch.isfinite(image).all()):
        raise NonFiniteError(
            "the autoencoder gave NaN or infinity", found=f"vae in {image.dtype}", remedy="check the weights of the vae"
        )
    return image


def _unscaled(vae: Any, latents: Tensor) -> Tensor:
    """Latents as the autoencoder made them, from those that the model denoises."""
    mean, std = (statistic(vae, name, latents) for name in ("latents_mean", "latents_std"))
    if mean is None or std is None:
        return latents / vae.config.scaling_factor
    return latents * std / vae.config.scaling_factor + mean
