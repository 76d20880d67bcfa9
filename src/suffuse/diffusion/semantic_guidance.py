"""Guidance towards or away from concepts, each where it matters most (Brack et al., 2023, "SEGA: instructing text-to-image models
using semantic guidance").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any, ClassVar

import torch
from torch import Tensor

from suffuse.diffusion.checked import Checked, is_a
from suffuse.diffusion.conditioning import Denoiser
from suffuse.diffusion.guidance import Guidance, Text
from suffuse.diffusion.loop import Step
from suffuse.errors import InputError


@dataclass(frozen=True)
class Concept(Checked):
    """What a picture is edited by: a branch of its own, "edit_0", "edit_1" and so on.

    Attributes:
        prompt: Its words, one text for all pictures or one for each prompt, or what the text encoder makes of them.
        scale: How far towards it.
        reverse: Away from it instead.
        warmup: Steps before it counts.
        cooldown: Steps after which it no longer counts, if any.
        threshold: Which part of the positions it leaves alone, in [0, 1]: those where it says least.
        weight: Of it among the others; below 0 as 0.
    """

    limits: ClassVar[Mapping[str, tuple[float, float]]] = {"warmup": (0, inf), "cooldown": (0, inf), "threshold": (0, 1)}
    prompt: Text
    scale: float = 5.0
    reverse: bool = False
    warmup: int = 10
    cooldown: int | None = None
    threshold: float = 0.9
    weight: float = 1.0

    def direction(self, concept: Tensor, uncond: Tensor) -> Tensor:
        """Where it leads, with zeros where it says little (equations 5 and 6)."""
        direction = (concept - uncond) * (-self.scale if self.reverse else self.scale)
        strength = direction.abs()
        least = torch.quantile(strength.flatten(2).float(), self.threshold, dim=2).to(strength.dtype)
        return torch.where(strength >= least[:, :, None, None], direction, 0)

    def counts(self, index: int) -> bool:
        """Whether it has not ended at a step."""
        return self.cooldown is None or index < self.cooldown


@dataclass
class SemanticGuidance(Guidance):
    """Classifier-free guidance, and concepts on top of it.

    Attributes:
        scale: The guidance scale; at 1 or below only the conditional branch is computed, and no concept.
        concepts: What is edited.
        momentum_scale: How much of the edits of the steps before is added.
        beta: How much of them is kept from step to step.
        replayed: Edits of another run, (batch or 1, channels, rows, columns) for each step, to add.
        momentum: What is remembered of the edits so far.
        applied: The edit of each step so far, to be replayed in another run; None if they are not to be kept.

    Raises:
        InputError: There are concepts, and the scale asks for none.
    """

    remembers: ClassVar[tuple[str, ...]] = ("momentum", "applied")
    scale: float
    concepts: Sequence[Concept] = ()
    momentum_scale: float = 0.1
    beta: float = 0.4
    replayed: Sequence[Tensor] | Tensor = ()
    momentum: Tensor | None = field(default=None, repr=False)
    applied: list[Tensor] | None = field(default=None, repr=False)

    def check_values(self, name: str) -> None:
        """Raise `InputError` unless it is what it may be, and its scale asks for the concepts."""
        super().check_values(name)
        is_a(list, tuple, spelled='a list of Concept, [Concept("a hat")] for example')(f"{name}.concepts", self.concepts)
        for index, concept in enumerate[Any](self.concepts):
            is_a(Concept, spelled='a Concept, Concept("a hat") for example')(f"{name}.concepts[{index}]", concept)
        is_a(Tensor, list, tuple, spelled="a list of tensors, one for each step")(f"{name}.replayed", self.replayed)
        for index, edit in enumerate[Any](self.replayed):
            is_a(Tensor, spelled="a torch.Tensor")(f"{name}.replayed[{index}]", edit)
        if self.concepts and self.scale <= 1:
            raise InputError(
                f"{name}: concepts are given, and scale={self.scale} guides nothing", expected="a scale above 1, 7.5 for example"
            )

    @property
    def branches(self) -> tuple[str, ...]:
        """Names of the branches, in batch order."""
        edits = (f"edit_{number}" for number in range(len(self.concepts)))
        return ("uncond", "cond", *edits) if self.scale > 1 else ("cond",)

    @property
    def texts(self) -> Mapping[str, Text]:
        """The concepts, where they are asked for."""
        return dict(zip(self.branches[2:], (concept.prompt for concept in self.concepts), strict=False))

    def unheard(self, total: int) -> str | None:
        """That the picture is not edited, if so many steps are over before any concept counts."""
        warmup = min((concept.warmup for concept in self.concepts), default=0)
        return f"a concept (warmup={warmup})" if self.texts and warmup >= total else None

    def __call__(self, denoiser: Denoiser, step: Step) -> Tensor:
        """One prediction, of the shape of the latents."""
        replayed = self.replayed_at(step)
        predictions = denoiser(step, self.branches)
        cond, uncond = predictions["cond"], predictions.get("uncond")
        if uncond is None:
            return cond
        guided = (cond - uncond).mul_(self.scale)
        edit = self.edit([predictions[name] for name in self.branches[2:]], uncond, step.index)
        if self.applied is not None:
            self.applied.append(edit)
        if self.concepts:
            guided = guided + edit
        return uncond + (guided if replayed is None else guided + replayed.to(guided))

    def replayed_at(self, step: Step) -> Tensor | None:
        """The edit of another run that is added at a step, if any are.

        Raises:
            InputError: There is none for this step, or it is not of the shape of the latents.
        """
        if not len(self.replayed) or self.scale <= 1:
            return None
        if step.index >= len(self.replayed):
            raise InputError(f"replayed: {len(self.replayed)} edits for {step.total} steps", remedy="pass one for each step")
        edit, shape = self.replayed[step.index], tuple(step.latents.shape)
        if tuple(edit.shape) not in (shape, (1, *shape[1:])):
            raise InputError(f"replayed[{step.index}] has the wrong shape", found=tuple(edit.shape), expected=shape)
        return edit

    def edit(self, predictions: Sequence[Tensor], uncond: Tensor, index: int) -> Tensor:
        """What the concepts that are warm add at a step (equation 8), and remember it (equation 9)."""
        if not self.concepts:
            return torch.zeros_like(uncond)
        weights = torch.tensor([max(c.weight, 0.0) if c.counts(index) else 0.0 for c in self.concepts]).to(uncond)
        directions = torch.stack(
            [
                concept.direction(prediction, uncond) if concept.counts(index) else torch.zeros_like(uncond)
                for concept, prediction in zip(self.concepts, predictions, strict=True)
            ]
        )
        momentum = torch.zeros_like(uncond) if self.momentum is None else self.momentum.to(uncond)
        together = _weighted(weights, directions) + self.momentum_scale * momentum
        self.momentum = self.beta * momentum + (1 - self.beta) * together
        warm = [number for number, concept in enumerate(self.concepts) if index >= concept.warmup]
        if len(warm) == len(self.concepts):
            return together
        # While some wait, the others share the whole weight.
        share = weights[warm] / weights[warm].sum()
        return _weighted(share.nan_to_num(), directions[warm])


def _weighted(weights: Tensor, directions: Tensor) -> Tensor:
    rows = weights[:, None].expand(-1, directions.shape[1])
    return torch.einsum("cb,cbijk->bijk", rows, directions)
