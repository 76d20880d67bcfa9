"""Variations of a picture with Stable unCLIP: its vector, noised, is a class embedding of the UNet (Ramesh et al., 2022)."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from suffuse.errors import InputError
from suffuse.noise import Generators, Seeds
from suffuse.pipelines.arguments import check_batch, recipe
from suffuse.pipelines.features import Guided
from suffuse.pipelines.image_variation.shown import pixels_of
from suffuse.pipelines.saved_run import SavedRun
from suffuse.pipelines.stable_unclip.vectors import FromVectors
from suffuse.processing.image import ImageInput
from suffuse.processing.pixels import listed

if TYPE_CHECKING:
    from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection
    from typing_extensions import Unpack

    from suffuse.models.autoencoder_kl import AutoencoderKL
    from suffuse.models.unet_2d_condition import UNet2DConditionModel
    from suffuse.pipelines.stable_unclip.image_normalizer import StableUnCLIPImageNormalizer
    from suffuse.schedulers.scheduler import SchedulerMixin


class StableUnCLIPImg2ImgPipeline(FromVectors):
    """Pictures like a picture, with what prompts say."""

    model_cpu_offload_seq = "text_encoder->image_encoder->unet->vae"
    _exclude_from_cpu_offload = ["image_normalizer"]

    image_encoder: Any

    def __init__(
        self,
        feature_extractor: CLIPImageProcessor,
        image_encoder: CLIPVisionModelWithProjection,
        image_normalizer: StableUnCLIPImageNormalizer,
        image_noising_scheduler: SchedulerMixin,
        tokenizer: CLIPTokenizer,
        text_encoder: CLIPTextModel,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL,
    ) -> None:
        seeing = {"feature_extractor": feature_extractor, "image_encoder": image_encoder, "image_normalizer": image_normalizer}
        told = {"tokenizer": tokenizer, "text_encoder": text_encoder, "image_noising_scheduler": image_noising_scheduler}
        self.set_up(**seeing, **told, unet=unet, scheduler=scheduler, vae=vae)

    def needed_components(self, arguments: dict[str, Any]) -> list[str]:
        """Those of drawing from vectors, and what sees if there is a picture."""
        seeing = ["image_encoder", *([] if isinstance(arguments["image"], Tensor) else ["feature_extractor"])]
        return [*super().needed_components(arguments), *(seeing if arguments["image_embeds"] is None else [])]

    def check_call(self, arguments: dict[str, Any]) -> None:
        """Raise `InputError` unless the arguments go together; no prompt is an empty one, for each of a list of pictures."""
        image = arguments["image"]
        if (image is None) == (arguments["image_embeds"] is None):
            both = "missing" if image is None else "given"
            raise InputError(f"image and image_embeds are both {both}", remedy="pass one of the two")
        if image is not None:
            listed(image, "image")
        if arguments["prompt"] is None and arguments["prompt_embeds"] is None:
            arguments["prompt"] = [""] * len(image) if isinstance(image, list) else ""
        super().check_call(arguments)

    @recipe
    def __call__(
        self,
        image: ImageInput | None = None,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 20,
        guidance_scale: float = 10,
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
        image_embeds: Tensor | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        seed: Seeds = None,
        save_run: str | os.PathLike[str] | None = None,
        resume: str | os.PathLike[str] | SavedRun | None = None,
        **values: Unpack[Guided],
    ) -> Any:
        """Draw what a picture shows once more, differently, with what prompts say.

        Returns:
            `ImagePipelineOutput(images)`, or the same as a tuple.

        Raises:
            InputError, LimitError: An argument is not what it may be; no generator was used.
            NonFiniteError: The numbers overflowed; says where, and what to do.
        """
        self._run.guidance = self.guidance_for(guidance_scale)
        return self.draw_seen(*self.default_size(height, width), self.seen)

    def seen(self, batch: int) -> Tensor:
        """What the UNet is told of the pictures of the call, (batch, 2 · size).

        Raises:
            InputError: They are neither one for all prompts nor one for each.
        """
        given, each = self._run.arguments, self._run.arguments["num_images_per_prompt"]
        vectors, generator = given["image_embeds"], given["generator"]
        if vectors is None:
            vectors = self.image_encoder(pixels_of(self, given["image"], "image")).image_embeds
        vectors = vectors.to(self._execution_device, self.image_encoder.dtype if self.image_encoder is not None else None)
        if len(vectors) not in (1, batch // each):
            raise InputError(
                f"image: {len(vectors)} pictures given for {batch // each} prompts", expected="one for all, or one for each"
            )
        check_batch("generator", generator, batch)
        times = batch // len(vectors)
        if isinstance(generator, list):
            vectors, times = vectors.repeat_interleave(times, dim=0), 1
        told = self.noise_image_embeddings(vectors, given["noise_level"], generator=generator)
        return told.repeat_interleave(times, dim=0)
