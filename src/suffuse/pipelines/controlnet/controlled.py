"""What the pipelines with ControlNets share: the component (Zhang et al., 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from suffuse.checkpoints.layout import numbered
from suffuse.diffusion.conditioning import Conditioner
from suffuse.models.side_by_side import parts_of
from suffuse.pipelines.arguments import prompt_count
from suffuse.pipelines.controlnet.controls import check_count, check_nets, control_processor, controls, one_model
from suffuse.pipelines.stable_diffusion.base import StableDiffusionBase
from suffuse.processing.image import Box, Frame, ImageInput, ResizeMode, VaeImageProcessor

if TYPE_CHECKING:
    from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

    from suffuse.models.autoencoder_kl import AutoencoderKL
    from suffuse.models.controlnet import ControlNetModel, MultiControlNetModel
    from suffuse.models.unet_2d_condition import UNet2DConditionModel
    from suffuse.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from suffuse.schedulers.scheduler import SchedulerMixin


class Controlled(StableDiffusionBase):
    """The verbs of ControlNets, and the components of those for Stable Diffusion."""

    controlnet: Any

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        controlnet: ControlNetModel | Sequence[ControlNetModel] | MultiControlNetModel,
        scheduler: SchedulerMixin,
        safety_checker: StableDiffusionSafetyChecker | None,
        feature_extractor: CLIPImageProcessor | None,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        requires_safety_checker: bool = True,
    ) -> None:
        checker = (safety_checker, feature_extractor, image_encoder, requires_safety_checker)
        super().__init__(vae, text_encoder, tokenizer, unet, scheduler, *checker)
        self.take(controlnet)

    def take(self, controlnet: Any) -> None:
        """Make a ControlNet, or a list of several, the component of the pipeline."""
        controlnet = one_model(controlnet)
        check_nets(self.unet, parts_of(controlnet))
        self.register_modules(controlnet=controlnet)

    @property
    def control_name(self) -> str:
        """The argument that holds the control pictures."""
        return self.called.get("control_image", "control_image")

    @property
    def nets(self) -> list[Any]:
        """The ControlNets, in the order of their pictures."""
        return parts_of(self.controlnet)

    @property
    def _modules_by_name(self) -> dict[str, nn.Module]:
        # Each net is a model of its own, to be moved and to wait elsewhere.
        modules = {name: module for name, module in super()._modules_by_name.items() if name != "controlnet"}
        return modules | {numbered("controlnet", index): net for index, net in enumerate(self.nets)}

    def needed_components(self, arguments: dict[str, Any]) -> list[str]:
        """Those of Stable Diffusion, and the ControlNet."""
        return [*super().needed_components(arguments), "controlnet"]

    def further(self, frame: Frame) -> list[Conditioner]:
        """What the ControlNets make of the control pictures, and the values of the call."""
        return [*controls(self, self.controlnet, self.control_name, frame), *super().further(frame)]

    # ------------------------------------------------------------ control pictures

    @property
    def control_image_processor(self) -> VaeImageProcessor:
        """Control pictures to tensors in [0, 1]."""
        return control_processor(self.vae_scale_factor)

    def check_image(self, image: ImageInput, prompt: str | list[str] | None, prompt_embeds: Tensor | None) -> None:
        """Raise `InputError` unless control pictures are one for all prompts, or one for each."""
        check_count(image, prompt_count({"prompt": prompt, "prompt_embeds": prompt_embeds}), self.control_name)

    def prepare_control_image(
        self,
        image: ImageInput,
        width: int | None,
        height: int | None,
        batch_size: int,
        num_images_per_prompt: int,
        device: torch.device,
        dtype: torch.dtype,
        crops_coords: Box | None = None,
        resize_mode: ResizeMode = "default",
        do_classifier_free_guidance: bool = False,
        guess_mode: bool = False,
    ) -> Tensor:
        """Control pictures as a ControlNet sees them: (batch, 3, height, width) in [0, 1].

        Args:
            image: One for all, or one for each prompt.
            width: Columns wanted; the picture's own, if None.
            height: Rows, likewise.
            batch_size: How often to repeat one picture.
            num_images_per_prompt: How often to repeat each of several.
            device: Where they are wanted.
            dtype: The type of the net.
            crops_coords: (left, top, right, bottom) to cut out of PIL pictures first.
            resize_mode: "fill" and "crop" keep the aspect of PIL pictures.
            do_classifier_free_guidance: Once more for the unconditional branch.
            guess_mode: Not for that branch.
        """
        pictures = self.control_image_processor.preprocess(
            image, height, width, resize_mode, crops_coords, self.control_name
        ).float()
        times = batch_size if len(pictures) == 1 else num_images_per_prompt
        pictures = pictures.repeat_interleave(times, dim=0).to(device, dtype)
        return torch.cat([pictures] * 2) if do_classifier_free_guidance and not guess_mode else pictures
