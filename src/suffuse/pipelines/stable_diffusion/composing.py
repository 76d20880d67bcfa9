"""Text to image that takes whatever else there is: what the values of a call say, decides which recipe it is."""

from __future__ import annotations

from typing import Any, ClassVar

from suffuse.pipelines.features import asked_features
from suffuse.pipelines.stable_diffusion.drawing import Drawing
from suffuse.pipelines.stable_diffusion.painting import Painting


class Composing(Drawing, Painting):
    """The verb of pipelines that draw, redraw and paint."""

    default_strength: ClassVar[dict[str, float]] = {"image": 0.8, "mask_image": 1.0}
    """How far to go from what a call begins with, if it does not say."""

    @classmethod
    def input_channels(cls, latents: int) -> tuple[int, ...]:
        """What begins with noise has nothing to show a UNet that was trained for inpainting."""
        return (latents,)

    def compose(self, height: int | None, width: int | None) -> Any:
        """Draw; or redraw the picture of the call, or paint it anew where its mask is white, if there is one.

        The result is as large as asked for, as the picture, as what comes along, or as what the UNet was trained on.

        Args:
            height: Rows asked for.
            width: Columns asked for.

        Returns:
            The result of the call.
        """
        given = self._run.arguments
        begins = next((name for name in ("mask_image", "image") if given[name] is not None), None)
        if begins is None:
            given["strength"] = 1.0
            return self.draw(*self.drawn_size(height, width))
        if given["strength"] is None:
            given["strength"] = self.default_strength[begins]
        if begins == "mask_image":
            return self.paint(*self.size_by("image", height, width))
        return self.redraw(self.image_processor.preprocess(given["image"], height, width))

    def drawn_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """(height, width) asked for, or of what the first feature with a picture is shown, or what the UNet was trained on."""
        sizes = (feature.size for feature in asked_features(self, self._run.arguments) if feature.size is not None)
        size = next(sizes, None)
        return self.default_size(height, width) if size is None else size(self, height, width)
