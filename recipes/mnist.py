"""mnist.npz -> a pretrained DDPM and packed images, for experiments; they do not ship with the repository."""

from pathlib import Path

import click
import numpy as np

from recipes import digits
from recipes.training import train_unet
from stages.data.images import Images, write_images
from stages.runtime.errors import InputError
from stages.runtime.stage_outputs import beside_the_pipeline
from stages.storage.files import check_free, file_sha256, writing
from stages.storage.provenance import write_run_record

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
    check_free(model_out, data_out)
    check_free(model_out, stage="finetune")
    check_free(data_out, stage="fetch")
    with writing(data_out) as folder:
        write_images(folder, images, {"sha256": file_sha256(npz)})
        write_run_record(folder, "fetch", seed=SEED)
    train_unet(UNET, images, TRAINING, SEED, inputs=[data_out], checkpoints=checkpoints, out=model_out)


if __name__ == "__main__":
    main()
