"""Four times larger: the UNet of Stable Diffusion 2 sees the small picture, noised a little, beside latents of its size.

How much noise is told as a class (conditioning augmentation: Ho et al., 2022, "Cascaded diffusion models", section 4).
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from suffuse.configuration import check_type
from suffuse.diffusion.conditioning import Channels, ModelCall
from suffuse.diffusion.latents import repeats
from suffuse.diffusion.loop import Step
from suffuse.errors import InputError
from suffuse.noise import Generators, Seeds, randn_tensor
from suffuse.pipelines.arguments import check_batch, recipe
from suffuse.pipelines.features import Guided
from suffuse.pipelines.saved_run import SavedRun
from suffuse.pipelines.stable_diffusion.base import StableDiffusionBase
from suffuse.processing.image import ImageInput, VaeImageProcessor

if TYPE_CHECKING:
    from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer
    from typing_extensions import Unpack

    from suffuse.models.autoencoder_kl import AutoencoderKL
    from suffuse.models.unet_2d_condition import UNet2DConditionModel
    from suffuse.schedulers.ddpm import DDPMScheduler
    from suffuse.schedulers.scheduler import SchedulerMixin

SCALING_FACTOR = 0.08333
"""Of the autoencoder that was trained for this; its first configurations did not say."""


def noise_level_as_class(call: ModelCall, step: Step) -> None:
    """Tell the UNet how much noise there is in the picture it sees."""
    call.kwargs["class_labels"] = call.conditioning.select("noise_level", call.branches)


class StableDiffusionUpscalePipeline(StableDiffusionBase):
    """Pictures four times larger, with what prompts say."""

    model_cpu_offload_seq = "text_encoder->unet->vae"
    _optional_components = ["watermarker", "safety_checker", "feature_extractor"]
    _scheduler_settings = {}
    _upcast_types = {"encode": (), "decode": (torch.float16,)}

    low_res_scheduler: Any
    watermarker: Any

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        low_res_scheduler: DDPMScheduler,
        scheduler: SchedulerMixin,
        safety_checker: Any | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
        watermarker: Any | None = None,
        max_noise_level: int = 350,
    ) -> None:
        check_type(type(self).__name__, "max_noise_level", max_noise_level, int)
        self.set_up(
            vae=None if vae is None else corrected_autoencoder(vae),  # pyright: ignore[reportUnnecessaryComparison]
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            low_res_scheduler=low_res_scheduler,
            scheduler=scheduler,
            safety_checker=safety_checker,
            watermarker=watermarker,
            feature_extractor=feature_extractor,
        )
        self.image_processor = VaeImageProcessor(
            vae_scale_factor=self.vae_scale_factor, vae_latent_channels=self.latent_channels, resample="bicubic"
        )
        self.register_to_config(max_noise_level=max_noise_level)

    @classmethod
    def input_channels(cls, latents: int) -> tuple[int, ...]:
        """Latents, and the colours of the picture."""
        return (latents + 3,)

    def needed_components(self, arguments: dict[str, Any]) -> list[str]:
        """Those of Stable Diffusion, and what noises the picture."""
        return [*super().needed_components(arguments), "low_res_scheduler"]

    def check_call(self, arguments: Mapping[str, Any]) -> None:
        """Raise `InputError` unless prompts go together, and the noise is no more than the UNet was trained for."""
        super().check_call(dict(arguments))
        level, most = arguments["noise_level"], self.config["max_noise_level"]
        if level > most:
            raise InputError(f"noise_level={level} is more than this model was trained for", expected=f"at most {most}")

    @recipe
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: ImageInput | None = None,
        num_inference_steps: int = 75,
        guidance_scale: float = 9.0,
        noise_level: int = 20,
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
        callback_steps: int = 1,
        cross_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        seed: Seeds = None,
        save_run: str | os.PathLike[str] | None = None,
        resume: str | os.PathLike[str] | SavedRun | None = None,
        **values: Unpack[Guided],
    ) -> Any:
        """Draw pictures four times larger.

        Returns:
            `StableDiffusionPipelineOutput(images, nsfw_content_detected)`, or the same as a tuple.

        Raises:
            InputError, LimitError: An argument is not what it may be; no generator was used.
            NonFiniteError: The numbers overflowed; says where, and what to do.
        """
        run = self._run
        run.guidance = self.guidance_for(guidance_scale)
        pictures = self.image_processor.preprocess(image)
        way, steps = self.way()
        conditioning = self.encode()
        batch, dtype = conditioning.batch, conditioning.tensors["prompt_embeds"].dtype
        shape = (batch, self.latent_channels, *pictures.shape[-2:])
        self.check_noise(shape)

        # The generator is spent on the picture, then on the latents.
        seen = self.noised_a_little(pictures.to(self._execution_device, dtype), batch, noise_level)
        conditioning.share(image=seen, noise_level=torch.full((batch,), noise_level, device=seen.device))
        conditioners = [*self.conditioners(conditioning), noise_level_as_class, Channels(["image"])]
        noisy = self.make_noise(shape, dtype) * run.scheduler.init_noise_sigma
        return self.finish(self.denoise(self.unet, conditioning, noisy, way, steps, conditioners), dtype)

    def noised_a_little(self, pictures: Tensor, batch: int, noise_level: int) -> Tensor:
        """Pictures at a noise level, for each of the batch.

        Raises:
            InputError: Their number does not divide the batch.
        """
        generator, times = self._run.arguments["generator"], repeats(batch, pictures, "image")
        check_batch("generator", generator, batch)
        if isinstance(generator, list):
            pictures, times = torch.cat([pictures] * times), 1
        noise = randn_tensor(pictures.shape, generator=generator, device=pictures.device, dtype=pictures.dtype)
        level = torch.tensor([noise_level], device=pictures.device)
        return torch.cat([self.low_res_scheduler.add_noise(pictures, noise, level)] * times)

    def run_safety_checker(self, image: Any, device: torch.device, dtype: torch.dtype) -> tuple[Any, list[bool] | None]:
        """Blank the pictures that the safety checker objects to; says which they are (None: no checker)."""
        if self.safety_checker is None:
            return image, None
        shown = self.image_processor.postprocess(image, output_type="pil")
        features = self.feature_extractor(shown, return_tensors="pt").to(device)
        # A checker may look for watermarks too, and say a third thing.
        checked = self.safety_checker(images=image, clip_input=features.pixel_values.to(dtype))
        return checked[0], checked[1]

    def output(self, images: Any, flagged: list[bool] | None) -> Any:
        """The result of a call, with the watermark if there is one."""
        if self.watermarker is not None and self._run.arguments["output_type"] == "pil":
            images = self.watermarker.apply_watermark(images)
        return super().output(images, flagged)

    def upcast_vae(self) -> None:
        """Make the autoencoder float32 for good; calls that need it in float32 lend it the weights, and do not need this."""
        self.vae.to(dtype=torch.float32)


def corrected_autoencoder(vae: AutoencoderKL) -> AutoencoderKL:
    """The autoencoder itself, or one with its weights and the scale that pictures were encoded at where it says another."""
    if vae.config.scaling_factor == SCALING_FACTOR:
        return vae
    warnings.warn(
        f"vae/config.json: scaling_factor {vae.config.scaling_factor} is taken for {SCALING_FACTOR}, as this upscaler needs it; "
        "correct it there",
        stacklevel=3,
    )
    other = copy.copy(vae)
    other.register_to_config(scaling_factor=SCALING_FACTOR)
    return other
