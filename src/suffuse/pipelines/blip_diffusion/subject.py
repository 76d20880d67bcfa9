"""What both pipelines of BLIP-Diffusion share: their components, and from subjects to what the UNet attends to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from suffuse.diffusion.conditioning import Conditioner, Conditioning, text
from suffuse.diffusion.decoders import decode_latents
from suffuse.diffusion.guidance import ClassifierFreeGuidance
from suffuse.diffusion.prompts import listed
from suffuse.diffusion.weighted_prompts import TOKENIZING, Weighted
from suffuse.errors import InputError
from suffuse.pipelines.arguments import check_pixels
from suffuse.pipelines.features import check_features, guidance_of
from suffuse.pipelines.pipeline import DiffusionPipeline
from suffuse.pipelines.unconditional.base import noise_for, result

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

    from suffuse.models.autoencoder_kl import AutoencoderKL
    from suffuse.models.unet_2d_condition import UNet2DConditionModel
    from suffuse.pipelines.blip_diffusion.image_processor import BlipImageProcessor
    from suffuse.pipelines.blip_diffusion.qformer import Blip2QFormerModel
    from suffuse.pipelines.blip_diffusion.text_encoder import ContextCLIPTextModel
    from suffuse.schedulers.scheduler import SchedulerMixin

SUBJECTS = ("source_subject_category", "target_subject_category")


class SubjectDriven(DiffusionPipeline):
    """The verbs of drawing a picture's subject.

    Args:
        tokenizer: Reads prompts.
        text_encoder: Encodes them, with the subject among them.
        vae: Makes pictures of latents.
        unet: What predicts.
        scheduler: The way.
        qformer: Makes tokens of a picture and the name of its subject.
        image_processor: Brings pictures to the Q-Former.
        ctx_begin_pos: Which of a prompt's tokens the subject's stand before.
        mean: Of the pictures' channels, instead of the processor's.
        std: Likewise.
    """

    model_cpu_offload_seq = "qformer->text_encoder->unet->vae"
    _settings = ("mean", "std")

    tokenizer: Any
    text_encoder: Any
    vae: Any
    unet: Any
    qformer: Any
    image_processor: Any

    def __init__(
        self,
        tokenizer: CLIPTokenizer,
        text_encoder: ContextCLIPTextModel,
        vae: AutoencoderKL,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        qformer: Blip2QFormerModel,
        image_processor: BlipImageProcessor,
        ctx_begin_pos: int = 2,
        mean: list[float] | None = None,
        std: list[float] | None = None,
    ) -> None:
        models = {"vae": vae, "unet": unet, "scheduler": scheduler, "qformer": qformer}
        self.register_modules(tokenizer=tokenizer, text_encoder=text_encoder, image_processor=image_processor, **models)
        self.register_to_config(ctx_begin_pos=ctx_begin_pos, mean=mean, std=std)
        self.vae_scale_factor = 2 ** (len(self.vae.config.block_out_channels) - 1) if self.vae is not None else 8

    def check_call(self, arguments: dict[str, Any]) -> None:
        """Raise `InputError` unless each prompt has its subjects."""
        count = self.pictures_of(arguments)
        if any(isinstance(text, Weighted) for text in (*listed(arguments["prompt"]), arguments.get("neg_prompt"))):
            raise InputError("prompts with a subject among their words cannot be weighted", remedy="pass a plain text")
        for name in ("prompt", *SUBJECTS):
            if len(listed(arguments[name])) != count or not count:
                found = f"{len(listed(arguments[name]))} for {count} prompts"
                raise InputError(f"{name} is missing, or not one for each prompt", found=found, expected="one for each prompt")
        check_features(self, arguments)

    def pictures_of(self, arguments: dict[str, Any]) -> int:
        """One for each prompt."""
        return len(listed(arguments["prompt"]))

    # ------------------------------------------------------------ subjects and prompts

    def get_query_embeddings(self, input_image: Tensor, src_subject: list[str]) -> Tensor:
        """(batch, queries, width): the subjects of pictures (batch, 3, rows, columns)."""
        return self.qformer(image_input=input_image, text_input=src_subject, return_dict=False)

    def encode_prompt(self, query_embeds: Tensor | None, prompt: list[str], device: torch.device | None = None) -> Tensor:
        """(batch, tokens, width): prompts with subjects among their words, or without."""
        length = self.text_encoder.config.max_position_embeddings
        length -= 0 if query_embeds is None else query_embeds.shape[1]
        with TOKENIZING:
            read = self.tokenizer(prompt, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        begin = [self.config.ctx_begin_pos] * len(prompt)
        ids = read.input_ids.to(device or self._execution_device)
        return self.text_encoder(input_ids=ids, ctx_embeddings=query_embeds, ctx_begin_pos=begin)[0]

    def told(self) -> list[str]:
        """The prompts of the call, each with its subject before it and as often as asked for: that makes the subject weigh."""
        said = self._run.arguments
        times = int(said["prompt_strength"] * said["prompt_reps"])
        pairs = zip(listed(said["target_subject_category"]), listed(said["prompt"]), strict=True)
        return [", ".join([f"a {subject} {prompt.strip()}"] * times) for subject, prompt in pairs]

    # ------------------------------------------------------------ the recipe

    def draw(self, further: Sequence[Conditioner] = ()) -> Any:
        """Draw the subject of the call.

        Args:
            further: What the UNet sees besides.

        Returns:
            The result of the call.
        """
        run, device = self._run, self._execution_device
        said, dtype = run.arguments, self.unet.dtype
        check_pixels(said["height"], said["width"])
        run.guidance = guidance_of(self, ClassifierFreeGuidance(said["guidance_scale"]))
        steps = run.set_timesteps(device)
        own = {"mean": self.config.mean, "std": self.config.std}
        pictures = self.image_processor.pixels(said["reference_image"], "reference_image", **own).to(device)
        prompts, names = self.told(), listed(said["source_subject_category"])
        branches = {"cond": self.encode_prompt(self.get_query_embeddings(pictures, names), prompts)}
        if "uncond" in run.guidance.branches:
            branches["uncond"] = self.encode_prompt(None, [said["neg_prompt"] or ""] * len(prompts))
        embeds = torch.cat([branches[branch] for branch in run.guidance.branches]).to(dtype)
        conditioning = Conditioning(len(prompts), run.guidance.branches, {"prompt_embeds": embeds})
        rows, columns = (said[edge] // self.vae_scale_factor for edge in ("height", "width"))
        noise = noise_for(self, (len(prompts), self.unet.config.in_channels, rows, columns), dtype)
        noise = noise * run.scheduler.init_noise_sigma
        latents = self.denoise(self.unet, conditioning, noise, run.scheduler.timesteps, steps, [text, *further])
        return result(self, latents if said["output_type"] == "latent" else decode_latents(self.vae, latents))
