"""The reference: drawing, writing and reading it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from stages.models.autoencoder import Autoencoder
from stages.models.sampling import SamplingContext
from stages.protocol.reference import Reference, check_dense, dense_sha256, draw_set, read_reference
from stages.runtime.errors import InputError
from stages.storage.files import read_json, write_json
from stages.storage.tensors import tensors_sha256, write_tensors
from tests.references import write_reference


@pytest.fixture
def reference(protocol):
    """A reference with random samples and features."""
    draws = np.random.default_rng(0)
    samples = draws.integers(0, 256, (2, 4, 1, 16, 16)).astype(np.uint8)
    return Reference(protocol, "c" * 64, samples, torch.rand(2, 4, 8), torch.rand(10, 8))


def test_a_written_reference_reads_back_unchanged(reference, tmp_path):
    """Samples, features, protocol and the model's hash are equal, without pickle."""
    write_reference(tmp_path, reference)
    found = read_reference(tmp_path)

    assert found.protocol == reference.protocol
    assert found.model_sha256 == reference.model_sha256
    assert np.array_equal(found.samples, reference.samples)
    assert torch.equal(found.features, reference.features)
    assert torch.equal(found.real_features, reference.real_features)


def test_a_set_has_the_protocols_number_of_images(make_unet, scheduler, protocol):
    """It holds also if the batch size does not divide the number; sets share no image."""
    unet = make_unet(sample_size=16)
    batches = [list(draw_set(unet, scheduler, protocol, index, 3, "dense")) for index in range(2)]
    sets = [np.concatenate([pixels for _, pixels in drawn]) for drawn in batches]

    assert [[start for start, _ in drawn] for drawn in batches] == [[0, 3]] * 2

    assert [drawn.shape for drawn in sets] == [(4, 1, 16, 16)] * 2
    assert len(np.unique(np.concatenate(sets).reshape(8, -1), axis=0)) == 8


def test_a_damaged_reference_is_refused(reference, tmp_path):
    """Truncated samples, another number of sets, an invalid protocol and features that are not finite are refused."""
    write_reference(tmp_path, reference)
    written = read_json(tmp_path / "protocol.json")
    write_json(tmp_path / "protocol.json", {**written, "sets": 3})
    with pytest.raises(InputError, match=r"does not match its protocol\.json"):
        read_reference(tmp_path)

    write_json(tmp_path / "protocol.json", {"sets": 3})
    with pytest.raises(InputError, match="is not a valid protocol"):
        read_reference(tmp_path)

    write_json(tmp_path / "protocol.json", written)
    write_tensors(
        tmp_path / "features.safetensors", {"dense": torch.full((2, 4, 8), torch.nan), "real": torch.ones(10, 8)}
    )
    with pytest.raises(InputError, match=r"does not match its protocol\.json"):
        read_reference(tmp_path)

    (tmp_path / "samples.npy").write_bytes((tmp_path / "samples.npy").read_bytes()[:500])
    with pytest.raises(InputError, match="holds no samples"):
        read_reference(tmp_path)


def test_the_dense_model_is_its_denoiser_and_what_decodes_and_conditions(unet):
    """Two autoencoders, scales or tables make two models; a model in pixel space is its weights."""
    coders = []
    for seed, scale in ((0, 1.0), (0, 1.0), (1, 1.0), (0, 2.0)):
        torch.manual_seed(seed)
        coder = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=1, scaling_factor=scale)
        coders.append(Autoencoder(coder))
    tables = [np.arange(3), np.array([0, 1, -1])]
    contexts = [SamplingContext(coder) for coder in coders] + [SamplingContext(table=table) for table in tables]
    plain = dense_sha256(unet, SamplingContext())

    assert plain == tensors_sha256(unet.state_dict())
    assert dense_sha256(unet, contexts[0]) == dense_sha256(unet, contexts[1])
    assert len({plain, *(dense_sha256(unet, context) for context in contexts)}) == 6


def test_a_reference_of_another_dense_model_is_refused(reference, unet):
    """One line with both hashes."""
    own = replace(reference, model_sha256=dense_sha256(unet, SamplingContext()))
    check_dense(unet, SamplingContext(), own)
    with pytest.raises(InputError, match=r"the reference was drawn by dddddddd…; run the reference stage again"):
        check_dense(unet, SamplingContext(), replace(reference, model_sha256="d" * 64))
