"""T2I-Adapters as conditioners: features that are made once are added to the way down of a UNet (Mou et al., 2023)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from suffuse.diffusion.conditioning import ModelCall, per_branch
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

    def __call__(self, call: ModelCall, step: Step) -> None:
        """Add the features."""
        if self.part is None or step.index < int(self.inference_steps() * self.part):
            call.kwargs["down_intrablock_additional_residuals"] = [per_branch(each, call.branches) for each in self.maps]
