"""UCI digits -> a small DiT with classes and a learned variance, to prune, recover and measure on two cores.

Run it with `python -m recipes.dit_digits --out FOLDER`. It writes the digits to FOLDER-images, a folder for each class;
params.yaml takes both: `{source: folder, path: FOLDER}` and `{source: folder, path: FOLDER-images, labels: true}`.
"""

import copy
from pathlib import Path

import click
import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from PIL import Image
from sklearn.datasets import load_digits

from recipes.digits import HELDOUT, SEED
from stages.data.images import to_model_range
from stages.fetch.data import bundled_digits
from stages.fetch.split import split
from stages.models.families import family_of
from stages.models.pipeline import write_pipeline
from stages.runtime.device import select_device
from stages.runtime.progress import track
from stages.runtime.seeds import derive_seed, generator
from stages.runtime.stage_outputs import beside_the_pipeline, check_no_stage_output
from stages.storage.files import check_free, writing

NUM_CLASSES = 10
DIT = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 1,
    "out_channels": 2,
    "num_layers": 6,
    "num_attention_heads": 6,
    "attention_head_dim": 16,
    "num_embeds_ada_norm": NUM_CLASSES,
}
"""1.23 M parameters."""
NOISE = {"variance_type": "learned_range", "clip_sample": True}
STEPS, BATCH_SIZE, LEARNING_RATE, EMA_DECAY = 8000, 64, 5e-4, 0.998
LABEL_DROPOUT = 0.1
LOG_2 = 0.6931471805599453


class HybridLoss:
    """‖ε − ε_θ‖² + L_vlb, where only the variance learns from L_vlb (Nichol and Dhariwal, 2021, section 3.1).

    L_vlb is KL(q(x_{t−1} | x_t, x_0) ‖ N(μ_θ, Σ_θ)) in bits for each number, and at t = 0 the negative logarithm of
    the probability of the pixel's value; log Σ_θ = v log β_t + (1 − v) log β̃_t (eq. 15).
    """

    def __init__(self, scheduler: DDPMScheduler, device: torch.device) -> None:
        alphas = scheduler.alphas_cumprod.double().to(device)
        before = torch.cat([torch.ones(1, dtype=alphas.dtype, device=device), alphas[:-1]])
        betas = scheduler.betas.double().to(device)
        posterior = betas * (1 - before) / (1 - alphas)
        posterior = torch.cat([posterior[1:2], posterior[1:]])  # β̃ of t = 0 is 0, whose logarithm is not finite
        self.clean, self.noisy = betas * before.sqrt() / (1 - alphas), (1 - before) * (1 - betas).sqrt() / (1 - alphas)
        self.signal, self.noise = alphas.sqrt(), (1 - alphas).sqrt()
        self.low, self.high = posterior.log(), betas.log()

    def __call__(
        self, output: torch.Tensor, clean: torch.Tensor, noise: torch.Tensor, noisy: torch.Tensor, steps: torch.Tensor
    ) -> torch.Tensor:
        """Output [B, 2C, H, W]; x₀, ε and x_t [B, C, H, W]; t [B] -> the mean loss []."""
        predicted, share = output.chunk(2, dim=1)

        def at(table: torch.Tensor) -> torch.Tensor:
            """Table [T] -> its values at t, [B, 1, 1, 1]."""
            return table[steps].float().view(-1, 1, 1, 1)

        share = (share + 1) / 2
        log_variance = share * at(self.high) + (1 - share) * at(self.low)
        guess = (noisy - at(self.noise) * predicted.detach()) / at(self.signal)
        mean = at(self.clean) * guess + at(self.noisy) * noisy
        wanted = at(self.clean) * clean + at(self.noisy) * noisy
        ratio = at(self.low) - log_variance
        divergence = (ratio.exp() - 1 - ratio + (wanted - mean).square() * (-log_variance).exp()) / 2
        is_last = (steps == 0).view(-1, 1, 1, 1)
        bits = torch.where(is_last, -log_probability(clean, mean, log_variance), divergence) / LOG_2
        return (predicted - noise).square().mean() + bits.mean()


def log_probability(values: torch.Tensor, mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """Logarithm of the probability of 8-bit values in [-1, 1] under a Gaussian; the outermost bins are open."""
    scale = (-0.5 * log_variance).exp()
    upper = torch.where(values > 254 / 255, 1.0, torch.special.ndtr((values + 1 / 255 - mean) * scale))
    lower = torch.where(values < -254 / 255, 0.0, torch.special.ndtr((values - 1 / 255 - mean) * scale))
    return (upper - lower).clamp_min(1e-12).log()


def train(pixels: torch.Tensor, labels: torch.Tensor, steps: int) -> DiTTransformer2DModel:
    """Train on images in [-1, 1] [N, 1, 16, 16] and their classes [N]; returns the EMA."""
    device, scheduler = select_device(), DDPMScheduler(**NOISE)
    torch.manual_seed(derive_seed(SEED, "dit"))
    model = DiTTransformer2DModel(**DIT).to(device)
    family_of(model).prepare(model)
    ema, loss = copy.deepcopy(model).requires_grad_(requires_grad=False), HybridLoss(scheduler, device)
    optimizer, draws = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0), generator(SEED, "dit")
    for _ in track(range(steps), "DiT, step", steps):
        chosen = torch.randint(len(pixels), (BATCH_SIZE,), generator=draws)
        noise = torch.randn((BATCH_SIZE, *pixels.shape[1:]), generator=draws).to(device)
        timesteps = torch.randint(scheduler.config["num_train_timesteps"], (BATCH_SIZE,), generator=draws).to(device)
        is_dropped = torch.rand(BATCH_SIZE, generator=draws) < LABEL_DROPOUT
        clean, shown = pixels[chosen].to(device), torch.where(is_dropped, NUM_CLASSES, labels[chosen]).to(device)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        optimizer.zero_grad()
        loss(model(noisy, timesteps, shown).sample, clean, noise, noisy, timesteps).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for mean, parameter in zip(ema.parameters(), model.parameters(), strict=True):
            mean.lerp_(parameter, 1 - EMA_DECAY)
    return ema.eval()


def write_images(folder: Path, pixels: torch.Tensor, labels: torch.Tensor) -> None:
    """Write each image as PNG into the folder of its class."""
    for index, (image, label) in enumerate(zip(pixels, labels.tolist(), strict=True)):
        place = folder / str(label)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0]).save(place / f"{index:04d}.png")


@click.command()
@click.option(
    "--out",
    type=Path,
    required=True,
    callback=beside_the_pipeline,
    help="Folder for the model; OUT-images is for the digits.",
)
@click.option("--steps", type=click.IntRange(1), default=STEPS, help="Optimiser steps.")
def main(out: Path, steps: int) -> None:
    """Train the model and write it, and the digits in the folders of their classes."""
    pictures = out.with_name(f"{out.name}-images")
    check_no_stage_output(pictures, "--out")
    check_free(out, pictures, stage="dit_digits")
    pixels, labels = bundled_digits(), load_digits().target
    images = split(pixels, HELDOUT)
    train_labels = torch.from_numpy(split(labels.reshape(-1, 1), HELDOUT).train[:, 0]).long()
    model = train(to_model_range(images.train), train_labels, steps)
    with writing(out) as folder:
        write_pipeline(folder, model, DDPMScheduler(**NOISE))
    with writing(pictures) as folder:
        write_images(folder, pixels, torch.from_numpy(labels))


if __name__ == "__main__":
    main()
