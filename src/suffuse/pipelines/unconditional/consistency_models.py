"""Consistency models: pictures in one step, or a few (Song et al., 2023, https://arxiv.org/abs/2303.01469, algorithm 1)."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from suffuse.diffusion.conditioning import Keywords
from suffuse.errors import InputError
from suffuse.noise import Generators, Seeds
from suffuse.pipelines.arguments import recipe
from suffuse.pipelines.saved_run import SavedRun
from suffuse.pipelines.unconditional.base import Unconditional
from suffuse.pipelines.unconditional.classes import checked_classes, drawn_classes


class ConsistencyModelPipeline(Unconditional):
    """Pictures from noise, of a class if the UNet knows classes."""

    def check_call(self, arguments: dict[str, Any]) -> None:
        """Raise `InputError` unless classes are given that the UNet knows, one for each picture; or none."""
        if arguments["class_labels"] is not None:
            self.prepare_class_labels(arguments["batch_size"], "cpu", arguments["class_labels"])

    def prepare_class_labels(
        self, batch_size: int, device: torch.device | str, class_labels: Tensor | list[int] | int | None = None
    ) -> Tensor | None:
        """The class of each picture, (batch,); classes at random where none are given, None for a UNet that knows none.

        Raises:
            InputError: They are not one for each picture, or no classes of this UNet.
        """
        known = self.unet.config.num_class_embeds
        if known is None and class_labels is not None:
            raise InputError("class_labels are given, and this UNet knows no classes", remedy="leave them out")
        if known is None:
            return None
        if class_labels is None:
            return drawn_classes(known, batch_size, self._run.arguments.get("generator")).to(device)
        return checked_classes(class_labels, known, batch_size).to(device)

    def postprocess_image(self, sample: Tensor, output_type: str = "pil") -> Any:
        """Pictures (batch, channels, rows, columns) in [-1, 1] as `output_type` says; what is beyond is cut off."""
        return self.image_processor.postprocess(sample, output_type)

    @recipe
    def __call__(
        self,
        batch_size: int = 1,
        class_labels: Tensor | list[int] | int | None = None,
        num_inference_steps: int = 1,
        timesteps: list[int] | None = None,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback: Callable[..., Any] | None = None,
        callback_steps: int = 1,
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
        steps = self._run.set_timesteps(self._execution_device)
        noise = self.make_noise(batch_size) * self._run.scheduler.init_noise_sigma
        labels = self.prepare_class_labels(batch_size, self._execution_device, class_labels)
        return self.finish(self.walk(noise, steps, [] if labels is None else [Keywords({"class_labels": labels})]))
