"""Wide pictures from windows that agree (Bar-Tal et al., 2023, "MultiDiffusion")."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from suffuse.adapters.ip_adapter import MASKS
from suffuse.diffusion.adapter_features import features_of
from suffuse.diffusion.decoders import decode
from suffuse.diffusion.windows import View, Window, WindowedStep, windows
from suffuse.errors import InputError
from suffuse.noise import Generators, Seeds
from suffuse.pipelines.arguments import recipe
from suffuse.pipelines.features import BesideBoxes
from suffuse.pipelines.saved_run import SavedRun
from suffuse.pipelines.stable_diffusion.base import StableDiffusionBase
from suffuse.processing.image import Frame, ImageInput

if TYPE_CHECKING:
    from typing_extensions import Unpack


class StableDiffusionPanoramaPipeline(StableDiffusionBase):
    """Pictures from prompts, of any width; their edges meet, if they are to go all the way round."""

    model_cpu_offload_seq = "text_encoder->unet->vae"

    @recipe
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = 512,
        width: int | None = 2048,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        view_batch_size: int = 1,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        ip_adapter_image: ImageInput | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback: Callable[..., Any] | None = None,
        callback_steps: int | None = 1,
        cross_attention_kwargs: dict[str, Any] | None = None,
        circular_padding: bool = False,
        clip_skip: int | None = None,
        timesteps: list[int] | None = None,
        guidance_rescale: float = 0.0,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        window_size: int = 64,
        stride: int = 8,
        seed: Seeds = None,
        save_run: str | os.PathLike[str] | None = None,
        resume: str | os.PathLike[str] | SavedRun | None = None,
        **values: Unpack[BesideBoxes],
    ) -> Any:
        """Draw what prompts say.

        Returns:
            `StableDiffusionPipelineOutput(images, nsfw_content_detected)`, or the same as a tuple.

        Raises:
            InputError, LimitError: An argument is not what it may be; no generator was used.
            NonFiniteError: The numbers overflowed; says where, and what to do.
        """
        run = self._run
        if MASKS in (cross_attention_kwargs or {}):
            raise InputError(f"{MASKS} say where in a picture, and a panorama is seen in windows", remedy="leave them out")
        run.guidance = self.guidance_for(guidance_scale, guidance_rescale)
        size = self.default_size(height, width)
        further = self.further(Frame(*size))
        way, steps = self.way()
        conditioning = self.encode()
        shape = self.latent_shape(conditioning.batch, *size)
        places = windows(*shape[2:], window_size, stride, circular_padding)
        views = [View(place, shape[2:], circular_padding) for place in places]
        for view, features in product(views, features_of(further)):
            view.place(*features.shape[-2:])  # refused before noise is drawn
        noisy = self.make_noise(shape, self.unet.dtype) * run.scheduler.init_noise_sigma
        advance = partial(WindowedStep, views=views, at_once=view_batch_size)
        told = [*self.conditioners(conditioning), *further]
        made = self.denoise(self.unet, conditioning, noisy, way, steps, told, advance=advance)
        return self.finish(made, self.unet.dtype)

    def get_views(
        self, panorama_height: int, panorama_width: int, window_size: int = 64, stride: int = 8, circular_padding: bool = False
    ) -> list[Window]:
        """Windows (top, bottom, left, right), in latents, that cover a picture of so many pixels."""
        return windows(*self.latent_shape(1, panorama_height, panorama_width)[2:], window_size, stride, circular_padding)

    def decoded(self, latents: Tensor, **conditions: Tensor) -> Tensor:
        """Pictures of scaled latents, about [-1, 1]; both edges meet, if they are to."""
        round_about = self._run.arguments["circular_padding"]
        return self.decode_latents_with_padding(latents) if round_about else super().decoded(latents, **conditions)

    def decode_latents_with_padding(self, latents: Tensor, padding: int = 8) -> Tensor:
        """Pictures of scaled latents that the autoencoder sees go on at the other edge, for so many latents."""
        padding = min(padding, latents.shape[-1])
        latents = 1 / self.vae.config.scaling_factor * latents
        wider = torch.cat([latents[..., -padding:], latents, latents[..., :padding]], dim=-1)
        cut = padding * self.vae_scale_factor
        return decode(self.vae, wider, self._run.arguments.get("generator"), self.upcasts("decode"))[..., cut:-cut]
