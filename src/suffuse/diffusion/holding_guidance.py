"""A guidance that holds another: what is asked of it and is not its own affair, the other answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from suffuse.diffusion.guidance import Guidance, Text, is_guidance
from suffuse.schedulers.scheduler import SchedulerMixin

Self = TypeVar("Self", bound="HoldingGuidance")


@dataclass
class HoldingGuidance(Guidance):
    """Guidance by another one, which is asked in some other way: in a part of the way, of a part of the batch, of several steps.

    Attributes:
        guidance: The other.
    """

    guidance: Guidance

    def check_values(self, name: str) -> None:
        """Raise `InputError` unless it is what it may be, and holds a guidance that is too."""
        is_guidance(f"{name}.guidance", self.guidance)
        self.guidance.check_values(f"{name}.guidance")
        super().check_values(name)

    @property
    def scale(self) -> float:
        """That of the other; 1, if it has none."""
        return getattr(self.guidance, "scale", 1.0)

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

    @property
    def models(self) -> Mapping[str, nn.Module]:
        """Those of the other."""
        return {f"guidance.{name}": model for name, model in self.guidance.models.items()}

    def unheard(self, total: int) -> str | None:
        """What the other is not heard to say."""
        return self.guidance.unheard(total)

    def check_model(self, model: nn.Module) -> None:
        """Raise `InputError` unless the other can guide it."""
        self.guidance.check_model(model)

    def check_scheduler(self, scheduler: SchedulerMixin) -> None:
        """Raise `InputError` unless the other can guide with it."""
        self.guidance.check_scheduler(scheduler)
