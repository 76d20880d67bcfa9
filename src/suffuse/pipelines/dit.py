"""Pictures of classes by a transformer (Peebles and Xie, 2023, https://arxiv.org/abs/2212.09748)."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from suffuse.diffusion.advance import guided_step_of
from suffuse.diffusion.conditioning import Conditioning, Denoiser, ModelCall
from suffuse.diffusion.decoders import decode
from suffuse.diffusion.guidance import ClassifierFreeGuidance
from suffuse.diffusion.loop import Step
from suffuse.errors import InputError, nearest
from suffuse.noise import Generators, Seeds
from suffuse.pipelines.arguments import recipe
from suffuse.pipelines.features import Guided, check_features, guidance_of
from suffuse.pipelines.pipeline import DiffusionPipeline
from suffuse.pipelines.saved_run import SavedRun
from suffuse.pipelines.unconditional.base import noise_for, result
from suffuse.pipelines.unconditional.classes import checked_classes

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from suffuse.models.autoencoder_kl import AutoencoderKL
    from suffuse.models.transformer_2d import DiTTransformer2DModel, Transformer2DModel
    from suffuse.schedulers.scheduler import SchedulerMixin


class Means(Denoiser):
    """Predictions of a model that says a variance behind the mean, without the variance, which is not used."""

    def __call__(self, step: Step, branches: tuple[str, ...], latents: Tensor | None = None) -> dict[str, Tensor]:
        """Predictions by branch, for the latents of the step or those given instead."""
        made = super().__call__(step, branches[::-1], latents)  # in the order of the peer, whose last bits depend on it
        return {branch: made[branch][:, : (step.latents if latents is None else latents).shape[1]] for branch in branches}


def classes(call: ModelCall, step: Step) -> None:
    """Tell the classes of the branches asked for."""
    call.kwargs["class_labels"] = call.conditioning.select("class_labels", call.branches)


class DiTPipeline(DiffusionPipeline):
    """Pictures of the classes that a transformer was trained on.

    Args:
        transformer: What predicts.
        vae: Makes pictures of latents.
        scheduler: The way.
        id2label: Number of a class → its names, joined by commas.
    """

    model_cpu_offload_seq = "transformer->vae"
    _settings = ("id2label",)

    transformer: Any
    vae: Any

    def __init__(
        self,
        transformer: Transformer2DModel | DiTTransformer2DModel,
        vae: AutoencoderKL,
        scheduler: SchedulerMixin,
        id2label: dict[int, str] | None = None,
    ) -> None:
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
        self.register_to_config(id2label=id2label)
        named = ((name.strip(), int(number)) for number, names in (id2label or {}).items() for name in names.split(","))
        self.labels = dict(sorted(named))

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        """The numbers of classes by their names.

        Raises:
            InputError: There is no class of that name.
        """
        names = [label] if isinstance(label, str) else label
        for name in names:
            if name not in self.labels:
                close = nearest(name, self.labels)
                raise InputError(f"no class is called {name!r}", remedy=f"did you mean {close}?" if close else "see pipe.labels")
        return [self.labels[name] for name in names]

    def check_call(self, arguments: dict[str, Any]) -> None:
        """Raise `InputError` unless classes are given that the transformer knows."""
        given = arguments["class_labels"]
        if not isinstance(given, (list, Tensor)) or not len(given):
            raise InputError("class_labels must be a list of classes", found=given, expected="whole numbers, one a picture")
        checked_classes(given, self.transformer.config.num_embeds_ada_norm, len(given))
        check_features(self, arguments)

    def pictures_of(self, arguments: dict[str, Any]) -> int:
        """One for each class."""
        return len(arguments["class_labels"])

    @recipe
    def __call__(
        self,
        class_labels: list[int] | Tensor,
        guidance_scale: float = 4.0,
        generator: Generators = None,
        num_inference_steps: int = 50,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        seed: Seeds = None,
        save_run: str | os.PathLike[str] | None = None,
        resume: str | os.PathLike[str] | SavedRun | None = None,
        **values: Unpack[Guided],
    ) -> Any:
        """Draw a picture of each class.

        Returns:
            `ImagePipelineOutput(images)`, or the same as a tuple.

        Raises:
            InputError: An argument is not what it may be; no generator was used.
            NonFiniteError: The numbers overflowed; says where.
        """
        run, config, device = self._run, self.transformer.config, self._execution_device
        run.guidance = guidance_of(self, ClassifierFreeGuidance(guidance_scale))
        steps = run.set_timesteps(device)
        wanted = torch.as_tensor(class_labels, device=device)
        told = {"cond": wanted, "uncond": torch.full_like(wanted, config.num_embeds_ada_norm)}
        labels = torch.cat([told[branch] for branch in run.guidance.branches])
        conditioning = Conditioning(len(wanted), run.guidance.branches, {"class_labels": labels})
        noise = noise_for(self, (len(wanted), config.in_channels, *[config.sample_size] * 2), self.transformer.dtype)
        noise = noise * run.scheduler.init_noise_sigma
        way, advance = run.scheduler.timesteps, guided_step_of(Means)
        latents = self.denoise(self.transformer, conditioning, noise, way, steps, [classes], advance=advance)
        if output_type == "latent":
            return result(self, latents)
        return result(self, decode(self.vae, 1 / self.vae.config.scaling_factor * latents))
