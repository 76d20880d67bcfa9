"""T2I-Adapters as conditioners: features that are made once are added to the way down of a UNet (Mou et al., 2023)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from suffuse.diffusion.conditioning import Conditioner, ModelCall, at_told_steps
from suffuse.diffusion.loop import Step


@dataclass
class AdapterFeatures:
    """Add the same features in every step, or in the first part of them; those of several add up.

    Attributes:
        maps: (batch, channels, height, width) for each resolution.
        inference_steps: How many steps the call has, once that is known.
        part: The part of them in which features are added, in [0, 1]; None for always. Counted are calls of the model, as the
            peer does: solvers that call it twice a step, or more often at first, have the last ones without features.
    """

    maps: Sequence[Tensor]
    inference_steps: Callable[[], int]
    part: float | None = None

    def unheard(self, total: int) -> str | None:
        """What no step is told though it counts, if that is so; a part of 0 is meant."""
        heard = not self.part or int(self.inference_steps() * self.part) > 0
        return None if heard else f"what the adapter sees (adapter_conditioning_factor={self.part})"

    def __call__(self, call: ModelCall, step: Step) -> None:
        """Add the features."""
        acts = [self.part is None or index < int(self.inference_steps() * self.part) for index in step.indices]
        if any(acts):
            shown = (call.conditioning.shown(each, call.branches) for each in self.maps)
            call.kwargs["down_intrablock_additional_residuals"] = [at_told_steps(each, acts, call.branches) for each in shown]


def features_of(conditioners: Iterable[Conditioner]) -> list[Tensor]:
    """The features that are added, of all adapters among conditioners."""
    return [each for one in conditioners if isinstance(one, AdapterFeatures) for each in one.maps]
