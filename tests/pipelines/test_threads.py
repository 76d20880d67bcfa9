"""Threads share one pipeline, and each gets the picture it would get alone; nothing is left behind in the models."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tasks import TASKS, call, difference, pair, set_scheduler
from test_oracle import SCHEDULERS

OTHERS = ["SASolverScheduler", "TCDScheduler", "DDIMParallelScheduler", "DDPMParallelScheduler"]
"""Further schedulers of the same models, which do not take each other's configurations."""


def state_of(pipe):
    """What a run could leave behind: attributes, processors, weights."""
    attributes = {name: sorted(vars(module)) for name, module in pipe.unet.named_modules()}
    processors = {name: id(processor) for name, processor in pipe.unet.attn_processors.items()}
    weights = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in pipe.unet.modules())
    return attributes, processors, hooks, weights


@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept")  # the peer's KDPM2
@pytest.mark.parametrize("scheduler", [*SCHEDULERS, *OTHERS])
def test_eight_threads_on_one_pipeline(scheduler):
    _, pipe = pair("text")
    set_scheduler(pair("text"), scheduler)
    runs = [
        {
            "prompt": f"cat {seed}",
            "num_inference_steps": 4 + seed % 3,
            "guidance_scale": 1 + seed,
            "height": 32,
            "width": 32 + 8 * (seed % 2),
        }
        for seed in range(8)
    ]

    def run(seed):
        made = call(pipe, "text", generator=torch.Generator().manual_seed(seed), **runs[seed])
        return made, pipe.guidance_scale, pipe.num_timesteps, pipe.scheduler.timesteps.clone()

    before = state_of(pipe)
    serial = [run(seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as threads:
        shared = list(threads.map(run, range(8)))
    for (alone, *told_alone), (among, *told) in zip(serial, shared, strict=True):
        assert difference(alone, among) == 0
        assert told_alone[:2] == told[:2]
        assert torch.equal(told_alone[2], told[2])
    after = state_of(pipe)
    assert before[:3] == after[:3]
    assert all(torch.equal(tensor, after[3][name]) for name, tensor in before[3].items())


@pytest.mark.parametrize("task", [task for task in TASKS if task != "text"])
def test_every_task_in_threads(task):
    _, pipe = pair(task)
    set_scheduler(pair(task), "DPMSolverMultistepScheduler")
    expected = [call(pipe, task, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    with ThreadPoolExecutor(4) as threads:
        made = list(threads.map(lambda seed: call(pipe, task, generator=torch.Generator().manual_seed(seed)), range(4)))
    assert all(difference(one, other) == 0 for one, other in zip(expected, made, strict=True))
