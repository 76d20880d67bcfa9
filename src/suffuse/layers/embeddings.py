"""Embeddings of time and of what is added to it: texts, images, hints."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from suffuse.layers.activations import get_activation


def get_timestep_embedding(
    timesteps: Tensor,
    embedding_dim: int,
    flip_sin_to_cos: bool = False,
    downscale_freq_shift: float = 1,
    scale: float = 1,
    max_period: int = 10000,
) -> Tensor:
    """Sines and cosines of timesteps (Ho et al., 2020; Vaswani et al., 2017, section 3.5).

    Args:
        timesteps: (batch,), of any type.
        embedding_dim: Size of the embedding; an odd one ends in a zero.
        flip_sin_to_cos: Cosines first.
        downscale_freq_shift: How far the lowest frequency stays from `1 / max_period`.
        scale: Multiplies the angles.
        max_period: The longest period.

    Returns:
        (batch, embedding_dim), float32.
    """
    half = embedding_dim // 2
    exponent = -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=timesteps.device)
    frequencies = torch.exp(exponent / (half - downscale_freq_shift))
    angles = timesteps[:, None].float() * frequencies[None, :]
    if scale != 1:
        angles = scale * angles
    parts = [torch.cos(angles), torch.sin(angles)] if flip_sin_to_cos else [torch.sin(angles), torch.cos(angles)]
    embedding = torch.cat(parts, dim=-1)
    return nn.functional.pad(embedding, (0, 1)) if embedding_dim % 2 else embedding


class Timesteps(nn.Module):
    """`get_timestep_embedding` as a layer."""

    def __init__(self, num_channels: int, flip_sin_to_cos: bool, downscale_freq_shift: float) -> None:
        super().__init__()
        self.num_channels = num_channels
        self.flip_sin_to_cos, self.downscale_freq_shift = flip_sin_to_cos, downscale_freq_shift

    def forward(self, timesteps: Tensor) -> Tensor:
        """Map (batch,) to (batch, num_channels)."""
        return get_timestep_embedding(
            timesteps, self.num_channels, self.flip_sin_to_cos, downscale_freq_shift=self.downscale_freq_shift
        )


class GaussianFourierProjection(nn.Module):
    """Sines and cosines at random frequencies (Song et al., 2021, "Score SDE", appendix C.2).

    Args:
        embedding_size: Number of frequencies; the embedding is twice as long.
        scale: Standard deviation of the frequencies.
        log: Embed the logarithm of what comes.
        flip_sin_to_cos: Cosines first.
    """

    def __init__(self, embedding_size: int = 256, scale: float = 1.0, log: bool = True, flip_sin_to_cos: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(embedding_size) * scale, requires_grad=False)
        self.log, self.flip_sin_to_cos = log, flip_sin_to_cos

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch,) to (batch, 2 * embedding_size)."""
        angles = (torch.log(x) if self.log else x)[:, None] * self.weight[None, :] * 2 * np.pi
        parts = [torch.cos(angles), torch.sin(angles)] if self.flip_sin_to_cos else [torch.sin(angles), torch.cos(angles)]
        return torch.cat(parts, dim=-1)


class TimestepEmbedding(nn.Module):
    """Two linear layers with an activation between them, after an optional condition is added.

    Args:
        in_channels: Size in.
        time_embed_dim: Size between the layers.
        act_fn: Activation between the layers.
        post_act_fn: Activation after them.
        cond_proj_dim: Size of the condition.
        out_dim: Size out; `time_embed_dim`, if `None`.
    """

    def __init__(
        self,
        in_channels: int,
        time_embed_dim: int,
        act_fn: str = "silu",
        post_act_fn: str | None = None,
        cond_proj_dim: int | None = None,
        out_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, time_embed_dim)
        self.cond_proj = None if cond_proj_dim is None else nn.Linear(cond_proj_dim, in_channels, bias=False)
        self.act = get_activation(act_fn)
        self.linear_2 = nn.Linear(time_embed_dim, out_dim or time_embed_dim)
        self.post_act = None if post_act_fn is None else get_activation(post_act_fn)

    def forward(self, sample: Tensor, condition: Tensor | None = None) -> Tensor:
        """Map `sample` (batch, in_channels) and `condition` (batch, cond_proj_dim) to (batch, out_dim)."""
        if condition is not None and self.cond_proj is not None:
            sample = sample + self.cond_proj(condition)
        sample = self.linear_2(self.act(self.linear_1(sample)))
        return sample if self.post_act is None else self.post_act(sample)


# ---------------------------------------------------------------- context tokens


class TextImageProjection(nn.Module):
    """An image embedding as ten tokens before those of the text (Kandinsky 2.1)."""

    num_image_text_embeds = 10

    def __init__(self, text_embed_dim: int, image_embed_dim: int, cross_attention_dim: int) -> None:
        super().__init__()
        self.image_embeds = nn.Linear(image_embed_dim, self.num_image_text_embeds * cross_attention_dim)
        self.text_proj = nn.Linear(text_embed_dim, cross_attention_dim)

    def forward(self, text_embeds: Tensor, image_embeds: Tensor) -> Tensor:
        """Map (batch, tokens, text size) and (batch, image size) to (batch, 10 + tokens, cross_attention_dim)."""
        image_tokens = self.image_embeds(image_embeds).reshape(len(text_embeds), self.num_image_text_embeds, -1)
        return torch.cat([image_tokens, self.text_proj(text_embeds)], dim=1)


class ImageProjection(nn.Module):
    """An image embedding as a few normalised tokens (Kandinsky 2.2, IP-Adapter)."""

    def __init__(self, image_embed_dim: int = 768, cross_attention_dim: int = 768, num_image_text_embeds: int = 32) -> None:
        super().__init__()
        self.num_image_text_embeds = num_image_text_embeds
        self.image_embeds = nn.Linear(image_embed_dim, num_image_text_embeds * cross_attention_dim)
        self.norm = nn.LayerNorm(cross_attention_dim)

    def forward(self, image_embeds: Tensor) -> Tensor:
        """Map (batch, image_embed_dim) to (batch, num_image_text_embeds, cross_attention_dim)."""
        tokens = self.image_embeds(image_embeds.to(self.image_embeds.weight.dtype))
        return self.norm(tokens.reshape(len(image_embeds), self.num_image_text_embeds, -1))


# ---------------------------------------------------------------- added to the time embedding


class TextTimeEmbedding(nn.Module):
    """Text tokens pooled to one vector (DeepFloyd IF)."""

    def __init__(self, encoder_dim: int, time_embed_dim: int, num_heads: int = 64) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(encoder_dim)
        self.pool = AttentionPooling(num_heads, encoder_dim)
        self.proj = nn.Linear(encoder_dim, time_embed_dim)
        self.norm2 = nn.LayerNorm(time_embed_dim)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map (batch, tokens, encoder_dim) to (batch, time_embed_dim)."""
        return self.norm2(self.proj(self.pool(self.norm1(hidden_states))))


class AttentionPooling(nn.Module):
    """Attention of the mean token over itself and all tokens."""

    def __init__(self, num_heads: int, embed_dim: int) -> None:
        super().__init__()
        self.num_heads, self.dim_per_head = num_heads, embed_dim // num_heads
        self.positional_embedding = nn.Parameter(torch.randn(1, embed_dim) / embed_dim**0.5)
        self.k_proj = nn.Linear(embed_dim, embed_dim)
        self.q_proj = nn.Linear(embed_dim, embed_dim)
        self.v_proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, tokens, embed_dim) to (batch, embed_dim)."""
        mean = x.mean(dim=1, keepdim=True) + self.positional_embedding.to(x.dtype)
        x = torch.cat([mean, x], dim=1)
        query, key, value = self._by_head(self.q_proj(mean)), self._by_head(self.k_proj(x)), self._by_head(self.v_proj(x))
        scale = 1 / math.sqrt(math.sqrt(self.dim_per_head))
        scores = torch.einsum("bct,bcs->bts", query * scale, key * scale)
        weights = torch.softmax(scores.float(), dim=-1).type(scores.dtype)
        return torch.einsum("bts,bcs->bct", weights, value).reshape(len(x), -1)

    def _by_head(self, x: Tensor) -> Tensor:
        heads = x.view(len(x), -1, self.num_heads, self.dim_per_head).transpose(1, 2)
        return heads.reshape(len(x) * self.num_heads, -1, self.dim_per_head).transpose(1, 2)


class TextImageTimeEmbedding(nn.Module):
    """The sum of a text and an image embedding (Kandinsky 2.1)."""

    def __init__(self, text_embed_dim: int, image_embed_dim: int, time_embed_dim: int) -> None:
        super().__init__()
        self.text_proj = nn.Linear(text_embed_dim, time_embed_dim)
        self.text_norm = nn.LayerNorm(time_embed_dim)
        self.image_proj = nn.Linear(image_embed_dim, time_embed_dim)

    def forward(self, text_embeds: Tensor, image_embeds: Tensor) -> Tensor:
        """Map (batch, text size) and (batch, image size) to (batch, time_embed_dim)."""
        return self.image_proj(image_embeds) + self.text_norm(self.text_proj(text_embeds))


class ImageTimeEmbedding(nn.Module):
    """An image embedding (Kandinsky 2.2)."""

    def __init__(self, image_embed_dim: int, time_embed_dim: int) -> None:
        super().__init__()
        self.image_proj = nn.Linear(image_embed_dim, time_embed_dim)
        self.image_norm = nn.LayerNorm(time_embed_dim)

    def forward(self, image_embeds: Tensor) -> Tensor:
        """Map (batch, image size) to (batch, time_embed_dim)."""
        return self.image_norm(self.image_proj(image_embeds))


class ImageHintTimeEmbedding(ImageTimeEmbedding):
    """An image embedding, and a hint image made as small as the latents (Kandinsky 2.2 ControlNet)."""

    def __init__(self, image_embed_dim: int, time_embed_dim: int) -> None:
        super().__init__(image_embed_dim, time_embed_dim)
        sizes = [(3, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 96, 2), (96, 96, 1), (96, 256, 2), (256, 4, 1)]
        layers: list[nn.Module] = []
        for channels, out, stride in sizes:
            layers += [nn.Conv2d(channels, out, kernel_size=3, padding=1, stride=stride), nn.SiLU()]
        self.input_hint_block = nn.Sequential(*layers[:-1])
