"""What the pipelines of AltDiffusion share: they are those of Stable Diffusion, with another reader."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from suffuse.errors import InputError
from suffuse.outputs import BaseOutput
from suffuse.pipelines.stable_diffusion.base import StableDiffusionBase


@dataclass
class AltDiffusionPipelineOutput(BaseOutput):
    """Pictures, and for each whether the safety checker blanked it (None: there is no checker)."""

    images: Any
    nsfw_content_detected: list[bool] | None


class Multilingual(StableDiffusionBase):
    """The verbs of Stable Diffusion, where the words are of many languages and end in a projection."""

    def check_call(self, arguments: dict[str, Any]) -> None:
        """Raise `InputError` unless prompts go together, and all layers are to be read."""
        super().check_call(arguments)
        if arguments["clip_skip"] is not None:
            raise InputError(
                f"clip_skip={arguments['clip_skip']} means nothing here",
                found="this text encoder projects what its last layers make",
                remedy="leave clip_skip out",
            )

    def output(self, images: Any, flagged: list[bool] | None) -> Any:
        """The result of a call, as an output object or a plain tuple."""
        return AltDiffusionPipelineOutput(images, flagged) if self._run.arguments["return_dict"] else (images, flagged)
