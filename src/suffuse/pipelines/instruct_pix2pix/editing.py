"""What the pipelines for editing by instruction share: the picture as channels, three branches, the recipe.

The UNet sees latents of the picture beside those it denoises: their mean, as the autoencoder made it, without its scale.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from suffuse.diffusion.conditioning import Channels, Conditioning, rows
from suffuse.diffusion.latents import mean_of_image, repeats
from suffuse.errors import InputError
from suffuse.noise import Generators
from suffuse.pipelines.stable_diffusion.base import StableDiffusionBase
from suffuse.processing.image import Frame

TOLD = {"cond": "cond", "image": "uncond", "uncond": "uncond"}
"""Branch → the one of classifier-free guidance whose text it is told."""


class Editing(StableDiffusionBase):
    """The verbs of editing by instruction."""

    _scheduler_settings = {}

    @classmethod
    def input_channels(cls, latents: int) -> tuple[int, ...]:
        """Latents, and those of the picture."""
        return (2 * latents,)

    @property
    def image_guidance_scale(self) -> float:
        """How much the last run of this thread favours the picture."""
        return getattr(self._run.guidance, "image_scale", 1.0)

    def edit(self, pictures: Tensor) -> Any:
        """The recipe of editing, once the guidance of the run is set.

        Args:
            pictures: (batch, 3, height, width) in [-1, 1], or their latents.

        Returns:
            The result of the call.
        """
        factor = self.vae_scale_factor if pictures.shape[1] == self.latent_channels else 1
        further = self.further(Frame(pictures.shape[-2] * factor, pictures.shape[-1] * factor))
        way, steps = self.way()
        conditioning = self.encode()
        conditioners = [*self.conditioners(conditioning), *further, Channels(["image_latents"])]
        batch, dtype = conditioning.batch, conditioning.tensors["prompt_embeds"].dtype
        guided = self.do_classifier_free_guidance
        shown = self.prepare_image_latents(pictures, batch, 1, dtype, self._execution_device, guided)
        conditioning.tensors["image_latents"] = shown
        noise = self.make_noise((batch, self.latent_channels, *shown.shape[-2:]), dtype)
        noisy = noise * self._run.scheduler.init_noise_sigma
        return self.finish(self.denoise(self.unet, conditioning, noisy, way, steps, conditioners), dtype)

    def prepare_image_latents(
        self,
        image: Tensor,
        batch_size: int,
        num_images_per_prompt: int,
        dtype: torch.dtype,
        device: torch.device,
        do_classifier_free_guidance: bool,
        generator: Generators = None,
    ) -> Tensor:
        """Latents of pictures as the UNet sees them: (batch · branches, channels, rows, columns), zeros for "uncond".

        Args:
            image: (pictures, 3, height, width) in [-1, 1], or latents.
            batch_size: Prompts.
            num_images_per_prompt: Pictures for each.
            dtype: The floating point type wanted.
            device: Where they are wanted.
            do_classifier_free_guidance: For three branches, or for one.
            generator: Kept for its name: nothing is drawn.

        Raises:
            InputError: There are more pictures than prompts, or a number that does not divide theirs.
        """
        image, batch = image.to(device=device, dtype=dtype), batch_size * num_images_per_prompt
        if len(image) > batch:
            raise InputError(f"image: {len(image)} given for {batch} pictures", remedy="pass a prompt for each")
        encoded = image.shape[1] == self.latent_channels
        latents = image if encoded else mean_of_image(self.vae, image, self.upcasts("encode")).to(dtype)
        latents = torch.cat([latents] * repeats(batch, latents, "image"))
        return torch.cat([latents, latents, torch.zeros_like(latents)]) if do_classifier_free_guidance else latents

    def denoise(self, model: nn.Module, conditioning: Conditioning, *way: Any, **more: Any) -> Tensor:
        """Walk latents down the timesteps; what is joined over two branches of text is told to three."""
        if self.do_classifier_free_guidance:
            batch, layout = conditioning.batch, conditioning.layout
            conditioning.layout = tuple(TOLD)
            for name, value in conditioning.tensors.items():
                if len(value) == len(layout) * batch:
                    conditioning.tensors[name] = rows(value, layout, tuple(TOLD.values()))
        return super().denoise(model, conditioning, *way, **more)
