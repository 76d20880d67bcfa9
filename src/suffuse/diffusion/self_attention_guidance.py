"""Guidance away from what a model says when it sees a blur where it looked (Hong et al., 2023, "Improving sample quality of
diffusion models using self-attention guidance").
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from suffuse.diffusion.attention_control import map_size, watching
from suffuse.diffusion.conditioning import Denoiser
from suffuse.diffusion.guidance import ClassifierFreeGuidance, rescale_to
from suffuse.diffusion.loop import Step
from suffuse.diffusion.worse_guidance import blocks_below
from suffuse.errors import InputError
from suffuse.layers.attention import Attention
from suffuse.schedulers.prediction import EPSILON, X0
from suffuse.schedulers.scheduler import SchedulerMixin


@dataclass
class SelfAttentionGuidance(ClassifierFreeGuidance):
    """Classifier-free guidance, and on top of it away from a picture that is blurred where the model looks (equation 16).

    Of the weak branch, the unconditional one where there is one, the clean picture is predicted, blurred where self-attention
    looks more than evenly, brought back to its noise and predicted from once more.

    Attributes:
        sag_scale: How far away; about 0 to 1, and 0 for not at all.
        layer: Below which name of the model the first self-attention is watched.
    """

    sag_scale: float = 0.75
    layer: str = "mid_block"

    def watched_layer(self, model: nn.Module) -> Attention:
        """The layer that is watched.

        Raises:
            InputError: The model has none there.
        """
        return blocks_below(model, [self.layer])[0].attn1

    def check_model(self, model: nn.Module) -> None:
        """Raise `InputError` unless the model has a layer to watch."""
        self.watched_layer(model)

    def check_scheduler(self, scheduler: SchedulerMixin) -> None:
        """Raise `InputError` if the scheduler counts in timesteps between those of training."""
        if self.sag_scale > 0 and scheduler.timesteps.is_floating_point():
            raise InputError(
                f"self-attention guidance does not work with {type(scheduler).__name__}",
                found=f"timesteps of {scheduler.timesteps.dtype}",
                expected="whole timesteps",
                remedy="use DDIMScheduler, PNDMScheduler, DDPMScheduler, DPMSolverMultistepScheduler or UniPCMultistepScheduler",
            )

    def __call__(self, denoiser: Denoiser, step: Step) -> Tensor:
        """One prediction, of the shape of the latents."""
        if self.sag_scale <= 0:
            return super().__call__(denoiser, step)
        layer, seen = self.watched_layer(denoiser.model), list[Tensor]()
        denoiser = watching(denoiser, {layer: seen.append})
        predictions = denoiser(step, self.branches)
        weak = self.branches[0]
        attended = torch.cat([each.chunk(len(self.branches))[0] for each in seen])  # the model may be asked in several calls
        looked = looked_at(attended.unflatten(0, (-1, layer.heads)), step.latents)
        blurred = blurred_where(looked, predictions[weak], step, denoiser.scheduler)
        worse = denoiser(step, (weak,), blurred)[weak]
        cond, uncond = predictions["cond"], predictions.get("uncond")
        guided = cond if uncond is None else self.extrapolated(cond, uncond)
        guided = guided + self.sag_scale * (predictions[weak] - worse)
        return rescale_to(cond, guided, self.rescale) if self.rescale > 0 else guided


def looked_at(probabilities: Tensor, latents: Tensor) -> Tensor:
    """Where self-attention looks more than evenly (equation 12).

    Args:
        probabilities: (batch, heads, positions, positions).
        latents: (batch, channels, rows, columns), of which the positions are some halving.

    Returns:
        1 where it does and 0 elsewhere, (batch, 1, rows, columns).
    """
    often = probabilities.mean(1).sum(1) > 1.0
    mask = often.unflatten(1, map_size(latents, often.shape[1])).unsqueeze(1).to(probabilities.dtype)
    return F.interpolate(mask, latents.shape[-2:])


def blurred_where(mask: Tensor, prediction: Tensor, step: Step, scheduler: SchedulerMixin) -> Tensor:
    """The latents of a step, had the clean picture in them been blurred where the mask is 1 (equations 13 to 15)."""
    alpha = scheduler.alphas_cumprod[step.timestep.cpu()].to(step.latents.device)
    kind, scales = scheduler.config.prediction_type, (alpha**0.5, (1 - alpha) ** 0.5)
    clean, noise = (table[kind](step.latents, prediction, *scales) for table in (X0, EPSILON))
    mixed = gaussian_blur(clean) * mask + clean * (1 - mask)
    return scheduler.add_noise(mixed, noise, step.timestep[None])


def gaussian_blur(image: Tensor, kernel_size: int = 9, sigma: float = 1.0) -> Tensor:
    """(batch, channels, rows, columns) blurred, reflected at the edges."""
    half, channels = kernel_size // 2, image.shape[-3]
    if min(image.shape[-2:]) <= half:
        raise InputError(
            "the picture is too small to be blurred for self-attention guidance",
            found=f"{image.shape[-2]} x {image.shape[-1]} latents",
            expected=f"at least {half + 1} x {half + 1}",
        )
    density = torch.exp(-0.5 * (torch.linspace(-half, half, steps=kernel_size) / sigma).pow(2))
    line = (density / density.sum()).to(image)
    kernel = torch.mm(line[:, None], line[None, :]).expand(channels, 1, kernel_size, kernel_size)
    return F.conv2d(F.pad(image, [half] * 4, mode="reflect"), kernel, groups=channels)
