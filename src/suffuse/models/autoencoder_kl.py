"""The autoencoder of latent diffusion: images to latents eight times smaller, and back (Rombach et al., 2022)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from suffuse.configuration import register_to_config
from suffuse.errors import InputError
from suffuse.memory.offload import used_as_forward
from suffuse.models import tiling
from suffuse.models.attention_services import AttentionServices
from suffuse.models.model import ModelMixin
from suffuse.models.single_file import SingleFileModelMixin
from suffuse.models.sizes import require_positive
from suffuse.models.vae import (
    AutoencoderKLOutput,
    Decoder,
    DecoderOutput,
    DiagonalGaussianDistribution,
    Encoder,
    MemorySavings,
    joined,
)


class AutoencoderKL(SingleFileModelMixin, AttentionServices, MemorySavings, ModelMixin):
    """An autoencoder whose latents are kept close to a Gaussian.

    Args:
        in_channels: Channels of the images in.
        out_channels: Channels of the images out.
        down_block_types: Names of the encoder's blocks.
        up_block_types: Names of the decoder's blocks.
        block_out_channels: Channels of each.
        layers_per_block: Residual blocks in each; the decoder's have one more.
        act_fn: Name of the activation.
        latent_channels: Channels of the latents.
        norm_num_groups: Groups of the normalisations.
        sample_size: Height of the images it was trained on, and of tiles.
        scaling_factor: Latents times this have a standard deviation of one; for pipelines.
        force_upcast: Whether float16 overflows, and pipelines must use float32.
        shift_factor: Subtracted from latents before scaling; for pipelines.
        latents_mean: The same for each channel.
        latents_std: Standard deviation of each channel.
        use_quant_conv: A 1x1 convolution after the encoder.
        use_post_quant_conv: A 1x1 convolution before the decoder.
        mid_block_add_attention: Attention at the lowest resolution.

    Raises:
        ConfigError: The values do not make a network; the message says which.
    """

    tile_overlap_factor = 0.25

    _single_file_part = "vae"

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",),
        up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",),
        block_out_channels: tuple[int, ...] = (64,),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        sample_size: int | tuple[int, int] = 32,
        scaling_factor: float = 0.18215,
        force_upcast: bool = True,
        shift_factor: float | None = None,
        latents_mean: tuple[float, ...] | None = None,
        latents_std: tuple[float, ...] | None = None,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        mid_block_add_attention: bool = True,
    ) -> None:
        super().__init__()
        require_positive(
            "AutoencoderKL",
            in_channels=in_channels,
            out_channels=out_channels,
            latent_channels=latent_channels,
            norm_num_groups=norm_num_groups,
            sample_size=sample_size,
        )
        self.encoder = Encoder(
            in_channels,
            latent_channels,
            down_block_types,
            block_out_channels,
            layers_per_block,
            norm_num_groups,
            act_fn,
            mid_block_add_attention=mid_block_add_attention,
        )
        self.decoder = Decoder(
            latent_channels,
            out_channels,
            up_block_types,
            block_out_channels,
            layers_per_block,
            norm_num_groups,
            act_fn,
            mid_block_add_attention=mid_block_add_attention,
        )
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1) if use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1) if use_post_quant_conv else None
        self.tile_sample_min_size = sample_size if isinstance(sample_size, int) else sample_size[0]
        self.tile_latent_min_size = int(self.tile_sample_min_size / 2 ** (len(block_out_channels) - 1))

    @used_as_forward
    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """The distribution of latents of images (batch, in_channels, height, width), from -1 to 1."""
        posterior = DiagonalGaussianDistribution(joined([self._encode(part) for part in self.slices(x)]))
        return AutoencoderKLOutput(posterior) if return_dict else (posterior,)

    @used_as_forward
    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """The images of latents (batch, latent_channels, height, width); `generator` is not used."""
        sample = joined([self._decode(part) for part in self.slices(z)])
        return DecoderOutput(sample) if return_dict else (sample,)

    def forward(
        self, sample: Tensor, sample_posterior: bool = False, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Images through latents and back; `sample_posterior` draws latents with `generator` instead of the likeliest."""
        posterior = self.encode(sample, return_dict=False)[0]
        return self.decode(posterior.sample(generator) if sample_posterior else posterior.mode(), return_dict)

    def tiled_encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """`encode`, tile by tile whatever the size."""
        posterior = DiagonalGaussianDistribution(self._encode_tiles(x))
        return AutoencoderKLOutput(posterior) if return_dict else (posterior,)

    def tiled_decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """`decode`, tile by tile whatever the size."""
        sample = self._decode_tiles(z)
        return DecoderOutput(sample) if return_dict else (sample,)

    def blend_v(self, a: Tensor, b: Tensor, blend_extent: int) -> Tensor:
        """Fade the top of `b` in over the bottom of `a`."""
        return tiling.blend_v(a, b, blend_extent)

    def blend_h(self, a: Tensor, b: Tensor, blend_extent: int) -> Tensor:
        """Fade the left of `b` in over the right of `a`."""
        return tiling.blend_h(a, b, blend_extent)

    def _encode(self, x: Tensor) -> Tensor:
        _check_channels("images", x, self.encoder.conv_in)
        large = self.use_tiling and max(x.shape[-2:]) > self.tile_sample_min_size
        return self._encode_tiles(x) if large else self._encode_whole(x)

    def _decode(self, z: Tensor) -> Tensor:
        _check_channels("latents", z, self.decoder.conv_in)
        large = self.use_tiling and max(z.shape[-2:]) > self.tile_latent_min_size
        return self._decode_tiles(z) if large else self._decode_whole(z)

    def _encode_whole(self, x: Tensor) -> Tensor:
        encoded = self.encoder(x)
        return encoded if self.quant_conv is None else self.quant_conv(encoded)

    def _decode_whole(self, z: Tensor) -> Tensor:
        return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))

    def _encode_tiles(self, x: Tensor) -> Tensor:
        return tiling.run_in_tiles(self._encode_whole, x, self._tiles(self.tile_sample_min_size, self.tile_latent_min_size))

    def _decode_tiles(self, z: Tensor) -> Tensor:
        return tiling.run_in_tiles(self._decode_whole, z, self._tiles(self.tile_latent_min_size, self.tile_sample_min_size))

    def _tiles(self, size: int, result_size: int) -> tiling.Tiles:
        fade = int(result_size * self.tile_overlap_factor)
        return tiling.Tiles(size, int(size * (1 - self.tile_overlap_factor)), fade, result_size - fade)


def _check_channels(what: str, x: Tensor, first: nn.Conv2d) -> None:
    if x.ndim != 4 or x.shape[1] != first.in_channels:
        raise InputError(
            f"{what} have the wrong shape for this autoencoder",
            found=tuple(x.shape),
            expected=f"(batch, {first.in_channels}, height, width)",
        )
