"""Gradient checkpointing (Chen et al., 2016): recompute activations in the backward pass instead of keeping them.

A layer worth it derives from `Recomputable`; nothing else in the library mentions the matter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute(layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `layer` now without keeping its activations, and again when its gradient is needed."""
    return checkpoint(layer, *args, use_reentrant=False, **kwargs)


class Recomputable(nn.Module):
    """A layer whose activations need not be kept for the backward pass."""

    gradient_checkpointing: bool = False
    gradient_checkpointing_func: Callable[..., Any] = staticmethod(recompute)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer, through `gradient_checkpointing_func` while gradients are recorded and the switch is on."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self.gradient_checkpointing_func(super().__call__, *args, **kwargs)
        return super().__call__(*args, **kwargs)


class GradientCheckpointing(nn.Module):
    """What a model adds to switch its `Recomputable` layers, all at once."""

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether any layer recomputes its activations."""
        return any(layer.gradient_checkpointing for layer in self._recomputable())

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: Callable[..., Any] | None = None) -> None:
        """Trade time for memory in training: keep fewer activations.

        Args:
            gradient_checkpointing_func: Called as `(layer, *args, **kwargs)` instead of `torch.utils.checkpoint`.
        """
        for layer in self._recomputable():
            layer.gradient_checkpointing = True
            layer.gradient_checkpointing_func = gradient_checkpointing_func or recompute

    def disable_gradient_checkpointing(self) -> None:
        """Keep all activations again."""
        for layer in self._recomputable():
            layer.gradient_checkpointing = False
            layer.__dict__.pop("gradient_checkpointing_func", None)

    def _recomputable(self) -> list[Recomputable]:
        return [module for module in self.modules() if isinstance(module, Recomputable)]
