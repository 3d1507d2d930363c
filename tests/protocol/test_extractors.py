"""Feature extractors and the checks of their weights."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from stages.fetch.data import bundled_digits
from stages.protocol.classifiers import predict
from stages.protocol.extractors import INCEPTION_SHA256, PYTORCH_FID, SOURCES, Extractor
from stages.protocol.params import ExtractorParams
from stages.protocol.resnet56 import MEAN, RESNET56, RESNET56_SHA256, STD, ResidualBlock, ResNet56
from stages.runtime.errors import InputError
from stages.storage.files import file_sha256
from stages.storage.tensors import write_tensors


@pytest.fixture
def digits():
    """Build the digits extractor for a batch size."""
    return lambda batch_size: Extractor(ExtractorParams(name="digits"), batch_size)


@pytest.fixture
def refused():
    """Build an extractor from params that are refused, and return the error message of one line."""

    def build(**params):
        with pytest.raises(InputError) as caught:
            Extractor(ExtractorParams(**params), 4)
        assert "\n" not in caught.value.message
        return caught.value.message

    return build


def test_features_do_not_depend_on_the_batch_size(digits):
    """Batches of 1, 7 and 64 images give the same features."""
    images = bundled_digits()[:20]
    features = [digits(size).features(images) for size in (1, 7, 64)]

    assert features[0].shape == (20, 64)
    torch.testing.assert_close(features[0], features[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(features[0], features[2], rtol=1e-5, atol=1e-6)


def test_digits_of_another_size_are_resized(digits):
    """The features of enlarged digits stay close to their own, and far from those of other digits."""
    images = bundled_digits()[:4]
    floats = torch.from_numpy(images).float()
    large = torch.nn.functional.interpolate(floats, (32, 32), mode="nearest")
    found, expected = (digits(4).features(part) for part in (large.to(torch.uint8).numpy(), images))

    assert float((found - expected).norm() / expected.norm()) < 0.35
    assert float((found - expected.flip(0)).norm() / expected.norm()) > 0.8


def test_thumbnail_features_are_block_means():
    """Images of any size are averaged over an 8×8 grid; the extractor takes no weights."""
    extractor = Extractor(ExtractorParams(name="thumbnail"), 2)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32)).astype(np.uint8)
    blocks = pixels.reshape(2, 3, 8, 4, 8, 4).mean((3, 5))
    found = extractor.features(pixels)

    np.testing.assert_allclose(found.numpy(), blocks.reshape(2, -1) / 127.5 - 1, rtol=1e-5, atol=1e-5)
    assert extractor.features(np.zeros((1, 1, 16, 16), np.uint8)).shape == (1, 192)
    with pytest.raises(ValidationError, match="extractor thumbnail is bundled"):
        ExtractorParams(name="thumbnail", weights="somewhere")


def test_colour_images_are_refused_by_the_digits_extractor(digits):
    """The error gives the shape and the key to change."""
    with pytest.raises(InputError, match=r"takes grey images, found 3×16×16; use another reference\.extractor"):
        digits(4).features(np.zeros((2, 3, 16, 16), np.uint8))


def test_every_source_has_an_address_and_a_hash():
    """Each download is checked against a whole hash or its first digits."""
    assert {"inception-v3-compat", "vgg16", "clip-vit-b-32"} < set(SOURCES)
    assert all(len(source.sha256) in (8, 64) and source.url.endswith((".pth", ".pt")) for source in SOURCES.values())
    assert SOURCES["inception-v3-compat"].file_name.endswith(f"-{INCEPTION_SHA256[:8]}.pth")


def test_an_unknown_extractor_is_refused(refused):
    """The error lists the allowed names."""
    assert "reference.extractor.name is 'inception'; allowed: digits, thumbnail, inception-v3-compat" in refused(
        name="inception"
    )


def test_an_extractor_that_runs_code_of_no_fixed_version_is_refused(refused):
    """torch-fidelity loads DINOv2's code from the newest commit of a repository."""
    assert "which runs code of no fixed version" in refused(name="dinov2-vit-b-14")


def test_missing_weights_are_refused(refused, tmp_path):
    """The error gives the path."""
    message = refused(name="inception-v3-compat", weights=tmp_path / "inception.pth")

    assert message.startswith(f"no extractor weights at {tmp_path}/inception.pth")


def test_a_failed_download_names_path_and_key(refused, monkeypatch, tmp_path):
    """The error gives the path in the cache and the key for another path."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    message = refused(name="inception-v3-compat")

    assert f"are not at {tmp_path}/hub/checkpoints/weights-inception" in message
    assert "set reference.extractor.weights" in message


def offline(*_, **__):
    """Fail as on a machine without a network."""
    raise OSError("Network is unreachable")


def test_weights_with_another_hash_are_refused(refused, tmp_path):
    """The error gives the expected and the found hash."""
    (tmp_path / "other.pth").write_bytes(b"other weights")
    message = refused(name="inception-v3-compat", weights=tmp_path / "other.pth")

    assert f"expected {INCEPTION_SHA256}" in message
    assert file_sha256(tmp_path / "other.pth") in message


def test_a_torchscript_archive_needs_the_published_hash(refused, tmp_path):
    """TorchScript is code, so a hash in the params does not allow another archive."""
    (tmp_path / "clip.pt").write_bytes(b"code")
    sha256 = file_sha256(tmp_path / "clip.pt")

    assert "is opened only with" in refused(name="clip-vit-b-32", weights=tmp_path / "clip.pt", sha256=sha256)


def test_pickled_code_is_never_run(refused, tmp_path):
    """A file that would run a command when unpickled is refused, and the command does not run."""

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    path = tmp_path / "inception.pth"
    path.write_bytes(pickle.dumps(Evil(), protocol=2))

    message = refused(name="inception-v3-compat", weights=path, sha256=file_sha256(path))
    assert "holds something other than tensors" in message
    assert not (tmp_path / "ran").exists()


def test_what_is_opened_is_what_was_checked(tmp_path, monkeypatch):
    """Whoever may write the file cannot change it between the two."""
    path, opened = tmp_path / "vgg.pth", []
    torch.save({"weight": torch.ones(3)}, path)
    sha256 = file_sha256(path)

    def swap(*_, feature_extractor_weights_path, **__):
        path.write_bytes(b"code")
        opened.append(file_sha256(Path(feature_extractor_weights_path)))

    monkeypatch.setattr("stages.protocol.extractors.create_feature_extractor", swap)
    Extractor(ExtractorParams(name="vgg16", weights=path, sha256=sha256), 1)

    assert opened == [sha256]


def test_tensors_of_another_network_are_refused(refused, tmp_path):
    """The error has one line, although PyTorch's own has many."""
    torch.save({"weight": torch.ones(3)}, tmp_path / "other.pth")
    sha256 = file_sha256(tmp_path / "other.pth")

    assert "does not hold weights of vgg16" in refused(name="vgg16", weights=tmp_path / "other.pth", sha256=sha256)


def test_a_bundled_extractor_takes_no_weights(tmp_path):
    """A path to weights is refused instead of ignored."""
    with pytest.raises(ValidationError, match="is bundled"):
        ExtractorParams(name="digits", weights=tmp_path)


@pytest.fixture(scope="module")
def random_inception(tmp_path_factory):
    """Random weights of Inception: the path and sha256 that params give."""
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *_, **__: {})
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    torch.save(network.state_dict(), path)
    return {"weights": path, "sha256": file_sha256(path)}


SMALL = np.random.default_rng(0).integers(0, 256, (3, 1, 32, 32)).astype(np.uint8)


@pytest.mark.parametrize("name", ["inception-v3-compat", PYTORCH_FID])
def test_inception_loads_custom_weights(random_inception, name):
    """Random weights with their hash in the params give 2,048 features for images of any size."""
    extractor = Extractor(ExtractorParams(name=name, **random_inception), 2)

    assert extractor.features(SMALL).shape == (3, 2048)
    assert extractor.layer == "2048"
    assert extractor.sha256 == random_inception["sha256"]


def interpolation(inside, outside):
    """The matrix [outside, inside] of bilinear interpolation with half-pixel centres and repeated borders."""
    centres = np.clip((np.arange(outside) + 0.5) * inside / outside - 0.5, 0, inside - 1)
    left = np.floor(centres).astype(int)
    right, share = np.minimum(left + 1, inside - 1), centres - left
    matrix = np.zeros((outside, inside))
    np.add.at(matrix, (np.arange(outside), left), 1 - share)
    np.add.at(matrix, (np.arange(outside), right), share)
    return torch.from_numpy(matrix)


def test_pytorch_fids_preprocessing_is_half_pixel_and_symmetric(random_inception, monkeypatch):
    """The features are those of torch-fidelity's own network on 2r/255 - 1, r resized in closed form (reference)."""

    def resize(images, **_):
        rows, columns = (interpolation(side, 299) for side in images.shape[2:])
        return (rows @ images.double() @ columns.T * 256 / 255).float()  # (x - 128) / 128 of this is 2r/255 - 1

    found = Extractor(ExtractorParams(name=PYTORCH_FID, **random_inception), 2).features(SMALL)
    compat = Extractor(ExtractorParams(name="inception-v3-compat", **random_inception), 2)
    torch_fidelity_resizing = compat.features(SMALL)
    module = "torch_fidelity.feature_extractor_inceptionv3"
    monkeypatch.setattr(f"{module}.interpolate_bilinear_2d_like_tensorflow1x", resize)
    expected = compat.features(SMALL)

    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert float((found - torch_fidelity_resizing).norm() / found.norm()) > 1e-3


@pytest.fixture(scope="module")
def random_resnet(tmp_path_factory):
    """Random weights of the residual network, and the path and sha256 that params give."""
    path = tmp_path_factory.mktemp("resnet") / "random.safetensors"
    torch.manual_seed(0)
    network = ResNet56().eval()
    for name, values in network.state_dict().items():
        if "running" in name:  # statistics of their own, so that the features show that they are read
            values.uniform_(*((-0.1, 0.1) if "mean" in name else (0.5, 1.5)))
    write_tensors(path, {name: values for name, values in network.state_dict().items() if values.ndim})
    return network, {"weights": path, "sha256": file_sha256(path)}


PHOTOGRAPHS = np.random.default_rng(1).integers(0, 256, (3, 3, 32, 32)).astype(np.uint8)


def test_the_residual_network_reads_safetensors(random_resnet):
    """The features are the network's own on normalised pixels, for any batch size."""
    network, params = random_resnet
    extractor = Extractor(ExtractorParams(name=RESNET56, **params), 2)
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (MEAN, STD))
    with torch.no_grad():
        expected, logits = network((torch.from_numpy(PHOTOGRAPHS) / 255 - mean) / std)

    torch.testing.assert_close(extractor.features(PHOTOGRAPHS), expected, rtol=1e-5, atol=1e-6)
    assert predict(extractor, extractor.features(PHOTOGRAPHS)).tolist() == logits.argmax(dim=1).tolist()
    assert float((expected.std(0) > 1e-3).float().mean()) > 0.5
    assert (extractor.layer, extractor.sha256, tuple(logits.shape)) == ("64", params["sha256"], (3, 10))
    assert sum(isinstance(module, torch.nn.Conv2d | torch.nn.Linear) for module in network.modules()) == 56


def test_photographs_of_another_size_are_resized(random_resnet):
    """A photograph whose pixels are doubled has almost its own features; grey ones are taken as colours."""
    extractor = Extractor(ExtractorParams(name=RESNET56, **random_resnet[1]), 4)
    smooth = np.repeat(np.repeat(PHOTOGRAPHS[..., ::8, ::8], 8, -1), 8, -2)
    large, grey = np.repeat(np.repeat(smooth, 2, -1), 2, -2), smooth[:, :1]
    found, expected = (extractor.features(pixels) for pixels in (large, smooth))

    assert float((found - expected).norm() / expected.norm()) < 0.1
    assert torch.equal(extractor.features(grey), extractor.features(np.repeat(grey, 3, 1)))


def test_a_shortcut_without_parameters_is_subsampling_and_zeros():
    """With residual branches of zero, every second row and column stays, between channels of zeros (closed form)."""
    block = ResidualBlock(2, 4).eval()
    torch.nn.init.zeros_(block.conv2.weight)
    images = torch.rand(1, 2, 4, 4)
    found = block(images)

    assert torch.equal(found[:, 1:3], images[..., ::2, ::2])
    assert not found[:, [0, 3]].any()


def test_the_residual_network_needs_its_weights(refused, random_resnet, tmp_path, monkeypatch):
    """Without a path, with an unset variable, and with other weights than the published ones it is refused."""
    monkeypatch.delenv("ESPALIER_DATA", raising=False)
    with pytest.raises(ValidationError, match="cifar10-resnet56 needs weights; give the path of its safetensors file"):
        ExtractorParams(name=RESNET56)
    write_tensors(tmp_path / "other.safetensors", {"weight": torch.ones(3)})
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps({}))
    others = [{"weights": path, "sha256": file_sha256(path)} for path in sorted(tmp_path.iterdir())]

    unset = refused(name=RESNET56, weights="$ESPALIER_DATA/net.safetensors")
    assert "$ESPALIER_DATA is not set; set it in the environment or change the path" in unset
    assert f"expected {RESNET56_SHA256}" in refused(name=RESNET56, weights=random_resnet[1]["weights"])
    assert all(f"does not hold weights of {RESNET56}" in refused(name=RESNET56, **other) for other in others)


def test_variables_in_the_path_of_weights_are_expanded(random_resnet, monkeypatch):
    """As in the paths of models and data; params keep the path as it is written."""
    monkeypatch.setenv("ESPALIER_DATA", str(random_resnet[1]["weights"].parent))
    params = ExtractorParams(
        name=RESNET56, weights="$ESPALIER_DATA/random.safetensors", sha256=random_resnet[1]["sha256"]
    )

    assert Extractor(params, 2).sha256 == params.sha256
    assert str(params.weights) == "$ESPALIER_DATA/random.safetensors"


def test_a_path_of_weights_that_cannot_be_followed_is_refused(refused):
    """A name that no file system takes gives one line with the key."""
    assert "reference.extractor.weights is xxx" in refused(name="inception-v3-compat", weights="x" * 5000)
