"""Editing by two prompts, with the noise of the picture itself (Wu and De la Torre, 2023, "CycleDiffusion")."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from suffuse.diffusion.conditioning import Conditioning
from suffuse.diffusion.cycle import CycleStep, SourceAndTarget
from suffuse.errors import InputError
from suffuse.noise import Generators, Seeds, randn_tensor
from suffuse.pipelines.arguments import recipe
from suffuse.pipelines.features import BesidePicture
from suffuse.pipelines.saved_run import SavedRun
from suffuse.pipelines.sides import encode_sides, per_branch
from suffuse.pipelines.stable_diffusion.base import StableDiffusionBase
from suffuse.processing.image import Frame, ImageInput
from suffuse.schedulers.ddim import DDIMScheduler

if TYPE_CHECKING:
    from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection
    from typing_extensions import Unpack

    from suffuse.models.autoencoder_kl import AutoencoderKL
    from suffuse.models.unet_2d_condition import UNet2DConditionModel
    from suffuse.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker


class CycleDiffusionPipeline(StableDiffusionBase):
    """Pictures from a picture, a prompt that tells what it shows, and one that tells what it should show."""

    _callback_tensor_inputs = ["latents", "prompt_embeds"]
    _scheduler_settings = {"steps_offset": 1}
    _only_here = ("image_encoder",)

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: DDIMScheduler,
        safety_checker: StableDiffusionSafetyChecker | None,
        feature_extractor: CLIPImageProcessor | None,
        requires_safety_checker: bool = True,
        image_encoder: CLIPVisionModelWithProjection | None = None,
    ) -> None:
        checker = (safety_checker, feature_extractor, image_encoder, requires_safety_checker)
        super().__init__(vae, text_encoder, tokenizer, unet, scheduler, *checker)

    def check_call(self, arguments: dict[str, Any]) -> None:
        """Raise `InputError` unless the scheduler draws noise that can be given, and the arguments go together."""
        super().check_call(arguments)
        if not isinstance(self.scheduler, DDIMScheduler):
            remedy = "pipe.scheduler = suffuse.DDIMScheduler.from_config(pipe.scheduler.config)"
            raise InputError(f"{type(self).__name__} steps by DDIM", found=type(self.scheduler).__name__, remedy=remedy)
        if arguments["source_prompt"] is None:
            raise InputError("source_prompt is missing", remedy="say what the picture shows")

    @recipe
    def __call__(
        self,
        prompt: str | list[str] | None,
        source_prompt: str | list[str],
        image: ImageInput | None = None,
        strength: float = 0.8,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        source_guidance_scale: float = 1,
        num_images_per_prompt: int = 1,
        eta: float = 0.1,
        generator: Generators = None,
        prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback: Callable[..., Any] | None = None,
        callback_steps: int | None = 1,
        cross_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int | None = None,
        ip_adapter_image: ImageInput | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        seed: Seeds = None,
        save_run: str | os.PathLike[str] | None = None,
        resume: str | os.PathLike[str] | SavedRun | None = None,
        **values: Unpack[BesidePicture],
    ) -> Any:
        """Redraw pictures as prompts say, and keep what both prompts leave as it is.

        Returns:
            `StableDiffusionPipelineOutput(images, nsfw_content_detected)`, or the same as a tuple.

        Raises:
            InputError, LimitError: An argument is not what it may be; no generator was used.
            NonFiniteError: The numbers overflowed; says where, and what to do.
        """
        run = self._run
        run.guidance = guidance = SourceAndTarget(self.guidance_for(guidance_scale), source_guidance_scale)
        pictures = self.image_processor.preprocess(image)
        further = self.further(Frame(*self.size_of(pictures)))
        way, steps = self.way()
        told = self.encode_both()
        batch, dtype = told.batch // 2, self.unet.dtype
        clean = self.clean(pictures, batch, dtype)
        noise = randn_tensor(clean.shape, generator, self._execution_device, dtype)
        guidance.source = run.scheduler.add_noise(clean, noise, way[:1].repeat(batch))
        advance = partial(CycleStep, clean=clean)
        made = self.denoise(self.unet, told, guidance.source, way, steps, [*self.conditioners(told), *further], advance=advance)
        return self.finish(made, dtype)

    def encode_both(self) -> Conditioning:
        """The prompts of source and target, one behind the other in each branch."""
        sides = encode_sides(self, [{"prompt": self._run.arguments["source_prompt"], "prompt_embeds": None}, {}])
        pairs = zip(*map(per_branch, sides), strict=True)
        joined = torch.cat([both for pair in pairs for both in pair])
        further = {
            branch: {name: torch.cat([side.further[branch][name] for side in sides]) for name in told}
            for branch, told in sides[0].further.items()
        }
        return Conditioning(2 * sides[0].batch, sides[0].layout, {"prompt_embeds": joined}, further)
