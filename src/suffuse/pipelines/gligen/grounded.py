"""What the pipelines with boxes share: the recipe (Li et al., 2023, "GLIGEN")."""

from __future__ import annotations

from typing import Any

from suffuse.diffusion.conditioning import Channels
from suffuse.pipelines.gligen.boxes import check_boxes, grounding, inpainted, keep_around
from suffuse.pipelines.stable_diffusion.base import StableDiffusionBase
from suffuse.processing.image import Frame


class Grounded(StableDiffusionBase):
    """The verb of drawing things in boxes."""

    _scheduler_settings = {}

    @classmethod
    def input_channels(cls, latents: int) -> tuple[int, ...]:
        """A plain UNet sees latents; one trained for inpainting latents of the picture around the boxes, and where it is, too."""
        return latents, 2 * latents + 1

    def needed_components(self, arguments: dict[str, Any]) -> list[str]:
        """Those of Stable Diffusion, and what reads phrases."""
        around = ["vae"] if arguments["gligen_inpaint_image"] is not None else []
        return [*super().needed_components(arguments), "text_encoder", "tokenizer", *around]

    def check_call(self, arguments: dict[str, Any]) -> None:
        """Raise `InputError` unless prompts go together, and there is something for each box."""
        super().check_call(arguments)
        check_boxes(self, arguments)

    def ground(self, height: int | None, width: int | None, part: float) -> Any:
        """The recipe of drawing things in boxes, once the guidance of the run is set.

        Args:
            height: Rows asked for.
            width: Columns asked for.
            part: The part of the steps in which the boxes are told.

        Returns:
            The result of the call.
        """
        frame = Frame(*self.default_size(height, width))
        seen, pictures = [grounding(self, part), *self.further(frame)], inpainted(self, frame)
        way, steps = self.way()
        conditioning = self.encode()
        conditioners = [*self.conditioners(conditioning), *seen]
        dtype = conditioning.tensors["prompt_embeds"].dtype

        # The generator is spent on the noise, on the picture, and in each step on the picture's noise.
        noise = self.make_noise(self.latent_shape(conditioning.batch, *frame[:2]), dtype)
        hooks = [] if pictures is None else [keep_around(self, pictures, conditioning)]
        if self.unet.config.in_channels != self.latent_channels:
            conditioners.append(Channels(["gligen_inpaint"]))
        noisy = noise * self._run.scheduler.init_noise_sigma
        return self.finish(self.denoise(self.unet, conditioning, noisy, way, steps, conditioners, hooks), dtype)
