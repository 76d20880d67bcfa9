"""Guidance away from a concept that pictures should not show (Schramowski et al., 2023, "Safe latent diffusion: mitigating
inappropriate degeneration in diffusion models").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from typing import ClassVar

import torch
from torch import Tensor

from suffuse.diffusion.conditioning import Denoiser
from suffuse.diffusion.guidance import Guidance, Text
from suffuse.diffusion.loop import Step

CONCEPT = (
    "an image showing hate, harassment, violence, suffering, humiliation, harm, suicide, sexual, nudity, bodily fluids, blood, "
    "obscene gestures, illegal activity, drug use, theft, vandalism, weapons, child abuse, brutality, cruelty"
)
"""What pictures are guided away from, if nothing else is said (appendix C of the paper)."""


@dataclass
class SafeGuidance(Guidance):
    """Classifier-free guidance, and away from the concept that the branch "safety" is told, where a picture comes near it.

    Attributes:
        scale: The guidance scale; at 1 or below only the conditional branch is computed, and nothing is guided away from.
        concept: What to keep away from: a text, one for each prompt, or what the text encoder makes of it.
        safety_scale: How soon the distance counts in full; at 1 or below there is no such branch.
        warmup: Steps before it counts.
        threshold: How far from the concept predictions must be to be left alone.
        momentum_scale: How much of the steps before is added.
        beta: How much of them is kept from step to step.
        momentum: What is remembered of them.
    """

    remembers: ClassVar[tuple[str, ...]] = ("momentum",)
    limits: ClassVar[Mapping[str, tuple[float, float]]] = {"warmup": (0, inf)}
    scale: float
    concept: Text = CONCEPT
    safety_scale: float = 1000.0
    warmup: int = 10
    threshold: float = 0.01
    momentum_scale: float = 0.3
    beta: float = 0.4
    momentum: Tensor | None = field(default=None, repr=False)

    @property
    def branches(self) -> tuple[str, ...]:
        """Names of the branches, in batch order."""
        if self.scale <= 1:
            return ("cond",)
        return ("uncond", "cond", "safety") if self.safety_scale > 1 else ("uncond", "cond")

    @property
    def texts(self) -> Mapping[str, Text]:
        """The concept, where it is asked for."""
        return {"safety": self.concept} if "safety" in self.branches else {}

    def unheard(self, total: int) -> str | None:
        """That nothing is kept away from, if so many steps are over before it counts."""
        return f"what to keep away from (warmup={self.warmup})" if self.texts and self.warmup >= total else None

    def __call__(self, denoiser: Denoiser, step: Step) -> Tensor:
        """One prediction, of the shape of the latents."""
        predictions = denoiser(step, self.branches)
        cond, uncond, concept = predictions["cond"], predictions.get("uncond"), predictions.get("safety")
        if uncond is None:
            return cond
        direction = cond - uncond
        if concept is not None:
            away = self.away(cond, uncond, concept)
            direction = direction - away if step.index >= self.warmup else direction
        return uncond + self.scale * direction

    def away(self, cond: Tensor, uncond: Tensor, concept: Tensor) -> Tensor:
        """What leads to the concept where the prediction is near it (equations 4 to 7), and remember it (equation 8)."""
        distance = cond - concept
        near = torch.where(distance >= self.threshold, 0, (distance.abs() * self.safety_scale).clamp(max=1.0))
        momentum = torch.zeros_like(cond) if self.momentum is None else self.momentum.to(cond)
        away = (concept - uncond) * near + self.momentum_scale * momentum
        self.momentum = self.beta * momentum + (1 - self.beta) * away
        return away
