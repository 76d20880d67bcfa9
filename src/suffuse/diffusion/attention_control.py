"""Attention that is watched: what layers attend to is shown to a value of the call.

Nothing of the model is changed, so threads that share it do not see each other's watching, and nothing is left in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from suffuse.diffusion.conditioning import Denoiser, ModelCall
from suffuse.diffusion.loop import Step
from suffuse.errors import InputError
from suffuse.layers.attention import Attention
from suffuse.layers.attention_processors import Watch

PLACES = ("up_blocks", "down_blocks", "mid_block")
"""Parts of a UNet, in the order in which what they attend to is added up."""


@dataclass(frozen=True)
class WatchAttention:
    """A conditioner that has the probabilities of layers shown, beside what others watch.

    Attributes:
        watched: Layer → what is shown its probabilities, (batch · heads, tokens, context tokens).

    Raises:
        InputError: A layer has a processor that shows nothing.
    """

    watched: Mapping[Attention, Watch]

    def __post_init__(self) -> None:
        for layer in self.watched:
            if not layer.takes("watched"):
                raise InputError(
                    "attention is to be watched, and a processor shows nothing",
                    found=type(layer.get_processor()).__name__,
                    remedy="unet.set_default_attn_processor(), or a processor that takes watched=",
                )

    def __call__(self, call: ModelCall, step: Step) -> None:
        """Tell the layers."""
        options = call.kwargs.get("cross_attention_kwargs") or {}
        call.kwargs["cross_attention_kwargs"] = {**options, "watched": {**options.get("watched", {}), **self.watched}}


def watching(denoiser: Denoiser, watched: Mapping[Attention, Watch]) -> Denoiser:
    """A denoiser that has layers watched, whatever branches it is asked for."""
    return replace(denoiser, conditioners=[*denoiser.conditioners, WatchAttention(watched)])


def recording(denoiser: Denoiser, layers: Iterable[Attention], seen: dict[Attention, Tensor]) -> Denoiser:
    """A denoiser that puts the probabilities of layers into `seen`, in the order in which they are called."""
    return watching(denoiser, {layer: partial(seen.__setitem__, layer) for layer in layers})


def formed(model: Any) -> WatchAttention:
    """A conditioner that has all probabilities formed in memory: layers that are watched and those that are not then compute
    the same, to the last bit.
    """
    return WatchAttention(dict.fromkeys(model.attention_layers().values(), lambda probabilities: None))


def cross_attention(model: nn.Module) -> list[Attention]:
    """The layers of a UNet that attend to words, by place and in the order in which they are called there."""
    return [
        module
        for place in PLACES
        for name, module in model.named_modules()
        if name.startswith(place) and isinstance(module, Attention) and module.is_cross_attention
    ]


def map_size(latents: Tensor, tokens: int) -> tuple[int, int]:
    """(rows, columns) of a feature map with so many positions, where a model halves latents (…, rows, columns) some times.

    Raises:
        InputError: No feature map has as many.
    """
    rows, columns = latents.shape[-2:]
    while rows * columns > tokens:
        rows, columns = (rows + 1) // 2, (columns + 1) // 2
    if rows * columns != tokens:
        raise InputError(f"no halving of {tuple(latents.shape[-2:])} latents has {tokens} positions")
    return rows, columns
