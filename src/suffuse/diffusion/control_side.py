"""ControlNet-XS as a conditioner: the UNet has a control side, which is shown a picture (Zavadski et al., 2024)."""

from __future__ import annotations

from dataclasses import dataclass

from suffuse.diffusion.conditioning import ModelCall
from suffuse.diffusion.control import Control
from suffuse.diffusion.loop import Step


@dataclass
class ControlSide(Control):
    """Show the pictures to the control side of the UNet itself; outside of its part of the way the UNet goes alone."""

    def __call__(self, call: ModelCall, step: Step) -> None:
        """Hand pictures and scale over."""
        shown = call.conditioning.shown(self.pictures, call.branches)
        call.kwargs |= {"controlnet_cond": shown, "conditioning_scale": self.scale, "apply_control": self.acts(step.index)}
