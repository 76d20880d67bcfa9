"""RePaint: inpainting with a model that knows nothing of masks (Lugmayr et al., 2022, https://arxiv.org/abs/2201.09865)."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from suffuse.diffusion.advance import GuidedStep
from suffuse.diffusion.latents import repeats
from suffuse.diffusion.loop import Step
from suffuse.errors import InputError
from suffuse.noise import Generators, Seeds
from suffuse.pipelines.arguments import recipe
from suffuse.pipelines.saved_run import SavedRun
from suffuse.pipelines.unconditional.base import Unconditional, noise_for
from suffuse.processing.image import ImageInput, VaeImageProcessor
from suffuse.processing.pixels import listed


@dataclass
class RePaintStep(GuidedStep):
    """A step down, in which what is known stays as it is; or, where the timesteps rise, noise for a step up (algorithm 1).

    Attributes:
        known: The clean picture, of the shape of the sample.
        mask: 1 where it is known, 0 where it is painted, (batch, 1, rows, columns).
        generator: Where noise comes from.
    """

    known: Tensor | None = None
    mask: Tensor | None = None
    generator: Generators = None

    def __call__(self, step: Step) -> Tensor:
        """The sample at the next timestep, whichever way that lies."""
        scheduler: Any = self.scheduler
        before = scheduler.timesteps[step.index - 1] if step.index else step.timestep + 1
        if step.timestep >= before:
            return scheduler.undo_step(step.latents, before, self.generator)
        prediction = self.guidance(self.denoiser, step)
        told = (self.known, self.mask, self.generator)
        return scheduler.step(prediction, step.timestep, step.latents, *told).prev_sample


class RePaintPipeline(Unconditional):
    """Pictures with a part painted anew, by a UNet that draws from noise alone.

    Its `mask_image` is the other way round than elsewhere: white is kept, black is painted.
    """

    mask_processor = VaeImageProcessor(resample="nearest", do_normalize=False, do_binarize=True, do_convert_grayscale=True)

    def pictures_of(self, arguments: dict[str, Any]) -> int:
        """As many as are given."""
        return sum(len(item) if getattr(item, "ndim", 3) == 4 else 1 for item in listed(arguments["image"], "image"))

    @recipe
    def __call__(
        self,
        image: ImageInput,
        mask_image: ImageInput,
        num_inference_steps: int = 250,
        eta: float = 0.0,
        jump_length: int = 10,
        jump_n_sample: int = 10,
        generator: Generators = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        seed: Seeds = None,
        save_run: str | os.PathLike[str] | None = None,
        resume: str | os.PathLike[str] | SavedRun | None = None,
    ) -> Any:
        """Paint anew what `mask_image` leaves black.

        Returns:
            `ImagePipelineOutput(images)`, or the same as a tuple.

        Raises:
            InputError: An argument is not what it may be; no generator was used.
            NonFiniteError: The numbers overflowed; says after which step.
        """
        scheduler: Any = self._run.scheduler
        device, dtype = self._execution_device, self.unet.dtype
        known = self.image_processor.preprocess(image).to(device, dtype)
        mask = self.mask_processor.preprocess(mask_image, name="mask_image").to(device, dtype)
        if mask.shape[-2:] != known.shape[-2:]:
            found = f"{mask.shape[-1]} x {mask.shape[-2]} and {known.shape[-1]} x {known.shape[-2]} pixels"
            raise InputError("mask_image and image differ in size", found=found, expected="one size")
        mask = torch.cat([mask] * repeats(len(known), mask, "mask_image"))
        scheduler.set_timesteps(num_inference_steps, jump_length, jump_n_sample, device)
        noise = noise_for(self, tuple(known.shape), dtype)
        scheduler.eta = eta  # of this run's own fork
        advance = partial(RePaintStep, known=known, mask=mask, generator=generator)
        return self.finish(self.walk(noise, len(scheduler.timesteps), advance=advance))
