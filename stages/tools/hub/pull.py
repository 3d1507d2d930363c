"""A model that was pushed to the Hugging Face Hub -> its folder, every file compared with its hash."""

import re
import shutil
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError

from stages.fetch.release_list import FILES_LIST
from stages.register.package import ALLOWED, is_model_file
from stages.runtime.errors import InputError
from stages.storage.files import RUN_RECORD, check_free, file_sha256, writing
from stages.storage.manifest import Manifest, check_space, describe, parse_manifest
from stages.tools.hub.errors import hub_errors


class Pulled(NamedTuple):
    """What was pulled."""

    commit: str
    sha256: str
    """Hash of files.json."""
    num_files: int


def pull(repo: str, revision: str, sha256: str | None, out: Path) -> Pulled:
    """Download a pushed model, file by file as its files.json lists them, and compare sizes and hashes.

    Args:
        repo: OWNER/NAME.
        revision: A commit, branch or tag; it is resolved to a commit once.
        sha256: Expected hash of files.json, as push prints it. None compares the files with the list alone: that finds
            damage, and not a change by somebody who may write to the repository.
        out: Folder to write; it is complete or absent.

    Raises:
        InputError: The revision or the hash is not one, the repository is not one of push, a file is not what the list
            says, or `out` is in use.
        UnavailableError: The Hub does not answer.
    """
    if not revision:
        raise InputError("--revision is empty; give a commit, branch or tag, or leave it out for main")
    if sha256 is not None and not re.fullmatch("[0-9a-f]{64}", sha256):
        raise InputError(f"--sha256 is {sha256!r}; allowed: the 64 digits 0-9, a-f that espalier push printed")
    check_free(out)
    if (out / RUN_RECORD).is_file() and not (out / FILES_LIST).is_file():
        raise InputError(f"{out} holds what was not pulled; give another folder")
    with hub_errors(repo, "read"):
        api = HfApi(library_name="espalier")
        commit = str(api.repo_info(repo, revision=revision).sha)
        origin = f"{repo} at {commit}"
        with writing(out) as folder:
            manifest = _download_list(api, repo, commit, folder)
            found = file_sha256(folder / FILES_LIST)
            if sha256 not in (None, found):
                raise InputError(f"{FILES_LIST} of {origin} has sha256 {found}, expected {sha256}; correct --sha256")
            check_space(manifest, folder, origin)
            for entry in manifest.files:
                path = Path(api.hf_hub_download(repo, entry.path, revision=commit, local_dir=folder))
                if describe(path, folder) != entry:
                    raise InputError(f"{entry.path} of {origin} is not what its {FILES_LIST} lists; pull it again")
            shutil.rmtree(folder / ".cache", ignore_errors=True)  # notes of the Hub's client
    return Pulled(commit, found, len(manifest.files) + 1)


def _download_list(api: HfApi, repo: str, commit: str, folder: Path) -> Manifest:
    """Download and parse files.json.

    Raises:
        InputError: There is none, it is damaged, or it lists a file that no model has.
    """
    try:
        path = Path(api.hf_hub_download(repo, FILES_LIST, revision=commit, local_dir=folder))
        manifest = parse_manifest(path.read_bytes())
    except EntryNotFoundError:
        found = f"{repo} at {commit} has no {FILES_LIST}, so that its files cannot be checked"
        raise InputError(f"{found}; pull what espalier push sent, or download it with hf download") from None
    except ValueError as error:
        raise InputError(f"{FILES_LIST} of {repo} at {commit} is damaged ({error}); push the model again") from None
    other = [it.path for it in manifest.files if not is_model_file(PurePosixPath(it.path))]
    if other:
        raise InputError(f"{repo} lists {other[0]}, which is no file of a model; allowed: {', '.join(sorted(ALLOWED))}")
    return manifest
