"""The autoencoder with a codebook: each latent becomes the nearest of a few hundred vectors (van den Oord et al., 2017; Esser
et al., 2021).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from suffuse.configuration import register_to_config
from suffuse.errors import InputError
from suffuse.memory.offload import used_as_forward
from suffuse.models.model import ModelMixin
from suffuse.models.sizes import require_positive
from suffuse.models.vae import Decoder, DecoderOutput, Encoder
from suffuse.noise import Generators
from suffuse.outputs import BaseOutput

COMMITMENT = 0.25
"""The weight of the loss that keeps what the encoder gives near the codebook (van den Oord et al., 2017, equation 3)."""


@dataclass
class VQEncoderOutput(BaseOutput):
    """`latents`: (batch, vq_embed_dim, height, width), before they are quantised."""

    latents: Tensor


class VectorQuantizer(nn.Module):
    """A codebook.

    Args:
        count: How many vectors it has.
        width: Numbers in each.
    """

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(count, width)
        nn.init.uniform_(self.embedding.weight, -1.0 / count, 1.0 / count)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The nearest vector at each position of `z` (batch, width, height, width).

        Returns:
            (of the shape of `z`, with the gradient of `z`; the loss; the indices, (batch * height * width,)).
        """
        z = z.permute(0, 2, 3, 1).contiguous()
        indices = torch.cdist(z.view(-1, z.shape[-1]), self.embedding.weight).argmin(dim=1)
        nearest = self.embedding(indices).view(z.shape)
        # The published models were trained with the weight on the codebook's term instead of the encoder's.
        loss = torch.mean((nearest.detach() - z) ** 2) + COMMITMENT * torch.mean((nearest - z.detach()) ** 2)
        straight_through = z + (nearest - z).detach()
        return straight_through.permute(0, 3, 1, 2).contiguous(), loss, indices

    def get_codebook_entry(self, indices: Tensor, shape: tuple[int, int, int, int] | None = None) -> Tensor:
        """The vectors of indices: (…, width), or of `shape` (batch, height, width, width) as (batch, width, height, width)."""
        vectors = self.embedding(indices)
        return vectors if shape is None else vectors.view(shape).permute(0, 3, 1, 2).contiguous()


class VQModel(ModelMixin):
    """An autoencoder whose decoder sees only vectors of its codebook.

    Args:
        in_channels: Channels of the images in.
        out_channels: Channels of the images out.
        down_block_types: Names of the encoder's blocks.
        up_block_types: Names of the decoder's blocks.
        block_out_channels: Channels of each.
        layers_per_block: Residual blocks in each; the decoder's have one more.
        act_fn: Name of the activation.
        latent_channels: Channels of the latents.
        sample_size: Height of the images it was trained on.
        num_vq_embeddings: Vectors in the codebook.
        norm_num_groups: Groups of the normalisations.
        vq_embed_dim: Numbers in a vector; as many as latents have channels, if `None`.
        scaling_factor: Latents times this have a standard deviation of one; for pipelines.
        norm_type: "group", or "spatial" for normalisation under the latents.
        mid_block_add_attention: Attention at the lowest resolution.
        lookup_from_codebook: What is decoded unquantised are indices of the codebook.
        force_upcast: Whether float16 overflows, and pipelines must use float32.

    Raises:
        ConfigError: The values do not make a network; the message says which.
    """

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
        latent_channels: int = 3,
        sample_size: int = 32,
        num_vq_embeddings: int = 256,
        norm_num_groups: int = 32,
        vq_embed_dim: int | None = None,
        scaling_factor: float = 0.18215,
        norm_type: Literal["group", "spatial"] = "group",
        mid_block_add_attention: bool = True,
        lookup_from_codebook: bool = False,
        force_upcast: bool = False,
    ) -> None:
        super().__init__()
        require_positive(
            "VQModel",
            in_channels=in_channels,
            out_channels=out_channels,
            latent_channels=latent_channels,
            norm_num_groups=norm_num_groups,
            num_vq_embeddings=num_vq_embeddings,
            vq_embed_dim=vq_embed_dim,
        )
        width = latent_channels if vq_embed_dim is None else vq_embed_dim
        halves = (block_out_channels, layers_per_block, norm_num_groups, act_fn)
        self.encoder = Encoder(in_channels, latent_channels, down_block_types, *halves, False, mid_block_add_attention)
        self.quant_conv = nn.Conv2d(latent_channels, width, 1)
        self.quantize = VectorQuantizer(num_vq_embeddings, width)
        self.post_quant_conv = nn.Conv2d(width, latent_channels, 1)
        self.decoder = Decoder(latent_channels, out_channels, up_block_types, *halves, norm_type, mid_block_add_attention)

    @used_as_forward
    def encode(self, x: Tensor, return_dict: bool = True) -> VQEncoderOutput | tuple[Tensor]:
        """The latents of images (batch, in_channels, height, width), from -1 to 1."""
        latents = self.quant_conv(self.encoder(x))
        return VQEncoderOutput(latents) if return_dict else (latents,)

    @used_as_forward
    def decode(
        self,
        h: Tensor,
        force_not_quantize: bool = False,
        return_dict: bool = True,
        shape: tuple[int, int, int, int] | None = None,
        generator: Generators = None,
    ) -> DecoderOutput | tuple[Tensor, Tensor]:
        """The images of latents.

        Args:
            h: (batch, vq_embed_dim, height, width); with `force_not_quantize` and a model that says `lookup_from_codebook`,
                indices of the codebook.
            force_not_quantize: Take them as they are.
            return_dict: Return an output object instead of a tuple.
            shape: (batch, height, width, vq_embed_dim) of indices.
            generator: Not used; for those who decode with any autoencoder.

        Raises:
            InputError: The latents have other channels.
        """
        looked_up = force_not_quantize and self.config.lookup_from_codebook
        if not looked_up and (h.ndim != 4 or h.shape[1] != self.post_quant_conv.in_channels):
            expected = f"(batch, {self.post_quant_conv.in_channels}, height, width)"
            raise InputError("latents have the wrong shape for this autoencoder", found=tuple(h.shape), expected=expected)
        if force_not_quantize:
            quantized = self.quantize.get_codebook_entry(h, shape) if looked_up else h
            loss = torch.zeros(len(h), device=h.device, dtype=h.dtype)
        else:
            quantized, loss, _ = self.quantize(h)
        sample = self.decoder(self.post_quant_conv(quantized), quantized if self.config.norm_type == "spatial" else None)
        return DecoderOutput(sample, loss) if return_dict else (sample, loss)

    def forward(self, sample: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor, ...]:
        """Images (batch, in_channels, height, width) through latents of the codebook and back."""
        return self.decode(self.encode(sample, return_dict=False)[0], return_dict=return_dict)
