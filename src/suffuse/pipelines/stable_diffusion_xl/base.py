"""What the pipelines of Stable Diffusion XL share (Podell et al., 2023, "SDXL: Improving latent diffusion models …").

Beside the prompts, which two text encoders read, the UNet is told numbers: how large the picture was, where it was cropped, how
large it should be (section 2.2); a refiner is told how much people like it instead of the last. One pipeline may go a part of the
way, and another the rest (`denoising_end`, `denoising_start`; section 2.5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from suffuse.adapters.lora import StableDiffusionXLLoraLoaderMixin
from suffuse.configuration import check_type
from suffuse.diffusion.conditioning import UNTOLD, Conditioner, Conditioning, ModelCall
from suffuse.diffusion.loop import Step
from suffuse.diffusion.prompts import encode_text_and_pool, listed, repeat_rows
from suffuse.diffusion.weighted_prompts import length_for
from suffuse.errors import ConfigError, InputError
from suffuse.layers.low_rank import scaled
from suffuse.outputs import BaseOutput
from suffuse.pipelines.arguments import check_shape
from suffuse.pipelines.features import TOLD_BY_PROMPTS
from suffuse.pipelines.stable_diffusion.base import ENCODERS, PROMPTS, StableDiffusionBase
from suffuse.pipelines.stable_diffusion_xl.watermark import StableDiffusionXLWatermarker, is_available
from suffuse.pipelines.texts import tell_texts

if TYPE_CHECKING:
    from transformers import (
        CLIPImageProcessor,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
        CLIPVisionModelWithProjection,
    )

    from suffuse.models.autoencoder_kl import AutoencoderKL
    from suffuse.models.unet_2d_condition import UNet2DConditionModel
    from suffuse.schedulers.scheduler import SchedulerMixin

SECOND_PROMPTS = ("prompt_2", "negative_prompt_2", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")


@dataclass
class StableDiffusionXLPipelineOutput(BaseOutput):
    """Pictures, in the form of `output_type`."""

    images: Any


def pooled_and_sizes(call: ModelCall, step: Step) -> None:
    """Hand over the prompts' one vector each, and the sizes."""
    call.kwargs["added_cond_kwargs"] = {
        "text_embeds": call.conditioning.select("add_text_embeds", call.branches),
        "time_ids": call.conditioning.select("add_time_ids", call.branches),
    }


class StableDiffusionXLBase(StableDiffusionXLLoraLoaderMixin, StableDiffusionBase):  # pyright: ignore[reportIncompatibleMethodOverride]
    """The verbs of Stable Diffusion XL, where they are others than those of Stable Diffusion.

    Args:
        vae: The autoencoder.
        text_encoder: The first text encoder; a refiner has none.
        text_encoder_2: The second.
        tokenizer: Of the first text encoder.
        tokenizer_2: Of the second.
        unet: The UNet.
        scheduler: The solver.
        image_encoder: For IP-Adapters.
        feature_extractor: For IP-Adapters.
        requires_aesthetics_score: The UNet is told how much people like the picture, not how large it should be; None for a
            pipeline that has no place for it.
        force_zeros_for_empty_prompt: Without a negative prompt, the unconditional embeddings are zeros.
        add_watermarker: Mark pictures invisibly; None for where the package for it is installed.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->image_encoder->unet->vae"
    _optional_components = ["tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2", "image_encoder", "feature_extractor"]
    _exclude_from_cpu_offload = []
    _scheduler_settings = {}
    _upcast_types = {"encode": (torch.float16, torch.bfloat16), "decode": (torch.float16,)}
    _negative_ids = "add_neg_time_ids"
    _told_by_text = ("prompt_embeds", "add_text_embeds")

    text_encoder_2: Any
    tokenizer_2: Any

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel | None,
        text_encoder_2: CLIPTextModelWithProjection | None,
        tokenizer: CLIPTokenizer | None,
        tokenizer_2: CLIPTokenizer | None,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
        requires_aesthetics_score: bool | None = False,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool | None = None,
    ) -> None:
        settings = {"force_zeros_for_empty_prompt": force_zeros_for_empty_prompt}
        if requires_aesthetics_score is not None:
            settings["requires_aesthetics_score"] = requires_aesthetics_score
        for name, value in settings.items():
            check_type(type(self).__name__, name, value, bool)
        check_type(type(self).__name__, "add_watermarker", add_watermarker, bool | None)
        self.set_up(
            vae=vae,
            text_encoder=text_encoder,
            text_encoder_2=text_encoder_2,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=unet,
            scheduler=scheduler,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
        )
        self.register_to_config(**settings)
        check_added(unet, text_encoder_2, numbers=sizes_told(requires_aesthetics_score or False))
        marks = is_available() if add_watermarker is None else add_watermarker
        self.watermark = StableDiffusionXLWatermarker() if marks else None

    @classmethod
    def component_names(cls) -> list[str]:
        """Names of the components, in the order of `__init__`."""
        return [name for name in super().component_names() if name != "add_watermarker"]

    @property
    def denoising_end(self) -> float | None:
        """The part of the way that the call goes, as it was passed."""
        return self._run.arguments.get("denoising_end")

    @property
    def denoising_start(self) -> float | None:
        """The part of the way that was gone before the call, as it was passed."""
        return self._run.arguments.get("denoising_start")

    # ------------------------------------------------------------ prompts

    def encode_prompt(  # pyright: ignore[reportIncompatibleMethodOverride]: the second encoder's words stand between
        self,
        prompt: str | list[str] | None,
        prompt_2: str | list[str] | None = None,
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Encode prompts and, for guidance, negative prompts.

        Returns:
            Embeddings (prompts · num_images_per_prompt, tokens, width), negative ones, the prompts' one vector each (prompts ·
            num_images_per_prompt, width), negative ones; the negative ones are None without guidance.
        """
        device = self._execution_device if device is None else device
        model = self.text_encoder_2 if self.text_encoder_2 is not None else self.unet
        dtype = model.dtype if model is not None else None

        def placed(states: Tensor) -> Tensor:
            return repeat_rows(states.to(dtype=dtype, device=device), num_images_per_prompt)

        def pooled_placed(pooled: Tensor) -> Tensor:
            return pooled.to(device).repeat(1, num_images_per_prompt).view(len(pooled) * num_images_per_prompt, -1)

        if prompt_embeds is None:
            prompts = [prompt] if isinstance(prompt, str) else prompt or []
            texts = [prompts, _listed(prompt_2 or prompts, len(prompts))]
            told = [*texts[0], *texts[1], *listed(negative_prompt), *listed(negative_prompt_2)]
            tokenizer = self.tokenizer_2 or self.tokenizer
            length = length_for(self.maybe_convert_prompt(told, tokenizer), tokenizer)
            prompt_embeds, pooled = self._read(texts, device, length, clip_skip or 0, lora_scale)
            pooled_prompt_embeds = pooled if pooled_prompt_embeds is None else pooled_prompt_embeds
        if pooled_prompt_embeds is None:
            raise InputError("pooled_prompt_embeds are missing", remedy="pass them with prompt_embeds")
        if not do_classifier_free_guidance:
            pooled = pooled_placed(pooled_prompt_embeds)
            return placed(prompt_embeds), negative_prompt_embeds, pooled, negative_pooled_prompt_embeds
        if negative_prompt_embeds is None:
            if negative_prompt is None and negative_prompt_2 is None and self.config["force_zeros_for_empty_prompt"]:
                negative_prompt_embeds, pooled = torch.zeros_like(prompt_embeds), torch.zeros_like(pooled_prompt_embeds)
            else:
                first = negative_prompt or ""
                texts = [_listed(text, len(prompt_embeds)) for text in (first, negative_prompt_2 or first)]
                negative_prompt_embeds, pooled = self._read(texts, device, prompt_embeds.shape[1], 0, lora_scale)
            negative_pooled_prompt_embeds = pooled if negative_pooled_prompt_embeds is None else negative_pooled_prompt_embeds
        check_shape("negative_prompt_embeds", negative_prompt_embeds, tuple(prompt_embeds.shape))
        check_shape("negative_pooled_prompt_embeds", negative_pooled_prompt_embeds, tuple(pooled_prompt_embeds.shape))
        if negative_pooled_prompt_embeds is None:
            raise InputError("negative_pooled_prompt_embeds are missing", remedy="pass them with negative_prompt_embeds")
        return (
            placed(prompt_embeds),
            placed(negative_prompt_embeds),
            pooled_placed(pooled_prompt_embeds),
            pooled_placed(negative_pooled_prompt_embeds),
        )

    def _read(
        self, texts: Sequence[list[str]], device: torch.device, length: int | None, clip_skip: int, lora_scale: float | None
    ) -> tuple[Tensor, Tensor | None]:
        """What the text encoders make of a list of texts each, side by side; a refiner's one reads the first list."""
        states, pooled = list[Tensor](), None
        for own, (encoder, tokenizer) in zip(texts, self._encoders(), strict=False):
            parts = getattr(self, tokenizer), getattr(self, encoder), device
            with scaled(lora_scale):
                made, vector = encode_text_and_pool(
                    self.maybe_convert_prompt(own, parts[0]), *parts, length=length, clip_skip=clip_skip
                )
            states.append(made)
            pooled = vector if pooled is None else pooled
        return torch.concat(states, dim=-1), pooled

    def _encoders(self) -> list[tuple[str, str]]:
        """Names of the text encoders that there are, and of their tokenizers."""
        return [names for names in ENCODERS.items() if names[0] == "text_encoder_2" or getattr(self, names[0]) is not None]

    def encode(self) -> Conditioning:
        """The prompts of the run, joined over the branches its guidance asks for."""
        run, guided = self._run, self.do_classifier_free_guidance
        passed = {name: run.arguments[name] for name in (*PROMPTS, *SECOND_PROMPTS)}
        self.check_readers(passed["prompt"], passed["prompt_embeds"], passed["negative_prompt_embeds"], run.clip_skip)
        cond, uncond, pooled, uncond_pooled = self.encode_prompt(
            device=self._execution_device,
            num_images_per_prompt=run.arguments["num_images_per_prompt"],
            do_classifier_free_guidance=guided,
            lora_scale=self.lora_scale,
            clip_skip=run.clip_skip,
            **passed,
        )
        cond, uncond = cond.to(self.unet.dtype), None if uncond is None else uncond.to(self.unet.dtype)
        tensors = {"prompt_embeds": cond, "add_text_embeds": pooled}
        if uncond is not None and uncond_pooled is not None:
            tensors |= {"negative_prompt_embeds": uncond, "negative_pooled_prompt_embeds": uncond_pooled}
        if guided and uncond is not None and uncond_pooled is not None:
            tensors |= {"prompt_embeds": torch.cat([uncond, cond]), "add_text_embeds": torch.cat([uncond_pooled, pooled])}
        return tell_texts(self, Conditioning(len(cond), TOLD_BY_PROMPTS if guided else ("cond",), tensors))

    def read_texts(self, texts: list[str], length: int) -> dict[str, Tensor]:
        """What the UNet is told of texts, of so many tokens: their states side by side, and one vector each."""
        self.check_readers(texts, None, None, None)
        states, pooled = self._read([texts, texts], self._execution_device, length, self._run.clip_skip or 0, self.lora_scale)
        return dict(zip(self._told_by_text, (states, cast(Tensor, pooled)), strict=True))

    def check_readers(self, prompt: Any, prompt_embeds: Tensor | None, negatives: Tensor | None, clip_skip: int | None) -> None:
        """Raise `InputError` if a text encoder that this call needs is not there, or embeddings do not fit the UNet."""
        zeros = self.config["force_zeros_for_empty_prompt"] and all(
            self._run.arguments[name] is None for name in ("negative_prompt", "negative_prompt_2")
        )
        if prompt is not None or (negatives is None and self.do_classifier_free_guidance and not zeros):
            missing = [name for pair in self._encoders() for name in pair if getattr(self, name) is None]
            if missing:
                raise InputError(
                    f"this pipeline has no {' and no '.join(missing)}",
                    remedy="pass prompt_embeds, pooled_prompt_embeds and the negative ones, or load the pipeline with both",
                )
        width = self.unet.config.cross_attention_dim
        if prompt_embeds is not None and isinstance(width, int) and self.unet.config.encoder_hid_dim is None:
            check_shape("prompt_embeds", prompt_embeds, (*prompt_embeds.shape[:-1], width))
        pooled, config = self._run.arguments["pooled_prompt_embeds"], self.unet.config
        if pooled is not None and config.projection_class_embeddings_input_dim is not None:
            numbers = sizes_told(self.config.get("requires_aesthetics_score", False)) * config.addition_time_embed_dim
            check_shape("pooled_prompt_embeds", pooled, (len(pooled), config.projection_class_embeddings_input_dim - numbers))
        for name, _ in self._encoders():
            layers = getattr(getattr(getattr(self, name), "config", None), "num_hidden_layers", None)
            if clip_skip is not None and layers is not None and clip_skip >= layers:
                raise InputError(f"clip_skip={clip_skip} leaves no layer", expected=f"less than {layers}, the layers of {name}")

    # ------------------------------------------------------------ sizes

    def size_ids(self, height: int, width: int) -> tuple[list[float], list[float]]:
        """The numbers the UNet is told of the picture, and of what it should not look like."""
        said = self._run.arguments
        original, target = said["original_size"] or [height, width], said["target_size"] or [height, width]
        negatives = [said.get("negative_original_size"), said.get("negative_target_size")]
        scored = self.config.get("requires_aesthetics_score", False)
        crops = said["crops_coords_top_left"]
        negative_crops = said.get("negative_crops_coords_top_left", crops)
        if not scored and not any(negatives) and not any(negative_crops):
            negative_crops = crops
        last, negative_last = target, negatives[1] or target
        if scored:
            last, negative_last = [said["aesthetic_score"]], [said["negative_aesthetic_score"]]
        return [*original, *crops, *last], [*(negatives[0] or original), *negative_crops, *negative_last]

    def conditioners(self, conditioning: Conditioning) -> list[Conditioner]:
        """What the UNet of the run sees: the prompts, the sizes, and what the call asks to hand on."""
        return [*super().conditioners(conditioning), pooled_and_sizes]

    def denoise(self, model: nn.Module, conditioning: Conditioning, latents: Tensor, *way: Any, **more: Any) -> Tensor:
        """Walk latents down the timesteps; the sizes that the call leaves open are those of the latents."""
        height, width = (size * self.vae_scale_factor for size in latents.shape[-2:])
        dtype = conditioning.tensors["prompt_embeds"].dtype
        cond, uncond = (
            torch.tensor([numbers] * conditioning.batch, dtype=dtype, device=latents.device)
            for numbers in self.size_ids(height, width)
        )
        ids = [uncond if branch in UNTOLD else cond for branch in conditioning.layout]
        conditioning.tensors |= {self._negative_ids: uncond, "add_time_ids": torch.cat(ids)}
        return super().denoise(model, conditioning, latents, *way, **more)

    # ------------------------------------------------------------ a part of the way

    def way(self) -> tuple[Tensor, int]:
        """The timesteps of the call: from `denoising_start`, or as `strength` says, to `denoising_end`.

        Raises:
            InputError: None is left.
        """
        run, start, end = self._run, self.denoising_start, self.denoising_end
        if start is not None and end is not None and start >= end:
            raise InputError(f"denoising_start={start} is not before denoising_end={end}")
        if start is not None and run.arguments.get("latents") is not None:
            raise InputError("denoising_start and latents are both given", remedy="pass what another pipeline left as image")
        steps = run.set_timesteps(self._execution_device)
        if start is None:
            timesteps, steps = run.timesteps_for(steps, run.arguments.get("strength", 1.0))
        else:
            timesteps, steps = rest_of_the_way(run.scheduler, start)
        if end is not None and end < 1:
            steps = int((timesteps >= timestep_at(run.scheduler, end)).sum())
            timesteps = timesteps[:steps]
        if not len(timesteps):
            raise InputError(
                "no step is left", found=f"denoising_start={start}, denoising_end={end}", remedy="use more num_inference_steps"
            )
        return timesteps, steps

    def get_timesteps(
        self, num_inference_steps: int, strength: float, device: torch.device, denoising_start: float | None = None
    ) -> tuple[Tensor, int]:
        """The timesteps that `strength` or `denoising_start` leaves of those the scheduler was set to, and how many steps."""
        if denoising_start is None:
            return super().get_timesteps(num_inference_steps, strength, device)
        return rest_of_the_way(self.scheduler, denoising_start)

    # ------------------------------------------------------------ pictures

    def inspected(self, image: Tensor, dtype: torch.dtype) -> tuple[Tensor, list[bool] | None]:
        """Decoded pictures with the watermark, if there is one."""
        return (image if self.watermark is None else self.watermark.apply_watermark(image)), None

    def output(self, images: Any, flagged: list[bool] | None) -> Any:
        """The result of a call, as an output object or a plain tuple."""
        return StableDiffusionXLPipelineOutput(images) if self._run.arguments["return_dict"] else (images,)

    def upcast_vae(self) -> None:
        """Make the autoencoder float32 for good; calls that need it in float32 lend it the weights, and do not need this."""
        self.vae.to(dtype=torch.float32)


def timestep_at(scheduler: SchedulerMixin, part: float) -> int:
    """The training timestep after a part of the way."""
    trained = scheduler.config["num_train_timesteps"]
    return round(trained - part * trained)


def rest_of_the_way(scheduler: SchedulerMixin, start: float) -> tuple[Tensor, int]:
    """The timesteps after a part of the way that another pipeline has gone, and how many they are."""
    steps = int((scheduler.timesteps < timestep_at(scheduler, start)).sum())
    # Solvers of order 2 have every timestep but the first twice: to begin between the two would be half a step.
    steps += scheduler.order == 2 and steps % 2 == 0
    skipped = len(scheduler.timesteps) - steps
    scheduler.set_begin_index(skipped)
    return scheduler.timesteps[skipped:], steps


def sizes_told(scored: bool) -> int:
    """How many numbers the UNet is told: two sizes and a crop, or a size, a crop and a score."""
    return 5 if scored else 6


def check_added(unet: Any, text_encoder_2: Any, numbers: int) -> None:
    """Raise `ConfigError` unless the UNet has a place for the prompt's vector and so many numbers."""
    if unet is None or text_encoder_2 is None:
        return
    config = unet.config
    if config.addition_embed_type != "text_time":
        raise ConfigError(
            "unet/config.json: this is no UNet of Stable Diffusion XL",
            found=f"addition_embed_type={config.addition_embed_type!r}",
            expected="'text_time'",
        )
    made = text_encoder_2.config.projection_dim + numbers * config.addition_time_embed_dim
    taken = config.projection_class_embeddings_input_dim
    if made != taken:
        other = (made + (1 if numbers == 5 else -1) * config.addition_time_embed_dim) == taken
        raise ConfigError(
            "unet/config.json and text_encoder_2/config.json disagree",
            found=f"projection_class_embeddings_input_dim={taken}; projection_dim and {numbers} sizes make {made}",
            remedy=f"pass requires_aesthetics_score={numbers == 6}" if other else "load both from one checkpoint",
        )


def _listed(texts: str | list[str], count: int) -> list[str]:
    return [texts] * count if isinstance(texts, str) else texts
