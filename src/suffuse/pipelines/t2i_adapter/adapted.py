"""What the pipelines with T2I-Adapters share: the component (Mou et al., 2023)."""

from __future__ import annotations

from typing import Any

from suffuse.diffusion.conditioning import Conditioner
from suffuse.models.side_by_side import parts_of
from suffuse.pipelines.stable_diffusion.drawing import Drawing
from suffuse.pipelines.t2i_adapter.adapters import adapter_features, check_adapter, one_adapter
from suffuse.processing.image import Frame


class Adapted(Drawing):
    """The verbs of T2I-Adapters."""

    called = {"adapter_image": "image"}

    adapter: Any

    def take(self, adapter: Any) -> None:
        """Make an adapter, or a list of several, the component of the pipeline.

        Raises:
            ConfigError: It makes other features than the UNet takes.
        """
        adapter = one_adapter(adapter)
        check_adapter(self.unet, adapter)
        self.register_modules(adapter=adapter)

    @property
    def adapters(self) -> list[Any]:
        """The adapters, in the order of their pictures."""
        return parts_of(self.adapter)

    def needed_components(self, arguments: dict[str, Any]) -> list[str]:
        """Those of Stable Diffusion, and the adapter."""
        return [*super().needed_components(arguments), "adapter"]

    def further(self, frame: Frame) -> list[Conditioner]:
        """What the adapters make of their pictures, and the values of the call."""
        return [adapter_features(self, self.adapter, "image", frame), *super().further(frame)]
