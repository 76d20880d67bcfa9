"""Residual blocks of convolutions under a time embedding."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from suffuse.errors import ConfigError, InputError
from suffuse.layers.activations import get_activation
from suffuse.layers.gradient_checkpointing import Recomputable
from suffuse.layers.normalization import AdaGroupNorm, SpatialNorm, group_norm

Resample = Callable[[Tensor], Tensor]

CONDITIONED: dict[str, Callable[[int, int, int, float], nn.Module]] = {
    "ada_group": lambda temb_channels, channels, groups, eps: AdaGroupNorm(temb_channels, channels, groups, eps=eps),
    "spatial": lambda temb_channels, channels, groups, eps: SpatialNorm(channels, temb_channels),
}
"""Normalisations that take the embedding themselves."""

PROJECTED: dict[str, int] = {"default": 1, "scale_shift": 2}
"""How the embedding enters otherwise → vectors per channel it is projected to: a sum, or a scale and a shift."""


class ResnetBlock2D(Recomputable):
    """Two 3x3 convolutions with normalisation, activation and a skip connection (He et al., 2016; Ho et al., 2020).

    Args:
        in_channels: Channels in.
        out_channels: Channels between the convolutions, and out unless `conv_2d_out_channels` says otherwise.
        temb_channels: Size of the embedding; `None` for a block without.
        groups: Groups of the first normalisation.
        groups_out: Groups of the second; as the first if `None`.
        eps: Added to variances.
        dropout: Probability of zeroing.
        non_linearity: Name of the activation.
        time_embedding_norm: How the embedding enters: "default" (added), "scale_shift", "ada_group" or "spatial".
        skip_time_act: Project the embedding as it is, without activation.
        output_scale_factor: Divides the sum of both branches.
        resample: Resizes both branches before the first convolution.
        use_in_shortcut: Put a 1x1 convolution on the skip connection; if channels differ, when `None`.
        conv_shortcut_bias: Whether that convolution has a bias.
        conv_2d_out_channels: Channels out of the second convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        temb_channels: int | None = 512,
        groups: int = 32,
        groups_out: int | None = None,
        eps: float = 1e-6,
        dropout: float = 0.0,
        non_linearity: str = "swish",
        time_embedding_norm: str = "default",
        skip_time_act: bool = False,
        output_scale_factor: float = 1.0,
        resample: Resample | None = None,
        use_in_shortcut: bool | None = None,
        conv_shortcut_bias: bool = True,
        conv_2d_out_channels: int | None = None,
    ) -> None:
        super().__init__()
        self.time_embedding_norm, self.skip_time_act = time_embedding_norm, skip_time_act
        self.output_scale_factor, self.resample = output_scale_factor, resample
        conv_2d_out_channels = conv_2d_out_channels or out_channels

        def norm(channels: int, groups: int) -> nn.Module:
            if time_embedding_norm in CONDITIONED:
                return CONDITIONED[time_embedding_norm](temb_channels or 0, channels, groups, eps)
            return group_norm(groups, channels, eps)

        self.norm1 = norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        self.time_emb_proj = self._projection(temb_channels, out_channels)
        self.norm2 = norm(out_channels, groups_out or groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, conv_2d_out_channels, kernel_size=3, padding=1)
        self.nonlinearity = get_activation(non_linearity)
        self.conv_shortcut = None
        if in_channels != conv_2d_out_channels if use_in_shortcut is None else use_in_shortcut:
            self.conv_shortcut = nn.Conv2d(in_channels, conv_2d_out_channels, kernel_size=1, bias=conv_shortcut_bias)

    def _projection(self, temb_channels: int | None, out_channels: int) -> nn.Linear | None:
        if temb_channels is None or self.time_embedding_norm in CONDITIONED:
            return None
        if self.time_embedding_norm not in PROJECTED:
            raise ConfigError(
                "no such way for the time embedding to enter a residual block",
                found=self.time_embedding_norm,
                expected=[*PROJECTED, *CONDITIONED],
            )
        return nn.Linear(temb_channels, PROJECTED[self.time_embedding_norm] * out_channels)

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None) -> Tensor:
        """Map (batch, in_channels, height, width) under `temb` (batch, temb_channels) to the channels out.

        With "spatial", `temb` is a feature map (batch, temb_channels, any height, any width).
        """
        condition = (temb,) if self.time_embedding_norm in CONDITIONED else ()
        hidden_states = self.nonlinearity(self.norm1(input_tensor, *condition))
        if self.resample is not None:
            input_tensor, hidden_states = self.resample(input_tensor), self.resample(hidden_states)
        hidden_states = self.conv1(hidden_states)
        if condition:
            hidden_states = self.norm2(hidden_states, *condition)
        else:
            hidden_states = self._embed(hidden_states, temb)
        hidden_states = self.conv2(self.dropout(self.nonlinearity(hidden_states)))
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        total = input_tensor + hidden_states
        return total if self.output_scale_factor == 1 else total / self.output_scale_factor

    def _embed(self, hidden_states: Tensor, temb: Tensor | None) -> Tensor:
        if self.time_emb_proj is None:
            return self.norm2(hidden_states)
        if temb is None:
            raise InputError("a residual block with a time embedding was called without one")
        projected: Tensor = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))[:, :, None, None]
        if self.time_embedding_norm == "default":
            return self.norm2(hidden_states + projected)
        scale, shift = projected.chunk(2, dim=1)
        return self.norm2(hidden_states) * (1 + scale) + shift
