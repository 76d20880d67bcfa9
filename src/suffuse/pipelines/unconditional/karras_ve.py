"""Stochastic sampling in variance exploding time (Karras et al., 2022, https://arxiv.org/abs/2206.00364, algorithm 2)."""

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


@dataclass
class StochasticHeun(GuidedStep):
    """Add noise, take a step of Euler, and correct it by the slope where it leads."""

    generator: Generators = None

    def __call__(self, step: Step) -> Tensor:
        """The latents of the next timestep."""
        scheduler: Any = self.scheduler
        t = int(step.timestep)
        sigma, below = scheduler.schedule[t], scheduler.schedule[t - 1] if t > 0 else 0
        noisier, raised = scheduler.add_noise_to_input(step.latents, sigma, generator=self.generator)
        moved = scheduler.step(self.slope(step, noisier, raised), raised, below, noisier)
        if below == 0:
            return moved.prev_sample
        slope = self.slope(step, moved.prev_sample, below)
        return scheduler.step_correct(slope, raised, below, noisier, moved.prev_sample, moved.derivative).prev_sample

    def slope(self, step: Step, sample: Tensor, sigma: Tensor) -> Tensor:
        """What the UNet predicts, which knows pictures in [0, 1], at half the noise."""
        return sigma / 2 * self.guidance(self.denoiser, replace(step, latents=(sample + 1) / 2, timestep=sigma / 2))


class KarrasVePipeline(Unconditional):
    """Pictures from noise, in steps of second order with some noise added before each."""

    @recipe
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int = 50,
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
        scheduler = self._run.scheduler
        steps = self._run.set_timesteps(self._execution_device)
        noise = self.make_noise(batch_size) * scheduler.init_noise_sigma
        return self.finish(self.walk(noise, steps // scheduler.order, advance=partial(StochasticHeun, generator=generator)))
