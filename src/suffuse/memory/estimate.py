"""How much memory the stages of a pipeline take, told from its configurations by walking through their layers on paper.

Nothing is computed and torch is not needed: a layer is what it keeps alive at its worst moment and what it leaves behind, in
numbers (elements); the dtype turns them into bytes. What is counted are tensors: libraries may take some workspace besides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass
class Walk:
    """A walk through a network with a batch of feature maps.

    Args:
        batch: Feature maps at once.
        channels: Of the current one.
        height: Rows.
        width: Columns.
        held: Numbers that are alive besides the current feature map: skip connections, mostly.
        peak: The most that was alive at any moment.
    """

    batch: int
    channels: int
    height: int
    width: int
    held: int = 0
    peak: int = 0

    def size(self, channels: int | None = None) -> int:
        """Numbers in a feature map of so many channels at the current resolution."""
        return self.batch * (self.channels if channels is None else channels) * self.height * self.width

    def need(self, extra: int) -> None:
        """So much more is alive for a moment, beside the current feature map."""
        self.peak = max(self.peak, self.held + self.size() + extra)

    def convolve(self, channels: int, scale: float = 1, between: int = 0) -> None:
        """A convolution to other channels and, by `scale`, another resolution; `between` is alive on the way."""
        height, width = int(self.height * scale), int(self.width * scale)
        self.need(between + self.batch * channels * height * width)
        self.channels, self.height, self.width = channels, height, width

    def residual(self, channels: int) -> None:
        """A residual block: normalised and activated copies, two convolutions, the shortcut and the sum."""
        before, after = self.size(), self.size(channels)
        self.need(max(2 * before, before + after, 3 * after))
        self.channels = channels

    def attend(self, tokens: int, width: int) -> None:
        """One layer of attention over the positions: queries, keys and values, what comes out, and its projection."""
        queries = self.batch * tokens * width
        self.need(6 * queries)

    def transformer(self, layers: int, context: int) -> None:
        """Blocks of self-attention, attention to `context` tokens, and a gated layer four times as wide."""
        one = self.size()
        self.need(2 * one)
        for _ in range(layers):
            self.need(one + 6 * one)  # the entrance, queries, keys and values, what comes out
            self.need(3 * one + 4 * one + 2 * self.batch * context * self.channels)
            self.need(3 * one + 17 * one)  # two halves of the wide layer, one of them activated, and their product

    def decode_attention(self) -> None:
        """Attention in the middle of an autoencoder."""
        self.need(7 * self.size())

    def finish(self, channels: int) -> None:
        """The last normalisation, activation and convolution."""
        self.need(2 * self.size())
        self.convolve(channels, between=self.size())


def unet_activations(config: Mapping[str, Any], batch: int, height: int, width: int, tokens: int = 77) -> int:
    """Numbers alive at the worst moment of one evaluation of a conditional UNet.

    Args:
        config: Its config.json.
        batch: Latents at once: pictures, times the branches of guidance.
        height: Rows of the latents.
        width: Columns.
        tokens: Of the prompts.
    """
    channels: Sequence[int] = config["block_out_channels"]
    down, up = config["down_block_types"], config["up_block_types"]
    layers = _each(config.get("layers_per_block", 2), len(channels))
    depth = _each(config.get("transformer_layers_per_block", 1), len(channels))
    walk = Walk(batch, config.get("in_channels", 4), height, width)
    latents, prompts = 2 * walk.size(), batch * tokens * _width(config)
    walk.held = latents + prompts
    walk.convolve(channels[0])
    skips = [walk.channels]
    for level, kind in enumerate(down):
        for _ in range(layers[level]):
            walk.held += walk.size()  # the one before is a skip connection
            walk.residual(channels[level])
            if "Attn" in kind:
                walk.transformer(depth[level], tokens)
            skips.append(walk.channels)
        if level + 1 < len(down):
            walk.held += walk.size()
            walk.convolve(channels[level], 1 / 2)
            skips.append(walk.channels)
    walk.held += walk.size()
    walk.residual(channels[-1])
    if config.get("mid_block_type", "UNetMidBlock2DCrossAttn"):
        walk.transformer(depth[-1], tokens)
        walk.residual(channels[-1])
    for level, kind in enumerate(up):
        mirrored = len(channels) - 1 - level
        for _ in range(layers[mirrored] + 1):
            before = walk.size()
            walk.need(walk.size(skips[-1]) + before)  # both, and what joins them
            walk.held += before
            walk.channels += skips.pop()
            walk.residual(channels[mirrored])
            if "Attn" in kind:
                walk.transformer(depth[mirrored], tokens)
            walk.held -= before
        if level + 1 < len(up):
            walk.convolve(walk.channels, 2, between=4 * walk.size())
    walk.finish(config.get("out_channels", 4))
    return walk.peak


def decoder_activations(config: Mapping[str, Any], batch: int, height: int, width: int) -> int:
    """Numbers alive at the worst moment of decoding latents to pictures with an autoencoder.

    Args:
        config: Its config.json.
        batch: Latents at once.
        height: Rows of the latents.
        width: Columns.
    """
    channels = list(reversed(config["block_out_channels"]))
    walk = Walk(batch, config.get("latent_channels", 4), height, width)
    walk.held = 2 * walk.size()
    walk.convolve(channels[0])
    walk.residual(channels[0])
    walk.decode_attention()
    walk.residual(channels[0])
    for level, wide in enumerate(channels):
        for _ in range(config.get("layers_per_block", 1) + 1):
            walk.residual(wide)
        if level + 1 < len(channels):
            walk.convolve(wide, 2, between=4 * walk.size())
    walk.finish(config.get("out_channels", 3))
    return walk.peak


def text_activations(config: Mapping[str, Any], batch: int) -> int:
    """Numbers alive at the worst moment of encoding prompts: the states of every layer are kept.

    Args:
        config: config.json of a CLIP text model.
        batch: Prompts at once.
    """
    tokens, width = config.get("max_position_embeddings", 77), config.get("hidden_size", 512)
    return batch * tokens * (config.get("num_hidden_layers", 12) * width + 7 * width + 2 * config.get("intermediate_size", 2048))


def _each(value: Any, count: int) -> list[int]:
    """One whole number for each level; of a list of lists, the largest."""
    listed = list(value) if isinstance(value, (list, tuple)) else [value] * count
    return [max(item) if isinstance(item, (list, tuple)) else item for item in listed]


def _width(config: Mapping[str, Any]) -> int:
    width = config.get("cross_attention_dim", 1280)
    return max(width) if isinstance(width, (list, tuple)) else width or 0
