"""One thing in a picture made another: the picture is inverted, and drawn again with other words (Parmar et al., 2023)."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from suffuse.diffusion.advance import GuidedStep, step_options
from suffuse.diffusion.attention_control import formed
from suffuse.diffusion.conditioning import Conditioner, Conditioning, Denoiser
from suffuse.diffusion.decoders import decode_latents
from suffuse.diffusion.hooks import CountNoise
from suffuse.diffusion.inversion import LikeNoise
from suffuse.diffusion.loop import denoise
from suffuse.diffusion.pix2pix_zero import CrossAttentionGuidance, Looked, Recorded
from suffuse.diffusion.prompts import encode_text
from suffuse.errors import InputError
from suffuse.noise import Generators, Seeds
from suffuse.outputs import BaseOutput
from suffuse.pipelines.arguments import check_prompts, check_shape, prompt_count, recipe
from suffuse.pipelines.features import BesideGuidance
from suffuse.pipelines.saved_run import SavedRun
from suffuse.pipelines.stable_diffusion.base import StableDiffusionBase
from suffuse.processing.image import Frame, ImageInput
from suffuse.schedulers.prediction import EPSILON

if TYPE_CHECKING:
    from transformers import BlipForConditionalGeneration, BlipProcessor, CLIPImageProcessor, CLIPTextModel, CLIPTokenizer
    from typing_extensions import Unpack

    from suffuse.models.autoencoder_kl import AutoencoderKL
    from suffuse.models.unet_2d_condition import UNet2DConditionModel
    from suffuse.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from suffuse.schedulers.scheduler import SchedulerMixin

CAPTION = "a photography of"
"""How a caption begins."""


@dataclass
class Pix2PixInversionPipelineOutput(BaseOutput):
    """The noise that pictures come from, (batch, channels, rows, columns), and what it shows."""

    latents: Tensor
    images: Any


class StableDiffusionPix2PixZeroPipeline(StableDiffusionBase):
    """Pictures in which one thing becomes another: `generate_caption`, `invert`, `get_embeds`, and the call."""

    model_cpu_offload_seq = "text_encoder->unet->vae"
    _optional_components = ["safety_checker", "feature_extractor", "caption_generator", "caption_processor", "inverse_scheduler"]
    _exclude_from_cpu_offload = ["safety_checker", "caption_generator"]
    _scheduler_settings = {}

    inverse_scheduler: Any
    caption_generator: Any
    caption_processor: Any

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        feature_extractor: CLIPImageProcessor | None,
        safety_checker: StableDiffusionSafetyChecker | None,
        inverse_scheduler: SchedulerMixin | None,
        caption_generator: BlipForConditionalGeneration | None,
        caption_processor: BlipProcessor | None,
        requires_safety_checker: bool = True,
    ) -> None:
        checker = (safety_checker, feature_extractor, None, requires_safety_checker)
        super().__init__(vae, text_encoder, tokenizer, unet, scheduler, *checker)
        self.register_modules(
            inverse_scheduler=inverse_scheduler, caption_generator=caption_generator, caption_processor=caption_processor
        )

    # ------------------------------------------------------------ arguments

    def needed_components(self, arguments: dict[str, Any]) -> list[str]:
        """What a call or an inversion cannot do without."""
        return [*super().needed_components(arguments), *(["inverse_scheduler"] if "lambda_kl" in arguments else [])]

    def check_call(self, arguments: dict[str, Any]) -> None:
        """Raise `InputError` unless the arguments of a call or an inversion go together."""
        if "lambda_kl" in arguments:
            check_prompts(arguments)
            needed = {"image": "the picture"}
        else:
            super().check_call(arguments)
            needed = dict.fromkeys(("source_embeds", "target_embeds"), "what pipe.get_embeds([…]) returns")
        for name, remedy in needed.items():
            if arguments[name] is None:
                raise InputError(f"{name} is missing", remedy=f"pass {name}=…: {remedy}")

    def pictures_of(self, arguments: dict[str, Any]) -> int:
        """How many pictures a call makes, or an inversion inverts."""
        return prompt_count(arguments) * arguments.get("num_images_per_prompt", 1)

    # ------------------------------------------------------------ words

    @torch.no_grad()
    def generate_caption(self, images: Any) -> str:
        """What a picture shows, as the caption generator says it.

        Raises:
            InputError: The pipeline has none.
        """
        if self.caption_generator is None or self.caption_processor is None:
            raise InputError(
                "this pipeline has no caption_generator and caption_processor",
                remedy="load it with transformers' BlipForConditionalGeneration and BlipProcessor, or write the prompt yourself",
            )
        told = self.caption_processor(images, CAPTION, return_tensors="pt")
        told = told.to(device=self.caption_generator.device, dtype=self.caption_generator.dtype)
        said = self.caption_generator.generate(**told, max_new_tokens=128)
        return self.caption_processor.batch_decode(said, skip_special_tokens=True)[0]

    @torch.no_grad()
    def get_embeds(self, prompt: list[str], batch_size: int = 16) -> Tensor:
        """The mean of what the text encoder makes of texts about one thing: (1, tokens, width).

        Raises:
            InputError: There are none, or the pipeline has no text encoder.
        """
        if not prompt or isinstance(prompt, str):
            raise InputError("get_embeds needs a list of texts", found=repr(prompt), expected="at least one text")
        if self.text_encoder is None or self.tokenizer is None:
            raise InputError("this pipeline has no text encoder", remedy="load it with its text_encoder and tokenizer")
        parts = (prompt[start : start + batch_size] for start in range(0, len(prompt), batch_size))
        states = [encode_text(part, self.tokenizer, self.text_encoder, self._execution_device) for part in parts]
        return torch.cat(states).mean(0)[None]

    def construct_direction(self, embs_source: Tensor, embs_target: Tensor) -> Tensor:
        """From one thing to another: (1, tokens, width) of (texts, tokens, width) of each."""
        return (embs_target.mean(0) - embs_source.mean(0)).unsqueeze(0)

    # ------------------------------------------------------------ to noise

    @recipe
    def invert(
        self,
        prompt: str | list[str] | None = None,
        image: ImageInput | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        cross_attention_guidance_amount: float = 0.1,
        output_type: str = "pil",
        return_dict: bool = True,
        callback: Callable[..., Any] | None = None,
        callback_steps: int | None = 1,
        cross_attention_kwargs: dict[str, Any] | None = None,
        lambda_auto_corr: float = 20.0,
        lambda_kl: float = 20.0,
        num_reg_steps: int = 5,
        num_auto_corr_rolls: int = 5,
        seed: Seeds = None,
    ) -> Any:
        """Go from pictures to the noise that they come from; `latents` and `cross_attention_guidance_amount` are not used.

        Returns:
            `Pix2PixInversionPipelineOutput(latents, images)`, or the same as a tuple; `latents` are those of the call.

        Raises:
            InputError: An argument is not what it may be; no generator was used.
            NonFiniteError: The numbers overflowed; says where, and what to do.
        """
        run = self._run
        run.arguments["num_images_per_prompt"] = 1
        run.guidance = LikeNoise(
            guidance_scale,
            epsilon=self.get_epsilon,
            steps=num_reg_steps,
            correlation=lambda_auto_corr,
            divergence=lambda_kl,
            rolls=num_auto_corr_rolls,
            generator=generator,
        )
        run.scheduler = self.inverse_scheduler.fork()
        self.inverse_scheduler.follow(run.scheduler)
        pictures = self.image_processor.preprocess(image)
        steps = run.set_timesteps(self._execution_device)
        clean = self.clean(pictures, prompt_count(run.arguments), self.vae.dtype)
        conditioning = self.encode()
        conditioners = [*self.conditioners(conditioning), formed(self.unet)]
        inverted = self.denoise(self.unet, conditioning, clean, run.scheduler.timesteps, steps, conditioners)
        shown = self.image_processor.postprocess(decode_latents(self.vae, inverted), output_type)
        return Pix2PixInversionPipelineOutput(inverted, shown) if return_dict else (inverted, shown)

    def get_epsilon(self, model_output: Tensor, sample: Tensor, timestep: int | Tensor) -> Tensor:
        """The noise in a sample, whatever the model predicts: of the shape of the sample."""
        alpha, kind = self.inverse_scheduler.alphas_cumprod[int(timestep)], self.inverse_scheduler.config.prediction_type
        return EPSILON[kind](sample, model_output, alpha**0.5, (1 - alpha) ** 0.5)

    # ------------------------------------------------------------ and back

    @recipe
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        source_embeds: Tensor | None = None,
        target_embeds: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        cross_attention_guidance_amount: float = 0.1,
        output_type: str = "pil",
        return_dict: bool = True,
        callback: Callable[..., Any] | None = None,
        callback_steps: int | None = 1,
        cross_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        seed: Seeds = None,
        save_run: str | os.PathLike[str] | None = None,
        resume: str | os.PathLike[str] | SavedRun | None = None,
        **values: Unpack[BesideGuidance],
    ) -> Any:
        """Draw what prompts say, and then once more with the one thing made the other; callbacks see the second time.

        Returns:
            `StableDiffusionPipelineOutput(images, nsfw_content_detected)`, or the same as a tuple.

        Raises:
            InputError, LimitError: An argument is not what it may be; no generator was used.
            NonFiniteError: The numbers overflowed; says where, and what to do.
        """
        run = self._run
        run.guidance = guidance = CrossAttentionGuidance(guidance_scale, amount=cross_attention_guidance_amount)
        rows, columns = self.default_size(height, width)
        further = self.further(Frame(rows, columns))
        way, steps = self.way()
        conditioning = self.encode()
        edited, dtype = self.edited(conditioning), conditioning.tensors["prompt_embeds"].dtype
        conditioners = [*self.conditioners(conditioning), *further, formed(self.unet)]
        noise = self.make_noise(self.latent_shape(conditioning.batch, rows, columns), dtype) * run.scheduler.init_noise_sigma
        guidance.references = self.references(conditioning, noise, way, conditioners)
        return self.finish(self.denoise(self.unet, edited, noise, way, steps, conditioners), dtype)

    def edited(self, conditioning: Conditioning) -> Conditioning:
        """The conditioning of a run, with the conditional branch told of the other thing."""
        source, target = (self._run.arguments[name] for name in ("source_embeds", "target_embeds"))
        told = conditioning.tensors["prompt_embeds"]
        for name, states in (("source_embeds", source), ("target_embeds", target)):
            check_shape(name, states, (len(states), *told.shape[1:]))
        direction = self.construct_direction(source, target).to(told)
        parts = zip(conditioning.layout, told.chunk(len(conditioning.layout)), strict=True)
        joined = torch.cat([part + direction if branch == "cond" else part for branch, part in parts])
        return Conditioning(conditioning.batch, conditioning.layout, {**conditioning.tensors, "prompt_embeds": joined})

    def references(self, conditioning: Conditioning, noise: Tensor, way: Tensor, conditioners: list[Conditioner]) -> list[Looked]:
        """Where the UNet looks for words while it draws what the prompts say, for each step."""
        run, arguments = self._run, self._run.arguments
        scheduler, recorded = run.scheduler.fork(), Recorded(run.guidance.scale)
        options = step_options(scheduler, eta=arguments["eta"], generator=arguments["generator"])
        advance = GuidedStep(Denoiser(self.unet, scheduler, conditioning, conditioners), recorded, scheduler, options)
        denoise(noise, way, advance, [CountNoise(arguments["generator"])])
        return recorded.steps
