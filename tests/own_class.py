"""The example of a class of its own as a model folder, with changes for a test."""

import json
import runpy
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

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
