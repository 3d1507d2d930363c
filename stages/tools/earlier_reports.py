"""A commit -> the reports that its dvc.lock names, from DVC's cache or remote."""

import os
from pathlib import Path

from stages.runtime.errors import InputError, first_line

FILES = ("evaluate/evaluation.json", "evaluate/run.json", "costs/costs.json")
"""What a comparison reads, below the folder of reports."""


def fetch_reports(commit: str, reports: Path, folder: Path) -> None:
    """Write the reports of a commit below a folder.

    Args:
        commit: A branch, tag or hash of the repository in the current folder.
        reports: The folder of reports in it, absolute or below the current folder.
        folder: Where the files go, each below its stage's name.

    Raises:
        InputError: There is no such commit, it has no reports, or they are neither in the cache nor in a remote.
    """
    # DVC takes more than a second to import, which a report without a comparison does not need.
    from dvc.api import DVCFileSystem  # noqa: PLC0415

    here = Path.cwd()
    places = Path(os.path.normpath(here / reports)), reports.resolve()  # by its name, or where links lead
    below = next((place.relative_to(here) for place in places if place.is_relative_to(here)), None)
    if below is None:
        raise InputError(f"{reports} is outside the current folder, and --against reads the same one of {commit}")
    try:
        source = DVCFileSystem(".", rev=commit)
        contents = {name: source.read_bytes((below / name).as_posix()) for name in FILES}
    except Exception as error:  # noqa: BLE001  # those of DVC's parts have no common class
        found = f"the reports of {commit} could not be read ({first_line(error)})"
        advice = "give a commit whose dvc.lock has them, and run `dvc push` where they were computed"
        raise InputError(f"{found}; {advice}") from None
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
