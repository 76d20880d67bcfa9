"""Twice as large, in latent space: a UNet, parametrized as by Karras et al. (2022, table 1), sees the small latents enlarged.

It is told log(sigma) / 4 for a timestep and, with it, the prompt's one vector; the last of its channels is not used.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from suffuse.diffusion.advance import guided_step_of
from suffuse.diffusion.conditioning import Channels, Conditioning, Denoiser, ModelCall, text
from suffuse.diffusion.guidance import ClassifierFreeGuidance
from suffuse.diffusion.latents import repeats
from suffuse.diffusion.loop import Step
from suffuse.diffusion.prompts import encode_text_and_end
from suffuse.errors import InputError
from suffuse.noise import Generators, Seeds
from suffuse.pipelines.arguments import check_shape, prompt_count, recipe
from suffuse.pipelines.features import Guided, guidance_of
from suffuse.pipelines.pipeline import ImagePipelineOutput
from suffuse.pipelines.saved_run import SavedRun
from suffuse.pipelines.stable_diffusion.base import StableDiffusionBase, check_channels
from suffuse.processing.image import ImageInput, VaeImageProcessor
from suffuse.schedulers.scheduler import SchedulerMixin

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer
    from typing_extensions import Unpack

    from suffuse.models.autoencoder_kl import AutoencoderKL
    from suffuse.models.unet_2d_condition import UNet2DConditionModel

LEVEL = 64
"""How many ones, and zeros, tell the UNet that there is no noise in what it sees."""


@dataclass
class SigmaAndVector:
    """Tell the UNet the noise level in its own way, and the prompt's one vector."""

    scheduler: SchedulerMixin

    def __call__(self, call: ModelCall, step: Step) -> None:
        """Replace the timestep, and add the vector to it."""
        call.timestep = torch.log(sigma_of(self.scheduler, step)) * 0.25
        call.kwargs["timestep_cond"] = call.conditioning.select("noise_and_text", call.branches)


class Preconditioned(Denoiser):
    """Predictions of noise, of a model that predicts in the parametrization of Karras et al. (2022, table 1)."""

    def __call__(self, step: Step, branches: tuple[str, ...], latents: Tensor | None = None) -> dict[str, Tensor]:
        """Predictions by branch, for the latents of the step or those given instead."""
        latents, sigma = step.latents if latents is None else latents, sigma_of(self.scheduler, step)
        skipped = 1 / (sigma**2 + 1) * latents
        scale = self.scheduler.scale_model_input(sigma, step.timestep)
        return {branch: skipped + scale * made[:, :-1] for branch, made in super().__call__(step, branches, latents).items()}


def sigma_of(scheduler: Any, step: Step) -> Tensor:
    """The noise level of a step, 0-dimensional."""
    return scheduler.sigmas[step.index]


class StableDiffusionLatentUpscalePipeline(StableDiffusionBase):
    """Pictures, or latents of Stable Diffusion, twice as large."""

    model_cpu_offload_seq = "text_encoder->unet->vae"
    _optional_components = []
    _callback_tensor_inputs = ["latents", "prompt_embeds"]
    _told_by_text = ()

    safety_checker = feature_extractor = None

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
    ) -> None:
        components = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer, "unet": unet, "scheduler": scheduler}
        self.register_modules(**components)
        check_channels(components, type(self))
        self.vae_scale_factor = 2 ** (len(self.vae.config.block_out_channels) - 1) if self.vae is not None else 8
        self.image_processor = VaeImageProcessor(
            vae_scale_factor=self.vae_scale_factor, vae_latent_channels=self.latent_channels, resample="bicubic"
        )

    @classmethod
    def input_channels(cls, latents: int) -> tuple[int, ...]:
        """Latents, and the small ones enlarged."""
        return (2 * latents,)

    def pictures_of(self, arguments: dict[str, Any]) -> int:
        """How many pictures a call makes at once."""
        return prompt_count(arguments)

    @recipe
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: ImageInput | None = None,
        num_inference_steps: int = 75,
        guidance_scale: float = 9.0,
        negative_prompt: str | list[str] | None = None,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback: Callable[..., Any] | None = None,
        callback_steps: int = 1,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        seed: Seeds = None,
        save_run: str | os.PathLike[str] | None = None,
        resume: str | os.PathLike[str] | SavedRun | None = None,
        **values: Unpack[Guided],
    ) -> Any:
        """Draw pictures twice as large. With a `guidance_scale` of 0 the prompt is not read.

        Returns:
            `ImagePipelineOutput(images)`, or the same as a tuple.

        Raises:
            InputError, LimitError: An argument is not what it may be; no generator was used.
            NonFiniteError: The numbers overflowed; says where, and what to do.
        """
        run = self._run
        if not hasattr(run.scheduler, "sigmas"):
            raise InputError(f"{type(run.scheduler).__name__} has no sigmas", remedy="pipe.scheduler = EulerDiscreteScheduler(…)")
        run.guidance = guidance_of(self, ClassifierFreeGuidance(guidance_scale))
        pictures = self.image_processor.preprocess(image)
        way, steps = self.way()
        conditioning = self.encode()
        batch, dtype = conditioning.batch, conditioning.tensors["prompt_embeds"].dtype
        repeats(batch, pictures, "image")
        factor = 1 if pictures.shape[1] == self.latent_channels else self.vae_scale_factor
        shape = (batch, self.latent_channels, *(2 * (edge // factor) for edge in pictures.shape[-2:]))
        self.check_noise(shape)

        # The generator is spent on the picture, then on the latents.
        small = self.clean(pictures, batch, dtype)
        conditioning.share(enlarged=F.interpolate(small, scale_factor=2, mode="nearest"))
        noisy = self.make_noise(shape, dtype) * run.scheduler.init_noise_sigma
        conditioners = [text, SigmaAndVector(run.scheduler), Channels(["enlarged"])]
        latents = self.denoise(self.unet, conditioning, noisy, way, steps, conditioners, advance=guided_step_of(Preconditioned))
        return self.finish(latents, dtype)

    def encode(self) -> Conditioning:
        """The prompts of the run, with their one vector each, joined over the branches its guidance asks for."""
        run, given = self._run, self._run.arguments
        states, vectors = given["prompt_embeds"], given["pooled_prompt_embeds"]
        if states is None:
            asked = given["prompt"] if isinstance(given["prompt"], list) else [given["prompt"]]
            states, vectors = self.read([""] * len(asked) if run.guidance.scale == 0 else asked)
        tensors = {"cond": (states, vectors)}
        if self.do_classifier_free_guidance:
            told = given["negative_prompt_embeds"], given["negative_pooled_prompt_embeds"]
            if told[0] is None:
                negative = given["negative_prompt"]
                told = self.read(negative if isinstance(negative, list) else [negative or ""] * len(states))
            check_shape("negative_prompt_embeds", told[0], tuple(states.shape))
            tensors["uncond"] = told
        embeds, pooled = (
            torch.cat([tensors[branch][part] for branch in run.guidance.branches]).to(self._execution_device, self.unet.dtype)
            for part in (0, 1)
        )
        level = torch.cat([pooled.new_ones(len(pooled), LEVEL), pooled.new_zeros(len(pooled), LEVEL)], dim=1)
        joined = {"prompt_embeds": embeds, "noise_and_text": torch.cat([level, pooled], dim=1)}
        return Conditioning(len(states), run.guidance.branches, joined)

    def read(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Texts as the UNet is told them: states (texts, tokens, width), and one vector each (texts, width).

        Raises:
            InputError: There is no text encoder.
        """
        if self.text_encoder is None or self.tokenizer is None:
            raise InputError("this pipeline has no text encoder", remedy="pass prompt_embeds and pooled_prompt_embeds")
        words = self.maybe_convert_prompt(texts, self.tokenizer)
        return encode_text_and_end(words, self.tokenizer, self.text_encoder, self._execution_device)

    def output(self, images: Any, flagged: list[bool] | None) -> Any:
        """The result of a call, as an output object or a plain tuple."""
        return ImagePipelineOutput(images) if self._run.arguments["return_dict"] else (images,)
