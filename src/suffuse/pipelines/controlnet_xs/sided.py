"""What the pipelines with ControlNet-XS share: a UNet with a control side, and from control pictures to a conditioner."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from suffuse.diffusion.conditioning import Conditioner
from suffuse.diffusion.control_side import ControlSide
from suffuse.models.controlnet_xs import ControlNetXSAdapter, UNetControlNetXSModel
from suffuse.models.unet_2d_condition import UNet2DConditionModel
from suffuse.pipelines.arguments import one_for_each, prompt_count
from suffuse.pipelines.controlnet.controls import PER_NET, check_count, check_parts, check_size, control_processor
from suffuse.pipelines.stable_diffusion.base import StableDiffusionBase
from suffuse.processing.image import Frame, ImageInput, VaeImageProcessor


class Sided(StableDiffusionBase):
    """The verbs of ControlNet-XS: its pipelines have the control side twice, beside their UNet and, to be saved, alone."""

    called = {"control_image": "image"}

    controlnet: Any

    def further(self, frame: Frame) -> list[Conditioner]:
        """What the control side sees, and the values of the call."""
        return [self.control_side("image", frame), *super().further(frame)]

    def control_side(self, name: str, frame: Frame) -> ControlSide:
        """The conditioner of a call.

        Args:
            name: The argument that holds the control pictures.
            frame: What the call fills.

        Raises:
            InputError: Pictures are not one for all prompts or one for each, or do not fit; the part of the way is none.
        """
        run = self._run
        arguments = run.arguments
        check_count(arguments[name], prompt_count(arguments), name)
        scale, start, end = (one_for_each(key, arguments[key], 1, "control side")[0] for key in PER_NET)
        check_parts([start], [end])
        asked = (arguments["width"], arguments["height"])
        each, place = arguments["num_images_per_prompt"], (self._execution_device, self.unet.dtype)
        pictures = self.prepare_image(arguments[name], *asked, 1, each, *place)
        check_size(name, pictures, (self.unet.config.ctrl_conditioning_channels, *frame[:2]))
        return ControlSide(self.unet, pictures, run.scheduler, scale, start, end)

    # ------------------------------------------------------------ control pictures

    @property
    def control_image_processor(self) -> VaeImageProcessor:
        """Control pictures to tensors in [0, 1]."""
        return control_processor(self.vae_scale_factor)

    def check_image(self, image: ImageInput, prompt: str | list[str] | None, prompt_embeds: Tensor | None) -> None:
        """Raise `InputError` unless control pictures are one for all prompts, or one for each."""
        check_count(image, prompt_count({"prompt": prompt, "prompt_embeds": prompt_embeds}), "image")

    def prepare_image(
        self,
        image: ImageInput,
        width: int | None,
        height: int | None,
        batch_size: int,
        num_images_per_prompt: int,
        device: torch.device,
        dtype: torch.dtype,
        do_classifier_free_guidance: bool = False,
    ) -> Tensor:
        """Control pictures as the control side sees them: (batch, 3, height, width) in [0, 1].

        Args:
            image: One for all, or one for each prompt.
            width: Columns wanted; the picture's own, if None.
            height: Rows, likewise.
            batch_size: How often to repeat one picture.
            num_images_per_prompt: How often to repeat each of several.
            device: Where they are wanted.
            dtype: The type of the UNet.
            do_classifier_free_guidance: Once more for the unconditional branch.
        """
        pictures = self.control_image_processor.preprocess(image, height, width).float()
        times = batch_size if len(pictures) == 1 else num_images_per_prompt
        pictures = pictures.repeat_interleave(times, dim=0).to(device, dtype)
        return torch.cat([pictures] * 2) if do_classifier_free_guidance else pictures


def with_side(unet: UNet2DConditionModel | UNetControlNetXSModel, controlnet: ControlNetXSAdapter) -> Any:
    """The UNet with the control side beside it, if it has none yet."""
    return UNetControlNetXSModel.from_unet(unet, controlnet) if isinstance(unet, UNet2DConditionModel) else unet
