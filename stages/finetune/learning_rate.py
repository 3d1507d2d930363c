"""A schedule of the block finetune -> the learning rate of each step."""

from collections.abc import Callable

import torch
from diffusers.optimization import get_scheduler

from stages.finetune.params import FinetuneParams

SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
"""finetune.schedule -> its name in diffusers."""


def rate_schedule(params: FinetuneParams) -> Callable[[int], float]:
    """Return the learning rate of a step relative to its highest."""
    name, steps = SCHEDULES[params.schedule], params.steps
    any_optimizer = torch.optim.SGD([torch.zeros(1)])  # the schedule is a function of the step alone
    schedule = get_scheduler(name, any_optimizer, num_warmup_steps=params.warmup_steps, num_training_steps=steps)
    factor: Callable[[int], float] = schedule.lr_lambdas[0]
    return factor
