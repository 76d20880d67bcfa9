"""The two halves of image autoencoders, and the distribution between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from suffuse.layers.normalization import SpatialNorm, group_norm
from suffuse.models.block_layers import BlockOptions
from suffuse.models.sizes import require_length, require_positive
from suffuse.models.unet_2d_blocks import DECODER_BLOCKS, ENCODER_BLOCKS, MID_BLOCKS, MidBlock, Place, find_block
from suffuse.noise import Generators, randn_tensor
from suffuse.outputs import BaseOutput

EPS = 1e-6


@dataclass
class DecoderOutput(BaseOutput):
    """`sample`: the image (batch, channels, height, width)."""

    sample: Tensor
    commit_loss: Tensor | None = None


@dataclass
class AutoencoderKLOutput(BaseOutput):
    """`latent_dist`: the distribution of latents."""

    latent_dist: DiagonalGaussianDistribution


class Encoder(nn.Module):
    """Image to latents, or to their means and logarithms of variances (Rombach et al., 2022; Esser et al., 2021).

    Args:
        in_channels: Channels of the image.
        out_channels: Channels of the latents.
        down_block_types: Names from `ENCODER_BLOCKS`.
        block_out_channels: Channels out of each.
        layers_per_block: Residual blocks in each.
        norm_num_groups: Groups of the normalisations.
        act_fn: Name of the activation.
        double_z: Give means and logarithms of variances.
        mid_block_add_attention: Attention in the middle.

    Raises:
        ConfigError: The values do not make a network.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: Sequence[str] = ("DownEncoderBlock2D",),
        block_out_channels: Sequence[int] = (64,),
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        act_fn: str = "silu",
        double_z: bool = True,
        mid_block_add_attention: bool = True,
    ) -> None:
        super().__init__()
        count = len(down_block_types)
        require_length("Encoder", count, "down_block_types", block_out_channels=block_out_channels)
        require_positive("Encoder", block_out_channels=block_out_channels, layers_per_block=layers_per_block)
        options = BlockOptions(None, EPS, act_fn, norm_num_groups, downsample_padding=0)
        widths = [block_out_channels[0], *block_out_channels]
        self.conv_in = nn.Conv2d(in_channels, widths[0], kernel_size=3, padding=1)
        self.down_blocks = nn.ModuleList()
        for level, name in enumerate(down_block_types):
            kind = find_block(ENCODER_BLOCKS, name)
            place = Place(widths[level], widths[level + 1], layers_per_block, resamples=level < count - 1)
            self.down_blocks.append(kind.block(kind, place, options))
        self.mid_block = make_mid_block(widths[-1], options, mid_block_add_attention)
        self.conv_norm_out = group_norm(norm_num_groups, widths[-1], eps=EPS)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(widths[-1], out_channels * (2 if double_z else 1), kernel_size=3, padding=1)

    def forward(self, sample: Tensor) -> Tensor:
        """Map (batch, in_channels, height, width) to the latents' channels at the lowest resolution."""
        sample = self.conv_in(sample)
        for block in self.down_blocks:
            sample = block(sample)
        sample = self.mid_block(sample)
        return self.conv_out(self.conv_act(self.conv_norm_out(sample)))


class Decoder(nn.Module):
    """Latents to image.

    Args:
        in_channels: Channels of the latents.
        out_channels: Channels of the image.
        up_block_types: Names from `DECODER_BLOCKS`.
        block_out_channels: Channels of each, last first.
        layers_per_block: Residual blocks in each, less one.
        norm_num_groups: Groups of the normalisations.
        act_fn: Name of the activation.
        norm_type: "group", or "spatial" for normalisation under the latents (Zheng et al., 2022).
        mid_block_add_attention: Attention in the middle.

    Raises:
        ConfigError: The values do not make a network.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        up_block_types: Sequence[str] = ("UpDecoderBlock2D",),
        block_out_channels: Sequence[int] = (64,),
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        act_fn: str = "silu",
        norm_type: str = "group",
        mid_block_add_attention: bool = True,
    ) -> None:
        super().__init__()
        count = len(up_block_types)
        require_length("Decoder", count, "up_block_types", block_out_channels=block_out_channels)
        require_positive("Decoder", block_out_channels=block_out_channels, layers_per_block=layers_per_block)
        spatial = norm_type == "spatial"
        options = BlockOptions(
            in_channels if spatial else None, EPS, act_fn, norm_num_groups, time_scale_shift="spatial" if spatial else "default"
        )
        widths = [block_out_channels[-1], *reversed(block_out_channels)]
        self.conv_in = nn.Conv2d(in_channels, widths[0], kernel_size=3, padding=1)
        self.mid_block = make_mid_block(widths[0], options, mid_block_add_attention)
        self.up_blocks = nn.ModuleList()
        for level, name in enumerate(up_block_types):
            kind = find_block(DECODER_BLOCKS, name)
            place = Place(widths[level], widths[level + 1], layers_per_block + 1, resamples=level < count - 1)
            self.up_blocks.append(kind.block(kind, place, options))
        self.conv_norm_out = SpatialNorm(widths[-1], in_channels) if spatial else group_norm(norm_num_groups, widths[-1], eps=EPS)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(widths[-1], out_channels, kernel_size=3, padding=1)

    def forward(self, sample: Tensor, latent_embeds: Tensor | None = None) -> Tensor:
        """Map (batch, in_channels, height, width) to the image; "spatial" needs the latents as `latent_embeds`."""
        sample = self.start(sample, latent_embeds)
        for block in self.up_blocks:
            sample = block(sample, latent_embeds)
        return self.finish(sample, latent_embeds)

    def start(self, sample: Tensor, latent_embeds: Tensor | None = None) -> Tensor:
        """The lowest resolution, in the type of what follows: pipelines keep only that in float32."""
        sample = self.mid_block(self.conv_in(sample), latent_embeds)
        return sample.to(next(self.up_blocks.parameters()).dtype)

    def finish(self, sample: Tensor, latent_embeds: Tensor | None = None) -> Tensor:
        """The last normalisation and convolution."""
        condition = () if latent_embeds is None else (latent_embeds,)
        return self.conv_out(self.conv_act(self.conv_norm_out(sample, *condition)))


def make_mid_block(channels: int, options: BlockOptions, add_attention: bool) -> MidBlock:
    """The middle of both halves: residual block, one head of attention or none, residual block."""
    kind = MID_BLOCKS["UNetMidBlock2D"]
    return MidBlock(kind if add_attention else kind._replace(attention=None), channels, options)


class DiagonalGaussianDistribution:
    """A Gaussian with a variance for each value (Kingma and Welling, 2014).

    Args:
        parameters: Means and logarithms of variances, one behind the other: (batch, 2 * channels, height, width).
        deterministic: Have no variance.
    """

    def __init__(self, parameters: Tensor, deterministic: bool = False) -> None:
        self.parameters, self.deterministic = parameters, deterministic
        self.mean, logvar = torch.chunk(parameters, 2, dim=1)
        self.logvar = torch.clamp(logvar, -30.0, 20.0)
        self.std = torch.zeros_like(self.mean) if deterministic else torch.exp(0.5 * self.logvar)
        self.var = self.std if deterministic else torch.exp(self.logvar)

    def sample(self, generator: Generators = None) -> Tensor:
        """Draw one, on the generator's device; a list gives each item of the batch its own generator."""
        noise = randn_tensor(
            tuple(self.mean.shape), generator=generator, device=self.parameters.device, dtype=self.parameters.dtype
        )
        return self.mean + self.std * noise

    def mode(self) -> Tensor:
        """The likeliest: the mean."""
        return self.mean

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> Tensor:
        """The divergence (batch,) from `other`, or from a standard Gaussian."""
        if self.deterministic:
            return torch.Tensor([0.0])
        if other is None:
            terms = torch.pow(self.mean, 2) + self.var - 1.0 - self.logvar
        else:
            distance = torch.pow(self.mean - other.mean, 2) / other.var
            terms = distance + self.var / other.var - 1.0 - self.logvar + other.logvar
        return 0.5 * torch.sum(terms, dim=[1, 2, 3])

    def nll(self, sample: Tensor, dims: Sequence[int] = (1, 2, 3)) -> Tensor:
        """The negative logarithm of the likelihood of `sample`, summed over `dims`."""
        if self.deterministic:
            return torch.Tensor([0.0])
        terms = np.log(2.0 * np.pi) + self.logvar + torch.pow(sample - self.mean, 2) / self.var
        return 0.5 * torch.sum(terms, dim=tuple(dims))


class MemorySavings(nn.Module):
    """What autoencoders offer to need less memory: one image at a time, and tiles."""

    use_slicing: bool = False
    use_tiling: bool = False

    def enable_slicing(self) -> None:
        """Run one item of a batch at a time."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Run whole batches again."""
        self.use_slicing = False

    def enable_tiling(self, use_tiling: bool = True) -> None:
        """Run large images tile by tile; the result is close to that of the whole, not equal."""
        self.use_tiling = use_tiling

    def disable_tiling(self) -> None:
        """Run images whole again."""
        self.use_tiling = False

    def slices(self, batch: Tensor) -> Sequence[Tensor]:
        """The batch in the parts it is to be run in."""
        return batch.split(1) if self.use_slicing and len(batch) > 1 else [batch]


def joined(parts: Sequence[Tensor]) -> Tensor:
    """One batch of the results for `MemorySavings.slices`."""
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]
