"""What changed by class."""

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from sklearn.datasets import load_digits

from stages.evaluate.classes import ImageClasses, classify_reference
from stages.evaluate.opened import OpenedReference
from stages.protocol.classifiers import CLASSIFIERS, predict
from stages.protocol.extractors import Extractor
from stages.protocol.params import ExtractorParams
from stages.protocol.reference import Reference

DRAWS = np.random.default_rng(0)
SSIM = np.array([[0.95, 0.89], [0.9, 0.1]])


@pytest.fixture
def digits():
    """The bundled extractor, which has a classifier."""
    return Extractor(ExtractorParams(name="digits"), 100)


@pytest.fixture
def open_images(protocol):
    """Make a reference of two sets of two images with these features, opened with an extractor."""

    def make(features, extractor, table=None):
        two = protocol.model_copy(update={"sets": 2, "num_images": 2})
        samples = np.zeros((2, 2, 1, 16, 16), np.uint8)
        reference = Reference(two, "a" * 64, samples, features, features[0], table)
        return OpenedReference(reference, extractor, DDPMScheduler())

    return make


def test_predictions_are_those_of_the_classifier_on_the_images(digits):
    """From the features alone, the head gives the classes that the whole network gives."""
    pixels = DRAWS.integers(0, 256, (40, 1, 16, 16)).astype(np.uint8)
    classifier = digits.network.classifier
    with torch.inference_mode():
        expected = classifier(torch.from_numpy(pixels).float() / 127.5 - 1)[1].argmax(dim=1)

    found = predict(digits, digits.features(pixels))

    assert found.tolist() == expected.tolist()
    assert len(set(found.tolist())) > 1


def test_the_digits_are_recognised(digits):
    """Most real digits: the head is that of the features."""
    small = load_digits()
    pixels = np.kron(small.images[:200] * 255 / 16, np.ones((2, 2))).round().astype(np.uint8)[:, None]

    assert (predict(digits, digits.features(pixels)) == small.target[:200]).mean() > 0.8


def test_an_extractor_without_classifier_predicts_nothing(open_images):
    """Nor are there classes then."""
    thumbnail = Extractor(ExtractorParams(name="thumbnail"), 100)
    features = torch.zeros(2, 2, 192)

    found = classify_reference(open_images(features, thumbnail))

    assert predict(thumbnail, features) is None
    assert found.by is None
    assert found.changes(None, SSIM) == []


def test_changes_are_counted_by_the_class_of_the_dense_image():
    """An image that is visible below .9 counts once, and one that changed its class counts for the class it had."""
    names = {0: "zero", 1: "one", 2: "never drawn"}
    dense = np.array([[0, 1], [1, 1]])
    found = ImageClasses("predictions", names, dense, dense)

    zero, one = found.changes(np.array([[0, 0], [1, 2]]), SSIM)

    assert (zero.name, zero.images, zero.visible, zero.changed) == ("zero", 1, 0, 0)
    assert (one.name, one.images, one.visible, one.changed) == ("one", 3, 2, 2)


def test_a_conditional_model_has_the_classes_of_its_conditions(open_images, digits):
    """Whatever the extractor predicts; what it predicts is compared between the two models."""
    features = torch.randn(2, 2, 64, generator=torch.Generator().manual_seed(0))
    opened = open_images(features, digits, np.zeros((3, 1, 4), np.float32))

    found = classify_reference(opened)

    assert found.by == "labels"
    assert found.classes.tolist() == [
        opened.sampling.labels(opened.reference.protocol.seed, 2, index) for index in range(2)
    ]
    assert [change.changed for change in found.changes(found.predicted, SSIM)] == [0, 0]


def test_every_classifier_names_its_classes():
    """Ten each, all different."""
    assert {len(set(found.names)) for found in CLASSIFIERS.values()} == {10}
