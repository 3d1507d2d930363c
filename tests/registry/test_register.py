"""What a version is called unless told, and what becomes none."""

from types import SimpleNamespace

import pytest

from stages.errors import InputError
from stages.register.register import _check_drawn, _default_name


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ({"source": "bundled", "name": "digits"}, "espalier-digits"),
        ({"source": "hub", "repo": "google/ddpm-cifar10-32"}, "espalier-ddpm-cifar10-32"),
        ({"source": "folder", "path": "/models/mine/"}, "espalier-mine"),
        ({"source": "checkpoint", "system": "celeba-hq-64", "path": "$DATA/ckpt.pth"}, "espalier-celeba-hq-64"),
        ({"source": "registry", "uri": "models:/espalier-digits/3"}, "espalier-digits"),
        ({"source": "registry", "uri": "models:/faces/3"}, "espalier-faces"),
    ],
)
def test_a_version_is_named_after_the_base_model(source, name):
    """By what people call it, whatever it came from."""
    lineage = SimpleNamespace(runs={"fetch": {"params": {"fetch": {"model": source}}}})

    assert _default_name(lineage) == name


@pytest.mark.parametrize("beside", ["vqvae", "vae", "class_embedding"])
def test_what_needs_more_than_seeds_to_draw_is_no_version(tmp_path, beside):
    """The file that draws in MLflow knows neither autoencoders nor classes."""
    _check_drawn(tmp_path)
    (tmp_path / beside).mkdir()

    with pytest.raises(InputError, match=f"has a {beside}; versions hold models that draw pixels from seeds alone"):
        _check_drawn(tmp_path)
