"""Text to image, edited by concepts (Brack et al., 2023, "SEGA")."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from suffuse.diffusion.prompts import listed
from suffuse.diffusion.semantic_guidance import Concept, SemanticGuidance
from suffuse.errors import InputError
from suffuse.noise import Generators, Seeds
from suffuse.pipelines.arguments import one_for_each, prompt_count, recipe
from suffuse.pipelines.features import BesideGuidance
from suffuse.pipelines.saved_run import SavedRun
from suffuse.pipelines.stable_diffusion.base import StableDiffusionPipelineOutput
from suffuse.pipelines.stable_diffusion.drawing import Drawing
from suffuse.processing.image import ImageInput

if TYPE_CHECKING:
    from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection
    from typing_extensions import Unpack

    from suffuse.models.autoencoder_kl import AutoencoderKL
    from suffuse.models.unet_2d_condition import UNet2DConditionModel
    from suffuse.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from suffuse.schedulers.scheduler import SchedulerMixin

SETTINGS = {
    "scale": "edit_guidance_scale",
    "reverse": "reverse_editing_direction",
    "warmup": "edit_warmup_steps",
    "cooldown": "edit_cooldown_steps",
    "threshold": "edit_threshold",
    "weight": "edit_weights",
}
"""Field of a concept → the argument that says it, once for all or for each."""


@dataclass
class SemanticStableDiffusionPipelineOutput(StableDiffusionPipelineOutput):
    """Pictures, and for each whether the safety checker blanked it (None: there is no checker)."""


def concepts_of(arguments: Mapping[str, Any]) -> list[Concept]:
    """What a call edits by.

    Raises:
        InputError: Texts and embeddings are both given, or a list has not an entry for each.
    """
    texts, embeds = arguments["editing_prompt"], arguments["editing_prompt_embeddings"]
    if texts is not None and embeds is not None:
        raise InputError("editing_prompt and editing_prompt_embeddings are both given", remedy="pass one of the two")
    # diffusers reads a concept once for each prompt, and how many texts are read at once decides the last bits.
    told: Any = [[text] * prompt_count(arguments) for text in listed(texts)] if embeds is None else [*embeds]
    each = {field: one_for_each(name, arguments[name], len(told), "editing prompt") for field, name in SETTINGS.items()}
    settings = [dict(zip(each, values, strict=True)) for values in zip(*each.values(), strict=True)]
    return [
        Concept(text, **{name: value for name, value in own.items() if value is not None})
        for text, own in zip(told, settings, strict=True)
    ]


class SemanticStableDiffusionPipeline(Drawing):
    """Pictures from prompts, with concepts to go towards or away from."""

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
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback: Callable[..., Any] | None = None,
        callback_steps: int | None = 1,
        editing_prompt: str | list[str] | None = None,
        editing_prompt_embeddings: Tensor | None = None,
        reverse_editing_direction: bool | list[bool] = False,
        edit_guidance_scale: float | list[float] = 5,
        edit_warmup_steps: int | list[int] = 10,
        edit_cooldown_steps: int | list[int] | None = None,
        edit_threshold: float | list[float] = 0.9,
        edit_momentum_scale: float = 0.1,
        edit_mom_beta: float = 0.4,
        edit_weights: list[float] | None = None,
        sem_guidance: list[Tensor] | Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        ip_adapter_image: ImageInput | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        seed: Seeds = None,
        save_run: str | os.PathLike[str] | None = None,
        resume: str | os.PathLike[str] | SavedRun | None = None,
        **values: Unpack[BesideGuidance],
    ) -> Any:
        """Draw what prompts say, and edit it.

        Returns:
            `SemanticStableDiffusionPipelineOutput(images, nsfw_content_detected)`, or the same as a tuple; afterwards,
            `pipe.sem_guidance` is what another call replays as `sem_guidance`.

        Raises:
            InputError, LimitError: An argument is not what it may be; no generator was used.
            NonFiniteError: The numbers overflowed; says where, and what to do.
        """
        concepts, replayed = concepts_of(self._run.arguments), () if sem_guidance is None else sem_guidance
        self._run.guidance = SemanticGuidance(guidance_scale, concepts, edit_momentum_scale, edit_mom_beta, replayed, applied=[])
        rows, columns = self.default_size(height, width)
        self.check_replayed(replayed, self.latent_shape(self.pictures_of(self._run.arguments), rows, columns))
        return self.draw(rows, columns)

    @property
    def sem_guidance(self) -> Tensor | None:
        """The edits of the last run of this thread, (steps + 1, batch, channels, rows, columns), the last zeros."""
        applied = getattr(self._run.guidance, "applied", None)
        return torch.stack([*applied, torch.zeros_like(applied[0])]).float().cpu() if applied else None

    def check_call(self, arguments: dict[str, Any]) -> None:
        """Raise `InputError` unless prompts and edits go together."""
        super().check_call(arguments)
        edits = "editing_prompt" if concepts_of(arguments) else "sem_guidance"
        if (edits == "editing_prompt" or arguments[edits] is not None) and arguments["guidance_scale"] <= 1:
            raise InputError(
                f"{edits} is given, and guidance_scale={arguments['guidance_scale']} guides nothing",
                remedy="pass a guidance_scale above 1, 7.5 for example",
            )

    @staticmethod
    def check_replayed(replayed: Sequence[Tensor] | Tensor, shape: tuple[int, ...]) -> None:
        """Raise `InputError` unless the edits to be replayed are for latents of this shape."""
        for index, edit in enumerate(replayed):
            if tuple(edit.shape) not in (shape, (1, *shape[1:])):
                raise InputError(f"sem_guidance[{index}] has the wrong shape", found=tuple(edit.shape), expected=shape)

    def way(self) -> tuple[Tensor, int]:
        """The timesteps of the call, for each of which there must be an edit if edits are replayed."""
        way, steps = super().way()
        replayed = self._run.arguments["sem_guidance"]
        if replayed is not None and len(replayed) < len(way):
            raise InputError(f"sem_guidance: {len(replayed)} edits for {len(way)} steps", remedy="pass one for each step")
        return way, steps

    def output(self, images: Any, flagged: list[bool] | None) -> Any:
        """The result of a call, as an output object or a plain tuple."""
        made = SemanticStableDiffusionPipelineOutput(images, flagged)
        return made if self._run.arguments["return_dict"] else (images, flagged)
