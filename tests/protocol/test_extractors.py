"""Extractors and their weights."""

import os
import pickle

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from stages.fetch.data import bundled_digits
from stages.protocol.extractors import INCEPTION_SHA256, SOURCES, Extractor
from stages.protocol.params import ExtractorParams
from stages.runtime.errors import InputError
from stages.storage.files import file_sha256


@pytest.fixture
def digits():
    """The bundled extractor at some batch size."""
    return lambda batch_size: Extractor(ExtractorParams(name="digits"), batch_size)


@pytest.fixture
def refused():
    """Ask for an extractor and return the one line that refuses it."""

    def ask(**params):
        with pytest.raises(InputError) as caught:
            Extractor(ExtractorParams(**params), 4)
        assert "\n" not in caught.value.message
        return caught.value.message

    return ask


def test_features_do_not_depend_on_the_batch(digits):
    """1, 7 and 64 images at a time give the same features."""
    images = bundled_digits()[:20]
    features = [digits(size).features(images) for size in (1, 7, 64)]

    assert features[0].shape == (20, 64)
    torch.testing.assert_close(features[0], features[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(features[0], features[2], rtol=1e-5, atol=1e-6)


def test_digits_of_another_size_are_brought_to_the_size_that_is_seen(digits):
    """As bilinear interpolation does it; MNIST's are 28×28."""
    images = bundled_digits()[:4]
    floats = torch.from_numpy(images).float()
    large = torch.nn.functional.interpolate(floats, (32, 32), mode="nearest")
    found, expected = (digits(4).features(part) for part in (large.to(torch.uint8).numpy(), images))

    assert float((found - expected).norm() / expected.norm()) < 0.35
    assert float((found - expected.flip(0)).norm() / expected.norm()) > 0.8


def test_a_thumbnail_is_the_mean_of_each_block():
    """Of pictures of any size; what changes within a block is not seen, what changes the block is."""
    extractor = Extractor(ExtractorParams(name="thumbnail"), 2)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32)).astype(np.uint8)
    blocks = pixels.reshape(2, 3, 8, 4, 8, 4).mean((3, 5))
    found = extractor.features(pixels)

    np.testing.assert_allclose(found.numpy(), blocks.reshape(2, -1) / 127.5 - 1, rtol=1e-5, atol=1e-5)
    assert extractor.features(np.zeros((1, 1, 16, 16), np.uint8)).shape == (1, 192)
    with pytest.raises(ValidationError, match="extractor thumbnail brings what it needs"):
        ExtractorParams(name="thumbnail", weights="somewhere")


def test_images_that_the_extractor_does_not_see_are_refused(digits):
    """Colour pictures are no digits."""
    with pytest.raises(InputError, match=r"sees grey images, these are 3×16×16; choose another reference\.extractor"):
        digits(4).features(np.zeros((2, 3, 16, 16), np.uint8))


def test_every_extractor_knows_where_its_weights_are_and_what_they_must_be():
    """A hash or its first digits for each; nothing is downloaded unchecked."""
    assert {"inception-v3-compat", "vgg16", "clip-vit-b-32"} < set(SOURCES)
    assert all(len(source.sha256) in (8, 64) and source.url.endswith((".pth", ".pt")) for source in SOURCES.values())
    assert SOURCES["inception-v3-compat"].file_name.endswith(f"-{INCEPTION_SHA256[:8]}.pth")


def test_an_unknown_name_is_refused(refused):
    """With those that are allowed."""
    assert "reference.extractor.name is 'inception'; allowed: digits, thumbnail, inception-v3-compat" in refused(
        name="inception"
    )


def test_an_extractor_that_runs_code_of_no_fixed_version_is_refused(refused):
    """torch-fidelity loads DINOv2's code from the newest commit of a repository."""
    assert "which runs code of no fixed version" in refused(name="dinov2-vit-b-14")


def test_missing_weights_are_named(refused, tmp_path):
    """With the path that was tried."""
    message = refused(name="inception-v3-compat", weights=tmp_path / "inception.pth")

    assert message.startswith(f"the extractor's weights are not at {tmp_path}/inception.pth")


def test_an_offline_machine_is_told_where_the_weights_belong(refused, monkeypatch, tmp_path):
    """The cache's path, and the key that names another."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    message = refused(name="inception-v3-compat")

    assert f"neither at {tmp_path}/hub/checkpoints/weights-inception" in message
    assert "set reference.extractor.weights" in message


def offline(*_, **__):
    """Fail as a machine without a network does."""
    raise OSError("Network is unreachable")


def test_weights_with_another_hash_are_refused(refused, tmp_path):
    """Unless the params name that hash themselves."""
    (tmp_path / "other.pth").write_bytes(b"other weights")
    message = refused(name="inception-v3-compat", weights=tmp_path / "other.pth")

    assert f"expected {INCEPTION_SHA256}" in message
    assert file_sha256(tmp_path / "other.pth") in message


def test_an_archive_with_code_is_opened_only_if_it_is_the_known_one(refused, tmp_path):
    """Naming its hash does not help: TorchScript is code."""
    (tmp_path / "clip.pt").write_bytes(b"code")
    sha256 = file_sha256(tmp_path / "clip.pt")

    assert "is opened only with" in refused(name="clip-vit-b-32", weights=tmp_path / "clip.pt", sha256=sha256)


def test_weights_that_run_code_are_never_unpickled(refused, tmp_path):
    """A file that would run a command when opened is refused, and the command does not run."""

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    path = tmp_path / "inception.pth"
    path.write_bytes(pickle.dumps(Evil(), protocol=2))

    message = refused(name="inception-v3-compat", weights=path, sha256=file_sha256(path))
    assert "holds something other than tensors" in message
    assert not (tmp_path / "ran").exists()


def test_tensors_of_another_network_are_refused(refused, tmp_path):
    """In one line, although PyTorch has many to say."""
    torch.save({"weight": torch.ones(3)}, tmp_path / "other.pth")
    sha256 = file_sha256(tmp_path / "other.pth")

    assert "holds no weights of vgg16" in refused(name="vgg16", weights=tmp_path / "other.pth", sha256=sha256)


def test_the_bundled_extractor_takes_no_other_weights(tmp_path):
    """Rather than ignoring them."""
    with pytest.raises(ValidationError, match="brings what it needs"):
        ExtractorParams(name="digits", weights=tmp_path)


def test_inception_works_with_weights_of_ones_own(monkeypatch, tmp_path):
    """Random weights in Inception's architecture, named by their hash: 2,048 features of pictures of any size."""
    torch.manual_seed(0)
    monkeypatch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", lambda *_, **__: {})
    monkeypatch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *_, **__: {})
    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    monkeypatch.undo()
    torch.save(network.state_dict(), tmp_path / "random.pth")
    chosen = ExtractorParams(
        name="inception-v3-compat", weights=tmp_path / "random.pth", sha256=file_sha256(tmp_path / "random.pth")
    )

    extractor = Extractor(chosen, 2)
    features = extractor.features(np.random.default_rng(0).integers(0, 256, (3, 1, 32, 32)).astype(np.uint8))
    assert features.shape == (3, 2048)
    assert extractor.layer == "2048"
    assert extractor.sha256 == chosen.sha256
