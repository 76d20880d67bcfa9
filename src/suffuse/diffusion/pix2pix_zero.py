"""Pictures edited so that words stay where they are (Parmar et al., 2023, "Zero-shot image-to-image translation")."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from suffuse.diffusion.attention_control import cross_attention, recording
from suffuse.diffusion.conditioning import Denoiser, ModelCall, per_branch
from suffuse.diffusion.guidance import ClassifierFreeGuidance
from suffuse.diffusion.loop import Step
from suffuse.layers.attention import Attention

Looked = Mapping[Attention, Tensor]
"""Layer → its probabilities, (batch · heads, positions, words)."""


@dataclass
class Recorded(ClassifierFreeGuidance):
    """Classifier-free guidance that keeps where the model looks for words.

    Attributes:
        steps: What was kept of each step so far, in the memory of the CPU.
    """

    steps: list[Looked] = field(default_factory=list[Looked], repr=False)

    def __call__(self, denoiser: Denoiser, step: Step) -> Tensor:
        """One prediction, of the shape of the latents."""
        seen = dict[Attention, Tensor]()
        predictions = recording(denoiser, cross_attention(denoiser.model), seen)(step, self.branches)
        self.steps.append({layer: looked.detach().cpu() for layer, looked in seen.items()})
        return self.combine(predictions)


@dataclass
class CrossAttentionGuidance(ClassifierFreeGuidance):
    """Classifier-free guidance, from latents moved so that the model looks for words where it did in another run (section 3.2).

    Attributes:
        amount: How far they are moved.
        references: Where it looked, for each step.
    """

    amount: float = 0.1
    references: list[Looked] = field(default_factory=list[Looked], repr=False)

    def __call__(self, denoiser: Denoiser, step: Step) -> Tensor:
        """One prediction, of the shape of the latents, which are moved."""
        reference, seen = self.references[step.index], dict[Attention, Tensor]()
        with torch.enable_grad():
            latents = per_branch(step.latents, self.branches).detach().clone().requires_grad_(True)
            recording(shown(denoiser, latents), reference, seen)(step, self.branches)
            differences = [
                ((seen[layer] - looked.to(seen[layer])) ** 2).sum((1, 2)).mean() for layer, looked in reference.items()
            ]
            gradient = torch.autograd.grad(torch.stack(differences).sum(), latents)[0]
        moved = latents.detach().add(gradient, alpha=-self.amount)
        # Each branch moves its own; the step is taken from those of the first.
        step.latents = moved.chunk(len(self.branches))[0]
        return self.combine(shown(denoiser, moved)(step, self.branches))


def shown(denoiser: Denoiser, latents: Tensor) -> Denoiser:
    """A denoiser that shows the model these latents, (branches · batch, …), which need not be the same in all branches."""

    def show(call: ModelCall, step: Step) -> None:
        call.sample = denoiser.scheduler.scale_model_input(latents, step.timestep)

    return replace(denoiser, conditioners=[show, *denoiser.conditioners])
