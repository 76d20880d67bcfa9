"""The subject of a picture in another, under control of a third (Li et al., 2023, "BLIP-Diffusion", section 4.4)."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from suffuse.diffusion.control import Control
from suffuse.models.side_by_side import parts_of
from suffuse.noise import Generators, Seeds
from suffuse.pipelines.arguments import recipe
from suffuse.pipelines.blip_diffusion.subject import SubjectDriven
from suffuse.pipelines.controlnet.controls import check_nets
from suffuse.pipelines.features import Guided
from suffuse.pipelines.saved_run import SavedRun

if TYPE_CHECKING:
    from transformers import CLIPTokenizer
    from typing_extensions import Unpack

    from suffuse.models.autoencoder_kl import AutoencoderKL
    from suffuse.models.controlnet import ControlNetModel
    from suffuse.models.unet_2d_condition import UNet2DConditionModel
    from suffuse.pipelines.blip_diffusion.image_processor import BlipImageProcessor
    from suffuse.pipelines.blip_diffusion.qformer import Blip2QFormerModel
    from suffuse.pipelines.blip_diffusion.text_encoder import ContextCLIPTextModel
    from suffuse.schedulers.scheduler import SchedulerMixin


class BlipDiffusionControlNetPipeline(SubjectDriven):
    """Pictures of a subject, from a picture of it, prompts and a control picture."""

    controlnet: Any

    def __init__(
        self,
        tokenizer: CLIPTokenizer,
        text_encoder: ContextCLIPTextModel,
        vae: AutoencoderKL,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        qformer: Blip2QFormerModel,
        controlnet: ControlNetModel,
        image_processor: BlipImageProcessor,
        ctx_begin_pos: int = 2,
        mean: list[float] | None = None,
        std: list[float] | None = None,
    ) -> None:
        super().__init__(tokenizer, text_encoder, vae, unet, scheduler, qformer, image_processor, ctx_begin_pos, mean, std)
        check_nets(unet, parts_of(controlnet))
        self.register_modules(controlnet=controlnet)

    def prepare_control_image(
        self,
        image: Image.Image,
        width: int,
        height: int,
        batch_size: int,
        num_images_per_prompt: int,
        device: torch.device,
        dtype: torch.dtype,
        do_classifier_free_guidance: bool = False,
    ) -> Tensor:
        """Control pictures as the ControlNet sees them: (batch, 3, height, width) in [0, 1].

        Args:
            image: One for all, or one for each prompt.
            width: Columns wanted.
            height: Rows wanted.
            batch_size: How often to repeat one picture.
            num_images_per_prompt: How often to repeat each of several.
            device: Where they are wanted.
            dtype: The type of the net.
            do_classifier_free_guidance: Once more for the unconditional branch.
        """
        pictures = self.image_processor.pixels(image, "condtioning_image", (height, width), normalize=False)
        times = batch_size if len(pictures) == 1 else num_images_per_prompt
        pictures = pictures.repeat_interleave(times, dim=0).to(device, dtype)
        return torch.cat([pictures] * 2) if do_classifier_free_guidance else pictures

    @recipe
    def __call__(
        self,
        prompt: list[str],
        reference_image: Image.Image,
        condtioning_image: Image.Image,
        source_subject_category: list[str],
        target_subject_category: list[str],
        latents: Tensor | None = None,
        guidance_scale: float = 7.5,
        height: int = 512,
        width: int = 512,
        num_inference_steps: int = 50,
        generator: Generators = None,
        neg_prompt: str | None = "",
        prompt_strength: float = 1.0,
        prompt_reps: int = 20,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        seed: Seeds = None,
        save_run: str | os.PathLike[str] | None = None,
        resume: str | os.PathLike[str] | SavedRun | None = None,
        **values: Unpack[Guided],
    ) -> Any:
        """Draw the subject of `reference_image` as prompts say and `condtioning_image` shows.

        Returns:
            `ImagePipelineOutput(images)`, or the same as a tuple.

        Raises:
            InputError, LimitError: An argument is not what it may be; no generator was used.
            NonFiniteError: The numbers overflowed; says where.
        """
        place = (self._execution_device, self.controlnet.dtype)
        pictures = self.prepare_control_image(condtioning_image, width, height, 1, 1, *place)
        return self.draw([Control(self.controlnet, pictures, self._run.scheduler)])
