"""A preset's name -> params.yaml: python -m stages.preset cifar10."""

from pathlib import Path

from stages.params import load_params
from stages.runtime.errors import InputError
from stages.runtime.git import git_output
from stages.storage.files import write_atomically

PRESETS = Path("recipes/presets")
PARAMS = Path("params.yaml")


def find_preset(name: str) -> Path:
    """Find the file of a preset.

    Raises:
        InputError: There is no such preset here.
    """
    presets = {path.stem: path for path in sorted(PRESETS.glob("*.yaml"))}
    if name not in presets:
        known = f"choose one of {', '.join(presets)}" if presets else "run it at the top of the project"
        raise InputError(f"there is no preset {name!r} in {PRESETS}; {known}")
    return presets[name]


def choose_preset(name: str, *, force: bool = False) -> None:
    """Make params.yaml a preset, byte by byte.

    Args:
        name: Of a file in recipes/presets.
        force: Whether a params.yaml that can be had nowhere else is lost.

    Raises:
        InputError: There is no such preset, it is not allowed, or params.yaml holds changes.
    """
    preset = find_preset(name)
    load_params(preset)
    known_texts = {path.read_bytes().strip() for path in PRESETS.glob("*.yaml")}
    committed = git_output(Path(), "show", f"HEAD:{PARAMS}")
    if committed is not None:
        known_texts.add(committed.encode().strip())
    if PARAMS.is_dir():
        raise InputError(f"{PARAMS} is a folder; remove it")
    if PARAMS.exists() and PARAMS.read_bytes().strip() not in known_texts and not force:
        raise InputError(f"{PARAMS} holds changes that no preset and no commit has; commit them, or give --force")
    write_atomically(PARAMS, preset.read_bytes())
