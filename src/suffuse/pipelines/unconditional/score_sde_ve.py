"""Score-based models in variance exploding time (Song et al., 2021, https://arxiv.org/abs/2011.13456, algorithm 2)."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from suffuse.diffusion.advance import GuidedStep
from suffuse.diffusion.loop import Step
from suffuse.noise import Generators, Seeds
from suffuse.pipelines.arguments import recipe
from suffuse.pipelines.saved_run import SavedRun
from suffuse.pipelines.unconditional.base import Unconditional
from suffuse.processing.image import VaeImageProcessor


@dataclass
class PredictorCorrector(GuidedStep):
    """Correct the sample at its noise level, then predict the next; the last step adds no noise."""

    generator: Generators = None

    def __call__(self, step: Step) -> Tensor:
        """The latents of the next timestep."""
        scheduler: Any = self.scheduler
        at = replace(step, timestep=scheduler.sigmas[step.index].to(step.latents.device))
        for _ in range(scheduler.config.correct_steps):
            score = self.guidance(self.denoiser, at)
            at.latents = scheduler.step_correct(score, at.latents, generator=self.generator).prev_sample
        score = self.guidance(self.denoiser, at)
        moved = scheduler.step_pred(score, step.timestep, at.latents, generator=self.generator)
        return moved.prev_sample if step.index < step.total - 1 else moved.prev_sample_mean


class ScoreSdeVePipeline(Unconditional):
    """Pictures from noise: each step follows the score down, after some steps of Langevin dynamics at its own noise level."""

    image_processor = VaeImageProcessor(do_normalize=False)  # such UNets know pictures in [0, 1]

    @recipe
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int = 2000,
        generator: Generators = None,
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
            NonFiniteError: The numbers overflowed; says after which step.
        """
        scheduler: Any = self._run.scheduler
        steps = self._run.set_timesteps(self._execution_device)
        scheduler.set_sigmas(steps)
        noise = self.make_noise(batch_size) * scheduler.init_noise_sigma
        return self.finish(self.walk(noise, steps, advance=partial(PredictorCorrector, generator=generator)).clamp(0, 1))
