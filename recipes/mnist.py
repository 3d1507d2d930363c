"""mnist.npz -> a pretrained DDPM and packed images, for experiments; they do not ship with the repository."""

from hashlib import sha256
from pathlib import Path

import click
import numpy as np
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from recipes import digits
from stages.data.images import Images, write_images
from stages.finetune.checkpoint import Checkpoints
from stages.finetune.trainer import Trainer
from stages.models.pipeline import write_pipeline
from stages.runtime.device import select_device
from stages.runtime.errors import InputError
from stages.runtime.seeds import derive_seed
from stages.runtime.stage_outputs import beside_the_pipeline
from stages.storage.files import check_free, file_sha256, writing
from stages.storage.provenance import fingerprint, write_run_record

SEED = 0
UNET = {**digits.UNET, "sample_size": 28, "block_out_channels": (32, 64, 128)}
TRAINING = digits.TRAINING.model_copy(update={"batch_size": 32})


def read_mnist(path: Path) -> Images:
    """Read mnist.npz: 60,000 training images, and the 10,000 test images as held-out images.

    Raises:
        InputError: The file is missing or damaged, or lacks one of the arrays.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            train, heldout = (np.ascontiguousarray(arrays[f"{part}_images"][:, None]) for part in ("train", "test"))
    except (OSError, KeyError, ValueError) as error:
        raise InputError(
            f"{path} is not an .npz file with train_images and test_images ({error}); give mnist.npz"
        ) from None
    return Images(train, heldout)


@click.command()
@click.option("--npz", type=Path, required=True, help="mnist.npz, with train_images and test_images.")
@click.option("--model-out", type=Path, required=True, callback=beside_the_pipeline, help="Folder for the model.")
@click.option(
    "--data-out", type=Path, required=True, callback=beside_the_pipeline, help="Folder for the packed images."
)
@click.option(
    "--checkpoints", type=Path, default=Path("checkpoints/mnist"), help="Folder for the checkpoints of the training."
)
def main(npz: Path, model_out: Path, data_out: Path, checkpoints: Path) -> None:
    """Pack the images and train the model, in about twenty minutes on two cores."""
    images = read_mnist(npz)
    record = {"seed": SEED, "finetune": TRAINING}
    check_free(model_out, data_out)
    with writing(data_out) as folder:
        write_images(folder, images, {"sha256": file_sha256(npz)})
        write_run_record(folder, "fetch", **record)
    torch.manual_seed(derive_seed(SEED, "base"))
    trainer = Trainer(UNet2DModel(**UNET).to(select_device()), DDPMScheduler(), images, TRAINING, SEED)
    saved = Checkpoints(
        checkpoints, sha256(f"{fingerprint('finetune', [data_out], **record)} {UNET}".encode()).hexdigest()
    )
    trainer.run(saved)
    for point in trainer.curve:
        print(point)
    with writing(model_out) as folder:
        write_pipeline(folder, trainer.best_ema, trainer.scheduler)
        write_run_record(folder, "finetune", **record)
    saved.clear()


if __name__ == "__main__":
    main()
