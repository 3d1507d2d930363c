"""A folder of small photographs -> the pretrained DDPM `photos` that ships with the repository.

It prints the hash that belongs into stages/fetch/model.py. recipes/README.md says where the photographs come from, and
has the results.
"""

from hashlib import sha256
from pathlib import Path

import click
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from recipes import digits
from stages.data.images import read_images
from stages.fetch.data import fetch_data
from stages.fetch.model import BUNDLED, CARD
from stages.fetch.params import FolderData
from stages.fetch.weights import STEM
from stages.finetune.checkpoint import Checkpoints
from stages.finetune.params import EngineParams, FinetuneParams
from stages.finetune.trainer import Trainer
from stages.models.layout import WEIGHTS
from stages.models.pipeline import read_scheduler, read_unet, write_pipeline
from stages.runtime.device import select_device
from stages.runtime.seeds import derive_seed
from stages.runtime.stage_outputs import beside_the_pipeline
from stages.storage.files import RUN_RECORD, copy_file, file_sha256, write_atomically, writing
from stages.storage.provenance import fingerprint, write_run_record
from stages.storage.tensors import write_tensors

SEED = 0
HELDOUT = 0.04
SHAPE = (3, 32, 32)
UNET = {
    **digits.UNET,
    "sample_size": SHAPE[1],
    "in_channels": SHAPE[0],
    "out_channels": SHAPE[0],
    "block_out_channels": (48, 96, 144),
}
TRAINING = FinetuneParams(
    steps=4400,
    batch_size=64,
    learning_rate=6e-4,
    schedule="cosine",
    warmup_steps=200,
    antithetic=True,
    ema_decays=(0.995, 0.999),
    clip_norm=1.0,
    flip=True,
    heldout_images=512,
    heldout_every=200,
    checkpoint_every=200,
    engine=EngineParams(precision="bfloat16"),
)
MODEL_CARD = """\
---
license: other
license_name: research-use
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags:
- diffusion
---

# photos

A DDPM of small photographs, 32×32 pixels, 3.9 million parameters, in float16. Trained by `recipes/photos.py` on 24,000
images of CIFAR-10 that had been compressed as JPEG, which have no licence file and are used for research. It exists to
try Espalier out; no figure on it compares with published ones.
"""


def train(data: Path, model_out: Path, checkpoints: Path) -> None:
    """Train the model on packed images and write it in float32."""
    record = {"seed": SEED, "finetune": TRAINING}
    torch.manual_seed(derive_seed(SEED, "base"))
    trainer = Trainer(UNet2DModel(**UNET).to(select_device()), DDPMScheduler(), read_images(data), TRAINING, SEED)
    saved = Checkpoints(checkpoints, sha256(f"{fingerprint('finetune', [data], **record)} {UNET}".encode()).hexdigest())
    trainer.run(saved, lambda point, _: click.echo(str(point)))
    with writing(model_out) as folder:
        write_pipeline(folder, trainer.best_ema, trainer.scheduler)
        write_run_record(folder, "finetune", **record)
    saved.clear()


def write_bundled(model: Path) -> str:
    """Write a trained model as the bundled one, with weights in float16, and return the sha256 of these."""
    unet = read_unet(model)
    rounded = {name: tensor.half() for name, tensor in unet.state_dict().items()}
    with writing(BUNDLED / "photos") as folder:
        write_pipeline(folder, unet, read_scheduler(model))
        (folder / "unet" / WEIGHTS).unlink()
        weights = Path("unet", f"{STEM}.fp16.safetensors")
        write_tensors(folder / weights, rounded, metadata={"format": "pt"})
        write_atomically(folder / CARD, MODEL_CARD.encode())
        copy_file(model / RUN_RECORD, folder / RUN_RECORD)
    return file_sha256(BUNDLED / "photos" / weights)


@click.command()
@click.option("--images", type=Path, required=True, help="Folder with the training photographs, 32×32.")
@click.option(
    "--data-out",
    type=Path,
    required=True,
    callback=beside_the_pipeline,
    help="Folder for the packed images; used again if it is there.",
)
@click.option(
    "--model-out",
    type=Path,
    required=True,
    callback=beside_the_pipeline,
    help="Folder for the model in float32; likewise.",
)
@click.option("--checkpoints", type=Path, default=Path("checkpoints/photos"), help="Folder for the checkpoints.")
def main(images: Path, data_out: Path, model_out: Path, checkpoints: Path) -> None:
    """Pack the photographs, train the model in about two and a half hours on one core, and bundle it in float16."""
    if not data_out.exists():
        with writing(data_out) as folder:
            fetch_data(FolderData(source="folder", path=images.absolute()), SHAPE, HELDOUT, folder)
            write_run_record(folder, "fetch", seed=SEED)
    if not model_out.exists():
        train(data_out, model_out, checkpoints)
    click.echo(f"sha256 of the weights: {write_bundled(model_out)}")


if __name__ == "__main__":
    main()
