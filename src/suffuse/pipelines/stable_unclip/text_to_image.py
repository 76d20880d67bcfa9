"""Text to image with Stable unCLIP: a prior imagines CLIP's vector of the picture first (Ramesh et al., 2022)."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from suffuse.diffusion.advance import GuidedStep, step_options
from suffuse.diffusion.conditioning import Conditioning, Denoiser, ModelCall
from suffuse.diffusion.guidance import ClassifierFreeGuidance
from suffuse.diffusion.hooks import OnWholeSteps
from suffuse.diffusion.loop import Step, denoise
from suffuse.diffusion.prompts import encode_text_and_project, listed
from suffuse.errors import InputError
from suffuse.noise import Generators, Seeds, randn_tensor
from suffuse.pipelines.arguments import check_shape, recipe
from suffuse.pipelines.features import Guided
from suffuse.pipelines.saved_run import SavedRun
from suffuse.pipelines.stable_diffusion.base import check_same
from suffuse.pipelines.stable_unclip.vectors import FromVectors

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
    from typing_extensions import Unpack

    from suffuse.models.autoencoder_kl import AutoencoderKL
    from suffuse.models.prior_transformer import PriorTransformer
    from suffuse.models.unet_2d_condition import UNet2DConditionModel
    from suffuse.pipelines.stable_unclip.image_normalizer import StableUnCLIPImageNormalizer
    from suffuse.schedulers.scheduler import SchedulerMixin

TOLD = ("proj_embedding", "encoder_hidden_states", "attention_mask")
"""What a prior is told of a text, by its keywords."""


def tell_prior(call: ModelCall, step: Step) -> None:
    """Hand over the text."""
    call.kwargs |= {name: call.conditioning.select(name, call.branches) for name in TOLD}


class StableUnCLIPPipeline(FromVectors):
    """Pictures from prompts, by way of what CLIP would see in them."""

    model_cpu_offload_seq = "text_encoder->prior_text_encoder->unet->vae"
    _exclude_from_cpu_offload = ["prior", "image_normalizer"]

    prior_tokenizer: Any
    prior_text_encoder: Any
    prior: Any
    prior_scheduler: Any

    def __init__(
        self,
        prior_tokenizer: CLIPTokenizer,
        prior_text_encoder: CLIPTextModelWithProjection,
        prior: PriorTransformer,
        prior_scheduler: SchedulerMixin,
        image_normalizer: StableUnCLIPImageNormalizer,
        image_noising_scheduler: SchedulerMixin,
        tokenizer: CLIPTokenizer,
        text_encoder: CLIPTextModel,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL,
    ) -> None:
        reading = {"prior_tokenizer": prior_tokenizer, "prior_text_encoder": prior_text_encoder}
        imagining = {"prior": prior, "prior_scheduler": prior_scheduler}
        noising = {"image_normalizer": image_normalizer, "image_noising_scheduler": image_noising_scheduler}
        told = {"tokenizer": tokenizer, "text_encoder": text_encoder}
        self.set_up(**reading, **imagining, **noising, **told, unet=unet, scheduler=scheduler, vae=vae)
        check_widths(self)

    def needed_components(self, arguments: dict[str, Any]) -> list[str]:
        """Those of drawing from vectors, and what imagines them."""
        return [*super().needed_components(arguments), *(name for name in self.component_names() if name.startswith("prior"))]

    def check_call(self, arguments: dict[str, Any]) -> None:
        """Raise `InputError` unless the arguments go together, and there are words for the prior."""
        super().check_call(arguments)
        if arguments["prompt"] is None:
            raise InputError("prompt_embeds are given and no prompt", found="a prior that reads words", remedy="pass prompt=…")

    @recipe
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 20,
        guidance_scale: float = 10.0,
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
        noise_level: int = 0,
        prior_num_inference_steps: int = 25,
        prior_guidance_scale: float = 4.0,
        prior_latents: Tensor | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        seed: Seeds = None,
        save_run: str | os.PathLike[str] | None = None,
        resume: str | os.PathLike[str] | SavedRun | None = None,
        **values: Unpack[Guided],
    ) -> Any:
        """Imagine what a picture of the prompt shows, and draw it.

        The older kind of callback is told of the steps of the prior first, then of those of the picture. A run that is gone on
        with imagines once more what it did.

        Returns:
            `ImagePipelineOutput(images)`, or the same as a tuple.

        Raises:
            InputError, LimitError: An argument is not what it may be; no generator was used.
            NonFiniteError: The numbers overflowed; says where, and what to do.
        """
        self._run.guidance = self.guidance_for(guidance_scale)
        return self.draw_seen(*self.default_size(height, width), self.imagined)

    def prepare_prior_extra_step_kwargs(self, generator: Generators, eta: float) -> dict[str, Any]:
        """Those of `eta` and `generator` that the `step` of the prior's scheduler takes."""
        return step_options(self.prior_scheduler, eta=eta, generator=generator)

    def imagined(self, batch: int) -> Tensor:
        """What the prior imagines of the prompts of the call, noised, (batch, 2 · size).

        Args:
            batch: Pictures, as many for each prompt.

        Raises:
            InputError: `prior_latents` have another shape.
        """
        given = self._run.arguments
        shape = (batch, self.prior.config.embedding_dim)
        check_shape("prior_latents", given["prior_latents"], shape)
        scheduler, guidance = self.prior_scheduler.fork(), ClassifierFreeGuidance(given["prior_guidance_scale"])
        steps, generator = given["prior_num_inference_steps"], given["generator"]
        scheduler.set_timesteps(steps, device=self._execution_device)
        conditioning = self.told_prior(batch, guidance.branches)
        dtype, noise = conditioning.tensors["proj_embedding"].dtype, given["prior_latents"]
        if noise is None:
            noise = randn_tensor(shape, generator, self._execution_device, dtype)
        noisy = noise.to(self._execution_device, dtype) * scheduler.init_noise_sigma
        options = self.prepare_prior_extra_step_kwargs(generator, given["eta"])
        take = GuidedStep(Denoiser(self.prior, scheduler, conditioning, [tell_prior]), guidance, scheduler, options)

        def tell(step: Step) -> None:
            bar.update()
            if given["callback"] is not None and step.index % given["callback_steps"] == 0:
                given["callback"](step.index, step.timestep, step.latents)

        with self.progress_bar(total=len(scheduler.timesteps)) as bar:
            vectors = denoise(noisy, scheduler.timesteps, take, [OnWholeSteps(1, len(scheduler.timesteps), tell)])
        vectors = self.prior.post_process_latents(vectors)
        return self.noise_image_embeddings(vectors, given["noise_level"], generator=generator)

    def told_prior(self, batch: int, branches: tuple[str, ...]) -> Conditioning:
        """What the prior is told, for each branch."""
        prompts = listed(self._run.arguments["prompt"])
        reader = self.prior_tokenizer, self.prior_text_encoder, self._execution_device
        said = {"cond": prompts, "uncond": [""] * len(prompts)}
        made = [encode_text_and_project(said[branch], *reader) for branch in branches]
        joined = (torch.cat(parts) for parts in zip(*made, strict=True))
        times = batch // len(prompts)
        return Conditioning(
            batch, branches, {n: part.repeat_interleave(times, dim=0) for n, part in zip(TOLD, joined, strict=True)}
        )


def check_widths(pipe: StableUnCLIPPipeline) -> None:
    """Raise `ConfigError` unless the vectors that are handed on are as wide as those that are taken."""
    configs = {name: getattr(getattr(pipe, name), "config", None) for name in pipe.component_names()}
    reader, prior, normalizer = configs["prior_text_encoder"], configs["prior"], configs["image_normalizer"]
    if reader is not None and prior is not None:
        told = prior.embedding_proj_dim or prior.embedding_dim
        files = "prior_text_encoder/config.json", "prior/config.json"
        check_same(files[0], "projection_dim", reader.projection_dim, files[1], "embedding_dim", told)
    if normalizer is not None and prior is not None:
        made = prior.clip_embed_dim or prior.embedding_dim
        files = "prior/config.json", "image_normalizer/config.json"
        check_same(files[0], "embedding_dim", made, files[1], "embedding_dim", normalizer.embedding_dim)
