"""Images of digits -> features of the bundled classifier."""

from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import interpolate

from stages.protocol.bundled import BundledExtractor
from stages.storage.tensors import read_tensors

DIGITS_WEIGHTS = Path(__file__).parent / "digits_classifier.safetensors"
NUM_FEATURES = 64
DIGITS_SHAPE = (1, 16, 16)


class DigitsClassifier(nn.Module):
    """A classifier of the ten digits: [N, 1, 16, 16] in [-1, 1] -> (features [N, 64], logits [N, 10]).

    The features are divided by their root mean square on the training images, which brings them to the scale that
    KID's cubic kernel (x·y / 64 + 1)³ is made for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, NUM_FEATURES),
            nn.SiLU(),
        )
        self.head = nn.Linear(NUM_FEATURES, 10)
        self.rms: torch.Tensor
        self.register_buffer("rms", torch.ones(()))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Classify a batch."""
        features: torch.Tensor = self.body(images)
        return features / self.rms, self.head(features)


class DigitsExtractor(BundledExtractor):
    """The last hidden layer of the bundled classifier: [N, 3, H, W] uint8 -> [N, 64] float32.

    Images of another size are resized to 16×16, bilinearly with antialiasing.
    """

    num_features = NUM_FEATURES

    def __init__(self, name: str, features_list: list[str], **_: object) -> None:
        super().__init__(name, features_list)
        self.classifier = DigitsClassifier()
        self.classifier.load_state_dict(read_tensors(DIGITS_WEIGHTS))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
        """Extract the features of a batch of RGB images, of which only the first channel is used."""
        grey = images[:, :1].float()
        if grey.shape[1:] != DIGITS_SHAPE:
            grey = interpolate(grey, DIGITS_SHAPE[1:], mode="bilinear", antialias=True)
        return (self.classifier(grey / 127.5 - 1)[0],)
