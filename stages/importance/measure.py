"""A UNet, images and noise -> the saliency of every weight."""

from collections.abc import Sequence

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import nn

from stages.artifacts import Importance, tensors_sha256
from stages.importance.criteria import ENGINES, Engine
from stages.progress import track

NEEDS_GRADIENTS = {"taylor", "diff-pruning"}


def measure_importance(
    unet: UNet2DModel,
    scheduler: DDPMScheduler,
    images: torch.Tensor,
    noise: torch.Tensor,
    timesteps: Sequence[int],
    *,
    criterion: str,
    formula: str,
    threshold: float,
) -> Importance:
    """Score every weight of a UNet as Diff-Pruning does (Fang et al., 2023, algorithm 1).

    Args:
        unet: The dense model; its weights stay as they are, its gradients are used up.
        scheduler: The noise schedule that it was trained with.
        images: Calibration images, [B, C, H, W] in [-1, 1].
        noise: One noise tensor of that shape for all timesteps.
        timesteps: Ascending, as the original takes them.
        criterion: random, magnitude, taylor or diff-pruning.
        formula: paper or diffusers, see `ENGINES`.
        threshold: T of diff-pruning.

    Returns:
        The saliencies on the CPU, and the loss of every timestep that was used.
    """
    engine = ENGINES[formula]
    losses: list[float] = []
    if criterion in NEEDS_GRADIENTS:
        stop_below = threshold if criterion == "diff-pruning" else 0.0
        losses = accumulate_gradients(unet, scheduler, images, noise, timesteps, engine, stop_below)
    saliency = _saliency(unet, engine, criterion)
    unet.zero_grad(set_to_none=True)
    return Importance(
        criterion=criterion,
        formula=formula,
        model_sha256=tensors_sha256(unet.state_dict()),
        counts_doubled=engine.counts_doubled,
        timesteps=list(timesteps)[: len(losses)],
        losses=losses,
        saliency=saliency,
    )


def accumulate_gradients(
    unet: UNet2DModel,
    scheduler: DDPMScheduler,
    images: torch.Tensor,
    noise: torch.Tensor,
    timesteps: Sequence[int],
    engine: Engine,
    threshold: float,
) -> list[float]:
    """Sum ∇L_t over the timesteps into `.grad` until L_t < threshold · max L; return the losses that went in.

    This is the original's prefix rule: the first timestep below the threshold ends the sum, so the paper's set
    {t : L_t / L_max > T} results only while the loss falls with t.
    """
    unet.eval().zero_grad(set_to_none=True)
    losses: list[float] = []
    largest = 0.0
    for timestep in track(timesteps, "importance, timestep", len(timesteps)):
        moment = torch.full((len(images),), timestep, device=images.device)
        noisy = scheduler.add_noise(images, noise, moment)  # type: ignore[arg-type]  # any integers will do
        loss = engine.loss((unet(noisy, moment).sample - noise).square())
        largest = max(largest, loss.item())
        last = loss.item() < threshold * largest
        if last and not engine.keeps_last:
            break
        losses.append(loss.item())
        loss.backward()
        if last:
            break
    return losses


@torch.no_grad()
def _saliency(unet: UNet2DModel, engine: Engine, criterion: str) -> dict[str, torch.Tensor]:
    if criterion not in engine.saliency:
        return {}
    layers = {
        name: layer for name, layer in unet.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear | nn.GroupNorm)
    }
    values = {name: engine.saliency[criterion](layer) for name, layer in layers.items()}
    return {name: value.cpu() for name, value in values.items() if value is not None}
