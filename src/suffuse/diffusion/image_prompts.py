"""Pictures to take after, as a conditioner (Ye et al., 2023, "IP-Adapter")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from suffuse.diffusion.conditioning import UNTOLD, ModelCall
from suffuse.diffusion.loop import Step
from suffuse.layers.image_attention import ImagePrompts
from suffuse.models.image_adapter import ImageAdapters, Scale


@dataclass
class ShowPictures:
    """Let the layers of a UNet attend to pictures, whatever branches are asked for.

    Attributes:
        adapters: What makes keys and values of pictures.
        embeds: For each adapter, what an image encoder says of nothing and of its pictures: (1 or 2, pictures, …), where and in
            the type in which the UNet computes. One row is that of the pictures.
        scales: How much of each adapter.
        masks: Where each counts, (1, pictures, height, width); None for everywhere.
    """

    adapters: ImageAdapters
    embeds: Sequence[Tensor]
    scales: Sequence[Scale]
    masks: Sequence[Tensor | None]
    _made: dict[tuple[int, tuple[str, ...]], ImagePrompts] = field(
        default_factory=dict[tuple[int, tuple[str, ...]], ImagePrompts]
    )

    def __call__(self, call: ModelCall, step: Step) -> None:
        """Hand over keys and values; they are made once for each set of branches."""
        asked = len(call.sample) // len(call.branches), call.branches
        if asked not in self._made:
            self._made[asked] = self.adapters.prompts([rows(own, *asked) for own in self.embeds], self.scales, self.masks)
        before: Mapping[str, object] = call.kwargs.get("cross_attention_kwargs") or {}
        call.kwargs["cross_attention_kwargs"] = {**before, "image_prompts": self._made[asked]}


def rows(embeds: Tensor, batch: int, branches: Sequence[str]) -> Tensor:
    """What is said to each row of a batch: (branches · batch, pictures, …)."""
    nothing, pictures = embeds[:1], embeds[-1:]
    return torch.cat([nothing if branch in UNTOLD else pictures for branch in branches for _ in range(batch)])
