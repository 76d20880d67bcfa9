"""What every training here needs: a budget in minutes, a mean of the weights, and going on after any interruption."""

from __future__ import annotations

import copy
import math
import os
import time
from pathlib import Path

import torch
import torch.distributed as distributed
from torch import Tensor, nn


class Training:
    """Train a module for a number of minutes, counted over all the processes that took part.

    The learning rate warms up, stays, and falls to zero at the end of the budget. `path` holds weights, their mean, the
    optimizer, the generator and the clock; it is replaced in one move, so that it is whole at any time.

    Started by `torchrun --nproc-per-node COUNT`, the processes train one module on batches of their own; the first keeps
    the clock and the checkpoint.

    Args:
        module: What is trained.
        path: The checkpoint.
        minutes: The budget.
        rate: The highest learning rate.
        seed: Of the generator that draws the batches.
        decay: Of the mean of the weights.
        fall: Share of the budget in which the rate falls.
    """

    save_every = 120.0

    def __init__(
        self,
        module: nn.Module,
        path: Path,
        *,
        minutes: float,
        rate: float,
        seed: int = 0,
        decay: float = 0.999,
        fall: float = 0.6,
    ):
        self.module, self.path, self.budget, self.rate, self.decay, self.fall = module, path, minutes * 60, rate, decay, fall
        self.mean = copy.deepcopy(module).requires_grad_(False)
        matrices = [weight for weight in module.parameters() if weight.ndim > 1]
        others = [weight for weight in module.parameters() if weight.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))
        if "RANK" in os.environ:
            distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        self.rank, self.workers = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.generator = torch.Generator().manual_seed(seed)
        self.steps, self.spent, self.losses = 0, 0.0, 0.0
        self._tick: float | None = None
        self._saved = self._told = time.monotonic()
        if path.exists():
            self._resume()
        if self.rank:
            self.generator.manual_seed(seed + self.rank + self.workers * self.steps)

    def _state(self) -> dict:
        return {
            "module": self.module.state_dict(),
            "mean": self.mean.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "steps": self.steps,
            "spent": self.spent,
        }

    def _resume(self) -> None:
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        for name in ("module", "mean", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.generator.set_state(state["generator"])
        self.steps, self.spent = state["steps"], state["spent"]
        print(f"goes on from step {self.steps}, {self.spent / 60:.1f} of {self.budget / 60:.1f} minutes", flush=True)

    def save(self) -> None:
        """Replace the checkpoint."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".new")
        torch.save(self._state(), beside)
        os.replace(beside, self.path)
        self._saved = time.monotonic()

    @property
    def leads(self) -> bool:
        """Whether this is the process that tells, draws and saves."""
        return self.rank == 0

    @property
    def progress(self) -> float:
        """Share of the budget that is spent, in [0, 1]."""
        return min(self.spent / self.budget, 1.0)

    @property
    def goes_on(self) -> bool:
        """Whether there is time left."""
        return self.spent < self.budget

    def step(self, loss: Tensor) -> None:
        """One step down the gradient of `loss`; now and then a line and a checkpoint."""
        warm, cooling = min((self.steps + 1) / 100, 1), min((1 - self.progress) / self.fall, 1)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * warm * (0.5 - 0.5 * math.cos(math.pi * cooling))
        loss.backward()
        self._average()
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        if bool(norm.isfinite()):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.mean.parameters()), list(self.module.parameters()), 1 - decay)
        self.losses = 0.98 * self.losses + 0.02 * float(loss.detach()) if self.steps > 1 and self.losses else float(loss.detach())
        self._clock()

    def _average(self) -> None:
        """One gradient for all processes: the mean of theirs."""
        if self.workers > 1:
            gradients = [weight.grad for weight in self.module.parameters()]
            together = torch.cat([gradient.flatten() for gradient in gradients]).div_(self.workers)
            distributed.all_reduce(together)
            parts = together.split([gradient.numel() for gradient in gradients])
            torch._foreach_copy_(gradients, [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)])

    def _clock(self) -> None:
        now = time.monotonic()
        self.spent += now - (self._tick or now)
        self._tick = now
        if self.workers > 1:
            leading = torch.tensor([self.spent], dtype=torch.float64, device=next(self.module.parameters()).device)
            distributed.broadcast(leading, 0)
            self.spent = float(leading)
        if not self.leads:
            return
        if now - self._told > 30:
            self._told = now
            print(f"{self.spent / 60:6.1f} min  step {self.steps}  loss {self.losses:.4f}", flush=True)
        if now - self._saved > self.save_every or not self.goes_on:
            self.save()
            self._tick = time.monotonic()
