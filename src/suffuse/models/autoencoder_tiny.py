"""A small autoencoder for previews and slow machines (Bohan, 2023, "TAESD")."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from suffuse.configuration import ConfigMixin, register_to_config
from suffuse.errors import ConfigError
from suffuse.layers.activations import get_activation
from suffuse.layers.gradient_checkpointing import Recomputable
from suffuse.memory.offload import used_as_forward
from suffuse.models.autoencoder_kl import AutoencoderKL
from suffuse.models.model import ModelMixin
from suffuse.models.sizes import require_positive
from suffuse.models.vae import DecoderOutput, MemorySavings, joined
from suffuse.outputs import BaseOutput


@dataclass
class AutoencoderTinyOutput(BaseOutput):
    """`latents`: (batch, latent_channels, height / 8, width / 8)."""

    latents: Tensor


class AutoencoderTiny(MemorySavings, ModelMixin):
    """An autoencoder of plain convolutions, without a distribution.

    Args:
        in_channels: Channels of the images in.
        out_channels: Channels of the images out.
        encoder_block_out_channels: Channels at each resolution of the encoder.
        decoder_block_out_channels: Channels at each resolution of the decoder.
        act_fn: Name of the activation.
        latent_channels: Channels of the latents.
        upsampling_scaling_factor: How much each resolution of the decoder enlarges.
        num_encoder_blocks: Residual blocks at each resolution of the encoder.
        num_decoder_blocks: Residual blocks at each resolution of the decoder.
        latent_magnitude: Latents lie between minus and plus this.
        latent_shift: Where zero goes when latents are scaled to 0..1.
        force_upcast: Not used: float16 does not overflow.
        scaling_factor: Latents times this have a standard deviation of one; for pipelines.
        upsample_fn: How the decoder enlarges: "nearest", "bilinear", …
        shift_factor: Subtracted from latents before scaling; for pipelines.

    Raises:
        ConfigError: The values do not make a network; the message says which.
    """

    tile_overlap_factor = 0.125

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64),
        decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64),
        act_fn: str = "relu",
        latent_channels: int = 4,
        upsampling_scaling_factor: int = 2,
        num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3),
        num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1),
        latent_magnitude: int = 3,
        latent_shift: float = 0.5,
        force_upcast: bool = False,
        scaling_factor: float = 1.0,
        upsample_fn: str = "nearest",
        shift_factor: float = 0.0,
    ) -> None:
        super().__init__()
        require_positive(
            "AutoencoderTiny",
            in_channels=in_channels,
            out_channels=out_channels,
            latent_channels=latent_channels,
            upsampling_scaling_factor=upsampling_scaling_factor,
            encoder_block_out_channels=encoder_block_out_channels,
            decoder_block_out_channels=decoder_block_out_channels,
        )
        for half, channels, blocks in (
            ("encoder", encoder_block_out_channels, num_encoder_blocks),
            ("decoder", decoder_block_out_channels, num_decoder_blocks),
        ):
            if len(channels) != len(blocks):
                raise ConfigError(
                    f"AutoencoderTiny: {half}_block_out_channels and num_{half}_blocks must be as long as one another",
                    found=f"{len(channels)} and {len(blocks)} entries",
                )
        self.encoder = EncoderTiny(in_channels, latent_channels, num_encoder_blocks, encoder_block_out_channels, act_fn)
        self.decoder = DecoderTiny(
            latent_channels,
            out_channels,
            num_decoder_blocks,
            decoder_block_out_channels,
            upsampling_scaling_factor,
            act_fn,
            upsample_fn,
        )
        self.latent_magnitude, self.latent_shift = latent_magnitude, latent_shift
        self.spatial_scale_factor = 2 ** (len(encoder_block_out_channels) - 1)
        self.tile_sample_min_size = 512
        self.tile_latent_min_size = self.tile_sample_min_size // self.spatial_scale_factor
        # Pipelines read these from every autoencoder.
        self.register_to_config(block_out_channels=decoder_block_out_channels, force_upcast=False)

    def scale_latents(self, x: Tensor) -> Tensor:
        """Latents to 0..1, as an image file could hold them."""
        return x.div(2 * self.latent_magnitude).add(self.latent_shift).clamp(0, 1)

    def unscale_latents(self, x: Tensor) -> Tensor:
        """0..1 to latents."""
        return x.sub(self.latent_shift).mul(2 * self.latent_magnitude)

    @classmethod
    def compatible_classes(cls) -> list[type[ConfigMixin]]:
        """The class whose entries stand in this one's configuration too."""
        return [AutoencoderKL]

    @used_as_forward
    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderTinyOutput | tuple[Tensor]:
        """The latents of images (batch, in_channels, height, width), from -1 to 1."""
        latents = joined([self._encode(part) for part in self.slices(x)])
        return AutoencoderTinyOutput(latents) if return_dict else (latents,)

    @used_as_forward
    def decode(
        self, x: Tensor, generator: torch.Generator | None = None, return_dict: bool = True
    ) -> DecoderOutput | tuple[Tensor]:
        """The images of latents (batch, latent_channels, height, width); `generator` is not used."""
        sample = joined([self._decode(part) for part in self.slices(x)])
        return DecoderOutput(sample) if return_dict else (sample,)

    def forward(self, sample: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Images through latents, rounded to bytes on the way, and back."""
        latents = self.scale_latents(self.encode(sample, return_dict=False)[0])
        stored = latents.mul(255).round().byte()
        return self.decode(self.unscale_latents(stored / 255.0), return_dict=return_dict)

    def _encode(self, x: Tensor) -> Tensor:
        if not self.use_tiling:
            return self.encoder(x)
        return _in_tiles(self.encoder, x, self.tile_sample_min_size, 1 / self.spatial_scale_factor, self.tile_overlap_factor)

    def _decode(self, x: Tensor) -> Tensor:
        if not self.use_tiling:
            return self.decoder(x)
        return _in_tiles(self.decoder, x, self.tile_latent_min_size, self.spatial_scale_factor, self.tile_overlap_factor)


class AutoencoderTinyBlock(Recomputable):
    """Three convolutions and a skip connection."""

    def __init__(self, channels: int, act_fn: str) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(3):
            layers += [nn.Conv2d(channels, channels, kernel_size=3, padding=1), get_activation(act_fn)]
        self.conv = nn.Sequential(*layers[:-1])
        self.fuse = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, channels, height, width) to the same shape."""
        return self.fuse(self.conv(x) + x)


class EncoderTiny(nn.Module):
    """Image to latents."""

    def __init__(
        self, in_channels: int, out_channels: int, num_blocks: Sequence[int], widths: Sequence[int], act_fn: str
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for level, (number, width) in enumerate(zip(num_blocks, widths, strict=True)):
            if level == 0:
                layers.append(nn.Conv2d(in_channels, width, kernel_size=3, padding=1))
            else:
                layers.append(nn.Conv2d(width, width, kernel_size=3, padding=1, stride=2, bias=False))
            layers += [AutoencoderTinyBlock(width, act_fn) for _ in range(number)]
        layers.append(nn.Conv2d(widths[-1], out_channels, kernel_size=3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, in_channels, height, width), from -1 to 1."""
        return self.layers(x.add(1).div(2))


class DecoderTiny(nn.Module):
    """Latents to image."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_blocks: Sequence[int],
        widths: Sequence[int],
        scale: int,
        act_fn: str,
        upsample_fn: str,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(in_channels, widths[0], kernel_size=3, padding=1), get_activation(act_fn)]
        for level, (number, width) in enumerate(zip(num_blocks, widths, strict=True)):
            layers += [AutoencoderTinyBlock(width, act_fn) for _ in range(number)]
            last = level == len(widths) - 1
            if not last:
                layers.append(nn.Upsample(scale_factor=scale, mode=upsample_fn))
            layers.append(nn.Conv2d(width, out_channels if last else width, kernel_size=3, padding=1, bias=last))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, in_channels, height, width), softly held between -3 and 3, to an image from -1 to 1."""
        return self.layers(torch.tanh(x / 3) * 3).mul(2).sub(1)


def _in_tiles(function: Callable[[Tensor], Tensor], x: Tensor, size: int, scale: float, overlap: float) -> Tensor:
    """Run tiles of `size` and paint each over what is there already, ever more opaque over the overlap.

    `scale` is how much `function` enlarges.
    """
    step = size - int(size * overlap)
    rising = torch.arange(size * scale) / max(int(size * overlap) * scale - 1, 1)
    rising = rising.clamp(0, 1).to(x.device)
    opaque = torch.ones_like(rising)
    out: Tensor | None = None
    for top in range(0, x.shape[-2], step):
        for left in range(0, x.shape[-1], step):
            tile = function(x[..., top : top + size, left : left + size])
            if out is None:
                height, width = (int(side * scale) for side in x.shape[-2:])
                out = torch.zeros(*tile.shape[:2], height, width, device=x.device)
            height, width = tile.shape[-2:]
            opacity = ((rising if top else opaque)[:, None] * (rising if left else opaque))[:height, :width]
            there = out[..., int(top * scale) :, int(left * scale) :][..., :height, :width]
            there.copy_(opacity * tile + (1 - opacity) * there)
    return x if out is None else out.to(x.dtype)
