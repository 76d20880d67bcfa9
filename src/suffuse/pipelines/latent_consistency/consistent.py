"""What the pipelines of latent consistency models share (Luo et al., 2023, "Latent Consistency Models")."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from suffuse.diffusion.conditioning import Conditioning
from suffuse.diffusion.consistency import ConsistencyStep
from suffuse.errors import InputError
from suffuse.pipelines.stable_diffusion.drawing import Drawing


class Consistent(Drawing):
    """The verbs of Stable Diffusion where a consistency model does otherwise: which timesteps there are, and what the end is.

    The model was distilled to guide itself and is told the scale; there are no negative prompts. One that is told nothing (a
    LoRA made it fast, say) is guided as every other.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"
    _callback_tensor_inputs = ["latents", "denoised", "prompt_embeds", "w_embedding"]
    _scheduler_settings = {}

    def way(self) -> tuple[Tensor, int]:
        """The timesteps of the call: some of those the model was distilled on, of which `strength` leaves the last."""
        run, original = self._run, self._run.arguments["original_inference_steps"]
        if "original_inference_steps" not in inspect.signature(run.scheduler.set_timesteps).parameters:
            if original is not None:
                raise InputError(
                    f"{type(run.scheduler).__name__} takes no original_inference_steps",
                    remedy="leave it out, or use an LCMScheduler",
                )
            return super().way()
        strength = run.arguments.get("strength", 1.0)
        run.set_timesteps(self._execution_device, original_inference_steps=original, strength=strength)
        return run.scheduler.timesteps, len(run.scheduler.timesteps)

    def denoise(self, model: nn.Module, conditioning: Conditioning, *way: Any, **more: Any) -> Tensor:
        """What the last step thinks the end is."""
        latents = super().denoise(model, conditioning, *way, **{"advance": ConsistencyStep, **more})
        return conditioning.tensors.get("denoised", latents)
