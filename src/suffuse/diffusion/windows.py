"""Pictures larger than a model knows, by windows that agree (Bar-Tal et al., 2023, "MultiDiffusion", algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from suffuse.diffusion.advance import GuidedStep
from suffuse.diffusion.conditioning import Conditioning
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


@dataclass
class InEachWindow(Conditioning):
    """The tensors of a run for several windows at once: each window is told the same."""

    windows: int = 1

    def select(self, name: str, branches: tuple[str, ...]) -> Tensor:
        """The rows of `name` that belong to `branches`, in their order; in a branch, once for each window."""
        parts = super().select(name, branches).chunk(len(branches))
        return torch.cat([part for part in parts for _ in range(self.windows)])


@dataclass
class WindowedStep(GuidedStep):
    """Predict in each window, step in each, and let the mean be the latents of the next timestep (equation 5).

    All windows take one step of the scheduler together, so what a solver remembers is remembered for each.

    Attributes:
        windows: Where they lie.
        at_once: How many the model sees in one call.
        circular: Whether they go on at the other edge.
    """

    windows: Sequence[Window] = field(default_factory=list[Window])
    at_once: int = 1
    circular: bool = False

    def __call__(self, step: Step) -> Tensor:
        """The latents of the next timestep."""
        places = [self._place(window, step.latents) for window in self.windows]
        seen = torch.cat([step.latents[:, :, rows][:, :, :, columns] for rows, columns in places])
        batch = len(step.latents)
        groups = seen.split(self.at_once * batch)
        prediction = torch.cat(
            [self.guidance(self._denoiser(len(group) // batch), replace(step, latents=group)) for group in groups]
        )
        stepped = self.scheduler.step(prediction, step.timestep, seen, **self._options(), return_dict=False)[0]
        total, count = torch.zeros_like(step.latents), torch.zeros_like(step.latents[:1, :1])
        for (rows, columns), view in zip(places, stepped.chunk(len(places)), strict=True):
            total[:, :, rows].index_add_(3, columns, view)
            count[:, :, rows].index_add_(3, columns, torch.ones_like(view[:1, :1]))
        return total / count

    def _place(self, window: Window, latents: Tensor) -> tuple[slice, Tensor]:
        top, bottom, left, right = window
        edge = latents.shape[3]
        columns = torch.arange(left, right if self.circular else min(right, edge), device=latents.device) % edge
        return slice(top, bottom), columns

    def _denoiser(self, count: int) -> Any:
        told = self.denoiser.conditioning
        return replace(self.denoiser, conditioning=InEachWindow(told.batch, told.layout, told.tensors, count))

    def _options(self) -> dict[str, Any]:
        """Options of the scheduler's step; where each picture has a source of noise, each of its windows draws from it."""
        sources = self.options.get("generator")
        return self.options | ({"generator": sources * len(self.windows)} if isinstance(sources, list) else {})
