"""Tokens unmasked by confidence: MaskGIT (Chang et al., 2022, https://arxiv.org/abs/2202.04200, section 3.2), as in aMUSEd
(Patil et al., 2024, https://arxiv.org/abs/2401.01808).

At each step every masked token is drawn, and of those the least certain are masked again: `log p + temperature × Gumbel noise`
is the certainty, and a schedule says how many.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from suffuse.configuration import register_to_config
from suffuse.errors import InputError
from suffuse.noise import Generators
from suffuse.outputs import BaseOutput
from suffuse.schedulers.choices import Choices
from suffuse.schedulers.discrete import categorical, for_each_image, uniform
from suffuse.schedulers.noise_schedule import MOST_TIMESTEPS, checked_count
from suffuse.schedulers.scheduler import Memory, Remembered, SchedulerMixin

SMALLEST = 1e-20
"""Below it there is no logarithm."""


@dataclass
class AmusedMemory(Memory):
    """Adds the temperature of every step."""

    temperatures: Tensor = field(default_factory=lambda: torch.zeros(0))


@dataclass
class AmusedSchedulerOutput(BaseOutput):
    """What a step returns.

    Attributes:
        prev_sample: The tokens one step less masked, of the shape of the sample.
        pred_original_sample: All tokens as the step believes them to be, same shape.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


def _cosine(done: Tensor) -> Tensor:
    return torch.cos(done * math.pi / 2)


def _linear(done: Tensor) -> Tensor:
    return 1 - done


MASKED: Choices[Callable[[Tensor], Tensor]] = Choices("masking_schedule", {"cosine": _cosine, "linear": _linear})
"""masking_schedule → the share of masked tokens from the share of steps done."""


class AmusedScheduler(SchedulerMixin):
    """Steps between samples of tokens, whole numbers, of which one means "masked"."""

    _compatibles = []
    temperatures = Remembered()

    @register_to_config
    def __init__(self, mask_token_id: int, masking_schedule: Literal["cosine", "linear"] = "cosine") -> None:
        self._start(AmusedMemory(torch.zeros(0, dtype=torch.int64)))

    def set_timesteps(
        self,
        num_inference_steps: int,
        temperature: float | tuple[float, float] | list[float] = (2, 0),
        device: str | torch.device | None = None,
    ) -> None:
        """Choose the number of steps.

        Keywords of its own:
            temperature: Of the first and of the last step; a number falls to 0.01. More is more random.
        """
        count = checked_count(num_inference_steps, MOST_TIMESTEPS)
        first, last = temperature if isinstance(temperature, (tuple, list)) else (temperature, 0.01)
        temperatures = torch.linspace(first, last, count)
        self.memory = AmusedMemory(torch.arange(count, device=device).flip(0), count, temperatures=temperatures)

    def _masked(self, step: int) -> Tensor:
        """The share of tokens that are masked after `step`, zero-dimensional."""
        return MASKED[self.config["masking_schedule"]](torch.tensor(step + 1) / len(self.memory.timesteps))

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        starting_mask_ratio: float = 1.0,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> Any:
        """Draw the masked tokens, and mask the least certain of them again. Returns an `AmusedSchedulerOutput`.

        Args:
            model_output: Logits, (batch, classes, height, width) or (batch, length, classes).
            timestep: An entry of `timesteps`.
            sample: Tokens, (batch, height, width) or (batch, length).
            starting_mask_ratio: The share of tokens that were masked at the beginning.
            generator: Source of randomness.
            return_dict: Return an `AmusedSchedulerOutput`, or else the tuple of its fields.

        Raises:
            InputError: The shapes do not belong together, or the timestep is not one of the run's.
        """
        self._check_ready()
        shape, logits = sample.shape, model_output.flatten(2).transpose(1, 2) if model_output.ndim == 4 else model_output
        sample = sample.flatten(1)
        if logits.shape[:2] != sample.shape:
            raise InputError("model_output and sample do not belong together", found=f"{model_output.shape} and {shape}")
        step, probabilities = self.index_for_timestep(timestep), logits.softmax(-1)
        unknown = sample == self.config["mask_token_id"]
        believed = torch.where(unknown, for_each_image(categorical, probabilities, generator), sample)
        previous = believed
        if step + 1 < len(self.memory.timesteps):
            count = torch.floor(sample.shape[1] * (starting_mask_ratio * self._masked(step)))
            count = torch.minimum(unknown.sum(dim=-1, keepdim=True) - 1, count).clamp(min=1)
            certainty = torch.gather(probabilities, -1, believed[:, :, None])[:, :, 0]
            certainty = torch.where(unknown, certainty, torch.finfo(certainty.dtype).max)
            noise = for_each_image(_gumbel, certainty, generator)
            certainty = certainty.clamp(SMALLEST).log() + self.memory.temperatures[step] * noise
            threshold = torch.gather(certainty.sort(dim=-1).values, 1, count.long())
            previous = torch.where(certainty < threshold, self.config["mask_token_id"], believed)
        results = previous.reshape(shape), believed.reshape(shape)
        return AmusedSchedulerOutput(*results) if return_dict else results

    def add_noise(self, sample: Tensor, timesteps: int | Tensor, generator: Generators = None) -> Tensor:
        """`sample` with as many tokens masked, at random, as there are at `timesteps`, one entry of the run's."""
        self._check_ready()
        share = self._masked(self.index_for_timestep(timesteps))
        drawn = for_each_image(lambda tokens, source: uniform(tokens.shape, source, tokens.device), sample, generator)
        return torch.where(drawn < share, self.config["mask_token_id"], sample)


def _gumbel(like: Tensor, source: Any) -> Tensor:
    drawn = uniform(like.shape, source, like.device).to(like.dtype)
    return -torch.log((-torch.log(drawn.clamp(SMALLEST))).clamp(SMALLEST))
