"""A released model or a registered version -> one commit in a repository of the Hugging Face Hub."""

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo, get_token
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from stages.fetch.release_list import FILES_LIST
from stages.models.layout import PLAN
from stages.models.pipeline import denoiser_folder, weights_file
from stages.register.package import ALLOWED, check_formats, is_model_file, list_files
from stages.register.versions import downloaded, model_folder
from stages.runtime.bounded import MIB
from stages.runtime.errors import InputError
from stages.runtime.wording import count, format_bytes, format_table
from stages.storage.files import json_bytes, read_json
from stages.storage.manifest import Entry, Manifest, check_inside, parse_manifest
from stages.tools.hub.errors import hub_errors

CARD = "README.md"
IN_MEMORY = 8 * MIB
"""Files up to this size are read once, so that what is hashed is what is sent; the Hub keeps larger ones as LFS."""


class Release(NamedTuple):
    """What is pushed."""

    folder: Path
    manifest: Manifest
    """Every file with its size and hash; it becomes files.json."""
    list_bytes: bytes
    """Content of files.json."""

    @property
    def sha256(self) -> str:
        """Hash of files.json, which pins every file."""
        return hashlib.sha256(self.list_bytes).hexdigest()

    def lines(self) -> list[str]:
        """List files and sizes, and the sum."""
        sizes = [*((it.path, it.size_bytes) for it in self.manifest.files), (FILES_LIST, len(self.list_bytes))]
        rows = [(path, format_bytes(size)) for path, size in sizes]
        total = f"{count(len(rows), 'file')}, {format_bytes(sum(size for _, size in sizes))}"
        return [*format_table(("file", "size"), rows), f"{total}; {FILES_LIST} has sha256 {self.sha256}"]


@contextmanager
def opened(model: str) -> Iterator[Release]:
    """Yield a released model: a folder that the stage report wrote, or a version, whose files are checked.

    Raises:
        InputError: The folder is not that of a released model, or a version is not as it was registered.
        UnavailableError: MLflow's server does not answer.
    """
    if not model.startswith("models:"):
        yield read_release(Path(model))
        return
    with downloaded(model) as (_, files):
        check_formats(files)
        yield read_release(model_folder(files))


def read_release(folder: Path) -> Release:
    """List the files of a released model.

    Raises:
        InputError: A part of a released model is missing, or a file has a format that no model has.
    """
    if not folder.is_dir():
        raise InputError(f"model folder {folder} does not exist; give one, or a version such as models:/NAME/3")
    needed = [folder / name for name in (CARD, PLAN, "model_index.json")]
    config = denoiser_folder(folder) / "config.json"
    auto_map = read_json(config).get("auto_map") or {}
    if not isinstance(auto_map, dict):
        raise InputError(f"{config} has auto_map {auto_map!r}, not an object; run the stage report again")
    if loader := str(auto_map.get("AutoModel", "")):
        needed.append(config.with_name(f"{loader.partition('.')[0]}.py"))
    if missing := [path for path in (*needed, weights_file(folder)) if not path.is_file()]:
        found = f"{missing[0]} does not exist, so that this is no released model"
        raise InputError(f"{found}; give a folder with card and plan, such as artifacts/released/finetuned")
    _check_names(folder)
    manifest = list_files(folder)
    manifest = manifest.model_copy(update={"files": [it for it in manifest.files if it.path != FILES_LIST]})
    return Release(folder, manifest, json_bytes(manifest.model_dump(mode="json")))


def _check_names(folder: Path) -> None:
    """Check that a folder holds nothing but files that `pull` takes.

    Raises:
        InputError: It holds a link, a pipe, a hidden file or folder, another format, or a name that no list takes.
    """
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_dir() or (path.is_file() and is_model_file(path.relative_to(folder)))):
            kinds = ", ".join(sorted(ALLOWED))
            raise InputError(
                f"{path} is no file of a model; remove it (allowed: plain, not hidden files with suffix {kinds})"
            )
        try:
            check_inside(path.relative_to(folder).as_posix())
        except ValueError as error:
            raise InputError(f"{folder} has a file with a name that is not allowed: {error}; rename it") from None


def check_token() -> None:
    """Raise InputError if there is no token of the Hub."""
    if get_token() is None:
        raise InputError("there is no token of the Hub; set HF_TOKEN, or run hf auth login")


def push(release: Release, repo: str, *, public: bool) -> str:
    """Send a released model to the Hub in one commit, and compare what the Hub then holds with what was sent.

    The repository is made if there is none. What an earlier push left there and this one does not hold is removed in
    the same commit; other files stay.

    Args:
        release: The model.
        repo: OWNER/NAME.
        public: Whether everybody may read the repository; one that exists must be so already.

    Returns:
        The commit.

    Raises:
        InputError: There is no token, or the Hub refuses it, the repository has another visibility, or a file changed.
        UnavailableError: The Hub does not answer.
    """
    with hub_errors(repo, "written"):
        check_token()
        api = HfApi(library_name="espalier")
        info = _open_repository(api, repo, public=public)
        additions = [*_additions(release), CommitOperationAdd(FILES_LIST, release.list_bytes)]
        new = {it.path_in_repo for it in additions}
        stale = [path for path in _earlier_files(api, repo, info) if path not in new]
        api.preupload_lfs_files(repo, additions, free_memory=False)
        _check_unchanged(release, additions)
        deletions = [CommitOperationDelete(path, is_folder=False) for path in stale]
        message = f"Push {release.folder.resolve().name}, files.json {release.sha256[:12]}"
        done = api.create_commit(repo, [*additions, *deletions], commit_message=message, parent_commit=info.sha)
        _check_stored(api, repo, str(done.oid), release)
    return str(done.oid)


def _open_repository(api: HfApi, repo: str, *, public: bool) -> ModelInfo:
    """Describe a repository, which is made if there is none.

    Raises:
        InputError: It exists with the other visibility.
    """
    try:
        info = api.repo_info(repo)
    except RepositoryNotFoundError:
        api.create_repo(repo, private=not public)
        info = api.repo_info(repo)
    assert isinstance(info, ModelInfo)
    if bool(info.private) == public:
        found = "private; leave --public out" if info.private else "public; add --public to show the model to everybody"
        raise InputError(f"{repo} exists and is {found}, or choose another name")
    return info


def _earlier_files(api: HfApi, repo: str, info: ModelInfo) -> list[str]:
    """List the files that an earlier push left in a repository, out of its files.json."""
    present = {sibling.rfilename for sibling in info.siblings or []}
    if FILES_LIST not in present:
        return []
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(api.hf_hub_download(repo, FILES_LIST, revision=info.sha, local_dir=temporary))
        try:
            return sorted(present.intersection(it.path for it in parse_manifest(path.read_bytes()).files))
        except ValueError:  # the list of another program
            return []


def _additions(release: Release) -> list[CommitOperationAdd]:
    entries = [(entry, release.folder / entry.path) for entry in release.manifest.files]
    return [
        CommitOperationAdd(entry.path, path.read_bytes() if entry.size_bytes <= IN_MEMORY else str(path))
        for entry, path in entries
    ]


def _check_unchanged(release: Release, additions: list[CommitOperationAdd]) -> None:
    """Compare what was read for sending with the list.

    Raises:
        InputError: A file changed in between.
    """
    expected = {entry.path: entry.sha256 for entry in release.manifest.files}
    for addition in additions:
        sha256 = addition.upload_info.sha256.hex()  # for large files hashed as they were sent
        if sha256 != expected.get(addition.path_in_repo, release.sha256):
            raise InputError(
                f"{release.folder / addition.path_in_repo} changed while it was sent; nothing was committed"
            )


def _check_stored(api: HfApi, repo: str, commit: str, release: Release) -> None:
    """Compare the hashes of the Hub with those of the list.

    Raises:
        InputError: A file is missing or differs.
    """
    paths = [entry.path for entry in release.manifest.files]
    stored = {it.path: it for it in api.get_paths_info(repo, paths, revision=commit) if isinstance(it, RepoFile)}
    for entry in release.manifest.files:
        found = stored.get(entry.path)
        if found is None or not _is_same(found, entry, release.folder / entry.path):
            raise InputError(f"{entry.path} of {repo} at {commit} is not what was sent; push again")


def _is_same(found: RepoFile, entry: Entry, path: Path) -> bool:
    """Compare a file of the Hub with a local one: by sha256 in LFS, otherwise by the id that git gives its content."""
    if found.lfs is not None:
        return bool(found.lfs.sha256 == entry.sha256)
    content = path.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
    return bool(found.blob_id == blob.hexdigest() and hashlib.sha256(content).hexdigest() == entry.sha256)
