"""A guidance that holds another: what is asked of it and is not its own affair, the other answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor, nn

from suffuse.diffusion.conditioning import Denoiser
from suffuse.diffusion.guidance import Guidance, Text
from suffuse.diffusion.loop import Step
from suffuse.schedulers.scheduler import SchedulerMixin

Self = TypeVar("Self", bound="HeldGuidance")


@dataclass
class HeldGuidance(Guidance):
    """Another guidance, in some other way.

    Attributes:
        guidance: The other.
    """

    guidance: Guidance

    @property
    def scale(self) -> float:
        """That of the other."""
        return self.guidance.scale

    @scale.setter
    def scale(self, scale: float) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self.guidance.scale = scale

    @property
    def rescale(self) -> float:
        """That of the other, if it has one."""
        return self.guidance.rescale  # pyright: ignore[reportAttributeAccessIssue]

    @rescale.setter
    def rescale(self, rescale: float) -> None:
        self.guidance.rescale = rescale  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def branches(self) -> tuple[str, ...]:
        """Those of the other."""
        return self.guidance.branches

    @property
    def texts(self) -> Mapping[str, Text]:
        """Those of the other."""
        return self.guidance.texts

    def fork(self: Self) -> Self:
        """One like it for a run of its own, that holds one like the other."""
        fork = super().fork()
        fork.guidance = self.guidance.fork()
        return fork

    def check_model(self, model: nn.Module) -> None:
        """Raise `InputError` unless the other can guide it."""
        self.guidance.check_model(model)

    def check_scheduler(self, scheduler: SchedulerMixin) -> None:
        """Raise `InputError` unless the other can guide with it."""
        self.guidance.check_scheduler(scheduler)


@dataclass
class Foreseen(Denoiser):
    """A denoiser that was asked for the latents of a step, in a batch with others: it says again what it said then.

    One that is made of it by `replace` sees something else, and has said nothing.

    Attributes:
        said: What it said, by branch.
    """

    said: Mapping[str, Tensor] = field(init=False, default_factory=dict[str, Tensor])

    @classmethod
    def of(cls, denoiser: Denoiser, said: Mapping[str, Tensor]) -> Foreseen:
        """The denoiser, and what it said."""
        made = cls(denoiser.model, denoiser.scheduler, denoiser.conditioning, denoiser.conditioners)
        made.said = said
        return made

    def __call__(self, step: Step, branches: tuple[str, ...], latents: Tensor | None = None) -> dict[str, Tensor]:
        """Predictions by branch, for the latents of the step or those given instead."""
        if latents is None and self.said.keys() >= {*branches}:
            return {branch: self.said[branch] for branch in branches}
        return super().__call__(step, branches, latents)
