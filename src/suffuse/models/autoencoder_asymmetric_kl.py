"""An autoencoder with a heavier decoder that sees the unmasked image (Zhu et al., 2023, "Asymmetric VQGAN")."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from suffuse.configuration import ConfigMixin, register_to_config
from suffuse.errors import InputError
from suffuse.memory.offload import used_as_forward
from suffuse.models.attention_services import AttentionServices
from suffuse.models.autoencoder_kl import AutoencoderKL
from suffuse.models.model import ModelMixin
from suffuse.models.sizes import require_positive
from suffuse.models.vae import AutoencoderKLOutput, Decoder, DecoderOutput, DiagonalGaussianDistribution, Encoder


class AsymmetricAutoencoderKL(AttentionServices, ModelMixin):
    """An autoencoder for inpainting: what the mask leaves is carried from the image into the decoder.

    Args:
        in_channels: Channels of the images in.
        out_channels: Channels of the images out.
        down_block_types: Names of the encoder's blocks.
        down_block_out_channels: Channels of each.
        layers_per_down_block: Residual blocks in each.
        up_block_types: Names of the decoder's blocks.
        up_block_out_channels: Channels of each.
        layers_per_up_block: Residual blocks in each, less one.
        act_fn: Name of the activation.
        latent_channels: Channels of the latents.
        norm_num_groups: Groups of the normalisations.
        sample_size: Height of the images it was trained on.
        scaling_factor: Latents times this have a standard deviation of one; for pipelines.

    Raises:
        ConfigError: The values do not make a network; the message says which.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",),
        down_block_out_channels: tuple[int, ...] = (64,),
        layers_per_down_block: int = 1,
        up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",),
        up_block_out_channels: tuple[int, ...] = (64,),
        layers_per_up_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        sample_size: int = 32,
        scaling_factor: float = 0.18215,
    ) -> None:
        super().__init__()
        channels = {"in_channels": in_channels, "out_channels": out_channels, "latent_channels": latent_channels}
        require_positive("AsymmetricAutoencoderKL", norm_num_groups=norm_num_groups, sample_size=sample_size, **channels)
        self.encoder = Encoder(
            in_channels,
            latent_channels,
            down_block_types,
            down_block_out_channels,
            layers_per_down_block,
            norm_num_groups,
            act_fn,
        )
        self.decoder = MaskConditionDecoder(
            in_channels=latent_channels,
            out_channels=out_channels,
            up_block_types=up_block_types,
            block_out_channels=up_block_out_channels,
            layers_per_block=layers_per_up_block,
            norm_num_groups=norm_num_groups,
            act_fn=act_fn,
        )
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        # Pipelines read these from every autoencoder.
        self.register_to_config(block_out_channels=up_block_out_channels, force_upcast=False)

    @classmethod
    def compatible_classes(cls) -> list[type[ConfigMixin]]:
        """The class whose entries stand in this one's configuration too."""
        return [AutoencoderKL]

    @used_as_forward
    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """The distribution of latents of images (batch, in_channels, height, width), from -1 to 1."""
        posterior = DiagonalGaussianDistribution(self.quant_conv(self.encoder(x)))
        return AutoencoderKLOutput(posterior) if return_dict else (posterior,)

    @used_as_forward
    def decode(
        self,
        z: Tensor,
        generator: torch.Generator | None = None,
        image: Tensor | None = None,
        mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> DecoderOutput | tuple[Tensor]:
        """The images of latents.

        Args:
            z: Latents (batch, latent_channels, height, width).
            generator: Not used.
            image: What the unmasked part is taken from (batch, out_channels, height, width).
            mask: (batch, 1, height, width), 1 where the image is new.
            return_dict: Return an output object instead of a tuple.

        Raises:
            InputError: There is an image without a mask, or a mask without an image.
        """
        sample = self.decoder(self.post_quant_conv(z), image, mask)
        return DecoderOutput(sample) if return_dict else (sample,)

    def forward(
        self,
        sample: Tensor,
        mask: Tensor | None = None,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Images through latents and back; where `mask` is 0, the decoder sees them too."""
        posterior = self.encode(sample, return_dict=False)[0]
        z = posterior.sample(generator) if sample_posterior else posterior.mode()
        return self.decode(z, generator, None if mask is None else sample, mask, return_dict)


class MaskConditionEncoder(nn.Module):
    """Features of the unmasked image, one map for each resolution of the decoder."""

    halvings = 3

    def __init__(self, in_channels: int, out_channels: int, widest: int) -> None:
        super().__init__()
        widths = [min(out_channels * 2**level, widest) for level in range(self.halvings + 1)]
        sizes = pairwise([in_channels, *widths, widest])
        self.layers = nn.Sequential(*(_convolution(*size, halves=index > 1) for index, size in enumerate(sizes)))

    def forward(self, x: Tensor) -> dict[tuple[int, ...], Tensor]:
        """Map (batch, in_channels, height, width) to feature maps, found by their shape."""
        features: dict[tuple[int, ...], Tensor] = {}
        for layer in self.layers:
            x = layer(x)
            features[tuple(x.shape)] = x
            x = torch.relu(x)
        return features


class MaskConditionDecoder(Decoder):
    """A decoder into which the unmasked image is blended at every resolution."""

    def __init__(self, out_channels: int, block_out_channels: Sequence[int], **decoder: Any) -> None:
        super().__init__(out_channels=out_channels, block_out_channels=block_out_channels, **decoder)
        self.condition_encoder = MaskConditionEncoder(out_channels, block_out_channels[0], block_out_channels[-1])

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, sample: Tensor, image: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Map latents to an image; with `image` and `mask`, given both or neither, keep what the mask leaves."""
        if (image is None) != (mask is None):
            raise InputError("an image and a mask go together: one came without the other")
        features = None if image is None or mask is None else self.condition_encoder((1 - mask) * image)
        sample = self.start(sample)
        for block in self.up_blocks:
            sample = block(_blended(sample, features, mask))
        return self.finish(_blended(sample, features, mask))


def _convolution(in_channels: int, out_channels: int, halves: bool) -> nn.Conv2d:
    kernel_size, stride = (4, 2) if halves else (3, 1)
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=1)


def _blended(sample: Tensor, features: dict[tuple[int, ...], Tensor] | None, mask: Tensor | None) -> Tensor:
    if features is None or mask is None:
        return sample
    if tuple(sample.shape) not in features:
        raise InputError(
            "the image does not fit the latents at every resolution of the decoder",
            found=f"features {sorted(features)}",
            expected=f"one of shape {tuple(sample.shape)}",
            remedy="give an image and a mask of the size that is decoded, and sides that are multiples of 8",
        )
    mask = F.interpolate(mask, size=sample.shape[-2:], mode="nearest")
    return sample * mask + features[tuple(sample.shape)] * (1 - mask)
