"""Activation functions by the names configurations use."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from suffuse.errors import ConfigError, nearest

ACTIVATIONS: dict[str, type[nn.Module]] = {"swish": nn.SiLU, "silu": nn.SiLU, "mish": nn.Mish, "gelu": nn.GELU, "relu": nn.ReLU}


def get_activation(name: str) -> nn.Module:
    """A module for an activation's name, in any case.

    Raises:
        ConfigError: There is no activation of that name.
    """
    if name.lower() not in ACTIVATIONS:
        close = nearest(name.lower(), ACTIVATIONS)
        raise ConfigError(
            f"no activation function {name!r}", expected=sorted(ACTIVATIONS), remedy=f"did you mean {close}?" if close else ""
        )
    return ACTIVATIONS[name.lower()]()


class GELU(nn.Module):
    """A linear layer and a GELU (Hendrycks and Gimpel, 2016); `approximate="tanh"` for its cheaper form."""

    def __init__(self, dim_in: int, dim_out: int, approximate: str = "none") -> None:
        super().__init__()
        self.proj = nn.Linear(dim_in, dim_out)
        self.approximate = approximate

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map (…, dim_in) to (…, dim_out)."""
        return F.gelu(self.proj(hidden_states), approximate=self.approximate)


class GEGLU(nn.Module):
    """A linear layer gated by the GELU of another (Shazeer, 2020, "GLU Variants Improve Transformer", eq. 6)."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim_in, dim_out * 2)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map (…, dim_in) to (…, dim_out)."""
        values, gate = self.proj(hidden_states).chunk(2, dim=-1)
        return values * F.gelu(gate)
