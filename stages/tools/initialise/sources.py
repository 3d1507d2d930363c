"""What a person types for a model or for images -> the block fetch.model or fetch.data of params.yaml."""

import re
import zipfile
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from huggingface_hub import HfApi
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from numpy.lib import format as npy_format

from stages.fetch.convert import LAYOUTS, SYSTEMS
from stages.fetch.params import (
    BundledData,
    BundledModel,
    CheckpointModel,
    DataSource,
    FolderData,
    FolderModel,
    HubData,
    HubModel,
    ModelSource,
    NpzData,
    RegistryModel,
    System,
)
from stages.fetch.source_images import NPZ_ERRORS
from stages.runtime.errors import InputError, UnavailableError, first_line
from stages.runtime.schema import validate_tree
from stages.storage.files import read_json

BUNDLED, REGISTRY, BUCKET = "bundled:", "models:/", "s3://"
ON_THE_HUB = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
COMMIT = re.compile(r"[0-9a-f]{40}")
MODELS = "a diffusers folder, a checkpoint file, OWNER/NAME on the Hub, models:/NAME/VERSION or bundled:digits"
IMAGES = "a folder of images, an .npz file, OWNER/NAME of a dataset on the Hub or bundled:digits"


def model_sources(text: str, system: str | None = None, *, trust: bool = False) -> list[ModelSource]:
    """Find the source of a model that a text names; a checkpoint file is one source for each architecture.

    Args:
        text: A folder, a file, OWNER/NAME[@REVISION] on the Hub, models:/NAME/VERSION, or bundled:NAME.
        system: The architecture of a checkpoint file; None tries all.
        trust: Whether the code of a model's own class may be run.

    Raises:
        InputError: It names nothing of these.
        UnavailableError: The Hub does not answer.
    """
    path = _expand(text, "--model")
    if system and not path.is_file():
        raise InputError(f"--system is for a checkpoint file, and {text} is none; leave it out")
    if trust and (text.startswith(BUNDLED) or path.is_file()):
        raise InputError(f"--trust is for models with the code of their class, and {text} has none; leave it out")
    if text.startswith(BUNDLED):
        return [validate_tree({"source": "bundled", "name": text.removeprefix(BUNDLED)}, BundledModel, "--model")]
    if text.startswith(REGISTRY):
        return [validate_tree({"source": "registry", "uri": text, "trust": trust}, RegistryModel, "--model")]
    if path.is_dir():
        return [FolderModel(source="folder", path=path.resolve(), trust=trust)]
    if path.is_file():
        return _checkpoints(path.resolve(), system)
    repo, revision = _on_the_hub(text, "--model", MODELS)
    return [HubModel(source="hub", repo=repo, revision=_commit(repo, revision, "model"), trust=trust)]


def _expand(text: str, option: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:  # ~ followed by an unknown user
        raise InputError(f"{option} is {text}, and this home folder does not exist; give an absolute path") from None


def _checkpoints(path: Path, system: str | None) -> list[ModelSource]:
    known = get_args(System)
    if system and system not in known:
        raise InputError(f"--system is {system!r}; allowed: {', '.join(known)}")
    layouts = {class_name: layout for layout, (class_name, _) in LAYOUTS.items()}
    found: list[ModelSource] = []
    for name in [system] if system else known:
        layout = layouts[str(read_json(SYSTEMS / f"{name}.json")["_class_name"])]
        tree = {"source": "checkpoint", "layout": layout, "path": str(path), "system": name}
        if layout == "dit":  # nothing in the file says which autoencoder it was trained with
            tree["autoencoder"] = "$ESPALIER_DATA/sd-vae-ft-ema"
        found.append(validate_tree(tree, CheckpointModel, "--model"))
    return found


def data_source(text: str, column: str | None = None) -> DataSource:
    """Find the source of images that a text names.

    Args:
        text: A folder, an .npz file, OWNER/NAME[@REVISION] of a dataset on the Hub, or bundled:NAME.
        column: Image column of a dataset on the Hub; None is the default of fetch.data.column.

    Raises:
        InputError: It names nothing of these.
        UnavailableError: The Hub does not answer.
    """
    path = _expand(text, "--data")
    if column is not None and (text.startswith(BUNDLED) or path.exists()):
        raise InputError(f"--column names a column of a dataset on the Hub, and {text} is none; leave it out")
    if text.startswith(BUNDLED):
        return validate_tree({"source": "bundled", "name": text.removeprefix(BUNDLED)}, BundledData, "--data")
    if path.is_dir():
        return FolderData(source="folder", path=path.resolve())
    if path.is_file():
        return NpzData(source="npz", path=path.resolve(), images=_image_key(path))
    repo, revision = _on_the_hub(text, "--data", IMAGES)
    chosen = {} if column is None else {"column": column}
    return HubData(source="hub", repo=repo, revision=_commit(repo, revision, "dataset"), **chosen)


def _image_key(path: Path) -> str:
    """Return the key of the first array of uint8 images in an .npz file, by the headers of its arrays."""
    keys = []
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                with archive.open(name) as member:
                    version = npy_format.read_magic(member)
                    read = npy_format.read_array_header_1_0 if version == (1, 0) else npy_format.read_array_header_2_0
                    shape, _, dtype = read(member)
                keys.append(name.removesuffix(".npy"))
                if dtype == np.uint8 and len(shape) in (3, 4):
                    return keys[-1]
    except NPZ_ERRORS as error:
        raise InputError(f"--data {path} is no .npz file of arrays ({first_line(error)}); give {IMAGES}") from None
    raise InputError(
        f"--data {path} has no array of uint8 images [N, H, W] or [N, H, W, C]; its keys: {', '.join(keys)}"
    )


def _on_the_hub(text: str, option: str, allowed: str) -> tuple[str, str]:
    """Split OWNER/NAME@REVISION; the revision is main where none is given."""
    if text.startswith(BUCKET):
        raise InputError(f"{option} {text}: a bucket needs its sha256; write the block by hand (docs/architecture.md)")
    match = ON_THE_HUB.fullmatch(text)
    if not match or text.startswith((".", "~")):
        raise InputError(f"{option} {text} is no file or folder here; give {allowed}")
    return match[1], match[2] or "main"


def _commit(repo: str, revision: str, kind: Literal["model", "dataset"]) -> str:
    """Return the commit of a branch or tag: from the Hub or, where that does not answer, from its cache here.

    Raises:
        InputError: The Hub has no such repository or revision.
        UnavailableError: It does not answer, and the cache does not know the revision.
    """
    if COMMIT.fullmatch(revision):
        return revision
    try:
        found = HfApi().repo_info(repo, revision=revision, repo_type=kind).sha
        if found:
            return found
        reason = "it names no commit"
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise InputError(f"{repo} is no file or folder here, and the Hub says: {first_line(error)}") from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = first_line(error)
    cached = Path(HF_HUB_CACHE) / f"{kind}s--{repo.replace('/', '--')}" / "refs" / revision
    if cached.is_file():
        return cached.read_text().strip()
    advice = f"check the spelling and the network, or give the commit: {repo}@COMMIT"
    raise UnavailableError(f"{repo} is no file or folder here, and the Hub does not answer ({reason}); {advice}")
