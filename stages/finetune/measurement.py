"""A model in training -> its held-out loss and its samples."""

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from numpy.typing import NDArray

from stages.finetune.batches import Batch
from stages.finetune.distillation import Distillation
from stages.finetune.engine import DETERMINISTIC
from stages.finetune.loss import Objective, Prediction
from stages.models.families import Denoiser
from stages.models.params import SamplesParams
from stages.models.sampling import SamplingContext, draw, image_seeds
from stages.runtime.device import naming_switch


class HeldoutLoss:
    """Mean loss of a model on one fixed batch of held-out images.

    Args:
        batch: The held-out images, their noise and timesteps.
        part_size: Images computed at once.
        objective: The loss, without features.
        distillation: Runs the models; its teacher runs once, if the loss needs its output.
    """

    @naming_switch(DETERMINISTIC)
    @torch.no_grad()
    def __init__(self, batch: Batch, part_size: int, objective: Objective, distillation: Distillation) -> None:
        self.objective, self.distillation = objective, distillation
        teacher = distillation.teacher if "output" in objective.weights else None
        parts = [part.to(distillation.engine.device) for part in batch.split(part_size)]
        self.parts = [(part, distillation.predict(teacher, part) if teacher else None) for part in parts]

    @naming_switch(DETERMINISTIC)
    @torch.no_grad()
    def __call__(self, unet: Denoiser) -> float:
        """Measure the loss of a model.

        Raises:
            InputError: It has an operation without a deterministic kernel, and `finetune.engine` allows no other.
        """
        losses = []
        for part, teacher in self.parts:
            prediction = Prediction(self.distillation.target(part), self.distillation.predict(unet, part), teacher)
            losses.append(self.objective(prediction, part.timesteps))
        return float(torch.cat(losses).mean())


def draw_samples(
    unet: Denoiser, scheduler: DDPMScheduler, params: SamplesParams, context: SamplingContext
) -> NDArray[np.uint8]:
    """Draw images from noise that is the same at every call: [N, C, H, W] uint8."""
    seeds = image_seeds(0, params.num_images)
    return draw(
        unet,
        scheduler,
        seeds,
        params.sampler,
        batch_size=len(seeds),
        label="samples",
        context=context,
        labels=context.labels(0, len(seeds)),
    )
