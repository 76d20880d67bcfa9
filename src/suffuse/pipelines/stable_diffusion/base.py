"""What the pipelines of Stable Diffusion share: their components, and the verbs that use them (Rombach et al., 2022)."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from suffuse.adapters.ip_adapter import MASKS, IPAdapterMixin, check_image_prompts, image_prompts
from suffuse.adapters.lora import LoraLoaderMixin
from suffuse.adapters.textual_inversion import TextualInversionLoaderMixin
from suffuse.configuration import check_type
from suffuse.diffusion.advance import step_options
from suffuse.diffusion.conditioning import Conditioner, Conditioning, Keywords, scale_embedding, text
from suffuse.diffusion.decoders import decode_latents
from suffuse.diffusion.guidance import ClassifierFreeGuidance, EmbeddedGuidance, Guidance, guidance_scale_embedding
from suffuse.diffusion.latents import encode_image, repeats
from suffuse.diffusion.prompts import encode_text, listed, repeat_rows
from suffuse.diffusion.weighted_prompts import length_for
from suffuse.errors import ConfigError, InputError
from suffuse.layers.low_rank import scaled
from suffuse.noise import Generators, randn_tensor
from suffuse.outputs import BaseOutput
from suffuse.pipelines.arguments import check_batch, check_pixels, check_prompts, check_second_prompts, check_shape, prompt_count
from suffuse.pipelines.features import TOLD_BY_PROMPTS, check_features, guidance_of, values_of
from suffuse.pipelines.pipeline import DiffusionPipeline, Run
from suffuse.pipelines.texts import tell_texts
from suffuse.processing.image import Frame, VaeImageProcessor
from suffuse.processing.pixels import edges, flattened

if TYPE_CHECKING:
    from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

    from suffuse.models.autoencoder_kl import AutoencoderKL
    from suffuse.models.unet_2d_condition import UNet2DConditionModel
    from suffuse.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from suffuse.schedulers.scheduler import SchedulerMixin

PROMPTS = ("prompt", "negative_prompt", "prompt_embeds", "negative_prompt_embeds")
OF_VALUES = ("image_prompts", "unattended", "skipped", "watched")
"""What features tell attention, and callers do not."""
ENCODERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
"""Text encoder → the tokenizer that goes with it."""


@dataclass
class StableDiffusionPipelineOutput(BaseOutput):
    """Pictures, and for each whether the safety checker blanked it (None: there is no checker)."""

    images: Any
    nsfw_content_detected: list[bool] | None


class StableDiffusionBase(LoraLoaderMixin, TextualInversionLoaderMixin, IPAdapterMixin, DiffusionPipeline):
    """The verbs of Stable Diffusion: encode prompts, make noise, denoise, decode."""

    model_cpu_offload_seq = "text_encoder->image_encoder->unet->vae"
    _optional_components = ["safety_checker", "feature_extractor", "image_encoder"]
    _exclude_from_cpu_offload = ["safety_checker"]
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]

    _scheduler_settings: ClassVar[dict[str, Any]] = {"steps_offset": 1, "clip_sample": False}
    """What Stable Diffusion was trained with, and old checkpoints get wrong."""
    _told_by_text: ClassVar[tuple[str, ...]] = ("prompt_embeds",)
    """What the UNet is told of a text."""
    _upcast_types: ClassVar[dict[str, tuple[torch.dtype, ...]]] = {"encode": (), "decode": ()}
    """Types in which an autoencoder with `force_upcast` is not trusted to encode or decode; it then computes in float32."""

    vae: Any
    text_encoder: Any
    tokenizer: Any
    unet: Any
    safety_checker: Any
    feature_extractor: Any

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        safety_checker: StableDiffusionSafetyChecker | None,
        feature_extractor: CLIPImageProcessor | None,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        requires_safety_checker: bool = True,
    ) -> None:
        check_type(type(self).__name__, "requires_safety_checker", requires_safety_checker, bool)
        self.set_up(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
        )
        if safety_checker is None and requires_safety_checker:
            warnings.warn(
                f"{type(self).__name__} runs without a safety checker (safety_checker=None): nothing filters what it draws. "
                "Keep the checker wherever the public sees results; pass requires_safety_checker=False to say that this is meant",
                stacklevel=2,
            )
        if safety_checker is not None and feature_extractor is None:
            raise ConfigError(
                "a safety_checker needs a feature_extractor",
                remedy="pass feature_extractor=…, or safety_checker=None for neither",
            )
        self.register_to_config(requires_safety_checker=requires_safety_checker)

    def set_up(self, **components: Any) -> None:
        """Take those components that the class has: the scheduler as it needs it, the picture processor of the autoencoder."""
        components = {name: value for name, value in components.items() if name in self.component_names()}
        self.register_modules(**components)
        check_sizes(components)
        check_channels(components, type(self))
        if self.scheduler is not None:
            self.scheduler = corrected_scheduler(self.scheduler, self._scheduler_settings)
        self.vae_scale_factor = 2 ** (len(self.vae.config.block_out_channels) - 1) if self.vae is not None else 8
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor, vae_latent_channels=self.latent_channels)

    @classmethod
    def input_channels(cls, latents: int) -> tuple[int, ...]:
        """What the first layer of the UNet may take where latents have so many channels."""
        return (latents,)

    @property
    def latent_channels(self) -> int:
        """Channels of the latents, 4 in Stable Diffusion."""
        return self.vae.config.latent_channels if self.vae is not None else self.unet.config.out_channels if self.unet else 4

    def needed_components(self, arguments: dict[str, Any]) -> list[str]:
        """UNet and scheduler, and the autoencoder where there are pictures; the text encoder is missed when there is text."""
        pictures = arguments["output_type"] != "latent" or arguments.get("image") is not None
        return ["unet", "scheduler", *(["vae"] if pictures else [])]

    def check_call(self, arguments: dict[str, Any]) -> None:
        """Raise `InputError` unless prompts, and what stands for them, go together."""
        check_prompts(arguments)
        check_second_prompts(arguments)
        check_features(self, arguments)
        check_image_prompts(self, arguments)

    def pictures_of(self, arguments: dict[str, Any]) -> int:
        """How many pictures a call makes at once."""
        return prompt_count(arguments) * arguments["num_images_per_prompt"]

    # ------------------------------------------------------------ prompts and guidance

    def guidance_for(self, scale: float, rescale: float = 0.0) -> Guidance:
        """How the call is guided: as it says, or by the UNet's own embedding of the scale if it has one, else classifier-free."""
        embedded = self.unet.config.time_cond_proj_dim is not None
        return guidance_of(self, EmbeddedGuidance(scale) if embedded else ClassifierFreeGuidance(scale, rescale))

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        device: torch.device,
        num_images_per_prompt: int,
        do_classifier_free_guidance: bool,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Encode prompts and, for guidance, negative prompts.

        Returns:
            Two tensors (prompts · num_images_per_prompt, tokens, width); the second is None without guidance.
        """
        model = self.text_encoder if self.text_encoder is not None else self.unet
        dtype = model.dtype if model is not None else None

        def placed(states: Tensor) -> Tensor:
            return repeat_rows(states.to(dtype=dtype, device=device), num_images_per_prompt)

        def read(texts: list[str], **options: Any) -> Tensor:
            texts = self.maybe_convert_prompt(texts, self.tokenizer)
            with scaled(lora_scale):
                return encode_text(texts, self.tokenizer, self.text_encoder, device, **options)

        if prompt_embeds is None:
            told = self.maybe_convert_prompt([*listed(prompt), *listed(negative_prompt)], self.tokenizer)
            length = length_for(told, self.tokenizer)
            prompt_embeds = read(listed(prompt), length=length, clip_skip=clip_skip)
        if not do_classifier_free_guidance:
            return placed(prompt_embeds), negative_prompt_embeds
        if negative_prompt_embeds is None:
            negatives = negative_prompt if isinstance(negative_prompt, list) else [negative_prompt or ""] * len(prompt_embeds)
            negative_prompt_embeds = read(negatives, length=prompt_embeds.shape[1])
        check_shape("negative_prompt_embeds", negative_prompt_embeds, tuple(prompt_embeds.shape))
        return placed(prompt_embeds), placed(negative_prompt_embeds)

    def encode(self) -> Conditioning:
        """The prompts of the run, joined over the branches its guidance asks for."""
        run, guided = self._run, self.do_classifier_free_guidance
        passed = {name: run.arguments.get(name) for name in PROMPTS}
        self.check_encoders(run, passed["prompt"], passed["prompt_embeds"], passed["negative_prompt_embeds"])
        count = run.arguments["num_images_per_prompt"]
        cond, uncond = self.encode_prompt(
            device=self._execution_device,
            num_images_per_prompt=count,
            do_classifier_free_guidance=guided,
            lora_scale=self.lora_scale,
            clip_skip=run.clip_skip,
            **passed,
        )
        cond, uncond = cond.to(self.unet.dtype), None if uncond is None else uncond.to(self.unet.dtype)
        tensors = {"prompt_embeds": torch.cat([uncond, cond]) if guided and uncond is not None else cond}
        if uncond is not None:
            tensors["negative_prompt_embeds"] = uncond
        return tell_texts(self, Conditioning(len(cond), TOLD_BY_PROMPTS if guided else ("cond",), tensors))

    def read_texts(self, texts: list[str], length: int) -> dict[str, Tensor]:
        """What the UNet is told of texts, of so many tokens, by the names of `_told_by_text`, (texts, …) each."""
        self.check_encoders(self._run, texts, None, None)
        with scaled(self.lora_scale):
            texts = self.maybe_convert_prompt(texts, self.tokenizer)
            options = {"length": length, "clip_skip": self._run.clip_skip}
            states = encode_text(texts, self.tokenizer, self.text_encoder, self._execution_device, **options)
        return {"prompt_embeds": states}

    def check_encoders(self, run: Run, prompt: Any, prompt_embeds: Tensor | None, negative_embeds: Tensor | None) -> None:
        """Raise `InputError` if the text encoder that this call needs is not there, or embeddings do not fit the UNet."""
        needed = prompt is not None or (negative_embeds is None and self.do_classifier_free_guidance)
        if needed and (self.text_encoder is None or self.tokenizer is None):
            raise InputError(
                "this pipeline has no text encoder",
                remedy="pass prompt_embeds and negative_prompt_embeds, or load the pipeline with its text_encoder and tokenizer",
            )
        width = self.unet.config.cross_attention_dim
        if prompt_embeds is not None and isinstance(width, int) and self.unet.config.encoder_hid_dim is None:
            check_shape("prompt_embeds", prompt_embeds, (*prompt_embeds.shape[:-1], width))
        layers = getattr(getattr(self.text_encoder, "config", None), "num_hidden_layers", None)
        if run.clip_skip is not None and layers is not None and run.clip_skip >= layers:
            raise InputError(
                f"clip_skip={run.clip_skip} leaves no layer", expected=f"less than {layers}, the layers of the text encoder"
            )

    def conditioners(self, conditioning: Conditioning) -> list[Conditioner]:
        """What the UNet of the run sees: the prompts, and what the call asks to hand on."""
        run = self._run
        keywords: dict[str, Any] = {}
        options = {name: value for name, value in (run.cross_attention_kwargs or {}).items() if name != MASKS}
        inner = [name for name in options if name in OF_VALUES]
        if inner:
            raise InputError(f"cross_attention_kwargs: {inner[0]} is told by features", remedy="leave it out")
        if options:
            self.unet.check_cross_attention_kwargs(options)
            keywords["cross_attention_kwargs"] = options
        told = [text, Keywords(keywords), *image_prompts(self)]
        if self.unet.config.time_cond_proj_dim is not None:
            # A guidance that is passed in guides a model that was distilled at the scale of the call.
            given = run.arguments.get("guidance") is not None
            scale = torch.tensor((run.arguments["guidance_scale"] if given else run.guidance.scale) - 1).repeat(
                conditioning.batch
            )
            embedding = self.get_guidance_scale_embedding(scale, self.unet.config.time_cond_proj_dim)
            conditioning.share(w_embedding=embedding.to(self._execution_device, self.unet.dtype))
            told.append(scale_embedding)
        return told

    def further(self, frame: Frame) -> list[Conditioner]:
        """What the UNet sees of the values that came with the call, to fill a frame."""
        return values_of(self, frame)

    def get_guidance_scale_embedding(self, w: Tensor, embedding_dim: int = 512, dtype: torch.dtype = torch.float32) -> Tensor:
        """Sinusoidal embedding of guidance scales: (batch,) → (batch, embedding_dim)."""
        return guidance_scale_embedding(w, embedding_dim, dtype)

    # ------------------------------------------------------------ latents

    def latent_shape(self, batch: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(batch, channels, rows, columns) of the latents of a picture."""
        return batch, self.latent_channels, height // self.vae_scale_factor, width // self.vae_scale_factor

    def size_of(self, pictures: Tensor) -> tuple[int, int]:
        """(height, width) of pictures, or of those that latents stand for."""
        factor = self.vae_scale_factor if pictures.shape[1] == self.latent_channels else 1
        return pictures.shape[-2] * factor, pictures.shape[-1] * factor

    def default_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """(height, width) asked for; for what is missing, what the UNet was trained on.

        Raises:
            InputError: It is missing, and the UNet does not say.
            LimitError: They are larger than any picture that is decoded.
        """
        sample = self.unet.config.sample_size
        if sample is None and (height is None or width is None):
            raise InputError("height or width is missing, and unet/config.json has no sample_size", remedy="pass both")
        trained: Any = sample if isinstance(sample, (list, tuple)) else (sample, sample)
        rows: int = trained[0] * self.vae_scale_factor if height is None else height
        columns: int = trained[1] * self.vae_scale_factor if width is None else width
        check_pixels(rows, columns)
        return rows, columns

    def size_by(self, name: str, height: int | None, width: int | None, factor: int | None = None) -> tuple[int, int]:
        """(height, width) asked for; for what is missing, that of the first picture of an argument, cut to multiples of `factor`.

        Raises:
            InputError: It is missing, and there is no picture.
            LimitError: They are larger than any picture that is decoded.
        """
        image = self._run.arguments[name]
        cut = self.vae_scale_factor if factor is None else factor
        own = edges(next(iter(flattened(image)), image), name)
        if isinstance(image, Tensor) and image.ndim == 4 and image.is_floating_point() and image.shape[1] == self.latent_channels:
            own = self.size_of(image)
        rows, columns = (asked or edge - edge % cut for asked, edge in zip((height, width), own, strict=True))
        check_pixels(rows, columns)
        return rows, columns

    def check_noise(self, shape: tuple[int, ...]) -> None:
        """Raise `InputError` unless generators and latents of the call are for pictures of this shape."""
        check_batch("generator", self._run.arguments["generator"], shape[0])
        check_shape("latents", self._run.arguments.get("latents"), shape)

    def make_noise(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Standard normal noise from the generator of the call, or the latents that were passed for it."""
        self.check_noise(shape)
        generator, latents = self._run.arguments["generator"], self._run.arguments.get("latents")
        if latents is not None:
            return latents.to(self._execution_device, dtype)
        return randn_tensor(shape, generator=generator, device=self._execution_device, dtype=dtype)

    def encode_pictures(self, image: Tensor, dtype: torch.dtype) -> Tensor:
        """Latents of pictures, with the generator of the call; latents are passed through."""
        image = image.to(device=self._execution_device, dtype=dtype)
        if image.shape[1] == self.latent_channels:
            return image
        return encode_image(self.vae, image, self._run.arguments["generator"], self.upcasts("encode")).to(dtype)

    def upcasts(self, method: str) -> bool:
        """Whether the autoencoder is to encode or decode in float32, whatever its own type is."""
        return self.vae.config.get("force_upcast", False) and self.vae.dtype in self._upcast_types[method]

    def clean(self, pictures: Tensor, batch: int, dtype: torch.dtype) -> Tensor:
        """Latents of pictures, for each of the batch."""
        check_batch("generator", self._run.arguments["generator"], batch)
        if isinstance(self._run.arguments["generator"], list):
            pictures = torch.cat([pictures] * repeats(batch, pictures, "image"))
        times = repeats(batch, pictures, "image")
        return torch.cat([self.encode_pictures(pictures, dtype)] * times)

    def noised(self, pictures: Tensor, timestep: Tensor, batch: int, dtype: torch.dtype) -> Tensor:
        """Latents of pictures at the noise level of a timestep (1,), for each of the batch."""
        clean = self.clean(pictures, batch, dtype)
        noise = randn_tensor(clean.shape, generator=self._run.arguments["generator"], device=self._execution_device, dtype=dtype)
        return self._run.scheduler.add_noise(clean, noise, timestep.repeat(batch))

    def way(self) -> tuple[Tensor, int]:
        """The timesteps of the call, of which `strength` leaves the last, and how many inference steps they are."""
        return self._run.timesteps_for(self._run.set_timesteps(self._execution_device), self._run.arguments.get("strength", 1.0))

    def get_timesteps(self, num_inference_steps: int, strength: float, device: torch.device) -> tuple[Tensor, int]:
        """The timesteps that `strength` leaves of those the scheduler was set to, and how many steps they are."""
        return Run(self.scheduler).timesteps_for(num_inference_steps, strength)

    def prepare_extra_step_kwargs(self, generator: Generators, eta: float) -> dict[str, Any]:
        """Those of `eta` and `generator` that the scheduler's `step` takes."""
        return step_options(self.scheduler, eta=eta, generator=generator)

    # ------------------------------------------------------------ pictures

    def decode_latents(self, latents: Tensor) -> np.ndarray:
        """Scaled latents → (batch, height, width, 3) in [0, 1]."""
        return self.image_processor.postprocess(decode_latents(self.vae, latents), output_type="np")

    def run_safety_checker(self, image: Any, device: torch.device, dtype: torch.dtype) -> tuple[Any, list[bool] | None]:
        """Blank the pictures that the safety checker objects to; says which they are (None: no checker)."""
        if self.safety_checker is None:
            return image, None
        pictures = (
            self.image_processor.postprocess(image, output_type="pil") if isinstance(image, Tensor) else self.numpy_to_pil(image)
        )
        features = self.feature_extractor(pictures, return_tensors="pt").to(device)
        return self.safety_checker(images=image, clip_input=features.pixel_values.to(dtype))

    def finish(self, latents: Tensor, dtype: torch.dtype) -> Any:
        """Latents to the result of the call."""
        return self.output(*self.pictures(latents, dtype))

    def pictures(self, latents: Tensor, dtype: torch.dtype, **conditions: Tensor) -> tuple[Any, list[bool] | None]:
        """Latents decoded, checked, in the form of `output_type`; and which pictures were blanked, if there is a checker."""
        arguments = self._run.arguments
        if arguments["output_type"] == "latent":
            return latents, None
        image, flagged = self.inspected(self.decoded(latents, **conditions), dtype)
        shown = [not hidden for hidden in flagged] if flagged is not None else None
        return self.image_processor.postprocess(image, arguments["output_type"], shown), flagged

    def decoded(self, latents: Tensor, **conditions: Tensor) -> Tensor:
        """Pictures of scaled latents, about [-1, 1]."""
        return decode_latents(self.vae, latents, self._run.arguments["generator"], self.upcasts("decode"), **conditions)

    def inspected(self, image: Tensor, dtype: torch.dtype) -> tuple[Tensor, list[bool] | None]:
        """Decoded pictures as they may be shown, and which were blanked, if there is a checker."""
        return self.run_safety_checker(image, self._execution_device, dtype)

    def unchanged(self, pictures: Tensor) -> Any:
        """What a strength of 0 gives: the pictures themselves, as many as were asked for."""
        arguments = self._run.arguments
        pictures = torch.cat([pictures] * repeats(self.pictures_of(arguments), pictures, "image"))
        if pictures.shape[1] == self.latent_channels or arguments["output_type"] == "latent":
            return self.finish(self.encode_pictures(pictures, self.vae.dtype), self.vae.dtype)
        return self.output(self.image_processor.postprocess(pictures, arguments["output_type"]), None)

    def output(self, images: Any, flagged: list[bool] | None) -> Any:
        """The result of a call, as an output object or a plain tuple."""
        return StableDiffusionPipelineOutput(images, flagged) if self._run.arguments["return_dict"] else (images, flagged)

    # ------------------------------------------------------------ switches of the models

    def enable_vae_slicing(self) -> None:
        """Decode pictures one by one: less memory for several at once."""
        self.vae.enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Decode all pictures at once."""
        self.vae.disable_slicing()

    def enable_vae_tiling(self) -> None:
        """Decode in overlapping tiles: large pictures in little memory."""
        self.vae.enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Decode in one piece."""
        self.vae.disable_tiling()

    def enable_freeu(self, s1: float, s2: float, b1: float, b2: float) -> None:
        """Weigh skip connections down (s1, s2) and backbone features up (b1, b2) (Si et al., 2023, FreeU)."""
        self.unet.enable_freeu(s1=s1, s2=s2, b1=b1, b2=b2)

    def disable_freeu(self) -> None:
        """Take FreeU out."""
        self.unet.disable_freeu()

    def fuse_qkv_projections(self, unet: bool = True, vae: bool = True) -> None:
        """Join the query, key and value projections into one matrix product."""
        for wanted, model in ((unet, self.unet), (vae, self.vae)):
            if wanted:
                model.fuse_qkv_projections()

    def unfuse_qkv_projections(self, unet: bool = True, vae: bool = True) -> None:
        """Undo `fuse_qkv_projections`."""
        for wanted, model in ((unet, self.unet), (vae, self.vae)):
            if wanted:
                model.unfuse_qkv_projections()


def corrected_scheduler(scheduler: SchedulerMixin, corrections: dict[str, Any]) -> SchedulerMixin:
    """The scheduler itself, or one like it with the settings Stable Diffusion was trained with where it has others."""
    wrong = {name: value for name, value in corrections.items() if scheduler.config.get(name, value) != value}
    if not wrong:
        return scheduler
    settings = ", ".join(f"{name}={value}" for name, value in wrong.items())
    warnings.warn(
        f"{type(scheduler).__name__}: set to {settings}, as Stable Diffusion needs it; correct its config", stacklevel=5
    )
    return type(scheduler).from_config(scheduler.config, **wrong)


def check_sizes(components: dict[str, Any]) -> None:
    """Raise `ConfigError` if the components cannot work together: each says how wide its tensors are."""
    configs = {name: getattr(component, "config", None) for name, component in components.items()}
    unet, vae = configs.get("unet"), configs.get("vae")
    declared = [name for name in ENCODERS if name in components]
    encoders: dict[str, Any] = {name: configs[name] for name in declared if configs[name] is not None}
    # A Stable Diffusion XL without its first encoder is a refiner, or is told embeddings: what they are shows at the call.
    complete = bool(declared) and len(encoders) == len(declared)
    if unet is not None and complete and unet.encoder_hid_dim is None and isinstance(unet.cross_attention_dim, int):
        check_same(
            "unet/config.json",
            "cross_attention_dim",
            unet.cross_attention_dim,
            " and ".join(f"{name}/config.json" for name in encoders),
            "hidden_size",
            sum(getattr(encoder, "project_dim", encoder.hidden_size) for encoder in encoders.values()),
        )
    if unet is not None and vae is not None:
        files, channels = ("unet/config.json", "vae/config.json"), (unet.out_channels, vae.latent_channels)
        check_same(files[0], "out_channels", channels[0], files[1], "latent_channels", channels[1])
    if vae is not None and not 0 < vae.scaling_factor < math.inf:
        raise ConfigError(
            "vae/config.json: scaling_factor must be positive and finite", found=vae.scaling_factor, expected="0.18215, usually"
        )
    for name, encoder in encoders.items():
        _check_tokenizer(name, encoder, ENCODERS[name], components.get(ENCODERS[name]))


def _check_tokenizer(name: str, encoder: Any, other: str, tokenizer: Any) -> None:
    if tokenizer is None:
        return
    if len(tokenizer) > encoder.vocab_size:
        raise ConfigError(
            f"the {other} has more tokens than {name}/config.json has vocab_size",
            found=f"{len(tokenizer)} and {encoder.vocab_size}",
            remedy="use the tokenizer that was saved with the text encoder",
        )
    positions = getattr(encoder, "max_position_embeddings", None)
    if positions is not None and tokenizer.model_max_length not in range(1, positions + 1):
        raise ConfigError(
            f"{other}/tokenizer_config.json and {name}/config.json disagree",
            found=f"model_max_length={tokenizer.model_max_length}, max_position_embeddings={positions}",
            expected=f"a model_max_length of 1 to {positions}",
        )


def check_channels(components: dict[str, Any], pipeline: type[StableDiffusionBase]) -> None:
    """Raise `ConfigError` if the UNet was made for another task: what it sees besides latents tells."""
    unet, vae = components.get("unet"), components.get("vae")
    if unet is None or vae is None:
        return
    taken = pipeline.input_channels(vae.config.latent_channels)
    if unet.config.in_channels not in taken:
        raise ConfigError(
            f"unet/config.json: in_channels={unet.config.in_channels} does not fit {pipeline.__name__}",
            expected=" or ".join(map(str, taken)),
            remedy="StableDiffusionInpaintPipeline and XL take 4 or 9 channels, StableDiffusionDepth2ImgPipeline 5, the others 4",
        )


def check_same(file: str, key: str, value: int, other_file: str, other_key: str, other: int) -> None:
    """Raise `ConfigError` unless two files say the same width."""
    if value != other:
        raise ConfigError(
            f"{file} and {other_file} disagree",
            found=f"{key}={value}, {other_key}={other}",
            expected="the same width",
            remedy="load both from one checkpoint",
        )
