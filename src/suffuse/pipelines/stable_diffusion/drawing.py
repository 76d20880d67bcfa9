"""What pipelines from prompts, and from a picture and prompts, share: the two recipes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from suffuse.pipelines.arguments import check_shape
from suffuse.pipelines.stable_diffusion.base import StableDiffusionBase
from suffuse.processing.image import Frame


class Drawing(StableDiffusionBase):
    """The verbs of drawing."""

    def draw(self, height: int, width: int) -> Any:
        """The recipe of every pipeline that begins with noise, once the guidance of the run is set.

        Args:
            height: Rows of the picture.
            width: Columns.

        Returns:
            The result of the call.
        """
        further = self.further(Frame(height, width))
        way, steps = self.way()
        conditioning = self.encode()
        conditioners = [*self.conditioners(conditioning), *further]
        dtype = conditioning.tensors["prompt_embeds"].dtype
        noise = self.make_noise(self.latent_shape(conditioning.batch, height, width), dtype)
        noisy = noise * self._run.scheduler.init_noise_sigma
        return self.finish(self.denoise(self.unet, conditioning, noisy, way, steps, conditioners), dtype)

    def redraw(self, pictures: Tensor) -> Any:
        """The recipe of every pipeline that begins with a picture, once the guidance of the run is set.

        Args:
            pictures: (batch, 3, height, width) in [-1, 1], or latents.

        Returns:
            The result of the call.
        """
        arguments = self._run.arguments
        latents, resumed = arguments.get("latents"), arguments.get("denoising_start") is not None
        if arguments["strength"] == 0 and not resumed:
            return self.unchanged(pictures)
        further = self.further(Frame(*self.size_of(pictures)))
        way, steps = self.way()
        conditioning = self.encode()
        conditioners = [*self.conditioners(conditioning), *further]
        batch, dtype = conditioning.batch, conditioning.tensors["prompt_embeds"].dtype
        if latents is not None:
            check_shape("latents", latents, self.latent_shape(batch, *self.size_of(pictures)))
            begun = latents.to(self._execution_device, dtype)
        elif resumed:
            begun = self.clean(pictures, batch, dtype)
        else:
            begun = self.noised(pictures, way[:1], batch, dtype)
        return self.finish(self.denoise(self.unet, conditioning, begun, way, steps, conditioners), dtype)
