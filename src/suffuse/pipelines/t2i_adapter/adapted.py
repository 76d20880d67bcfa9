"""What the pipelines with T2I-Adapters share: the component, and from control pictures to features (Mou et al., 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from suffuse.diffusion.conditioning import ModelCall, per_branch
from suffuse.diffusion.loop import Step
from suffuse.errors import ConfigError, InputError
from suffuse.models.side_by_side import parts_of
from suffuse.models.t2i_adapter import MultiAdapter
from suffuse.pipelines.arguments import one_for_each, prompt_count
from suffuse.pipelines.pipeline import Run
from suffuse.pipelines.stable_diffusion.drawing import Drawing
from suffuse.processing.image import VaeImageProcessor
from suffuse.processing.pixels import edges


@dataclass
class Features:
    """Add the same features to the way down of a UNet in every step, or in the first part of them.

    Attributes:
        maps: (batch, channels, height, width) for each resolution.
        run: Knows how many inference steps there are.
        part: The part of them in which features are added, in [0, 1]; None for always. Counted are calls of the model, as the
            peer does: solvers that call it twice a step, or more often at first, have the last ones without features.
    """

    maps: list[Tensor]
    run: Run
    part: float | None = None

    def __call__(self, call: ModelCall, step: Step) -> None:
        """Add the features."""
        if self.part is None or step.index < int(self.run.num_inference_steps * self.part):
            call.kwargs["down_intrablock_additional_residuals"] = [per_branch(each, call.branches) for each in self.maps]


class Adapted(Drawing):
    """The verbs of T2I-Adapters."""

    adapter: Any

    def take(self, adapter: Any) -> None:
        """Make an adapter, or a list of several, the component of the pipeline.

        Raises:
            ConfigError: It makes other features than the UNet takes.
        """
        adapter = MultiAdapter(adapter) if isinstance(adapter, (list, tuple)) else adapter
        self.check_adapter(adapter)
        self.register_modules(adapter=adapter)

    def check_adapter(self, adapter: Any) -> None:
        """Raise `ConfigError` if an adapter makes other features than the UNet takes."""
        if self.unet is None or adapter is None:
            return
        wanted = list(self.unet.config.block_out_channels)
        for one in parts_of(adapter):
            own = list(one.config.channels)
            if not set(own) <= {*wanted}:
                raise ConfigError(
                    "adapter/config.json and unet/config.json disagree",
                    found=f"channels={own}, block_out_channels={wanted}",
                    expected="an adapter that was trained for this UNet",
                )

    @property
    def adapters(self) -> list[Any]:
        """The adapters, in the order of their pictures."""
        return parts_of(self.adapter)

    def needed_components(self, arguments: dict[str, Any]) -> list[str]:
        """Those of Stable Diffusion, and the adapter."""
        return [*super().needed_components(arguments), "adapter"]

    @property
    def adapter_image_processor(self) -> VaeImageProcessor:
        """Control pictures to tensors in [0, 1]."""
        gray = self.adapters[0].config.in_channels == 1
        return VaeImageProcessor(vae_scale_factor=self.adapter.downscale_factor, do_normalize=False, do_convert_grayscale=gray)

    def features(self, height: int | None, width: int | None) -> tuple[int, int, Features]:
        """The size of the picture to draw, and what the adapters make of the control pictures of the call.

        Args:
            height: Rows asked for; those of the first control picture, if None.
            width: Columns, likewise.

        Raises:
            InputError: Pictures or scales are not one for each adapter, or a picture does not fit.
        """
        self.check_adapter(self.adapter)
        arguments = self._run.arguments
        image, count = arguments["image"], len(self.adapters)
        several = isinstance(self.adapter, MultiAdapter)
        if several and (not isinstance(image, list) or len(image) != count):
            found = f"{len(image)} pictures" if isinstance(image, list) else type(image).__name__
            raise InputError(f"image does not go with {count} adapters", found=found, expected=f"a list of {count}")
        scales = one_for_each("adapter_conditioning_scale", arguments["adapter_conditioning_scale"], count, "adapter")
        pictures = image if several else [image]
        own = edges(pictures[0], "image")
        factor = self.adapter.downscale_factor
        rows, columns = (asked or edge - edge % factor for asked, edge in zip((height, width), own, strict=True))
        seen = [self._seen(each, rows, columns) for each in pictures]
        with torch.no_grad():
            maps = self.adapter(seen, scales) if several else [each * scales[0] for each in self.adapter(seen[0])]
        prompts, images = prompt_count(arguments), arguments["num_images_per_prompt"]
        if len(maps[0]) not in (1, prompts):
            raise InputError(f"image: {len(maps[0])} given for {prompts} prompts", expected="one for all, or one for each prompt")
        times = prompts * images if len(maps[0]) == 1 else images
        maps = [each.repeat_interleave(times, dim=0) if times > 1 else each for each in maps]
        return rows, columns, Features(maps, self._run, arguments.get("adapter_conditioning_factor"))

    def _seen(self, image: Any, height: int, width: int) -> Tensor:
        pictures = self.adapter_image_processor.preprocess(image, height, width, name="image")
        return pictures.to(self._execution_device, self.adapter.dtype)
