"""A noisy batch and random vectors -> how far the student's sensitivity to its input is from its teacher's."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from stages.finetune.batches import Batch
from stages.finetune.distillation import Distillation
from stages.finetune.loss import Objective
from stages.finetune.params import FinetuneParams
from stages.models.families import Denoiser, sample_shape
from stages.runtime.device import computing
from stages.runtime.seeds import generator


class JacobianMatching:
    """w(t) · (‖J_t‖² − ‖J_s‖²)² / D with J = ∇ₓ ⟨y(x_t, t), v⟩, averaged over the unit vectors v of an image.

    D is the number of pixels times channels: the published form (2ndMatch, CVPR 2026) is this one times D, beside
    losses that are sums over the pixels, so that its weights hold here too. A prediction of ε has ‖J‖² ≈ 1 / (1 − ᾱ_t),
    10⁴ at the first timestep of DDPM: `relative` divides by ‖J_t‖⁴ instead of D, which gives timesteps equal weight.

    Both models run in float32 whatever the engine's precision, uncompiled and with attention by plain matrix products:
    neither fused attention nor compiled code can be differentiated twice.

    Args:
        student: The pruned model itself, not as `Engine.wrap` returned it.
        teacher: The dense model.
        distillation: Runs them on a noisy batch.
        objective: Knows w(t).
        params: The block finetune of params.yaml, with a Jacobian loss.
        seed: Root seed of the vectors; each step has its own.

    Raises:
        InputError: The images do not divide evenly.
    """

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser,
        distillation: Distillation,
        objective: Objective,
        params: FinetuneParams,
        seed: int,
    ) -> None:
        assert params.loss.jacobian is not None
        self.params, self.num_parts, self.seed = params.loss.jacobian, params.engine.accumulate, seed
        self.student, self.teacher = _plain(student), _plain(teacher)
        self.distillation, self.objective = distillation, objective
        self.num_images = self.params.images or params.batch_size
        self.stride = params.batch_size // self.num_images
        self.rows = distillation.engine.local_rows(self.num_images, params.divided[0])
        self.shape = self.num_images, self.params.vectors, *sample_shape(student)

    def vectors(self, step: int) -> list[torch.Tensor]:
        """Draw the unit vectors of each part of this process's batch: [B, V, C, H, W]; none if the step has no loss.

        Those of the whole batch are drawn, so that an image has the same ones however the batch is divided.
        """
        if not self.params.weight_at(step):
            return []
        draws = torch.randn(self.shape, generator=generator(self.seed, "jacobian", step))
        unit = nn.functional.normalize(draws.flatten(2), dim=2).view_as(draws)[self.rows]
        unit = unit.pin_memory() if torch.cuda.is_available() else unit
        return list(unit.to(self.distillation.engine.device, non_blocking=True).chunk(self.num_parts))

    def backward(self, batch: Batch, vectors: torch.Tensor, step: int) -> torch.Tensor:
        """Add the gradients of one part of a step's batch to those of the weights, and return its share of the loss [].

        It must come before the wrapped model's forward pass, after which gradients are summed over the processes.
        """
        with computing("float32"), sdpa_kernel(SDPBackend.MATH):
            chosen = batch.every(self.stride)
            losses = self.objective.weights_at(chosen.timesteps) * self(chosen, vectors)
            loss = self.params.weight_at(step) / self.num_parts * losses.mean()
            loss.backward()
        return loss.detach()

    def __call__(self, batch: Batch, vectors: torch.Tensor) -> torch.Tensor:
        """Batch and unit vectors [B, V, C, H, W] -> [B]."""
        theirs = self.squared_norms(self.teacher, batch, vectors, differentiable=False)
        mine = self.squared_norms(self.student, batch, vectors, differentiable=True)
        if self.params.relative:
            return (1 - mine / theirs.clamp_min(1e-12)).square().mean(dim=1)
        return (theirs - mine).square().mean(dim=1) / vectors[0, 0].numel()

    def squared_norms(
        self, model: Callable[..., Any], batch: Batch, vectors: torch.Tensor, *, differentiable: bool
    ) -> torch.Tensor:
        """‖∇ₓ ⟨y(x_t, t), v⟩‖² of each image and vector: [B, V]."""
        noisy = self.distillation.noisy(batch).requires_grad_()
        predicted = self.distillation.predict(model, batch, noisy)
        products = [
            torch.autograd.grad(predicted, noisy, vector, retain_graph=True, create_graph=differentiable)[0]
            for vector in vectors.unbind(dim=1)
        ]
        return torch.stack([product.flatten(1).square().sum(dim=1) for product in products], dim=1)


def _plain(model: Denoiser) -> Callable[..., Any]:
    """Return the forward pass of a model's class; accelerate replaces that of the object by one in bfloat16."""
    return functools.partial(type(model).forward, model)
