"""Pictures to latents: what the image encoder of a latent diffusion model gives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from suffuse.diffusion.precision import in_float32
from suffuse.errors import InputError
from suffuse.noise import Generators, Source


def encode_image(vae: Any, image: Tensor, generator: Generators = None, upcast: bool = False) -> Tensor:
    """Sample scaled latents of pictures.

    Args:
        vae: An autoencoder.
        image: (batch, 3, height, width) in [-1, 1].
        generator: One for all pictures, or one for each.
        upcast: Encode in float32, where the autoencoder is known to overflow.

    Returns:
        (batch, latent channels, height / factor, width / factor).
    """
    dtype = image.dtype
    if isinstance(generator, list):
        each = [_sample(_encoded(vae, image[i : i + 1], upcast), generator[i]) for i in range(len(image))]
        latents = torch.cat(each)
    else:
        latents = _sample(_encoded(vae, image, upcast), generator)
    if upcast:
        latents = latents.to(dtype)
    mean, std = (statistic(vae, name, latents) for name in ("latents_mean", "latents_std"))
    if mean is None or std is None:
        return vae.config.scaling_factor * latents
    return (latents - mean) * vae.config.scaling_factor / std


def mean_of_image(vae: Any, image: Tensor, upcast: bool = False) -> Tensor:
    """Latents of pictures, of which nothing is drawn and which are as large as the autoencoder makes them.

    Args:
        vae: An autoencoder.
        image: (batch, 3, height, width) in [-1, 1].
        upcast: Encode in float32, where the autoencoder is known to overflow.

    Returns:
        (batch, latent channels, height / factor, width / factor).
    """
    encoded = _encoded(vae, image, upcast)
    return encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents


def statistic(vae: Any, name: str, like: Tensor) -> Tensor | None:
    """What the configuration of an autoencoder says of each channel, (1, channels, 1, 1) as `like`; None if it does not."""
    value = vae.config.get(name)
    return None if value is None else torch.tensor(value).view(1, -1, 1, 1).to(like.device, like.dtype)


def repeats(batch: int, values: Tensor, name: str) -> int:
    """How often `values` must be repeated along the first axis for `batch` pictures.

    How they are then repeated is up to the caller: `torch.cat` keeps their layout in memory and `Tensor.repeat` makes it plain,
    which decides the last bit of what is computed with them.

    Raises:
        InputError: `batch` is no multiple of their number.
    """
    if batch % len(values):
        raise InputError(
            f"{name}: {len(values)} given for {batch} pictures",
            expected=f"1, or a number that divides {batch}",
            remedy="pass one for each prompt, or one for all",
        )
    return batch // len(values)


def _encoded(vae: Any, image: Tensor, upcast: bool) -> Any:
    image = image.to(torch.float32 if upcast else vae.dtype)
    return in_float32(vae, "encode", image) if upcast and vae.dtype != torch.float32 else vae.encode(image)


def _sample(encoded: Any, generator: Source | None) -> Tensor:
    return encoded.latent_dist.sample(generator) if hasattr(encoded, "latent_dist") else encoded.latents
