"""The image encoder of Paint by Example: CLIP's class token through a few layers of its own (Yang et al., 2022, section 3.2).

One token of a whole picture is a bottleneck: too little to copy the example by, enough to say what it shows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedModel

from suffuse.layers.attention import Attention


class PaintByExampleImageEncoder(PreTrainedModel):
    """A picture as one token.

    Args:
        config: Of the vision model; `projection_dim` is how wide the token is.
        proj_size: How wide the token is, instead.
    """

    config_class = CLIPVisionConfig
    main_input_name = "pixel_values"
    _supports_sdpa = _supports_flash_attn = True
    _no_split_modules = ["CLIPEncoderLayer"]

    def __init__(self, config: CLIPVisionConfig, proj_size: int | None = None) -> None:
        super().__init__(config)
        width: Any = config.hidden_size
        self.proj_size: Any = proj_size or getattr(config, "projection_dim", 768)
        self.model = CLIPVisionModel(config)
        self.mapper = PaintByExampleMapper(config)
        self.final_layer_norm = nn.LayerNorm(width)
        self.proj_out = nn.Linear(width, self.proj_size)
        self.uncond_vector = nn.Parameter(torch.randn(1, 1, self.proj_size))
        self.post_init()

    def forward(self, pixel_values: Tensor, return_uncond_vector: bool = False) -> Any:
        """Encode pictures (batch, 3, rows, columns).

        Returns:
            (batch, 1, proj_size); and, if `return_uncond_vector`, the learned token of no picture (1, 1, proj_size).
        """
        token = self.model(pixel_values=pixel_values).pooler_output[:, None]
        token = self.proj_out(self.final_layer_norm(self.mapper(token)))
        return (token, self.uncond_vector) if return_uncond_vector else token


class PaintByExampleMapper(nn.Module):
    """A fifth as many transformer blocks as the vision model has layers."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        layers, width = config.num_hidden_layers, config.hidden_size
        self.blocks = nn.Sequential(*(MapperBlock(width) for _ in range((layers + 1) // 5)))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (batch, tokens, width) to the same shape."""
        return self.blocks(tokens)


class MapperBlock(nn.Module):
    """Self-attention with one head and a feed-forward layer, each after normalisation and added to its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, heads=1, dim_head=width, bias=True)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (batch, tokens, width) to the same shape."""
        tokens = self.attn1(self.norm1(tokens)) + tokens
        return self.ff(self.norm3(tokens)) + tokens


class FeedForward(nn.Module):
    """Two linear layers, with a GELU between them, four times as wide."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = nn.Sequential()
        inner.proj = nn.Linear(width, 4 * width)
        inner.activation = nn.GELU()
        self.net = nn.Sequential(inner, nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (batch, tokens, width) to the same shape."""
        return self.net(tokens)
