"""A preset's name -> params.yaml."""

from pathlib import Path

from stages.params import load_params
from stages.runtime.errors import InputError
from stages.runtime.git import git_output
from stages.runtime.presets import PRESETS
from stages.storage.files import write_atomically

PARAMS = Path("params.yaml")


def find_preset(name: str) -> Path:
    """Find the file of a preset.

    Raises:
        InputError: No preset has this name.
    """
    presets = {path.stem: path for path in sorted(Path(PRESETS).glob("*.yaml"), key=lambda path: path.stem)}
    if name not in presets:
        known = f"choose one of {', '.join(presets)}" if presets else "run the command at the top of the project"
        raise InputError(f"there is no preset {name!r} in {PRESETS}; {known}")
    return presets[name]


def choose_preset(name: str, *, force: bool = False) -> None:
    """Replace params.yaml with a byte-for-byte copy of a preset.

    Args:
        name: Name of a file in recipes/presets, without .yaml.
        force: Whether to overwrite a params.yaml that equals neither a preset nor the committed file.

    Raises:
        InputError: No preset has this name, a value in it is not allowed, or params.yaml holds uncommitted changes.
    """
    preset = find_preset(name)
    load_params(preset)
    known_texts = {path.read_bytes().strip() for path in Path(PRESETS).glob("*.yaml") if path.is_file()}
    committed = git_output(Path(), "show", f"HEAD:./{PARAMS}")
    if committed is not None:
        known_texts.add(committed.encode(errors="surrogateescape").strip())
    if PARAMS.is_dir():
        raise InputError(f"{PARAMS} is a folder; remove it")
    if PARAMS.exists() and PARAMS.read_bytes().strip() not in known_texts and not force:
        raise InputError(f"{PARAMS} holds uncommitted changes; commit them, or give --force")
    write_atomically(PARAMS, preset.read_bytes())
