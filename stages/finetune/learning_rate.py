"""A schedule of the block finetune -> the learning rate of each step."""

from collections.abc import Callable

import torch
from diffusers.optimization import get_scheduler

from stages.finetune.params import FinetuneParams

SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
"""finetune.schedule -> its name in diffusers."""


def rate_schedule(params: FinetuneParams) -> Callable[[int], float]:
    """Return the learning rate of a step, counted from 0, relative to its highest, which the last warm-up step has.

    diffusers' own warm-up begins with a step of rate 0, which changes nothing.
    """
    name, steps, warmup = SCHEDULES[params.schedule], params.steps, params.warmup_steps
    any_optimizer = torch.optim.SGD([torch.zeros(1)])  # the schedule is a function of the step alone
    schedule = get_scheduler(name, any_optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    factor: Callable[[int], float] = schedule.lr_lambdas[0]
    return lambda step: (step + 1) / warmup if step < warmup else factor(step)
