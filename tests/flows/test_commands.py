"""Commands that a flow runs."""

import os
import sys

import pytest

from flows.commands import run, stage_names
from stages.errors import InputError


def test_lines_are_handed_on_as_they_come_with_the_exit_code():
    """Both streams, without empty lines."""
    told = []
    code = "import sys; print('one', flush=True); print(); print('two', file=sys.stderr); sys.exit(3)"

    assert run([sys.executable, "-c", code], told.append) == 3
    assert told == ["one", "two"]


def test_a_command_dies_with_the_flow():
    """When the flow is interrupted while it listens, the whole process group goes."""

    def interrupt(line):
        raise KeyboardInterrupt(line)

    code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    with pytest.raises(KeyboardInterrupt) as caught:
        run([sys.executable, "-c", code], interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(int(str(caught.value)), 0)


@pytest.mark.parametrize("text", [None, "stages: [", "{}"])
def test_a_place_without_stages_is_refused(tmp_path, monkeypatch, text):
    """No dvc.yaml, a broken one, an empty one."""
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / "dvc.yaml").write_text(text)

    with pytest.raises(InputError, match=r"dvc\.yaml here lists no stages"):
        stage_names()
