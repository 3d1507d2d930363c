"""Files that DVC was writing when it was killed -> files that DVC can read, so that the next run needs no hand."""

import json
import time
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from flows.workspaces.commands import Log
from stages.runtime.git import git_output

LOCKFILE, RWLOCK, CUT = "dvc.lock", ".dvc/tmp/rwlock", ".dvc/tmp/dvc.lock.cut"
WAIT_S = 0.5
"""How long another DVC may take to write a file: DVC empties it first and then writes it."""
CONFLICT = "<<<<<<<"
"""Git's mark of a conflict, which somebody has to solve."""


def mend(folder: Path, log: Log) -> None:
    """Replace what a kill has cut off: dvc.lock by that of the commit, and DVC's table of busy files by none.

    Nothing is computed again for it: DVC finds finished stages in its cache by their inputs.

    Args:
        folder: Top folder of a checkout in which no other run works.
        log: Called with a line if dvc.lock was cut off; the rest of it is kept in .dvc/tmp.
    """
    lockfile, rwlock = folder / LOCKFILE, folder / RWLOCK
    if _is_cut(rwlock):
        rwlock.unlink()
    if _is_cut(lockfile):
        lockfile.replace(folder / CUT)
        committed = git_output(folder, "show", f"HEAD:./{LOCKFILE}")
        if committed is not None:
            lockfile.write_text(f"{committed}\n")
        log(f"{LOCKFILE} was cut off by a kill; replaced by that of the commit, and the rest of it kept in {CUT}")


def _is_cut(file: Path) -> bool:
    """Whether a file exists that DVC cannot read, and that nobody is writing or has to edit."""
    if _is_whole(file):
        return False
    time.sleep(WAIT_S)
    return not _is_whole(file)


def _is_whole(file: Path) -> bool:
    try:
        text = file.read_text(errors="replace")
    except OSError:  # missing, or not ours to replace
        return True
    if CONFLICT in text:
        return True
    try:
        if file.name == LOCKFILE:
            content = YAML(typ="safe").load(text)
            return isinstance(content["schema"], str) and isinstance(content["stages"], dict)
        return isinstance(json.loads(text), dict)
    except (YAMLError, ValueError, KeyError, TypeError):
        return False
