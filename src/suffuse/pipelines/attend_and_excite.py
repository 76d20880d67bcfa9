"""Text to image in which no word is left out (Chefer et al., 2023, "Attend-and-Excite")."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from torch import Tensor, nn

from suffuse.diffusion.attend_and_excite import AttendAndExcite, attention_sizes
from suffuse.diffusion.attention_control import formed
from suffuse.diffusion.conditioning import Conditioner, Conditioning, Denoiser
from suffuse.diffusion.prompts import listed
from suffuse.errors import InputError
from suffuse.noise import Generators, Seeds
from suffuse.pipelines.arguments import prompt_count, recipe
from suffuse.pipelines.features import BesidePicture
from suffuse.pipelines.saved_run import SavedRun
from suffuse.pipelines.stable_diffusion.drawing import Drawing
from suffuse.processing.image import ImageInput

if TYPE_CHECKING:
    from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection
    from typing_extensions import Unpack

    from suffuse.models.autoencoder_kl import AutoencoderKL
    from suffuse.models.unet_2d_condition import UNet2DConditionModel
    from suffuse.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from suffuse.schedulers.scheduler import SchedulerMixin


class StableDiffusionAttendAndExcitePipeline(Drawing):
    """Pictures from prompts, in which each word that is named is to be seen."""

    _only_here = ("image_encoder",)

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        safety_checker: StableDiffusionSafetyChecker | None,
        feature_extractor: CLIPImageProcessor | None,
        requires_safety_checker: bool = True,
        image_encoder: CLIPVisionModelWithProjection | None = None,
    ) -> None:
        checker = (safety_checker, feature_extractor, image_encoder, requires_safety_checker)
        super().__init__(vae, text_encoder, tokenizer, unet, scheduler, *checker)

    @recipe
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        token_indices: list[int] | list[list[int]] = [],
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
        output_type: str = "pil",
        return_dict: bool = True,
        callback: Callable[..., Any] | None = None,
        callback_steps: int | None = 1,
        cross_attention_kwargs: dict[str, Any] | None = None,
        max_iter_to_alter: int = 25,
        thresholds: dict[int, float] = {0: 0.05, 10: 0.5, 20: 0.8},
        scale_factor: float = 20,
        attn_res: tuple[int, int] | None = (16, 16),
        clip_skip: int | None = None,
        ip_adapter_image: ImageInput | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        seed: Seeds = None,
        save_run: str | os.PathLike[str] | None = None,
        resume: str | os.PathLike[str] | SavedRun | None = None,
        **values: Unpack[BesidePicture],
    ) -> Any:
        """Draw what prompts say, all of it.

        Returns:
            `StableDiffusionPipelineOutput(images, nsfw_content_detected)`, or the same as a tuple.

        Raises:
            InputError, LimitError: An argument is not what it may be; no generator was used.
            NonFiniteError: The numbers overflowed; says where, and what to do.
        """
        self._run.guidance = self.guidance_for(guidance_scale)
        rows, columns = self.default_size(height, width)
        self.watched_size(*self.latent_shape(1, rows, columns)[2:])
        return self.draw(rows, columns)

    def get_indices(self, prompt: str) -> dict[int, str]:
        """The tokens of a prompt by their positions: what `token_indices` counts."""
        return dict(enumerate(self.tokenizer.convert_ids_to_tokens(self.tokenizer(prompt).input_ids)))

    def check_call(self, arguments: dict[str, Any]) -> None:
        """Raise `InputError` unless the words that are named are words of the prompts."""
        super().check_call(arguments)
        words, count = words_of(arguments["token_indices"]), prompt_count(arguments)
        if len(words) != count:
            raise InputError(f"token_indices: {len(words)} lists for {count} prompts", remedy="pass a list for each prompt")
        prompts, embeds = listed(arguments["prompt"]), arguments["prompt_embeds"]
        lengths = [len(self.get_indices(text)) for text in prompts] or [embeds.shape[1] - 1] * count
        for positions, length in zip(words, lengths, strict=True):
            last = min(length, self.tokenizer.model_max_length - 1 if prompts else length) - 1
            outside = [position for position in positions if not 1 <= position <= last]
            if outside or not positions:
                raise InputError(
                    f"token_indices: {outside[0]} is the position of no word" if outside else "token_indices names no word",
                    expected=f"1 to {last}, as pipe.get_indices(prompt) counts",
                )

    def watched_size(self, rows: int, columns: int) -> tuple[int, int]:
        """(rows, columns) of the feature maps whose attention counts, for latents of this size.

        Raises:
            InputError: The UNet attends to words at other sizes only.
        """
        asked = self._run.arguments["attn_res"]
        size = (math.ceil(rows / 4), math.ceil(columns / 4)) if asked is None else (asked[0], asked[1])
        sizes = attention_sizes(self.unet, rows, columns)
        if size not in sizes:
            raise InputError(
                f"attn_res={size}: no feature map of the UNet that attends to words is so large",
                expected=" or ".join(map(str, sizes)),
                remedy=f"pass attn_res={sizes[len(sizes) // 2]}" if sizes else "",
            )
        return size

    def denoise(
        self,
        model: nn.Module,
        conditioning: Conditioning,
        latents: Tensor,
        timesteps: Tensor,
        num_inference_steps: int,
        conditioners: Sequence[Conditioner],
        *more: Any,
        **named: Any,
    ) -> Tensor:
        """Walk latents down the timesteps, and move them between the steps."""
        run, arguments = self._run, self._run.arguments
        told = [*conditioners, formed(model)]
        each = arguments["num_images_per_prompt"]
        lengths = arguments["scale_factor"] * np.sqrt(np.linspace(1.0, 0.5, len(timesteps)))
        excite = AttendAndExcite(
            Denoiser(model, run.scheduler, conditioning, told),
            words=[positions for positions in words_of(arguments["token_indices"]) for _ in range(each)],
            size=self.watched_size(latents.shape[-2], latents.shape[-1]),
            lengths=lengths.tolist(),
            moved=arguments["max_iter_to_alter"],
            thresholds=arguments["thresholds"],
        )
        return super().denoise(model, conditioning, latents, timesteps, num_inference_steps, told, [excite], *more, **named)


def words_of(positions: Sequence[Any]) -> list[list[int]]:
    """A list for each prompt of a list for the only one, or of one for each."""
    flat = not positions or not isinstance(positions[0], (list, tuple))
    return [list(cast(Sequence[int], own)) for own in ([positions] if flat else positions)]
