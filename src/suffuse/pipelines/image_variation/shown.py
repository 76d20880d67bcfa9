"""What pipelines share whose UNet is shown a picture where others are told a prompt: one token, made by an image encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from suffuse.diffusion.conditioning import Conditioning
from suffuse.diffusion.prompts import repeat_rows
from suffuse.errors import ConfigError, InputError
from suffuse.pipelines.arguments import check_shape
from suffuse.pipelines.features import check_features
from suffuse.pipelines.stable_diffusion.base import StableDiffusionBase
from suffuse.processing.pixels import listed

if TYPE_CHECKING:
    from transformers import CLIPImageProcessor

    from suffuse.models.autoencoder_kl import AutoencoderKL
    from suffuse.models.unet_2d_condition import UNet2DConditionModel
    from suffuse.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from suffuse.schedulers.scheduler import SchedulerMixin


class Shown(StableDiffusionBase):
    """The verbs of being shown a picture, and the components for it.

    Class attributes:
        shown_as: The argument that holds the picture to see.
    """

    _optional_components = ["safety_checker"]
    _callback_tensor_inputs = ["latents", "prompt_embeds"]
    _scheduler_settings = {}
    _told_by_text = ()

    shown_as: ClassVar[str] = "image"

    image_encoder: Any
    text_encoder = tokenizer = None

    def __init__(
        self,
        vae: AutoencoderKL,
        image_encoder: Any,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        safety_checker: StableDiffusionSafetyChecker | None,
        feature_extractor: CLIPImageProcessor | None,
        requires_safety_checker: bool,
    ) -> None:
        told: tuple[Any, Any] = (None, None)
        checker = (safety_checker, feature_extractor, image_encoder, requires_safety_checker)
        super().__init__(vae, *told, unet, scheduler, *checker)

    def set_up(self, **components: Any) -> None:
        """Take the components, of which there are none for text.

        Raises:
            ConfigError: What the image encoder makes is not as wide as what the UNet takes.
        """
        super().set_up(**components)
        made, taken = getattr(self.image_encoder, "config", None), getattr(self.unet, "config", None)
        if made is not None and taken is not None and made.projection_dim != taken.cross_attention_dim:
            raise ConfigError(
                "image_encoder/config.json and unet/config.json disagree",
                found=f"projection_dim={made.projection_dim}, cross_attention_dim={taken.cross_attention_dim}",
                expected="the same width",
                remedy="load both from one checkpoint",
            )

    def check_call(self, arguments: dict[str, Any]) -> None:
        """Raise `InputError` unless what is shown is pictures, and values go with them."""
        listed(arguments[self.shown_as], self.shown_as)
        check_features(self, arguments)

    def pictures_of(self, arguments: dict[str, Any]) -> int:
        """How many pictures a call makes at once."""
        return count(arguments["image"], "image") * arguments["num_images_per_prompt"]

    def needed_components(self, arguments: dict[str, Any]) -> list[str]:
        """Those of Stable Diffusion, and what sees; a tensor is what the feature extractor would make."""
        prepared = isinstance(arguments[self.shown_as], Tensor)
        return [*super().needed_components(arguments), "image_encoder", *([] if prepared else ["feature_extractor"])]

    def encode(self) -> Conditioning:
        """What the image encoder makes of the pictures of the call, joined over the branches its guidance asks for.

        Raises:
            InputError: The pictures shown are neither one for all nor one for each.
        """
        run = self._run
        batch, each = self.pictures_of(run.arguments), run.arguments["num_images_per_prompt"]
        seen, unseen = self.see(pixels_of(self, run.arguments[self.shown_as], self.shown_as))
        if len(seen) not in (1, batch // each):
            raise InputError(
                f"{self.shown_as}: {len(seen)} pictures given for {batch // each}", expected="one for all, or one for each"
            )
        cond = repeat_rows(seen, batch // len(seen)).to(self.unet.dtype)
        uncond = unseen.to(self.unet.dtype).expand_as(cond)
        told = {branch: cond if branch == "cond" else uncond for branch in run.guidance.branches}
        return Conditioning(batch, (*told,), {"prompt_embeds": torch.cat([*told.values()])})

    def see(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """What the UNet is told of pictures, (batch, 1, width), and of none, (1, 1, width)."""
        tokens = self.image_encoder(pixels).image_embeds.unsqueeze(1)
        return tokens, torch.zeros_like(tokens[:1])


def count(image: Any, name: str) -> int:
    """How many pictures an argument holds."""
    return sum(len(item) if getattr(item, "ndim", 3) == 4 else 1 for item in listed(image, name))


def pixels_of(pipe: Any, image: Any, name: str) -> Tensor:
    """Pictures (batch, 3, rows, columns) as the image encoder of a pipeline takes them.

    Args:
        pipe: The pipeline, with an image encoder and a feature extractor.
        image: Pictures; a tensor is taken to be what the feature extractor makes.
        name: The argument's name, for errors.

    Raises:
        InputError: It is no picture, or a tensor of another size than the encoder takes.
    """
    where = (pipe._execution_device, pipe.image_encoder.dtype)
    if isinstance(image, Tensor):
        edge = pipe.image_encoder.config.image_size
        check_shape(name, image, (len(image), 3, edge, edge))
        return image.to(*where)
    items = listed(image, name)
    if isinstance(items[0], Image.Image):
        pictures = [pipe.image_processor.convert_to_rgb(item) for item in items]
    else:  # the feature extractor counts in bytes, whatever range arrays are in
        pictures = pipe.image_processor.postprocess(pipe.image_processor.preprocess(image, name=name))
    return pipe.feature_extractor(images=pictures, return_tensors="pt").pixel_values.to(*where)
