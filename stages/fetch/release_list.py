"""A folder downloaded from the Hub, and the files.json that `espalier push` put there -> its files compared."""

from pathlib import Path

from stages.runtime.bounded import parse_json
from stages.runtime.errors import InputError
from stages.storage.files import read_bytes
from stages.storage.manifest import MAX_BYTES, describe, parse_manifest

FILES_LIST = "files.json"


def check_listed(folder: Path, origin: str) -> None:
    """Compare every downloaded file that the list names with its size and hash.

    A folder without a list passes, and so does one whose files.json is JSON of another form: a file of that name that
    others made.

    Args:
        folder: The downloaded folder, which may lack some of the listed files.
        origin: How to call it in messages.

    Raises:
        InputError: The list is damaged, or a file is not what it says.
    """
    if not (folder / FILES_LIST).is_file():
        return
    content = read_bytes(folder / FILES_LIST)
    try:
        if len(content) <= MAX_BYTES and not _is_ours(content):
            return
        entries = parse_manifest(content).files
    except ValueError as error:
        raise InputError(f"{FILES_LIST} of {origin} is damaged ({error}); push the model again") from None
    for entry in entries:
        path = folder / entry.path
        if path.is_file() and describe(path, folder) != entry:
            advice = "remove it from the Hub's cache and fetch it again, or choose another commit"
            raise InputError(f"{path} is not what {FILES_LIST} of {origin} lists; {advice}")


def _is_ours(content: bytes) -> bool:
    """Whether JSON has the keys of a list of hashes."""
    tree = parse_json(content)
    return isinstance(tree, dict) and tree.keys() >= {"version", "files"}
