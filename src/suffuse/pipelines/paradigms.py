"""Text to image, many steps at once (Shih et al., 2023, "ParaDiGMS"): fewer rounds where a device has room for them."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from suffuse.diffusion.hooks import EndWhen
from suffuse.diffusion.parallel import PicardStep, Settling, noise_of_steps, variances
from suffuse.errors import InputError
from suffuse.noise import Generators, Seeds
from suffuse.pipelines.arguments import recipe
from suffuse.pipelines.features import BesideBoxes
from suffuse.pipelines.saved_run import SavedRun
from suffuse.pipelines.stable_diffusion.base import StableDiffusionBase
from suffuse.processing.image import Frame, ImageInput

if TYPE_CHECKING:
    from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection
    from typing_extensions import Unpack

    from suffuse.models.autoencoder_kl import AutoencoderKL
    from suffuse.models.unet_2d_condition import UNet2DConditionModel
    from suffuse.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from suffuse.schedulers.scheduler import SchedulerMixin


class StableDiffusionParadigmsPipeline(StableDiffusionBase):
    """Pictures from prompts, in rounds of many steps.

    Attributes:
        wrapped_unet: What predicts for several steps, `torch.nn.DataParallel(pipe.unet)` for example; the UNet, if None.
    """

    wrapped_unet: nn.Module | None = None
    _only_here = ("image_encoder",)

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        safety_checker: StableDiffusionSafetyChecker | None,
        feature_extractor: CLIPImageProcessor | None,
        requires_safety_checker: bool = True,
        image_encoder: CLIPVisionModelWithProjection | None = None,
    ) -> None:
        checker = (safety_checker, feature_extractor, image_encoder, requires_safety_checker)
        super().__init__(vae, text_encoder, tokenizer, unet, scheduler, *checker)

    def check_call(self, arguments: dict[str, Any]) -> None:
        """Raise `InputError` unless the scheduler can take several steps at once, and the arguments go together."""
        super().check_call(arguments)
        name = type(self.scheduler).__name__
        if not hasattr(self.scheduler, "batch_step_no_noise"):
            remedy = "pipe.scheduler = suffuse.DDIMParallelScheduler.from_config(pipe.scheduler.config)"
            raise InputError(f"{name} cannot take several steps at once", remedy=remedy)
        if arguments["eta"] != 0:
            raise InputError(f"eta={arguments['eta']} is noise that {name} does not draw beforehand", remedy="leave it at 0")

    @recipe
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        parallel: int = 10,
        tolerance: float = 0.1,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback: Callable[..., Any] | None = None,
        callback_steps: int | None = 1,
        cross_attention_kwargs: dict[str, Any] | None = None,
        debug: bool = False,
        clip_skip: int | None = None,
        ip_adapter_image: ImageInput | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        seed: Seeds = None,
        save_run: str | os.PathLike[str] | None = None,
        resume: str | os.PathLike[str] | SavedRun | None = None,
        **values: Unpack[BesideBoxes],
    ) -> Any:
        """Draw what prompts say; callbacks are called after each round, with what is settled.

        Returns:
            `StableDiffusionPipelineOutput(images, nsfw_content_detected)`, or the same as a tuple.

        Raises:
            InputError, LimitError: An argument is not what it may be; no generator was used.
            NonFiniteError: The numbers overflowed; says where, and what to do.
        """
        run, scheduler = self._run, cast(Any, self._run.scheduler)
        run.guidance = state = Settling(self.guidance_for(guidance_scale))
        size = self.default_size(height, width)
        further = self.further(Frame(*size))
        way, steps = self.way()
        variances(scheduler)  # refused before noise is drawn
        conditioning = self.encode()
        shape = self.latent_shape(conditioning.batch, *size)
        noisy = self.make_noise(shape, self.unet.dtype) * scheduler.init_noise_sigma
        noise = None if scheduler._is_ode_scheduler else noise_of_steps(scheduler, noisy, generator)
        state.way = torch.stack([noisy] * (len(way) + 1))
        advance = partial(PicardStep, at_once=parallel, tolerance=tolerance, noise=noise, wide=self.wrapped_unet, exact=debug)
        ended = EndWhen(lambda: state.settled == len(way))
        told = [*self.conditioners(conditioning), *further]
        made = self.denoise(self.unet, conditioning, noisy, way, steps, told, [ended], advance)
        return self.finish(made, self.unet.dtype)
