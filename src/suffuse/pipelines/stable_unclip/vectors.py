"""What the pipelines of Stable unCLIP share: a vector of a picture is noised, and told to the UNet in the place of a class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from suffuse.diffusion.conditioning import UNTOLD, ModelCall
from suffuse.diffusion.loop import Step
from suffuse.errors import ConfigError, InputError
from suffuse.layers.embeddings import get_timestep_embedding
from suffuse.noise import Generators, randn_tensor
from suffuse.pipelines.pipeline import ImagePipelineOutput
from suffuse.pipelines.stable_diffusion.base import StableDiffusionBase


def picture_as_class(call: ModelCall, step: Step) -> None:
    """Tell the UNet what a picture shows, in the place of a class."""
    call.kwargs["class_labels"] = call.conditioning.select("image_embeds", call.branches)


class FromVectors(StableDiffusionBase):
    """The verbs of drawing from CLIP's vector of a picture (Ramesh et al., 2022, section 2.1)."""

    _optional_components = []
    _scheduler_settings = {}

    image_normalizer: Any
    image_noising_scheduler: Any
    safety_checker = None

    def set_up(self, **components: Any) -> None:
        """Take the components.

        Raises:
            ConfigError: The UNet is not shown pictures.
        """
        super().set_up(**components)
        if self.unet is not None and self.unet.config.class_embed_type is None:
            raise ConfigError(
                "unet/config.json: this UNet is not shown pictures", found="class_embed_type=None", expected="'projection'"
            )

    def needed_components(self, arguments: dict[str, Any]) -> list[str]:
        """Those of Stable Diffusion, and what noises a vector."""
        return [*super().needed_components(arguments), "image_normalizer", "image_noising_scheduler"]

    def check_call(self, arguments: dict[str, Any]) -> None:
        """Raise `InputError` unless prompts go together, and there is so much noise."""
        super().check_call(arguments)
        level, trained = arguments["noise_level"], self.image_noising_scheduler.config["num_train_timesteps"]
        if level >= trained:
            raise InputError(f"noise_level={level} is out of range", expected=f"at most {trained - 1}")

    def draw_seen(self, height: int, width: int, see: Callable[[int], Tensor]) -> Any:
        """The recipe of drawing what vectors show, once the guidance of the run is set.

        Args:
            height: Rows of the picture.
            width: Columns.
            see: From the number of pictures to their vectors, noised, (batch, 2 · size); draws before the latents do.

        Returns:
            The result of the call.
        """
        run = self._run
        way, steps = self.way()
        conditioning = self.encode()
        batch, dtype = conditioning.batch, conditioning.tensors["prompt_embeds"].dtype
        conditioners = [*self.conditioners(conditioning), picture_as_class]
        shape = self.latent_shape(batch, height, width)
        self.check_noise(shape)

        seen = see(batch).to(dtype)
        nothing = torch.zeros_like(seen)
        told = [nothing if branch in UNTOLD else seen for branch in conditioning.layout]
        conditioning.tensors["image_embeds"] = torch.cat(told)
        noisy = self.make_noise(shape, dtype) * run.scheduler.init_noise_sigma
        return self.finish(self.denoise(self.unet, conditioning, noisy, way, steps, conditioners), dtype)

    def noise_image_embeddings(
        self, image_embeds: Tensor, noise_level: int, noise: Tensor | None = None, generator: Generators = None
    ) -> Tensor:
        """Vectors of pictures at a noise level, with an embedding of it: (batch, size) → (batch, 2 · size).

        Args:
            image_embeds: As the image encoder makes them.
            noise_level: In steps of training; more leaves more to invent.
            noise: Of the shape of `image_embeds`; drawn, if None.
            generator: What it is drawn from.
        """
        if noise is None:
            noise = randn_tensor(image_embeds.shape, generator, image_embeds.device, image_embeds.dtype)
        levels = torch.tensor([int(noise_level)] * len(image_embeds), device=image_embeds.device)
        normal = self.image_noising_scheduler.add_noise(self.image_normalizer.scale(image_embeds), noise, levels)
        noised = self.image_normalizer.unscale(normal)
        told = get_timestep_embedding(levels, noised.shape[-1], flip_sin_to_cos=True, downscale_freq_shift=0)
        return torch.cat((noised, told.to(noised.dtype)), 1)

    def output(self, images: Any, flagged: list[bool] | None) -> Any:
        """The result of a call, as an output object or a plain tuple."""
        return ImagePipelineOutput(images) if self._run.arguments["return_dict"] else (images,)
