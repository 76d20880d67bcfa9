"""Pictures to latents: what the image encoder of a latent diffusion model gives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from suffuse.errors import InputError

Generators = torch.Generator | list[torch.Generator] | None


def encode_image(vae: Any, image: Tensor, generator: Generators = None) -> Tensor:
    """Sample scaled latents of pictures.

    Args:
        vae: An autoencoder.
        image: (batch, 3, height, width) in [-1, 1].
        generator: One for all pictures, or one for each.

    Returns:
        (batch, latent channels, height / factor, width / factor).
    """
    image = image.to(vae.dtype)
    if isinstance(generator, list):
        latents = torch.cat([_sample(vae.encode(image[i : i + 1]), generator[i]) for i in range(len(image))])
    else:
        latents = _sample(vae.encode(image), generator)
    return vae.config.scaling_factor * latents


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


def _sample(encoded: Any, generator: torch.Generator | None) -> Tensor:
    return encoded.latent_dist.sample(generator) if hasattr(encoded, "latent_dist") else encoded.latents
