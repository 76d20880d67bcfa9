"""Unconditional latent diffusion (Rombach et al., 2022, https://arxiv.org/abs/2112.10752, section 4.2)."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from suffuse.diffusion.decoders import decode
from suffuse.models.unet_2d import UNet2DModel
from suffuse.models.vq_model import VQModel
from suffuse.noise import Generators, Seeds
from suffuse.pipelines.arguments import recipe
from suffuse.pipelines.saved_run import SavedRun
from suffuse.pipelines.unconditional.base import Unconditional
from suffuse.schedulers.scheduler import SchedulerMixin


class LDMPipeline(Unconditional):
    """Pictures from noise, drawn as latents and decoded."""

    model_cpu_offload_seq = "unet->vqvae"

    vqvae: Any

    def __init__(self, vqvae: VQModel, unet: UNet2DModel, scheduler: SchedulerMixin) -> None:
        self.register_modules(vqvae=vqvae, unet=unet, scheduler=scheduler)

    @recipe
    def __call__(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        eta: float = 0.0,
        num_inference_steps: int = 50,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        seed: Seeds = None,
        save_run: str | os.PathLike[str] | None = None,
        resume: str | os.PathLike[str] | SavedRun | None = None,
    ) -> Any:
        """Draw pictures such as the UNet was trained on.

        Returns:
            `ImagePipelineOutput(images)`, or the same as a tuple.

        Raises:
            InputError: An argument is not what it may be; no generator was used.
            NonFiniteError: The numbers overflowed; says where.
        """
        steps = self._run.set_timesteps(self._execution_device)
        latents = self.walk(self.make_noise(batch_size) * self._run.scheduler.init_noise_sigma, steps)
        return self.finish(latents if output_type == "latent" else decode(self.vqvae, latents / self.vqvae.config.scaling_factor))
