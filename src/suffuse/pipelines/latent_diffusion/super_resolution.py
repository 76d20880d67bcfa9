"""Super-resolution by latent diffusion (Rombach et al., 2022, https://arxiv.org/abs/2112.10752, section 4.4)."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from suffuse.diffusion.conditioning import ModelCall, per_branch
from suffuse.diffusion.decoders import decode
from suffuse.diffusion.loop import Step
from suffuse.errors import InputError
from suffuse.models.unet_2d import UNet2DModel
from suffuse.models.vq_model import VQModel
from suffuse.noise import Generators, Seeds
from suffuse.pipelines.arguments import recipe
from suffuse.pipelines.saved_run import SavedRun
from suffuse.pipelines.unconditional.base import Unconditional, noise_for
from suffuse.processing.image import ImageInput, VaeImageProcessor
from suffuse.processing.pixels import listed
from suffuse.schedulers.scheduler import SchedulerMixin


@dataclass
class SmallPictures:
    """Show the pictures that are to grow beside their latents, scaled as those are.

    Attributes:
        pictures: (batch, 3, rows, columns) in [-1, 1]: one pixel stands beside one latent.
        scheduler: Of the run.
    """

    pictures: Tensor
    scheduler: SchedulerMixin

    def __call__(self, call: ModelCall, step: Step) -> None:
        """Add the channels."""
        call.channels.append(per_branch(self.scheduler.scale_model_input(self.pictures, step.timestep), call.branches))


class LDMSuperResolutionPipeline(Unconditional):
    """Pictures four times as large as those that are given."""

    model_cpu_offload_seq = "unet->vqvae"

    vqvae: Any

    def __init__(self, vqvae: VQModel, unet: UNet2DModel, scheduler: SchedulerMixin) -> None:
        self.register_modules(vqvae=vqvae, unet=unet, scheduler=scheduler)

    def pictures_of(self, arguments: dict[str, Any]) -> int:
        """As many as are given."""
        return sum(len(item) if getattr(item, "ndim", 3) == 4 else 1 for item in listed(arguments["image"], "image"))

    def check_call(self, arguments: dict[str, Any]) -> None:
        """Raise `InputError` unless `batch_size` is left alone, or says how many pictures are given."""
        given = self.pictures_of(arguments)
        if arguments["batch_size"] not in (1, given):
            raise InputError(f"batch_size={arguments['batch_size']} for {given} pictures", remedy="leave it out")

    @recipe
    def __call__(
        self,
        image: ImageInput | None = None,
        batch_size: int = 1,
        num_inference_steps: int = 100,
        eta: float = 0.0,
        generator: Generators = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        seed: Seeds = None,
        save_run: str | os.PathLike[str] | None = None,
        resume: str | os.PathLike[str] | SavedRun | None = None,
    ) -> Any:
        """Draw pictures as they would look at four times the size.

        Returns:
            `ImagePipelineOutput(images)`, or the same as a tuple.

        Raises:
            InputError: An argument is not what it may be; no generator was used.
            NonFiniteError: The numbers overflowed; says where.
        """
        run, shown = self._run, listed(image, "image")
        # PIL pictures are brought to sizes that any of these UNets takes, tensors are taken as they are.
        multiple = 32 if isinstance(shown[0], Image.Image) else 1
        processor = VaeImageProcessor(vae_scale_factor=multiple, vae_latent_channels=0)
        small = processor.preprocess(image).to(self._execution_device, self.unet.dtype)
        steps = run.set_timesteps(self._execution_device)
        shape = (len(small), self.unet.config.in_channels // 2, *small.shape[-2:])
        noise = noise_for(self, shape, self.unet.dtype) * run.scheduler.init_noise_sigma
        latents = self.walk(noise, steps, [SmallPictures(small, run.scheduler)])
        # These latents were never scaled.
        return self.finish(latents if output_type == "latent" else decode(self.vqvae, latents))
