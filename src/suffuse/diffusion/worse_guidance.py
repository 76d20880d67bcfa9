"""Guidance away from what a worse model says (Karras et al., 2024, "Guiding a diffusion model with a bad version of itself").

The worse model is another one, or the same with a part of it out of use: attention that does not look around (Ahn et al., 2024,
"Self-rectifying diffusion sampling with perturbed-attention guidance"), or transformer blocks that do nothing (Hyung et al.,
2024, "Spatiotemporal skip guidance"). Nothing in the model is changed: what is out of use is told in the call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import Tensor, nn

from suffuse.diffusion.checked import is_a, shown
from suffuse.diffusion.conditioning import Denoiser, ModelCall
from suffuse.diffusion.guidance import ClassifierFreeGuidance, Guidance, rescale_to
from suffuse.diffusion.loop import Step
from suffuse.errors import InputError
from suffuse.layers.transformer import TransformerBlock

Worsening = Callable[[nn.Module], Mapping[str, Any]]
"""From a model to what its call must be told, among `cross_attention_kwargs`, to be worse."""


@dataclass(frozen=True)
class PartOfModel:
    """Layers that are out of use.

    Attributes:
        layers: Beginnings of names of layers, "mid_block" or "down_blocks.2.attentions.0" for example; one, or several.
    """

    layers: Sequence[str] | str = ("mid_block",)

    def __post_init__(self) -> None:
        """Refuse what names nothing."""
        place, names = f"{type(self).__name__}.layers", (self.layers,) if isinstance(self.layers, str) else self.layers
        is_a(list, tuple, spelled="names of layers, ['mid_block'] for example")(place, names)
        if not names or not all(isinstance(name, str) and name for name in cast(Sequence[Any], names)):
            raise InputError(f"{place} are no names", found=shown(names), expected="at least one, ['mid_block'] for example")
        object.__setattr__(self, "layers", names)


@dataclass(frozen=True)
class Unattended(PartOfModel):
    """Self-attention below these names gives each position its own value."""

    def __call__(self, model: nn.Module) -> Mapping[str, Any]:
        """What the call is told."""
        return {"unattended": frozenset(block.attn1 for block in blocks_below(model, self.layers))}


@dataclass(frozen=True)
class Skipped(PartOfModel):
    """Transformer blocks below these names do nothing."""

    def __call__(self, model: nn.Module) -> Mapping[str, Any]:
        """What the call is told."""
        return {"skipped": frozenset(blocks_below(model, self.layers))}


def blocks_below(model: nn.Module, names: Sequence[str]) -> list[TransformerBlock]:
    """The transformer blocks whose names begin so.

    Raises:
        InputError: There are none below one of the names.
    """
    blocks = {name: block for name, block in model.named_modules() if isinstance(block, TransformerBlock)}
    for name in names:
        if not any(f"{block}.".startswith(f"{name}.") for block in blocks):
            known = sorted({block.rpartition(".transformer_blocks")[0] or block for block in blocks})
            raise InputError(f"no transformer block is below {name!r}", expected=", ".join(known))
    return [block for own, block in blocks.items() if any(f"{own}.".startswith(f"{name}.") for name in names)]


@dataclass
class WorseGuidance(ClassifierFreeGuidance):
    """Classifier-free guidance, and on top of it away from what the model says with a part of it out of use.

    Attributes:
        worse_scale: How far away.
        worsening: Which part.
    """

    worse_scale: float = 3.0
    worsening: Worsening = Unattended()

    def check_values(self, name: str) -> None:
        """Raise `InputError` unless it is what it may be, and something makes the model worse."""
        super().check_values(name)
        if isinstance(self.worsening, type) or not callable(self.worsening):
            expected = "Unattended(['mid_block']), or Skipped(['mid_block']), for example"
            raise InputError(f"{name}.worsening makes no model worse", found=shown(self.worsening), expected=expected)

    def check_model(self, model: nn.Module) -> None:
        """Raise `InputError` unless the model has the part."""
        self.worsening(model)

    def __call__(self, denoiser: Denoiser, step: Step) -> Tensor:
        """One prediction, of the shape of the latents."""
        predictions = denoiser(step, self.branches)
        cond, uncond = predictions["cond"], predictions.get("uncond")
        guided = cond if uncond is None else self.extrapolated(cond, uncond)
        told = self.worsening(denoiser.model)

        def tell(call: ModelCall, _: Step) -> None:
            call.kwargs["cross_attention_kwargs"] = {**(call.kwargs.get("cross_attention_kwargs") or {}), **told}

        worse = replace(denoiser, conditioners=[*denoiser.conditioners, tell])(step, ("cond",))["cond"]
        guided = guided + self.worse_scale * (cond - worse)
        return rescale_to(cond, guided, self.rescale) if self.rescale > 0 else guided


@dataclass
class AutoGuidance(Guidance):
    """From what a worse model says through what the model says (equation 3).

    Attributes:
        scale: How far.
        worse: A smaller model, or one that was trained for less time, that is called in the same way, where the pipeline
            computes and in its type. What was loaded onto the model, it has not.
    """

    scale: float
    worse: nn.Module

    @property
    def models(self) -> Mapping[str, nn.Module]:
        """The worse one."""
        return {"worse": self.worse}

    @property
    def branches(self) -> tuple[str, ...]:
        """Names of the branches, in batch order."""
        return ("cond",)

    def __call__(self, denoiser: Denoiser, step: Step) -> Tensor:
        """One prediction, of the shape of the latents."""
        good, worse = (each(step, ("cond",))["cond"] for each in (denoiser, replace(denoiser, model=self.worse)))
        return worse + self.scale * (good - worse)
