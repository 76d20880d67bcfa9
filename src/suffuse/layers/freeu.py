"""FreeU (Si et al., 2023): less of the skip connections' low frequencies, more of the backbone, without training."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.fft import fftn, fftshift, ifftn, ifftshift


class FreeU(NamedTuple):
    """The two factors of one resolution.

    Attributes:
        backbone: Multiplies the first half of the backbone's channels (b in the paper, eq. 4).
        skip: Multiplies the lowest frequencies of the skip connection (s in the paper, eq. 5).
    """

    backbone: float
    skip: float

    def __call__(self, hidden_states: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        """The backbone's features and the skip connection's, both (batch, channels, height, width), reweighted."""
        half = hidden_states.shape[1] // 2
        hidden_states = torch.cat([hidden_states[:, :half] * self.backbone, hidden_states[:, half:]], dim=1)
        return hidden_states, fourier_filter(skip, threshold=1, scale=self.skip)


def fourier_filter(x: Tensor, threshold: int, scale: float) -> Tensor:
    """Multiply the frequencies below `threshold` by `scale`, in float32 whatever the type of `x`."""
    frequencies = fftshift(fftn(x.float(), dim=(-2, -1)), dim=(-2, -1))
    rows, columns = (slice(size // 2 - threshold, size // 2 + threshold) for size in x.shape[-2:])
    mask = torch.ones(x.shape[-2:], device=x.device)
    mask[rows, columns] = scale
    return ifftn(ifftshift(frequencies * mask, dim=(-2, -1)), dim=(-2, -1)).real.to(x.dtype)
