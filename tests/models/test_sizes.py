"""Configs that ask for more than any model has are refused before anything is built."""

import time

import pytest
from diffusers import AutoencoderKL

from stages.models.autoencoder import read_autoencoder
from stages.models.pipeline import CPU, read_scheduler, read_unet
from stages.runtime.errors import InputError
from stages.storage.files import read_json, write_json


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("layers_per_block", 10**7, "layers_per_block 10000000; supported: at most 256"),
        ("layers_per_block", 250, "the config describes 250 layers or more, the weights"),
        ("sample_size", 1_000_000, "sample_size 1000000; supported: .* at most 4096"),
        ("sample_size", [8, 10**9], "at most"),
        ("block_out_channels", [32] * 10_000, "more than 64 values in block_out_channels"),
        ("block_out_channels", [16, 10**30], "block_out_channels .*; supported: at most 1000000"),
        ("block_out_channels", [], r"block_out_channels \[\]; supported: a list"),
        ("block_out_channels", 32, "block_out_channels 32; supported: a list"),
        ("norm_num_groups", float("inf"), "norm_num_groups inf; supported"),
        ("time_embedding_dim", 10**12, "time_embedding_dim 1000000000000; supported"),
    ],
)
def test_counts_of_a_unet_are_bounded(model_folder, key, value, message):
    """Layers, sides, blocks and widths; nothing is built."""
    path = model_folder / "unet" / "config.json"
    write_json(path, {**read_json(path), key: value})
    begin = time.monotonic()

    with pytest.raises(InputError, match=message) as caught:
        read_unet(model_folder)
    assert time.monotonic() - begin < 1
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    "change", [{"layers_per_block": 10**7}, {"block_out_channels": [8] * 100}, {"norm_num_groups": 1e9}]
)
def test_counts_of_an_autoencoder_are_bounded(tmp_path, change):
    """In the same way."""
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path / "vae")
    path = tmp_path / "vae" / "config.json"
    write_json(path, {**read_json(path), **change})

    with pytest.raises(InputError, match=next(iter(change))):
        read_autoencoder(tmp_path, CPU)


def test_timesteps_are_bounded_and_their_prediction_is_a_name(model_folder):
    """A billion betas would not fit in memory."""
    path = model_folder / "scheduler" / "scheduler_config.json"
    config = read_json(path)
    for change, message in (
        ({"num_train_timesteps": 10**9}, "num_train_timesteps 1000000000; supported: 1 to 100000"),
        ({"prediction_type": []}, r"prediction_type \[\]; supported: epsilon"),
    ):
        write_json(path, {**config, **change})
        with pytest.raises(InputError, match=message):
            read_scheduler(model_folder)
