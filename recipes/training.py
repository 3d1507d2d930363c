"""A config, images and the params of a training -> a pretrained UNet in a folder."""

from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import click
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from stages.data.images import Images
from stages.fetch.model import CARD
from stages.finetune.checkpoint import Checkpoints
from stages.finetune.params import FinetuneParams
from stages.finetune.trainer import Trainer
from stages.models.pipeline import write_pipeline
from stages.runtime.device import select_device
from stages.runtime.seeds import derive_seed
from stages.storage.files import write_atomically, writing
from stages.storage.provenance import fingerprint, write_run_record


def train_unet(
    config: Mapping[str, Any],
    images: Images,
    params: FinetuneParams,
    seed: int,
    *,
    inputs: Iterable[Path],
    checkpoints: Path,
    out: Path,
    card: str | None = None,
) -> None:
    """Train a UNet2DModel by the trainer of the pipeline, and write the best EMA; a stopped training goes on.

    Args:
        config: Of the UNet.
        images: Those of the training, and held-out ones.
        params: Of the training.
        seed: Of weights, batches and noise.
        inputs: Folders whose content decides the outcome, beside code, params and config.
        checkpoints: Where a stopped training goes on from; empty at the end.
        out: The folder of the model.
        card: Its model card, with the licence.
    """
    record: dict[str, Any] = {"seed": seed, "finetune": params}
    torch.manual_seed(derive_seed(seed, "base"))
    trainer = Trainer(UNet2DModel(**config).to(select_device()), DDPMScheduler(), images, params, seed)
    run = sha256(f"{fingerprint('finetune', inputs, **record)} {config}".encode()).hexdigest()
    saved = Checkpoints(checkpoints, run)
    trainer.run(saved, lambda point, _: click.echo(str(point)))
    with writing(out) as folder:
        write_pipeline(folder, trainer.best_ema, trainer.scheduler)
        write_run_record(folder, "finetune", **record)
        if card is not None:
            write_atomically(folder / CARD, card.encode())
    saved.clear()
