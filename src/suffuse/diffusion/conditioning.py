"""What the model sees: tensors per guidance branch, and the conditioners that hand them over."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from suffuse.diffusion.loop import Step
from suffuse.errors import InputError
from suffuse.schedulers.scheduler import SchedulerMixin

UNTOLD = ("uncond", "image")
"""Branches of guidance that are told no text, and so shown nothing and told of no objects either."""


def whole(pictures: Tensor) -> Tensor:
    """All that there is to see."""
    return pictures


def at_told_steps(values: Tensor, told: Sequence[bool], branches: Sequence[str]) -> Tensor:
    """Values of the rows of a call, with zeros at those of its steps at which nothing is told."""
    if all(told):
        return values
    share = torch.tensor(told).repeat_interleave(len(values) // (len(told) * len(branches))).repeat(len(branches))
    return values * share.to(values).view(-1, *(1 for _ in values.shape[1:]))


def per_branch(value: Tensor, branches: Sequence[str]) -> Tensor:
    """What all branches share, joined along the batch once per branch."""
    return torch.cat([value] * len(branches)) if len(branches) > 1 else value


def rows(joined: Tensor, layout: tuple[str, ...], branches: tuple[str, ...]) -> Tensor:
    """Of a tensor that is joined along the batch in `layout` order, the rows of `branches`, in theirs."""
    if branches == layout:
        return joined
    parts = dict(zip(layout, joined.chunk(len(layout)), strict=True))
    missing = [branch for branch in branches if branch not in parts]
    if missing:
        raise InputError(
            f"the run was begun without the branch {missing[0]!r}, and is asked for it",
            found=f"branches {', '.join(layout)}",
            remedy="begin with a guidance_scale above 1, and lower it until it is wanted",
        )
    return torch.cat([parts[branch] for branch in branches])


@dataclass
class Conditioning:
    """Tensors that belong to the run: those that differ per branch are joined along the batch in `layout` order.

    Callbacks read and replace these tensors by name. A callback that narrows a joined tensor (to drop the unconditional half,
    say) is understood by its length.

    Attributes:
        batch: Pictures made at once; the length of one branch.
        layout: Names of the branches, in the order the tensors are joined in.
        tensors: Name → tensor.
        further: Branch → name → tensor (batch, …), of branches that are told what no prompt says; of all else they are told what
            "cond" is. They are not joined to the others: callbacks see the prompts alone.
    """

    batch: int
    layout: tuple[str, ...]
    tensors: dict[str, Tensor]
    further: dict[str, dict[str, Tensor]] = field(default_factory=dict[str, dict[str, Tensor]])

    def share(self, **values: Tensor) -> None:
        """Add tensors, (batch, …), that are the same in every branch."""
        self.tensors |= {name: per_branch(value, self.layout) for name, value in values.items()}

    def select(self, name: str, branches: tuple[str, ...]) -> Tensor:
        """The rows of `name` that belong to `branches`, in their order."""
        if self.further.keys().isdisjoint(branches):
            return self._joined(name, branches)
        likes = ["cond" if branch in self.further else branch for branch in branches]
        asked = tuple(dict.fromkeys(likes))
        known = dict(zip(asked, self._joined(name, asked).chunk(len(asked)), strict=True))
        pairs = zip(branches, likes, strict=True)
        return torch.cat([self.further.get(branch, {}).get(name, known[like]) for branch, like in pairs])

    def _joined(self, name: str, branches: tuple[str, ...]) -> Tensor:
        joined = self.tensors[name]
        narrowed = len(joined) == self.batch * len(branches) and len(branches) != len(self.layout)
        return joined if narrowed else rows(joined, self.layout, branches)

    def shown(self, pictures: Tensor, branches: tuple[str, ...]) -> Tensor:
        """Pictures, or features of them, for each row of `branches`: one for all, or as many as go into the batch."""
        # One picture is shown as often as there are rows: alone in a batch, it would be embedded to other last bits.
        if len(pictures) == 1:
            return pictures.expand(self.batch * len(branches), -1, -1, -1)
        times = self.batch // len(pictures) * len(branches)
        return torch.cat([pictures] * times) if times > 1 else pictures


@dataclass
class ManyTimes(Conditioning):
    """The tensors of a run whose latents stand in a call many times, in windows or at several steps: each is told the same.

    Attributes:
        views: For each time, what it sees of pictures of the whole.
    """

    views: Sequence[Callable[[Tensor], Tensor]] = ()

    def select(self, name: str, branches: tuple[str, ...]) -> Tensor:
        """The rows of `name` that belong to `branches`, in their order; in a branch, once for each time."""
        parts = super().select(name, branches).chunk(len(branches))
        return torch.cat([part for part in parts for _ in self.views])

    def shown(self, pictures: Tensor, branches: tuple[str, ...]) -> Tensor:
        """What each time sees of pictures, for each row of `branches`."""
        once = super().shown(pictures, branches[:1])
        return per_branch(torch.cat([view(once) for view in self.views]), branches)


@dataclass(slots=True)
class ModelCall:
    """One call of the model, being assembled by the conditioners.

    Attributes:
        sample: The latents as the model takes them, once per branch.
        timestep: 0-dimensional.
        branches: Names of the branches asked for, in batch order.
        conditioning: The tensors of the run.
        channels: Concatenated to the channels of the sample.
        kwargs: Further keywords of the model.
    """

    sample: Tensor
    timestep: Tensor
    branches: tuple[str, ...]
    conditioning: Conditioning
    channels: list[Tensor] = field(default_factory=list)
    kwargs: dict[str, Any] = field(default_factory=dict)


Conditioner = Callable[[ModelCall, Step], None]
"""Changes what the model sees in one call."""


def warn_of_unheard(values: Sequence[Any], total: int) -> None:
    """Warn, once, of conditioners and guidance that say with `unheard(total)` that none of so many steps is in their part."""
    asked = (getattr(value, "unheard", None) for value in values)
    unheard = [what for ask in asked if ask is not None and (what := ask(total)) is not None]
    if unheard:
        told = " nor ".join(unheard)
        warnings.warn(f"no step of {total} is told {told}: pass more steps, or a wider part of them", stacklevel=4)


def text(call: ModelCall, step: Step) -> None:
    """Hand over the text embeddings of the branches asked for."""
    call.kwargs["encoder_hidden_states"] = call.conditioning.select("prompt_embeds", call.branches)


def scale_embedding(call: ModelCall, step: Step) -> None:
    """Hand over the embedded guidance scale, to a model that was distilled to be told it."""
    call.kwargs["timestep_cond"] = call.conditioning.select("w_embedding", call.branches)


@dataclass
class Keywords:
    """Hand the same keywords to every call."""

    values: dict[str, Any]

    def __call__(self, call: ModelCall, step: Step) -> None:
        """Add the keywords."""
        call.kwargs.update(self.values)


@dataclass
class Channels:
    """Concatenate tensors of the run, by name, to the channels of the sample."""

    names: Sequence[str]

    def __call__(self, call: ModelCall, step: Step) -> None:
        """Add the channels."""
        call.channels += [call.conditioning.select(name, call.branches) for name in self.names]


@dataclass
class Denoiser:
    """A model and its conditioning: one prediction per branch asked for, from one call of the model."""

    model: nn.Module
    scheduler: SchedulerMixin
    conditioning: Conditioning
    conditioners: Sequence[Conditioner] = (text,)

    def __call__(self, step: Step, branches: tuple[str, ...], latents: Tensor | None = None) -> dict[str, Tensor]:
        """Predictions by branch, for the latents of the step or those given instead."""
        latents = step.latents if latents is None else latents
        sample = per_branch(latents, branches)
        call = ModelCall(self.scheduler.scale_model_input(sample, step.timestep), step.timestep, branches, self.conditioning)
        for condition in self.conditioners:
            condition(call, step)
        sample = torch.cat([call.sample, *call.channels], dim=1) if call.channels else call.sample
        output = self.model(sample, timestep=call.timestep, **call.kwargs, return_dict=False)[0]
        return dict(zip(branches, output.chunk(len(branches)), strict=True))


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
