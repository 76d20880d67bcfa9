"""Text to image with the first latent diffusion model (Rombach et al., 2022, https://arxiv.org/abs/2112.10752, section 4.3)."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from suffuse.diffusion.conditioning import Conditioning, text
from suffuse.diffusion.decoders import decode
from suffuse.diffusion.guidance import ClassifierFreeGuidance
from suffuse.diffusion.prompts import encode_text, listed
from suffuse.errors import InputError
from suffuse.noise import Generators, Seeds
from suffuse.pipelines.arguments import check_pixels, recipe
from suffuse.pipelines.features import Guided, check_features, guidance_of
from suffuse.pipelines.pipeline import DiffusionPipeline
from suffuse.pipelines.saved_run import SavedRun
from suffuse.pipelines.unconditional.base import noise_for, result, trained_size
from suffuse.schedulers.scheduler import SchedulerMixin

if TYPE_CHECKING:
    from transformers import BertTokenizer
    from typing_extensions import Unpack

    from suffuse.models.autoencoder_kl import AutoencoderKL
    from suffuse.models.unet_2d_condition import UNet2DConditionModel
    from suffuse.models.vq_model import VQModel
    from suffuse.pipelines.latent_diffusion.bert import LDMBertModel

TOKENS = 77


@dataclass
class TwoSidedGuidance(ClassifierFreeGuidance):
    """Classifier-free guidance that goes towards the unconditional picture too, at scales below 1."""

    @property
    def branches(self) -> tuple[str, ...]:
        """Names of the branches, in batch order."""
        return ("uncond", "cond") if self.scale != 1 else ("cond",)


class LDMTextToImagePipeline(DiffusionPipeline):
    """Pictures from prompts."""

    model_cpu_offload_seq = "bert->unet->vqvae"

    vqvae: Any
    bert: Any
    tokenizer: Any
    unet: Any

    def __init__(
        self,
        vqvae: VQModel | AutoencoderKL,
        bert: LDMBertModel,
        tokenizer: BertTokenizer,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
    ) -> None:
        self.register_modules(vqvae=vqvae, bert=bert, tokenizer=tokenizer, unet=unet, scheduler=scheduler)
        self.vae_scale_factor = 2 ** (len(self.vqvae.config.block_out_channels) - 1) if self.vqvae is not None else 8

    def check_call(self, arguments: dict[str, Any]) -> None:
        """Raise `InputError` if there is no prompt."""
        if arguments["prompt"] is None:
            raise InputError("prompt is missing", expected="a text, or a list of texts")
        check_features(self, arguments)

    def pictures_of(self, arguments: dict[str, Any]) -> int:
        """One for each prompt."""
        return len(listed(arguments["prompt"]))

    def encode(self, prompts: list[str]) -> Tensor:
        """(prompts, 77, width): what the UNet attends to."""
        return encode_text(prompts, self.tokenizer, self.bert, self._execution_device, length=TOKENS)

    @recipe
    def __call__(
        self,
        prompt: str | list[str],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        seed: Seeds = None,
        save_run: str | os.PathLike[str] | None = None,
        resume: str | os.PathLike[str] | SavedRun | None = None,
        **values: Unpack[Guided],
    ) -> Any:
        """Draw what prompts say; `guidance_scale` below 1 draws away from them.

        Returns:
            `ImagePipelineOutput(images)`, or the same as a tuple.

        Raises:
            InputError, LimitError: An argument is not what it may be; no generator was used.
            NonFiniteError: The numbers overflowed; says where.
        """
        run, prompts = self._run, listed(prompt)
        trained = (edge * self.vae_scale_factor for edge in trained_size(self.unet))
        size = [own if asked is None else asked for asked, own in zip((height, width), trained, strict=True)]
        check_pixels(*size)
        run.guidance = guidance_of(self, TwoSidedGuidance(guidance_scale))
        steps = run.set_timesteps(self._execution_device)
        told = {"uncond": [""] * len(prompts), "cond": prompts}
        embeds = torch.cat([self.encode(told[branch]) for branch in run.guidance.branches])
        conditioning = Conditioning(len(prompts), run.guidance.branches, {"prompt_embeds": embeds})
        rows, columns = (pixels // self.vae_scale_factor for pixels in size)
        begun = noise_for(self, (len(prompts), self.unet.config.in_channels, rows, columns), embeds.dtype)
        begun = begun * run.scheduler.init_noise_sigma
        made = self.denoise(self.unet, conditioning, begun, run.scheduler.timesteps, steps, [text])
        if output_type == "latent":
            return result(self, made)
        return result(self, decode(self.vqvae, 1 / self.vqvae.config.scaling_factor * made))
