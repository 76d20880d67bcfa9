"""What the pipelines share that draw from noise alone: their two components, and the verbs that use them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from suffuse.diffusion.advance import GuidedStep
from suffuse.diffusion.conditioning import Conditioner, Conditioning
from suffuse.diffusion.guidance import ClassifierFreeGuidance
from suffuse.diffusion.loop import Advance
from suffuse.errors import ConfigError, InputError
from suffuse.models.unet_2d import UNet2DModel
from suffuse.noise import randn_tensor
from suffuse.pipelines.arguments import check_batch, check_shape
from suffuse.pipelines.features import check_features, guidance_of
from suffuse.pipelines.pipeline import DiffusionPipeline, ImagePipelineOutput
from suffuse.processing.image import VaeImageProcessor
from suffuse.schedulers.scheduler import SchedulerMixin

PROCESSOR = VaeImageProcessor(vae_latent_channels=0)  # whatever comes is pictures, not latents
_Scheduler = TypeVar("_Scheduler", bound=SchedulerMixin)


class Unconditional(DiffusionPipeline):
    """The verbs of drawing from noise: make it, denoise it, show what it has become."""

    model_cpu_offload_seq = "unet"

    unet: Any
    image_processor: ClassVar[VaeImageProcessor] = PROCESSOR

    def __init__(self, unet: UNet2DModel, scheduler: SchedulerMixin) -> None:
        self.register_modules(unet=unet, scheduler=scheduler)

    def check_call(self, arguments: dict[str, Any]) -> None:
        """Raise `InputError` if a guidance wants to know what the UNet says without being told, which it always is."""
        check_features(self, arguments)
        guidance = arguments.get("guidance")
        if guidance is not None and "uncond" in guidance.branches:
            found, remedy = type(guidance).__name__, "suffuse.AutoGuidance(2.0, worse=…) guides away from a worse model"
            raise InputError("guidance by what a model is told needs one that is told something", found=found, remedy=remedy)

    def make_noise(self, batch: int) -> Tensor:
        """Standard normal noise for so many pictures from the generator of the call, or the latents that were passed for it.

        Raises:
            InputError: Generators or latents of the call are for other pictures.
        """
        return noise_for(self, (batch, self.unet.config.in_channels, *trained_size(self.unet)), self.unet.dtype)

    def walk(
        self, noise: Tensor, steps: int, conditioners: Sequence[Conditioner] = (), advance: Callable[..., Advance] = GuidedStep
    ) -> Tensor:
        """Denoise along all timesteps that the scheduler was set to.

        Args:
            noise: (batch, channels, rows, columns), at the noise level of the first timestep.
            steps: How many steps of the solver they are.
            conditioners: What the UNet is told besides.
            advance: How a step is taken.

        Returns:
            The clean sample.
        """
        run = self._run
        run.guidance = guidance_of(self, ClassifierFreeGuidance(1.0))
        conditioning = Conditioning(len(noise), run.guidance.branches, {})
        return self.denoise(self.unet, conditioning, noise, run.scheduler.timesteps, steps, conditioners, advance=advance)

    def finish(self, pictures: Tensor) -> Any:
        """The result of the call, of pictures (batch, channels, rows, columns) in [-1, 1]; what is beyond is cut off."""
        return result(self, pictures, self.image_processor)


def trained_size(unet: Any) -> tuple[int, int]:
    """(rows, columns) of what a UNet was trained on.

    Raises:
        ConfigError: It does not say.
    """
    size = unet.config.sample_size
    if size is None:
        raise ConfigError(
            "unet/config.json has no sample_size: nothing says how large pictures are",
            remedy="pipe.unet.register_to_config(sample_size=…)",
        )
    rows, columns = size if isinstance(size, (list, tuple)) else (size, size)
    return rows, columns


def noise_for(pipe: DiffusionPipeline, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Standard normal noise from the generator of a call, or the latents that were passed for it.

    Raises:
        InputError: Generators or latents of the call are for other pictures.
    """
    arguments = pipe._run.arguments
    check_batch("generator", arguments["generator"], shape[0])
    check_shape("latents", arguments.get("latents"), shape)
    if arguments.get("latents") is not None:
        return arguments["latents"].to(pipe._execution_device, dtype)
    return randn_tensor(shape, generator=arguments["generator"], device=pipe._execution_device, dtype=dtype)


def result(pipe: DiffusionPipeline, pictures: Tensor, processor: VaeImageProcessor = PROCESSOR) -> Any:
    """The result of a call: pictures as `output_type` says, as an output object or a plain tuple."""
    arguments = pipe._run.arguments
    images = processor.postprocess(pictures, arguments["output_type"])
    return ImagePipelineOutput(images) if arguments["return_dict"] else (images,)


def as_a(kind: type[_Scheduler], scheduler: SchedulerMixin) -> _Scheduler:
    """The scheduler itself if it is one of this kind, or one of this kind with its settings."""
    if scheduler is None or isinstance(scheduler, kind):  # pyright: ignore[reportUnnecessaryComparison]
        return scheduler
    return kind.from_config(scheduler.config)
