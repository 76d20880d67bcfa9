"""Pictures larger than a model knows, by windows that agree (Bar-Tal et al., 2023, "MultiDiffusion", algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from suffuse.diffusion.advance import GuidedStep
from suffuse.diffusion.conditioning import Denoiser, ManyTimes
from suffuse.diffusion.loop import Step
from suffuse.errors import InputError

Window = tuple[int, int, int, int]
"""(top, bottom, left, right) in latents; right may be beyond the edge, where the picture begins anew."""


def windows(rows: int, columns: int, size: int, stride: int, circular: bool = False) -> list[Window]:
    """Windows of `size` by `size` that cover latents, row by row; where those `stride` apart leave an edge out, one ends at it.

    Args:
        rows: Of the latents.
        columns: Of the latents.
        size: Rows and columns of a window; latents that are smaller are one window, as far as they go.
        stride: From one window to the next.
        circular: Let windows go on at the left where they leave at the right, so that both edges meet.

    Raises:
        InputError: Windows would leave gaps.
    """
    if stride > size:
        raise InputError(f"stride={stride} leaves gaps between windows", expected=f"at most window_size={size}")
    tops = _starts(rows, size, stride)
    lefts = list(range(0, columns // stride * stride, stride)) if circular and columns > size else _starts(columns, size, stride)
    return [(top, top + size, left, left + size) for top in tops for left in lefts]


def _starts(edge: int, size: int, stride: int) -> list[int]:
    last = max(edge - size, 0)
    starts = list(range(0, last + 1, stride))
    return starts if starts[-1] == last else [*starts, last]


@dataclass(frozen=True)
class View:
    """What lies in a window, of latents or of anything that goes over the whole of them: a picture, or features of it.

    Attributes:
        window: Where it lies.
        size: Rows and columns of the latents.
        circular: Whether it goes on at the other edge.
    """

    window: Window
    size: tuple[int, int]
    circular: bool = False

    def place(self, height: int, width: int) -> tuple[slice, Tensor]:
        """The rows and columns of the window in a map that goes over the whole.

        Raises:
            InputError: It begins or ends in the midst of one.
        """
        top, bottom, left, right = self.window
        rows, columns = self.size
        down = [_scaled(edge, height, rows) for edge in (top, min(bottom, rows))]
        across = [_scaled(edge, width, columns) for edge in (left, right if self.circular else min(right, columns))]
        return slice(*down), torch.arange(*across) % width

    def __call__(self, values: Tensor) -> Tensor:
        """The part of a map (…, height, width) that the window shows."""
        rows, columns = self.place(*values.shape[-2:])
        return values[..., rows, :][..., columns.to(values.device)]


def _scaled(edge: int, length: int, latents: int) -> int:
    scaled, rest = divmod(edge * length, latents)
    if rest:
        raise InputError(
            "a window begins or ends in the midst of a feature",
            found=f"{edge} of {latents} latents, of which there are {length} features",
            remedy="let height, width, window_size and stride be such that windows and features end together",
        )
    return scaled


@dataclass
class WindowedDenoiser(Denoiser):
    """Predict what lies in windows, a few of them in each call of the model.

    Attributes:
        views: The windows, in the order in which they are in the latents of a step.
        at_once: How many the model sees in one call.
    """

    views: Sequence[View] = ()
    at_once: int = 1

    def __call__(self, step: Step, branches: tuple[str, ...], latents: Tensor | None = None) -> dict[str, Tensor]:
        """Predictions by branch for all windows, (windows · batch, channels, rows, columns)."""
        seen, told = step.latents if latents is None else latents, self.conditioning
        groups = [self.views[start : start + self.at_once] for start in range(0, len(self.views), self.at_once)]
        made = [
            Denoiser(self.model, self.scheduler, ManyTimes(**vars(told), views=group), self.conditioners)(step, branches, part)
            for group, part in zip(groups, seen.split(self.at_once * told.batch), strict=True)
        ]
        return {branch: torch.cat([each[branch] for each in made]) for branch in branches}


@dataclass
class WindowedStep(GuidedStep):
    """Predict in each window, step in each, and let the mean be the latents of the next timestep (equation 5).

    All windows take one step of the scheduler together, and are guided together: what a solver or a guidance remembers is
    remembered for each.

    Attributes:
        views: The windows.
        at_once: How many the model sees in one call.
    """

    views: Sequence[View] = ()
    at_once: int = 1

    def __call__(self, step: Step) -> Tensor:
        """The latents of the next timestep."""
        seen = torch.cat([view(step.latents) for view in self.views])
        denoiser = WindowedDenoiser(**vars(self.denoiser), views=self.views, at_once=self.at_once)
        prediction = self.guidance(denoiser, replace(step, latents=seen))
        stepped = self.scheduler.step(prediction, step.timestep, seen, **self._options(), return_dict=False)[0]
        total, count = torch.zeros_like(step.latents), torch.zeros_like(step.latents[:1, :1])
        for view, part in zip(self.views, stepped.chunk(len(self.views)), strict=True):
            rows, columns = view.place(*total.shape[-2:])
            columns = columns.to(total.device)
            total[:, :, rows].index_add_(3, columns, part)
            count[:, :, rows].index_add_(3, columns, torch.ones_like(part[:1, :1]))
        return total / count

    def _options(self) -> dict[str, Any]:
        """Options of the scheduler's step; where each picture has a source of noise, each of its windows draws from it."""
        sources = self.options.get("generator")
        return self.options | ({"generator": sources * len(self.views)} if isinstance(sources, list) else {})
