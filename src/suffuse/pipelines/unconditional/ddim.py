"""Denoising diffusion implicit models (Song et al., 2021, https://arxiv.org/abs/2010.02502, equation 12)."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from suffuse.models.unet_2d import UNet2DModel
from suffuse.noise import Generators, Seeds
from suffuse.pipelines.arguments import recipe
from suffuse.pipelines.features import Guided
from suffuse.pipelines.saved_run import SavedRun
from suffuse.pipelines.unconditional.base import Unconditional, as_a
from suffuse.schedulers.ddim import DDIMScheduler
from suffuse.schedulers.scheduler import SchedulerMixin

if TYPE_CHECKING:
    from typing_extensions import Unpack


class DDIMPipeline(Unconditional):
    """Pictures from noise in few steps; a scheduler of another class becomes a `DDIMScheduler` of its settings."""

    def __init__(self, unet: UNet2DModel, scheduler: SchedulerMixin) -> None:
        super().__init__(unet, as_a(DDIMScheduler, scheduler))

    @recipe
    def __call__(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        eta: float = 0.0,
        num_inference_steps: int = 50,
        use_clipped_model_output: bool | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        seed: Seeds = None,
        save_run: str | os.PathLike[str] | None = None,
        resume: str | os.PathLike[str] | SavedRun | None = None,
        **values: Unpack[Guided],
    ) -> Any:
        """Draw pictures such as the UNet was trained on.

        Returns:
            `ImagePipelineOutput(images)`, or the same as a tuple.

        Raises:
            InputError: An argument is not what it may be; no generator was used.
            NonFiniteError: The numbers overflowed; says after which step.
        """
        steps = self._run.set_timesteps(self._execution_device)
        return self.finish(self.walk(self.make_noise(batch_size), steps))
