"""What the pipelines with samplers of k-diffusion share: which sampler, the noise levels, and the recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from suffuse.diffusion.k_package import packaged_sampler, packaged_walk
from suffuse.diffusion.k_samplers import SAMPLERS, SamplerMemory, SamplerStep
from suffuse.diffusion.loop import Walk, denoise
from suffuse.errors import InputError
from suffuse.pipelines.arguments import check_batch
from suffuse.pipelines.saved_run import memory_fields
from suffuse.pipelines.stable_diffusion.base import StableDiffusionBase
from suffuse.processing.image import Frame
from suffuse.schedulers.brownian import Seed, brownian_noise, seed_of
from suffuse.schedulers.lms_discrete import LMSDiscreteScheduler
from suffuse.schedulers.noise_schedule import karras_sigmas, timesteps_of, to_tensor, training_sigmas


class Sampled(StableDiffusionBase):
    """The verbs of Stable Diffusion where `pipe.set_scheduler("sample_heun")` says how a step is taken.

    The scheduler, an `LMSDiscreteScheduler` with the configuration of the one given, only says which noise levels there are.
    """

    _scheduler_settings = {}
    sampler: str = "sample_dpmpp_2m"
    """The sampler by which calls go."""

    def set_up(self, **components: Any) -> None:
        """Take the components, and of the scheduler the noise levels."""
        scheduler = components["scheduler"]
        if scheduler is not None and not isinstance(scheduler, LMSDiscreteScheduler):
            scheduler = LMSDiscreteScheduler.from_config(scheduler.config)
        super().set_up(**components | {"scheduler": scheduler})

    def check_call(self, arguments: dict[str, Any]) -> None:
        """Raise `InputError` unless prompts go together, there is a path of noise for each picture, and steps to save."""
        super().check_call(arguments)
        check_batch("noise_sampler_seed", arguments["noise_sampler_seed"], self.pictures_of(arguments))
        sampler, saved = self.sampler_of(arguments), [name for name in ("save_run", "resume") if arguments[name] is not None]
        if saved and sampler not in SAMPLERS:
            raise InputError(
                f"{saved[0]} is given, and what {sampler} remembers between its steps is its own",
                remedy=f"leave it out, or choose another sampler: {', '.join(SAMPLERS)}",
            )

    def sampler_of(self, arguments: Mapping[str, Any]) -> str:
        """The sampler by which a call goes: that of the run that it goes on with, if there is one."""
        begun = arguments["resume"]
        return self.sampler if begun is None else begun.memory.get("sampler", self.sampler)

    def set_scheduler(self, scheduler_type: str) -> None:
        """Choose a sampler.

        Args:
            scheduler_type: A name from `suffuse.diffusion.k_samplers.SAMPLERS`, "sample_dpmpp_2m" for example; or of another
                sampler of the package k-diffusion, "sample_dpm_fast" for example.

        Raises:
            InputError: There is no such sampler.
            MissingPackageError: It is one of the package, which is not installed.
        """
        name = str(scheduler_type)
        if name not in SAMPLERS:
            packaged_sampler(name)
        self.sampler = name

    def way(self) -> tuple[Tensor, int]:
        """The timesteps at which the noise levels of the call are, and how many steps they are.

        Raises:
            InputError: The scheduler has been replaced with one of another kind.
        """
        run, scheduler = self._run, self._run.scheduler
        if not isinstance(scheduler, LMSDiscreteScheduler):
            found, remedy = type(scheduler).__name__, "pipe.scheduler = LMSDiscreteScheduler.from_config(pipe.scheduler.config)"
            raise InputError("samplers take their noise levels from an LMSDiscreteScheduler", found=found, remedy=remedy)
        _, count = super().way()
        memory = SamplerMemory(**{name: value for name, value in memory_fields(scheduler).items() if name != "derivatives"})
        if run.arguments["use_karras_sigmas"]:
            training = training_sigmas(scheduler.alphas_cumprod)
            sigmas = karras_sigmas(training[-1], training[0], count)
            timesteps = torch.from_numpy(timesteps_of(sigmas, training)).to(self._execution_device, torch.float32)
            memory = dataclasses.replace(memory, sigmas=to_tensor([*sigmas, 0.0]), timesteps=timesteps)
        scheduler.memory = dataclasses.replace(memory, sampler=self.sampler_of(run.arguments))
        return scheduler.timesteps, count

    def sample(self, height: int, width: int) -> Any:
        """The recipe, once the guidance of the run is set.

        Args:
            height: Rows of the picture.
            width: Columns.

        Returns:
            The result of the call.
        """
        run = self._run
        further = self.further(Frame(height, width))
        way, steps = self.way()
        levels: Any = run.scheduler.memory
        conditioning = self.encode()
        dtype = conditioning.tensors["prompt_embeds"].dtype
        noise = self.make_noise(self.latent_shape(conditioning.batch, height, width), dtype)
        noisy = noise * levels.sigmas[0]
        seed = run.arguments["noise_sampler_seed"]
        path = seed_of(run.arguments["generator"]) if seed is None else tuple(seed) if isinstance(seed, list) else seed
        told = [*self.conditioners(conditioning), *further]
        advance = partial(SamplerStep, noise=partial(self.path_noise, path))
        walk: Walk = denoise if levels.sampler in SAMPLERS else partial(packaged_walk, packaged_sampler(levels.sampler))
        return self.finish(self.denoise(self.unet, conditioning, noisy, way, steps, told, advance=advance, walk=walk), dtype)

    def path_noise(self, seed: Seed, like: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """Noise of a step, from one Brownian path over the noise levels of the run."""
        memory: Any = self._run.scheduler.memory
        ends = float(memory.sigmas[-2]), float(memory.sigmas[0])
        return brownian_noise(memory, seed, ends, like, sigma, sigma_next)
