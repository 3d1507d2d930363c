"""Small colour photographs -> features of a CIFAR-10 classifier with 56 layers."""

from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import interpolate, pad, relu

from stages.protocol.bundled import BundledExtractor
from stages.storage.tensors import read_tensors

RESNET56 = "cifar10-resnet56"
RESNET56_SHA256 = "cf29b05e3acebb9dc28868ebd84a604ff452971bb6770f22beaff48708079aee"
"""Hash of the published weights as one safetensors file (docs/presets/photos.md has the conversion)."""
WIDTHS, BLOCKS = (16, 32, 64), 9
SIDE = 32
"""Height and width of the images that the network reads."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of red, green and blue in [0, 1]: ImageNet's, with which the published weights were trained."""


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut without parameters (He et al., 2016, option A).

    Where the channels double, the shortcut takes every second row and column and adds channels of zeros.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=outputs // inputs, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[N, inputs, H, W] -> [N, outputs, H', W'], with half the height and width where the channels double."""
        hidden = self.bn2(self.conv2(relu(self.bn1(self.conv1(inputs)))))
        stride, missing = self.conv1.stride[0], hidden.shape[1] - inputs.shape[1]
        return relu(hidden + pad(inputs[..., ::stride, ::stride], (0, 0, 0, 0, missing // 2, missing // 2)))


class ResNet56(nn.Module):
    """The classifier of He et al. (2016, section 4.2) with n = 9: normalised [N, 3, 32, 32] -> features and logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(ResidualBlock(inputs, outputs), *(ResidualBlock(outputs, outputs) for _ in range(BLOCKS - 1)))
            for inputs, outputs in zip((WIDTHS[0], *WIDTHS), WIDTHS, strict=False)
        )
        self.linear = nn.Linear(WIDTHS[-1], 10)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the features before the classifier, [N, 64], and the logits, [N, 10]."""
        hidden = self.layer3(self.layer2(self.layer1(relu(self.bn1(self.conv1(images))))))
        features = hidden.mean(dim=(2, 3))
        return features, self.linear(features)


class ResNet56Extractor(BundledExtractor):
    """The features before the classifier: [N, 3, H, W] uint8 -> [N, 64] float32.

    Images of another size are resized to 32×32, bilinearly with antialiasing.

    Args:
        name: Name of the extractor.
        features_list: Names of the feature layers; there is one.
        feature_extractor_weights_path: The safetensors file with the weights.
    """

    num_features = WIDTHS[-1]

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str, **_: object) -> None:
        super().__init__(name, features_list)
        self.classifier = ResNet56()
        self.classifier.load_state_dict(read_tensors(Path(feature_extractor_weights_path)))
        self.mean: torch.Tensor
        self.std: torch.Tensor
        self.register_buffer("mean", torch.tensor(MEAN).reshape(3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).reshape(3, 1, 1))

    def classify(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[N, 3, H, W] uint8 -> features [N, 64] and logits [N, 10]."""
        pixels = images.float()
        if pixels.shape[2:] != (SIDE, SIDE):
            pixels = interpolate(pixels, (SIDE, SIDE), mode="bilinear", antialias=True)
        features, logits = self.classifier((pixels / 255 - self.mean) / self.std)
        return features, logits

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
        """Extract the features of a batch of RGB images."""
        return (self.classify(images)[0],)
