"""The example of an own class as a model folder, with changes for a test."""

import json
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from stages.fetch.model import fetch_model
from stages.fetch.params import FolderModel
from stages.runtime.errors import InputError

EXAMPLE = Path(__file__).parents[1] / "recipes" / "own_class"
LABELS = {"inputs": {"sample": "x", "timestep": "t", "labels": "y"}, "num_labels": 5, "empty_label": 4}
"""What a description says of four classes and one for none."""
MARK = "\nimport pathlib\npathlib.Path({marker!r}).touch()\n"


def write_own(folder, *, config=None, description=None, code=None, seed=0):
    """Write a model folder; `code` maps text of denoiser.py to other text, and null removes a key of the JSON files.

    Weights are those of the example's class as it is, with its config.
    """
    shutil.copytree(EXAMPLE, folder)
    unet = folder / "unet"
    for name, changes in (("config.json", config), ("denoiser.json", description)):
        tree = {**json.loads((unet / name).read_text()), **(changes or {})}
        (unet / name).write_text(json.dumps({key: value for key, value in tree.items() if value is not None}))
    settings = json.loads((unet / "config.json").read_text())
    names = ("in_channels", "width", "heads", "num_labels")
    torch.manual_seed(seed)
    cls = runpy.run_path(str(EXAMPLE / "unet" / "denoiser.py"))["ResidualUNet"]
    model = cls(**{name: settings[name] for name in names if name in settings})
    save_file(model.state_dict(), unet / "diffusion_pytorch_model.safetensors")
    text = (unet / "denoiser.py").read_text()
    for old, new in (code or {}).items():
        assert old in text, old
        text = text.replace(old, new)
    (unet / "denoiser.py").write_text(text)
    return folder


def fetched(folder, place):
    """Fetch a model folder that is trusted, and read it."""
    place.mkdir(parents=True)
    return fetch_model(FolderModel(source="folder", path=folder, trust=True), place / "model").unet


def refusal_of(folder, place, **source):
    """The one line by which fetch refuses a model folder."""
    with pytest.raises(InputError) as refused:
        fetch_model(FolderModel(**{"source": "folder", "path": folder, "trust": True, **source}), place / "model")
    message = refused.value.format_message()
    assert "\n" not in message
    assert not (place / "model" / "unet").exists()
    return message
