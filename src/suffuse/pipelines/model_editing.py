"""Text to image with a model whose assumptions are edited (Orgad et al., 2023, "TIME"): "a rose" can come to mean a blue one."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from suffuse.configuration import check_type
from suffuse.diffusion.assumption_editing import aligned, edited, projections
from suffuse.diffusion.prompts import TOKENIZING
from suffuse.errors import InputError
from suffuse.noise import Generators, Seeds
from suffuse.pipelines.arguments import number, phrase, recipe
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

BEGINNINGS = ["A photo of ", "An image of ", "A picture of "]
"""What edits are said after too, so that they hold in other sentences."""


class StableDiffusionModelEditingPipeline(Drawing):
    """Pictures from prompts, by a UNet that `edit_model` changes and `restore_model` gives back.

    The UNet itself is edited: pipelines that share it draw with it too, and `save_pretrained` writes it as it then is.
    """

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
        with_to_k: bool = True,
        with_augs: list[str] = BEGINNINGS,
        image_encoder: CLIPVisionModelWithProjection | None = None,
    ) -> None:
        checker = (safety_checker, feature_extractor, image_encoder, requires_safety_checker)
        super().__init__(vae, text_encoder, tokenizer, unet, scheduler, *checker)
        check_type(type(self).__name__, "with_to_k", with_to_k, bool)
        self.register_to_config(with_to_k=with_to_k, with_augs=list(with_augs))
        self._originals = dict[nn.Linear, Any]()

    @torch.no_grad()
    def edit_model(self, source_prompt: str, destination_prompt: str, lamb: float = 0.1, restart_params: bool = True) -> None:
        """Make the UNet take one prompt for another.

        Args:
            source_prompt: What is said, "a pack of roses".
            destination_prompt: What is to be meant, "a pack of blue roses": all words of the source, in order, and others.
            lamb: How near to the UNet as it was; smaller edits more.
            restart_params: Begin with the UNet as it was; or add to what was edited before.

        Raises:
            InputError: The prompts do not go together, or the UNet is not in one piece here; it is as it was.
        """
        phrase("source_prompt", source_prompt)
        phrase("destination_prompt", destination_prompt)
        number(1e-6)("lamb", lamb)
        layers = projections(self.unet, self.config.with_to_k)
        if any(layer.weight.is_meta for layer in layers):
            raise InputError("the weights of the UNet are elsewhere", remedy="pipe.remove_all_hooks() first")
        words = [self._words(source, target) for source, target in self._sentences(source_prompt, destination_prompt)]
        source, target = (torch.cat(side) for side in zip(*words, strict=True))
        began = self._originals if restart_params else {}
        weights = {layer: edited(began.get(layer, layer.weight), source, target, lamb) for layer in layers}
        for layer, weight in weights.items():
            self._originals.setdefault(layer, layer.weight)
            layer.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)

    @torch.no_grad()
    def restore_model(self) -> None:
        """Give the UNet back as it was before the first edit, to the last bit."""
        for layer, weight in self._originals.items():
            moved = weight.to(layer.weight)
            layer.weight = weight if moved is weight else nn.Parameter(moved, requires_grad=weight.requires_grad)
        self._originals = {}

    def _sentences(self, *prompts: str) -> Sequence[tuple[str, ...]]:
        """Pairs of what is said and meant: alone, and after each beginning."""
        later = [f"a{prompt[1:]}" if prompt.startswith("A") else prompt for prompt in prompts]
        return [prompts, *(tuple(beginning + prompt for prompt in later) for beginning in self.config.with_augs)]

    def _words(self, source: str, destination: str) -> tuple[Tensor, Tensor]:
        """(positions, width) of a source, and for each position what it is to be taken for."""
        texts = self.maybe_convert_prompt([source, destination], self.tokenizer)
        said, meant = self.encode_prompt(texts, self._execution_device, 1, False)[0]
        with TOKENIZING:
            tokens = self.tokenizer(texts).input_ids
            an, a = (self.tokenizer(article).input_ids[1:-1] for article in ("an", "a"))
        if len(an) == len(a) == 1:
            tokens = [[a[0] if token == an[0] else token for token in own] for own in tokens]
        longest, most = max(map(len, tokens)), self.tokenizer.model_max_length
        if longest > most or len(said) > most:
            raise InputError("a prompt is too long", found=f"{longest} tokens", expected=f"at most {most}")
        return said, meant[aligned(tokens[0], tokens[1], len(said))]

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
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback: Callable[..., Any] | None = None,
        callback_steps: int | None = 1,
        cross_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int | None = None,
        ip_adapter_image: ImageInput | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        seed: Seeds = None,
        save_run: str | os.PathLike[str] | None = None,
        resume: str | os.PathLike[str] | SavedRun | None = None,
        **values: Unpack[BesidePicture],
    ) -> Any:
        """Draw what prompts say, as the UNet now takes them.

        Returns:
            `StableDiffusionPipelineOutput(images, nsfw_content_detected)`, or the same as a tuple.

        Raises:
            InputError, LimitError: An argument is not what it may be; no generator was used.
            NonFiniteError: The numbers overflowed; says where, and what to do.
        """
        self._run.guidance = self.guidance_for(guidance_scale)
        return self.draw(*self.default_size(height, width))
