"""No word of a prompt left out (Chefer et al., 2023, "Attend-and-Excite: attention-based semantic guidance for text-to-image
diffusion models").
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from suffuse.diffusion.attention_control import PLACES, cross_attention, recording
from suffuse.diffusion.conditioning import Denoiser
from suffuse.diffusion.loop import SilentHook, Step
from suffuse.layers.attention import Attention

MOST_REFINEMENTS = 20
"""After so many moves, latents are taken as they are."""
SHARPNESS = 100.0
"""What attention to words is multiplied by before it is compared among them."""


@dataclass
class AttendAndExcite(SilentHook):
    """Before each step, move latents so that each word that is named is attended to somewhere (algorithm 1).

    Attributes:
        denoiser: Of the run: what the gradients go through.
        words: For each picture, the positions of the words among the tokens of its prompt.
        size: (rows, columns) of the feature maps whose attention counts.
        lengths: How far a move goes, for each step.
        moved: How many steps, from the first, begin with a move.
        thresholds: Step → how much every word must be attended to, in [0, 1], before it goes on.
    """

    denoiser: Denoiser
    words: Sequence[Sequence[int]]
    size: tuple[int, int]
    lengths: Sequence[float]
    moved: int
    thresholds: Mapping[int, float]

    def before(self, step: Step) -> None:
        """Move the latents."""
        if step.index >= self.moved and step.index not in self.thresholds:
            return
        with torch.enable_grad():
            latents = step.latents.detach().clone().requires_grad_(True)
            losses = self.losses(step, latents)
            if step.index in self.thresholds:
                latents, losses = self.refined(step, latents, losses, 1 - self.thresholds[step.index])
            if step.index < self.moved:
                latents = self.nearer(step, latents, losses, torch.ones_like(losses, dtype=torch.bool))
        step.latents = latents.detach()

    def refined(self, step: Step, latents: Tensor, losses: Tensor, enough: float) -> tuple[Tensor, Tensor]:
        """Latents with losses of at most `enough`, moved once more than it takes; each picture by itself."""
        open_still = losses > enough
        for _ in range(MOST_REFINEMENTS):
            if not bool(open_still.any()):
                break
            latents = self.nearer(step, latents, losses, open_still).detach().requires_grad_(True)
            open_still = open_still & (losses > enough)
            losses = self.losses(step, latents)
        return latents, losses

    def nearer(self, step: Step, latents: Tensor, losses: Tensor, which: Tensor) -> Tensor:
        """Latents moved against the gradient of their losses, where `which` is true."""
        gradient = torch.autograd.grad(losses.sum(), latents)[0]
        return torch.where(which[:, None, None, None], latents - self.lengths[step.index] * gradient, latents)

    def losses(self, step: Step, latents: Tensor) -> Tensor:
        """How little the word is attended to that is so least, for each picture: (batch,), from 0 to 1 (equation 1)."""
        layers, seen = cross_attention(self.denoiser.model), dict[Attention, Tensor]()
        recording(self.denoiser, layers, seen)(step, ("cond",), latents)
        maps = [
            seen[layer].unflatten(0, (len(latents), -1)).unflatten(2, self.size)
            for layer in layers
            if seen[layer].shape[1] == math.prod(self.size)
        ]
        heads = torch.cat(maps, dim=1)
        attended = heads.sum(1) / heads.shape[1]
        # The first token and the last are attended to more than any word.
        shares = (attended[..., 1:-1] * SHARPNESS).softmax(dim=-1)
        return torch.stack([_least(picture, words) for picture, words in zip(shares, self.words, strict=True)])


def _least(shares: Tensor, words: Sequence[int]) -> Tensor:
    named = torch.stack([shares[..., word - 1] for word in words])
    return (1.0 - smoothed(named).amax(dim=(1, 2))).clamp(min=0).max(dim=0).values


def smoothed(maps: Tensor, deviation: float = 0.5) -> Tensor:
    """(maps, rows, columns) under a Gaussian of 3 by 3, reflected at the edges."""
    line = torch.exp(-(((torch.arange(3, dtype=torch.float32) - 1) / (2 * deviation)) ** 2))
    line = line / (deviation * math.sqrt(2 * math.pi))
    kernel = line[:, None] * line[None, :]
    kernel = (kernel / kernel.sum()).to(maps)[None, None]
    return F.conv2d(F.pad(maps[:, None], (1, 1, 1, 1), mode="reflect"), kernel)[:, 0]


def attention_sizes(model: torch.nn.Module, rows: int, columns: int) -> list[tuple[int, int]]:
    """(rows, columns) of the feature maps at which a UNet attends to words, for latents of this size; the largest first."""
    attends = {name for name, module in model.named_modules() if isinstance(module, Attention) and module.is_cross_attention}
    count = len(list(model.get_submodule("down_blocks").children()))
    levels = {_level(name, count) for name in attends if name.startswith(PLACES)}
    return [(math.ceil(rows / 2**level), math.ceil(columns / 2**level)) for level in sorted(levels)]


def _level(name: str, count: int) -> int:
    place, number, _ = name.split(".", 2)
    return {"down_blocks": lambda: int(number), "up_blocks": lambda: count - 1 - int(number)}.get(place, lambda: count - 1)()
