"""Editing by two prompts: a picture is inverted, and changed where they differ (Couairon et al., 2023, "DiffEdit")."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from suffuse.diffusion.conditioning import Conditioning, Denoiser
from suffuse.diffusion.guidance import ClassifierFreeGuidance
from suffuse.diffusion.inversion import KeepOutside, LikeNoise, Record, difference_mask
from suffuse.diffusion.latents import repeats
from suffuse.diffusion.loop import Step
from suffuse.errors import InputError
from suffuse.noise import Generators, Seeds
from suffuse.outputs import BaseOutput
from suffuse.pipelines.arguments import check_prompts, check_shape, prompt_count, recipe
from suffuse.pipelines.features import BesidePicture
from suffuse.pipelines.pipeline import kept_steps
from suffuse.pipelines.saved_run import SavedRun
from suffuse.pipelines.sides import encode_sides
from suffuse.pipelines.stable_diffusion.base import PROMPTS, StableDiffusionBase
from suffuse.processing.image import Frame, ImageInput, VaeImageProcessor
from suffuse.schedulers.prediction import EPSILON

if TYPE_CHECKING:
    from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer
    from typing_extensions import Unpack

    from suffuse.models.autoencoder_kl import AutoencoderKL
    from suffuse.models.unet_2d_condition import UNet2DConditionModel
    from suffuse.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from suffuse.schedulers.scheduler import SchedulerMixin

SIDES = ("source", "target")
"""What the picture shows, and what it should show."""


@dataclass
class DiffEditInversionPipelineOutput(BaseOutput):
    """Latents on the way to noise, (batch, steps, channels, rows, columns), the noisiest first; and what they show, if asked."""

    latents: Tensor
    images: Any


class StableDiffusionDiffEditPipeline(StableDiffusionBase):
    """Pictures changed where two prompts differ: `generate_mask`, `invert`, and the call."""

    model_cpu_offload_seq = "text_encoder->unet->vae"
    _optional_components = ["safety_checker", "feature_extractor", "inverse_scheduler"]
    mask_processor = VaeImageProcessor(vae_scale_factor=1, do_normalize=False, do_binarize=True, do_convert_grayscale=True)

    inverse_scheduler: Any

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        safety_checker: StableDiffusionSafetyChecker | None,
        feature_extractor: CLIPImageProcessor | None,
        inverse_scheduler: SchedulerMixin | None,
        requires_safety_checker: bool = True,
    ) -> None:
        checker = (safety_checker, feature_extractor, None, requires_safety_checker)
        super().__init__(vae, text_encoder, tokenizer, unet, scheduler, *checker)
        self.register_modules(inverse_scheduler=inverse_scheduler)

    # ------------------------------------------------------------ arguments

    def needed_components(self, arguments: dict[str, Any]) -> list[str]:
        """What a call, a mask or an inversion cannot do without."""
        inverting = ["inverse_scheduler"] if "decode_latents" in arguments else []
        return [*super().needed_components(arguments), *inverting]

    def check_call(self, arguments: dict[str, Any]) -> None:
        """Raise `InputError` unless the arguments of a call, a mask or an inversion go together."""
        if "num_maps_per_mask" in arguments:
            for side in SIDES:
                check_prompts(told_of(side, arguments))
        elif "mask_image" in arguments:
            super().check_call(arguments)
        else:
            check_prompts(arguments)
        remedies = {"image": "the picture", "mask_image": "what generate_mask() returns", "image_latents": "invert(…).latents"}
        for name in remedies.keys() & arguments.keys():
            if arguments[name] is None:
                raise InputError(f"{name} is missing", remedy=f"pass {name}=…: {remedies[name]}")

    def pictures_of(self, arguments: dict[str, Any]) -> int:
        """How many pictures a call makes, how many noises a mask is made of, or how many pictures are inverted."""
        if "num_maps_per_mask" in arguments:
            return prompt_count(told_of("target", arguments)) * arguments["num_maps_per_mask"]
        return prompt_count(arguments) * arguments.get("num_images_per_prompt", 1)

    # ------------------------------------------------------------ what differs

    @recipe
    def generate_mask(
        self,
        image: ImageInput | None = None,
        target_prompt: str | list[str] | None = None,
        target_negative_prompt: str | list[str] | None = None,
        target_prompt_embeds: Tensor | None = None,
        target_negative_prompt_embeds: Tensor | None = None,
        source_prompt: str | list[str] | None = None,
        source_negative_prompt: str | list[str] | None = None,
        source_prompt_embeds: Tensor | None = None,
        source_negative_prompt_embeds: Tensor | None = None,
        num_maps_per_mask: int = 10,
        mask_encode_strength: float = 0.5,
        mask_thresholding_ratio: float = 3.0,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        generator: Generators = None,
        output_type: str = "np",
        cross_attention_kwargs: dict[str, Any] | None = None,
        seed: Seeds = None,
    ) -> Any:
        """Find out where a picture must change, from what the UNet predicts for two prompts.

        Returns:
            A mask for each picture, as large as its latents, 1 where it changes: an array or a tensor ("pt") of (batch, rows,
            columns), or PIL pictures.

        Raises:
            InputError: An argument is not what it may be; no generator was used.
        """
        run = self._run
        run.guidance = guidance = ClassifierFreeGuidance(guidance_scale)
        sides = encode_sides(
            self, [told_of(side, run.arguments) | {"num_images_per_prompt": num_maps_per_mask} for side in SIDES]
        )
        layout = tuple(f"{side} {branch}" for side in SIDES for branch in guidance.branches)
        batch, joined = sides[0].batch, torch.cat([side.tensors["prompt_embeds"] for side in sides])
        told = Conditioning(batch, layout, {"prompt_embeds": joined})
        way, _ = run.timesteps_for(run.set_timesteps(self._execution_device), mask_encode_strength)
        pictures = self.image_processor.preprocess(image).repeat_interleave(num_maps_per_mask, dim=0)
        noisy = self.noised(pictures, way[:1], batch, self.vae.dtype)
        said = Denoiser(self.unet, run.scheduler, told, self.conditioners(told))(Step(noisy, 1, 0, way[0]), layout)
        source, target = (
            guidance.combine({branch: said[f"{side} {branch}"] for branch in guidance.branches}).unflatten(
                0, (-1, num_maps_per_mask)
            )
            for side in SIDES
        )
        mask = difference_mask(target, source, mask_thresholding_ratio).cpu()
        if output_type == "pil":
            return self.image_processor.numpy_to_pil(mask[..., None].float().numpy())
        return mask if output_type == "pt" else mask.numpy()

    # ------------------------------------------------------------ to noise

    @recipe
    def invert(
        self,
        prompt: str | list[str] | None = None,
        image: ImageInput | None = None,
        num_inference_steps: int = 50,
        inpaint_strength: float = 0.8,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        generator: Generators = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        decode_latents: bool = False,
        output_type: str = "pil",
        return_dict: bool = True,
        callback: Callable[..., Any] | None = None,
        callback_steps: int | None = 1,
        cross_attention_kwargs: dict[str, Any] | None = None,
        lambda_auto_corr: float = 20.0,
        lambda_kl: float = 20.0,
        num_reg_steps: int = 0,
        num_auto_corr_rolls: int = 5,
        seed: Seeds = None,
    ) -> Any:
        """Go from pictures towards the noise that they come from.

        Returns:
            `DiffEditInversionPipelineOutput(latents, images)`, or the same as a tuple; `latents` are the call's `image_latents`.

        Raises:
            InputError: An argument is not what it may be; no generator was used.
            NonFiniteError: The numbers overflowed; says where, and what to do.
        """
        run = self._run
        run.arguments["num_images_per_prompt"] = 1
        told = (num_reg_steps, lambda_auto_corr, lambda_kl, num_auto_corr_rolls, generator)
        run.guidance = LikeNoise(guidance_scale, 0.0, self.get_epsilon, *told)
        run.scheduler = self.inverse_scheduler.fork()
        self.inverse_scheduler.follow(run.scheduler)
        pictures = self.image_processor.preprocess(image)
        steps = run.set_timesteps(self._execution_device)
        way, steps = self.get_inverse_timesteps(steps, inpaint_strength, self._execution_device)
        conditioning, record = self.encode(), Record()
        latents = self.clean(pictures, conditioning.batch, self.vae.dtype)
        self.denoise(self.unet, conditioning, latents, way, steps, self.conditioners(conditioning), [record])
        inverted = torch.stack(record.latents[::-1], dim=1)
        images = self.image_processor.postprocess(self.decoded(inverted.flatten(0, 1)), output_type) if decode_latents else None
        return DiffEditInversionPipelineOutput(inverted, images) if return_dict else (inverted, images)

    def get_inverse_timesteps(self, num_inference_steps: int, strength: float, device: torch.device) -> tuple[Tensor, int]:
        """The timesteps that `strength` leaves of those the inverse scheduler was set to, and how many steps they are.

        Raises:
            InputError: None is left.
        """
        kept = kept_steps(num_inference_steps, strength)
        return self.inverse_scheduler.timesteps[: len(self.inverse_scheduler.timesteps) - (num_inference_steps - kept)], kept

    def get_epsilon(self, model_output: Tensor, sample: Tensor, timestep: int | Tensor) -> Tensor:
        """The noise in a sample, whatever the model predicts: of the shape of the sample."""
        alpha = self.inverse_scheduler.alphas_cumprod[int(timestep)]
        return EPSILON[self.inverse_scheduler.config.prediction_type](sample, model_output, alpha**0.5, (1 - alpha) ** 0.5)

    # ------------------------------------------------------------ and back

    @recipe
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        mask_image: ImageInput | None = None,
        image_latents: Tensor | list[Tensor] | None = None,
        inpaint_strength: float = 0.8,
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
        clip_ckip: int | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        seed: Seeds = None,
        save_run: str | os.PathLike[str] | None = None,
        resume: str | os.PathLike[str] | SavedRun | None = None,
        **values: Unpack[BesidePicture],
    ) -> Any:
        """Draw what prompts say where the mask is 1, and go back the way of the inversion elsewhere.

        Returns:
            `StableDiffusionPipelineOutput(images, nsfw_content_detected)`, or the same as a tuple.

        Raises:
            InputError, LimitError: An argument is not what it may be; no generator was used.
            NonFiniteError: The numbers overflowed; says where, and what to do.
        """
        run = self._run
        run.guidance, run.clip_skip = self.guidance_for(guidance_scale), clip_ckip if clip_skip is None else clip_skip
        mask = self.mask_processor.preprocess(mask_image, name="mask_image")
        further = self.further(Frame(mask.shape[-2] * self.vae_scale_factor, mask.shape[-1] * self.vae_scale_factor))
        way, steps = run.timesteps_for(run.set_timesteps(self._execution_device), inpaint_strength)
        conditioning = self.encode()
        shape, dtype = (self.latent_channels, *mask.shape[-2:]), self.unet.dtype
        self.check_noise((conditioning.batch, *shape))
        prompts = conditioning.batch // num_images_per_prompt
        inverted = by_step(image_latents, (prompts, len(way), *shape)).repeat_interleave(num_images_per_prompt, dim=1)
        inverted = inverted.to(self._execution_device, dtype)
        mask = (
            mask.repeat(repeats(prompts, mask, "mask_image"), 1, 1, 1)
            .repeat_interleave(num_images_per_prompt, dim=0)
            .to(inverted)
        )
        begun = inverted[0] if latents is None else latents.to(inverted)
        conditioners = [*self.conditioners(conditioning), *further]
        made = self.denoise(self.unet, conditioning, begun, way, steps, conditioners, [KeepOutside(mask, inverted)])
        return self.finish(made, dtype)


def told_of(side: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The prompts of one side of a mask, by their usual names."""
    return {name: arguments[f"{side}_{name}"] for name in PROMPTS}


def by_step(latents: Any, shape: tuple[int, ...]) -> Tensor:
    """What an inversion returned, as (steps, batch, channels, rows, columns).

    Args:
        latents: (batch, steps, channels, rows, columns), or (batch · steps, channels, rows, columns); or a list of parts of it.
        shape: (batch, steps, channels, rows, columns).

    Raises:
        InputError: They are of another shape.
    """
    given = latents if isinstance(latents, Tensor) else torch.cat([one if one.ndim > 3 else one[None] for one in latents])
    if given.ndim == 4 and len(given) == shape[0] * shape[1]:
        given = given.unflatten(0, shape[:2])
    check_shape("image_latents", given, shape)
    return given.transpose(0, 1)
