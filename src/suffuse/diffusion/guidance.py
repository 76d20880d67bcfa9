"""Making and combining predictions: classifier-free guidance and its relatives."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from suffuse.diffusion.checked import Checked, shown
from suffuse.diffusion.conditioning import Denoiser
from suffuse.diffusion.loop import Step
from suffuse.errors import InputError
from suffuse.schedulers.scheduler import SchedulerMixin

Self = TypeVar("Self", bound="Guidance")
Text = str | list[str] | Tensor
"""What a branch is told: a text, one for each prompt, or what the text encoder makes of it, (tokens, width)."""


class Guidance(Checked, ABC):
    """Asks the denoiser for the branches it needs and makes one prediction of them.

    Class attributes:
        remembers: Fields that the steps change, which a saved run keeps.

    Attributes:
        scale: How far to go, what `pipe.guidance_scale` is meanwhile; a guidance without one is at 1.
    """

    remembers: ClassVar[tuple[str, ...]] = ()
    limits: ClassVar[Mapping[str, tuple[float, float]]] = {"rescale": (0, 1)}
    scale: float

    @property
    @abstractmethod
    def branches(self) -> tuple[str, ...]:
        """Names of the branches, in batch order; "uncond" and "cond" are told the prompts of the call."""

    @abstractmethod
    def __call__(self, denoiser: Denoiser, step: Step) -> Tensor:
        """One prediction, of the shape of the latents."""

    @property
    def texts(self) -> Mapping[str, Text]:
        """What branches are told that the prompts of the call say nothing of."""
        return {}

    @property
    def models(self) -> Mapping[str, nn.Module]:
        """Models that are asked besides that of the pipeline, by the names of fields."""
        return {}

    def unheard(self, total: int) -> str | None:
        """What none of so many steps is told, if something is meant for steps that there are not."""
        return None

    def fork(self: Self) -> Self:
        """One like it for a run of its own: what steps change is its own, models and texts are shared."""
        fork = copy.copy(self)
        for name in self.remembers:
            setattr(fork, name, copy.copy(getattr(self, name)))
        return fork

    def check_model(self, model: nn.Module) -> None:
        """Raise `InputError` unless the model can be guided so; computes nothing."""

    def check_scheduler(self, scheduler: SchedulerMixin) -> None:
        """Raise `InputError` unless the scheduler, whose timesteps are set, lets the model be guided so."""


def is_guidance(name: str, value: Any) -> None:
    """Raise `InputError` unless the value is a guidance."""
    if not isinstance(value, Guidance):
        remedy = f"pass one that is made: {value.__name__}(…)" if isinstance(value, type) else ""
        expected = "a suffuse.Guidance, ClassifierFreeGuidance(7.5) for example"
        raise InputError(f"{name} combines no predictions", found=shown(value), expected=expected, remedy=remedy)


@dataclass
class ClassifierFreeGuidance(Guidance):
    """Extrapolate from the unconditional prediction through the conditional one (Ho and Salimans, 2022).

    Attributes:
        scale: The guidance scale; at 1 or below only the conditional branch is computed.
        rescale: How far the result is brought back to the standard deviation of the conditional prediction, in [0, 1] (Lin et
            al., 2023, "Common diffusion noise schedules and sample steps are flawed", equations 15 and 16).
    """

    scale: float
    rescale: float = 0.0

    @property
    def branches(self) -> tuple[str, ...]:
        """Names of the branches, in batch order."""
        return ("uncond", "cond") if self.scale > 1 else ("cond",)

    def __call__(self, denoiser: Denoiser, step: Step) -> Tensor:
        """One prediction, of the shape of the latents."""
        return self.combine(denoiser(step, self.branches))

    def combine(self, predictions: dict[str, Tensor]) -> Tensor:
        """The guided prediction from those of the branches."""
        cond, uncond = predictions["cond"], predictions.get("uncond")
        if uncond is None:
            return cond
        guided = self.extrapolated(cond, uncond)
        return rescale_to(cond, guided, self.rescale) if self.rescale > 0 else guided

    def extrapolated(self, cond: Tensor, uncond: Tensor) -> Tensor:
        """From the unconditional prediction through the conditional one, in the memory of one tensor."""
        return (cond - uncond).mul_(self.scale).add_(uncond)


@dataclass
class EmbeddedGuidance(Guidance):
    """Guidance the model was distilled to do itself: it is told the scale and asked once (Luo et al., 2023, LCM)."""

    scale: float

    @property
    def branches(self) -> tuple[str, ...]:
        """Names of the branches, in batch order."""
        return ("cond",)

    def __call__(self, denoiser: Denoiser, step: Step) -> Tensor:
        """One prediction, of the shape of the latents."""
        return denoiser(step, self.branches)["cond"]


def rescale_to(reference: Tensor, guided: Tensor, amount: float) -> Tensor:
    """`guided` with `amount` in [0, 1] of its standard deviation, per picture, replaced by that of `reference`."""
    axes = list(range(1, guided.ndim))
    rescaled = guided * (reference.std(dim=axes, keepdim=True) / guided.std(dim=axes, keepdim=True))
    return amount * rescaled + (1 - amount) * guided


def guidance_scale_embedding(scale: Tensor, embedding_dim: int = 512, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sinusoidal embedding of a guidance scale: (batch,) → (batch, embedding_dim) (Vaswani et al., 2017, at 1000 × scale)."""
    half = embedding_dim // 2
    frequencies = torch.exp(torch.arange(half, dtype=dtype) * -(torch.log(torch.tensor(10000.0)) / (half - 1)))
    angles = (scale * 1000.0).to(dtype)[:, None] * frequencies[None, :]
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.nn.functional.pad(embedding, (0, embedding_dim % 2))
