"""Grounding in boxes: what stands where is told to gated attention (Li et al., 2023, "GLIGEN")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from suffuse.diffusion.conditioning import UNTOLD, ModelCall
from suffuse.diffusion.loop import SilentHook, Step
from suffuse.noise import Generators, randn_tensor
from suffuse.schedulers.scheduler import SchedulerMixin

OBJECTS = 30
"""How many objects the model was trained to see; what there are fewer of is filled with learned features of none."""
PRESENCE = ("masks", "phrases_masks", "image_masks")
"""Which of what is told says whether there is an object, a phrase, a picture."""


@dataclass(frozen=True)
class Grounding:
    """Tell gated attention of objects, in the first part of the way (section 3.3, scheduled sampling).

    Attributes:
        objects: What the model's `position_net` takes, by name: boxes (1, objects, 4), features (1, objects, size) and masks (1,
            objects), the same for all pictures.
        part: The part of the steps, from the first, in which they are told, in [0, 1]; in the others the model is as it was
            before it was trained for grounding.
    """

    objects: Mapping[str, Tensor]
    part: float = 1.0

    def unheard(self, total: int) -> str | None:
        """What no step of so many is told though it counts, if that is so; a part of 0 is meant."""
        heard = self.part == 0 or int(self.part * total) > 0
        return None if heard else f"the boxes (gligen_scheduled_sampling_beta={self.part})"

    def __call__(self, call: ModelCall, step: Step) -> None:
        """Add the objects to what attention is told, for the branches that are told a text."""
        if step.index >= int(self.part * step.total):
            return
        batch = len(call.sample) // len(call.branches)
        told = {
            name: torch.cat([self._rows(name, value, branch).expand(batch, *value.shape[1:]) for branch in call.branches])
            for name, value in self.objects.items()
        }
        call.kwargs["cross_attention_kwargs"] = {**(call.kwargs.get("cross_attention_kwargs") or {}), "gligen": told}

    @staticmethod
    def _rows(name: str, value: Tensor, branch: str) -> Tensor:
        return torch.zeros_like(value) if branch in UNTOLD and name in PRESENCE else value


@dataclass
class KeepAround(SilentHook):
    """Before each step, lay the known picture, at this step's noise level, around the boxes (section 3.3, inpainting).

    Attributes:
        scheduler: Of the run.
        known: Latents of the picture, (1, …) for all of the batch, or (batch, …).
        kept: (1, 1, rows, columns): 0 inside of boxes, 1 around them.
        generator: What noise is drawn from, new in each step; one, or a list of one a picture.
    """

    scheduler: SchedulerMixin
    known: Tensor
    kept: Tensor
    generator: Generators = None

    def before(self, step: Step) -> None:
        """Replace the latents around the boxes."""
        noise = randn_tensor(self.known.shape, generator=self.generator, device=self.known.device, dtype=self.known.dtype)
        known = self.scheduler.add_noise(self.known, noise, step.timestep[None])
        step.latents = known * self.kept + step.latents * (1 - self.kept)


def around_boxes(boxes: Sequence[Sequence[float]], rows: int, columns: int) -> Tensor:
    """(rows, columns): 0 inside of boxes, which are left, top, right, bottom from 0 to 1; 1 around them."""
    kept = torch.ones(rows, columns)
    for left, top, right, bottom in boxes:
        kept[int(top * rows) : int(bottom * rows), int(left * columns) : int(right * columns)] = 0
    return kept


def padded(features: Tensor, objects: int = OBJECTS) -> Tensor:
    """Features of some objects (count, …) with zeros for those that are not there: (1, objects, …)."""
    full = features.new_zeros(objects, *features.shape[1:])
    full[: len(features)] = features
    return full[None]
