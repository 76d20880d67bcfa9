"""ControlNets as conditioners: each adds to the layers of a UNet what it makes of a picture (Zhang et al., 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from suffuse.diffusion.conditioning import ModelCall, at_told_steps, rows
from suffuse.diffusion.loop import Step
from suffuse.models.controlnet import added
from suffuse.schedulers.scheduler import SchedulerMixin

TOLD = ("text_embeds", "time_ids")
"""What a ControlNet is told besides the text, of what its UNet is told."""


@dataclass
class Control:
    """Add what one ControlNet makes of its pictures; several beside each other add up.

    It sees what the conditioners before it have gathered, and stands after them.

    Attributes:
        net: The ControlNet.
        pictures: (batch, channels, height, width), or (1, …) for all of the batch; where the net computes, in its type.
        scheduler: Of the run: it knows how long the whole way is.
        scale: Multiplies what is added.
        start: The part of the way after which the net begins to act, in [0, 1].
        end: The part of the way after which it no longer does.
        guess: Leave the unconditional branch alone, so that the picture speaks where the text is silent; deep layers then say
            more than shallow ones.
    """

    net: nn.Module
    pictures: Tensor
    scheduler: SchedulerMixin
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    guess: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the pictures."""
        return self.pictures.shape[-2], self.pictures.shape[-1]

    def acts(self, index: int) -> bool:
        """Whether the net has a say in a step."""
        steps = len(self.scheduler.timesteps) - (self.scheduler.begin_index or 0)
        return self.scale != 0 and index / steps >= self.start and (index + 1) / steps <= self.end

    def unheard(self, total: int) -> str | None:
        """What no step of so many is told though it counts, if that is so."""
        heard = self.scale == 0 or any(map(self.acts, range(total)))
        told = f"control_guidance_start={self.start}, control_guidance_end={self.end}"
        return None if heard else f"what the ControlNet sees ({told})"

    def __call__(self, call: ModelCall, step: Step) -> None:
        """Ask the net for the branches it has a say in, and add what it says to what others said."""
        asked = tuple(branch for branch in call.branches if not (self.guess and branch == "uncond"))
        acts = [self.acts(index) for index in step.indices]
        if not asked or not any(acts):
            return
        told = call.kwargs.get("added_cond_kwargs") or {}
        sample = rows(call.sample, call.branches, asked)
        down, middle = self.net(
            sample,
            rows(call.timestep, call.branches, asked) if call.timestep.ndim else call.timestep,
            encoder_hidden_states=rows(call.kwargs["encoder_hidden_states"], call.branches, asked),
            controlnet_cond=call.conditioning.shown(self.pictures, asked),
            conditioning_scale=self.scale,
            added_cond_kwargs={name: rows(told[name], call.branches, asked) for name in TOLD if name in told},
            guess_mode=self.guess,
            return_dict=False,
        )
        *said, center = (silent_elsewhere(at_told_steps(one, acts, asked), asked, call.branches) for one in (*down, middle))
        add_residuals(call, said, center)


def silent_elsewhere(residual: Tensor, asked: tuple[str, ...], branches: tuple[str, ...]) -> Tensor:
    """A residual of the branches that were asked for, with zeros for the others."""
    if asked == branches:
        return residual
    parts = dict(zip(asked, residual.chunk(len(asked)), strict=True))
    nothing = torch.zeros_like(parts[asked[0]])
    return torch.cat([parts.get(branch, nothing) for branch in branches])


def add_residuals(call: ModelCall, down: Sequence[Tensor], middle: Tensor) -> None:
    """Hand residuals to the skip connections and the middle of a UNet, with those it is given already."""
    before = call.kwargs.get("down_block_additional_residuals"), call.kwargs.get("mid_block_additional_residual")
    if before[0] is not None and before[1] is not None:
        down, middle = added((before[0], before[1]), (down, middle))
    call.kwargs |= {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
