"""UCI digits -> the pretrained DDPM and the feature extractor that ship with the repository.

Run it with `make base`. It uses the data, split and trainer of the pipeline, and prints the hash that belongs into
stages/fetch/model.py. recipes/README.md has the results.
"""

from pathlib import Path

import click
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

from recipes.training import train_unet
from stages.data.images import Images, to_model_range
from stages.fetch.data import bundled_digits
from stages.fetch.model import BUNDLED, CARD
from stages.fetch.split import split
from stages.finetune.params import FinetuneParams
from stages.models.layout import WEIGHTS
from stages.protocol.digits import DIGITS_WEIGHTS, DigitsClassifier
from stages.runtime.progress import track
from stages.runtime.seeds import derive_seed, generator
from stages.storage.files import file_sha256
from stages.storage.tensors import write_tensors

SEED = 0
HELDOUT = 0.2
UNET = {
    "sample_size": 16,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    # The values below are those of the paper's UNets.
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
TRAINING = FinetuneParams(
    steps=4000,
    batch_size=64,
    learning_rate=1e-3,
    antithetic=False,
    ema_decays=(0.998,),
    clip_norm=1.0,
    flip=False,
    heldout_images=512,
    heldout_every=500,
    checkpoint_every=500,
)
CLASSIFIER_STEPS = 3000
MAX_SHIFT_PX = 1
"""Maximum shift of the classifier's training images, in pixels."""


def train_model(images: Images) -> None:
    """Train the DDPM and write it to the bundled model of the fetch stage."""
    out, checkpoints = BUNDLED / "digits", Path("checkpoints/base")
    card = (out / CARD).read_text()
    train_unet(UNET, images, TRAINING, SEED, inputs=[], checkpoints=checkpoints, out=out, card=card)
    print("sha256 of the weights:", file_sha256(out / "unet" / WEIGHTS))


def train_classifier(images: Images, train_labels: torch.Tensor, heldout_labels: torch.Tensor) -> None:
    """Train the feature extractor and write it to the weights that the evaluate stage reads."""
    torch.manual_seed(derive_seed(SEED, "classifier"))
    classifier = DigitsClassifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=1e-3, weight_decay=1e-2)
    batches, pixels = generator(SEED, "classifier batches"), to_model_range(images.train)
    for _ in track(range(CLASSIFIER_STEPS), "classifier, step", CLASSIFIER_STEPS):
        chosen = torch.randint(len(pixels), (64,), generator=batches)
        shifts = torch.randint(-MAX_SHIFT_PX, MAX_SHIFT_PX + 1, (2,), generator=batches).tolist()
        _, logits = classifier(pixels[chosen].roll(shifts, dims=(2, 3)))
        optimizer.zero_grad()
        cross_entropy(logits, train_labels[chosen]).backward()
        optimizer.step()
    with torch.no_grad():
        classifier.rms.copy_(classifier(pixels)[0].square().mean().sqrt())
        _, logits = classifier(to_model_range(images.heldout))
    print("held-out accuracy:", (logits.argmax(1) == heldout_labels).float().mean().item())
    write_tensors(DIGITS_WEIGHTS, classifier.state_dict())


@click.command()
@click.argument("parts", type=click.Choice(["classifier", "model"]), nargs=-1)
def main(parts: tuple[str, ...]) -> None:
    """Train the parts with these names; both without any."""
    pixels = bundled_digits()
    images = split(pixels, HELDOUT)
    labels = split(load_digits().target.reshape(-1, 1), HELDOUT)
    if "classifier" in parts or not parts:
        train_classifier(images, *(torch.from_numpy(part[:, 0]) for part in (labels.train, labels.heldout)))
    if "model" in parts or not parts:
        train_model(images)


if __name__ == "__main__":
    main()
