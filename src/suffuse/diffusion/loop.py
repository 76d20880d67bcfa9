"""The one loop: walk latents down a list of timesteps.

Every method of the library is a value given to this loop, never a branch in it: an `Advance` makes a step, a `Hook` acts between
steps, and inside a step a `Guidance` asks a `Denoiser` whose `Conditioner`s say what the model sees.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor


@dataclass(slots=True)
class Step:
    """What one step of the way may read or replace.

    Attributes:
        latents: (batch, channels, height, width), or whatever shape the model denoises.
        total: How many steps the way has.
        index: Which one this is, from 0.
        timestep: 0-dimensional; what the model is told.
    """

    latents: Tensor
    total: int
    index: int = 0
    timestep: Tensor = field(default_factory=lambda: torch.tensor(0))

    @property
    def indices(self) -> Sequence[int]:
        """Which steps the latents are at, one after another: this one, unless several are taken at once."""
        return (self.index,)


class Hook(Protocol):
    """Acts on the latents between steps. A hook may raise `Finished` to end the way early."""

    def before(self, step: Step) -> None:
        """Called before each step."""

    def after(self, step: Step) -> None:
        """Called after each step, with the new latents."""


class SilentHook:
    """A hook that does nothing: override what you need."""

    def before(self, step: Step) -> None:
        """Called before each step."""

    def after(self, step: Step) -> None:
        """Called after each step, with the new latents."""


class Finished(Exception):  # like StopIteration, the name of an end and not of an error
    """Raised by a hook to end the way here; the latents so far are the result."""


Advance = Callable[[Step], Tensor]
"""Makes one step: the latents of the next timestep."""
Walk = Callable[[Tensor, Tensor, Advance, Sequence[Hook], int], Tensor]
"""Goes the way: `denoise`, or a loop of somebody else's that calls the hooks as it does."""


def denoise(latents: Tensor, timesteps: Tensor, advance: Advance, hooks: Sequence[Hook] = (), begin: int = 0) -> Tensor:
    """Walk `latents` down `timesteps`, from step `begin`: `advance` makes one step, `hooks` act before and after it."""
    step = Step(latents, total=len(timesteps))
    try:
        for step.index, step.timestep in islice(enumerate(timesteps), begin, None):
            for hook in hooks:
                hook.before(step)
            step.latents = advance(step)
            for hook in hooks:
                hook.after(step)
    except Finished:
        pass
    return step.latents
