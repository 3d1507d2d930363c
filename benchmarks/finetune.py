"""The pruned digits model -> time of a step of `Trainer`, of a minimal loop and of one like diffusers' example.

With `--losses` time and memory of a step by its losses, noise alone, distillation, and the Jacobian loss beside it, and
by Adam or Muon.

The loops alternate step by step in one process, so that other load on the machine affects them equally. The example's
loop is written from its description: PIL images through torchvision's transforms and a DataLoader, accelerate, AdamW
with a cosine schedule, EMAModel, clipping.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import click
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms

from stages.data.images import read_images, to_model_range
from stages.finetune.distillation import read_teacher
from stages.finetune.forecast import peak_memory_bytes
from stages.finetune.params import EngineParams, FinetuneParams, JacobianParams, LossParams, MuonParams
from stages.finetune.trainer import Trainer
from stages.models.pipeline import read_scheduler, read_unet
from stages.runtime.device import computing, has_tf32, kernels, select_device

Step = Callable[[], None]
ENGINES = {
    "ours": EngineParams(),
    "ours, channels_last": EngineParams(channels_last=True),
    "ours, compiled": EngineParams(compile=True),
    "ours, tf32": EngineParams(precision="tf32"),
    "ours, bfloat16": EngineParams(precision="bfloat16"),
    "ours, not deterministic": EngineParams(deterministic=False),
    "ours, bfloat16, compiled": EngineParams(precision="bfloat16", compile=True),
}
DEFAULT_LOSS = LossParams()
PERIOD = 4
"""Steps that are timed together, so that each has its share of a loss of each 4th step."""
JACOBIANS = {
    "output, Jacobian every step, all images": (1, 1),
    "output, Jacobian every step, a quarter": (1, 4),
    "output, Jacobian each 4th step, all images": (PERIOD, 1),
    "output, Jacobian each 4th step, a quarter": (PERIOD, 4),
}
"""Row -> `every`, and the share of the batch that the Jacobian loss is computed on: one of so many."""
LOSSES = {
    "noise": LossParams(noise=1),
    "output": LossParams(noise=0, output=1),
    "output, feature": LossParams(noise=0, output=1, feature=0.1),
    **{
        row: LossParams(noise=0, output=1, jacobian=JacobianParams(weight=0.1, every=every))
        for row, (every, _) in JACOBIANS.items()
    },
}
"""Row -> its losses; the Jacobian loss takes the share of its row in `JACOBIANS`."""
WITH_MUON = {f"{row}, Muon": row for row in ("noise", "output, feature")}
"""Row that steps with Muon -> the row of `LOSSES` whose losses it has."""
ROWS = [*LOSSES, *WITH_MUON]


class TrainingLoops:
    """Builds the step of each loop for one model and its data, by default on the GPU if there is one."""

    def __init__(self, model: Path, data: Path, batch_size: int, device: torch.device | None = None) -> None:
        self.model, self.device, self.batch_size = model, device or select_device(), batch_size
        self.images, self.scheduler = read_images(data), read_scheduler(model)

    def ours(
        self,
        engine: EngineParams,
        loss: LossParams = DEFAULT_LOSS,
        teacher: Path | None = None,
        muon: MuonParams | None = None,
    ) -> Step:
        """Build the step of `Trainer`, with one EMA as in the example."""
        AcceleratorState._reset_state(reset_partial_state=True)  # noqa: SLF001  # accelerate sets the precision once per process
        params = FinetuneParams(
            steps=10**6,
            batch_size=self.batch_size,
            learning_rate=1e-4,
            muon=muon,
            schedule="cosine",
            ema_decays=(0.9999,),
            clip_norm=1.0,
            flip=False,
            heldout_images=1,
            heldout_every=10**6,
            checkpoint_every=10**6,
            loss=loss,
            engine=engine,
        )
        dense = read_teacher(teacher, self.model, self.device) if teacher else None
        trainer = Trainer(read_unet(self.model, self.device), self.scheduler, self.images, params, 0, dense)
        return kernels(deterministic=engine.deterministic)(trainer.step)

    def with_losses(self, row: str, teacher: Path) -> Step:
        """Build `PERIOD` steps of a row of `ROWS`."""
        loss = LOSSES[WITH_MUON.get(row, row)]
        if loss.jacobian:
            images = self.batch_size // JACOBIANS[row][1]
            loss = loss.model_copy(update={"jacobian": loss.jacobian.model_copy(update={"images": images})})
        step = self.ours(EngineParams(), loss, teacher, MuonParams(learning_rate=1e-4) if row in WITH_MUON else None)

        def steps() -> None:
            """Take the steps."""
            for _ in range(PERIOD):
                step()

        return steps

    def bare(self, precision: str = "float32") -> Step:
        """Build a minimal step: noise, forward and backward pass, Adam, with the kernels that PyTorch chooses."""
        unet = read_unet(self.model, self.device).train()
        optimizer = torch.optim.Adam(unet.parameters(), lr=1e-4, fused=True)  # as ours
        pixels = to_model_range(np.array(self.images.train)).to(self.device)

        @kernels(deterministic=False)
        @computing(precision)
        def step() -> None:
            """Take a step of the bare loop."""
            clean = pixels[torch.randint(len(pixels), (self.batch_size,))]
            noise = torch.randn(clean.shape, device=self.device)
            timesteps = torch.randint(1000, (self.batch_size,), device=self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                predicted = unet(self.scheduler.add_noise(clean, noise, timesteps), timesteps).sample
            loss = (predicted.float() - noise).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()

        return step

    def example(self) -> Step:
        """Build the step of diffusers' example of unconditional training, with the kernels that PyTorch chooses."""
        AcceleratorState._reset_state(reset_partial_state=True)  # noqa: SLF001
        accelerator = Accelerator(cpu=self.device.type == "cpu")
        unet = read_unet(self.model, self.device).train()
        ema = EMAModel(unet.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
        optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6)
        loader = self._example_loader()
        rates = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=10**6)
        unet, optimizer, loader, rates = accelerator.prepare(unet, optimizer, loader, rates)
        batches = _endless(loader)

        @kernels(deterministic=False)
        def step() -> None:
            """Take a step of the example."""
            clean = next(batches)
            noise = torch.randn(clean.shape, device=clean.device)
            timesteps = torch.randint(0, 1000, (len(clean),), device=clean.device).long()
            with accelerator.accumulate(unet):
                predicted = unet(self.scheduler.add_noise(clean, noise, timesteps), timesteps).sample
                loss = torch.nn.functional.mse_loss(predicted.float(), noise.float())
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(unet.parameters(), 1.0)
                optimizer.step()
                rates.step()
                optimizer.zero_grad()
            ema.step(unet.parameters())
            loss.detach().item()

        return step

    def _example_loader(self) -> DataLoader[torch.Tensor]:
        """Build the example's loader: each image through torchvision's transforms."""
        side = self.images.train.shape[-1]
        augment = transforms.Compose(
            [
                transforms.Resize(side, interpolation=transforms.InterpolationMode.BILINEAR),
                transforms.CenterCrop(side),
                transforms.ToTensor(),
                transforms.Normalize([0.5], [0.5]),
            ]
        )
        pictures = [Image.fromarray(image.transpose(1, 2, 0).squeeze()) for image in np.array(self.images.train)]
        return DataLoader(
            pictures,  # type: ignore[arg-type]
            batch_size=self.batch_size,
            shuffle=True,
            drop_last=True,
            collate_fn=lambda chosen: torch.stack([augment(picture) for picture in chosen]),
        )


def _endless(loader: DataLoader[torch.Tensor]) -> Iterator[torch.Tensor]:
    while True:
        yield from loader


def measure(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Time the loops step by step in alternating order: seconds of each step."""
    for step in steps.values():
        step()
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(rounds):
        names = list(steps) if index % 2 else list(reversed(steps))
        for name in names:
            begin = time.perf_counter()
            steps[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def table(timings: dict[str, list[float]], batch_size: int) -> str:
    """Format a Markdown table of medians, and of medians of the ratios round by round."""
    lines = [
        "| loop | precision | kernels | ms per step | images/s | ratio to bare | ratio of example to it |",
        "| --- | --- | --- |" + " ---: |" * 4,
    ]
    for name, seconds in timings.items():
        bare = median(mine / other for mine, other in zip(seconds, timings["bare"], strict=True))
        gain = median(other / mine for mine, other in zip(seconds, timings["example"], strict=True))
        middle = median(seconds)
        engine = ENGINES.get(name, EngineParams(deterministic=False))
        setting = f"{engine.precision} | {'deterministic' if engine.deterministic else 'chosen for speed'}"
        lines.append(
            f"| {name} | {setting} | {1000 * middle:.1f} | {batch_size / middle:.0f} | {bare:.3f}× | {gain:.2f}× |"
        )
    return "\n".join(lines)


def peak_memory(model: Path, data: Path, batch_size: int, row: str, teacher: Path) -> int:
    """Take the steps of a row twice and return the peak memory of this process in bytes."""
    steps = TrainingLoops(model, data, batch_size).with_losses(row, teacher)
    steps()
    steps()
    return peak_memory_bytes()


def loss_table(model: Path, data: Path, batch_size: int, rounds: int, teacher: Path, chosen: Sequence[str]) -> str:
    """Format a Markdown table of what a step costs by its losses: time, and the peak memory of a process of its own."""
    rows = ["noise", *(row for row in chosen if row != "noise")]
    loops = TrainingLoops(model, data, batch_size)
    lines = ["| losses | ms per step | ratio to noise | peak memory in MiB |", "| --- | ---: | ---: | ---: |"]
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        peaks = {row: pool.submit(peak_memory, model, data, batch_size, row, teacher).result() for row in rows}
    timings = measure({row: loops.with_losses(row, teacher) for row in rows}, rounds)
    for row, seconds in timings.items():
        ratio = median(mine / other for mine, other in zip(seconds, timings["noise"], strict=True))
        lines.append(f"| {row} | {1000 * median(seconds) / PERIOD:.1f} | {ratio:.2f}× | {peaks[row] / 2**20:.0f} |")
    return "\n".join(lines)


@click.command()
@click.option("--model", type=Path, default=Path("artifacts/pruned"), help="Model folder.")
@click.option("--data", type=Path, default=Path("artifacts/data"), help="Packed images.")
@click.option("--batch-size", type=click.IntRange(1), default=64, help="Images per step.")
@click.option("--rounds", type=click.IntRange(1), default=60, help="Timed steps of each loop.")
@click.option(
    "--engine",
    "engines",
    multiple=True,
    type=click.Choice(list(ENGINES)),
    help="Settings to time, by default all; tf32 is left out where the device has none.",
)
@click.option("--losses", is_flag=True, help="Measure the cost of the losses instead, in rounds of 4 steps.")
@click.option(
    "--row", "rows", multiple=True, type=click.Choice(ROWS), help="Rows of --losses, beside noise; by default all."
)
@click.option("--teacher", type=Path, default=Path("artifacts/pretrained"), help="Dense model, for --losses.")
def main(
    model: Path,
    data: Path,
    batch_size: int,
    rounds: int,
    engines: tuple[str, ...],
    rows: tuple[str, ...],
    *,
    losses: bool,
    teacher: Path,
) -> None:
    """Time the loops and print the table."""
    if rows and not losses:
        raise click.UsageError("--row names rows of --losses; give --losses, too, or leave --row out")
    if losses and engines:
        raise click.UsageError("--losses times the default engine; leave --engine out")
    parts = {JACOBIANS[row][1] for row in (rows or ROWS) if row in JACOBIANS}
    if losses and any(batch_size % count for count in parts):
        raise click.UsageError(f"--batch-size {batch_size} has no quarter, which rows take; choose a multiple of 4")
    if losses:
        click.echo(loss_table(model, data, batch_size, rounds, teacher, rows or ROWS))
        return
    loops = TrainingLoops(model, data, batch_size)
    steps = {"bare": loops.bare(), "example": loops.example()}
    chosen = [name for name in engines or ENGINES if ENGINES[name].precision != "tf32" or has_tf32(loops.device)]
    steps |= {name: loops.ours(ENGINES[name]) for name in chosen}
    click.echo(table(measure(steps, rounds), batch_size))


if __name__ == "__main__":
    main()
