"""Progress of long work."""

import io

import pytest

from stages.runtime import progress
from stages.runtime.progress import track


@pytest.fixture
def clock(monkeypatch):
    """The time, which a test sets."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_plain_lines_and_the_last_step(capsys):
    """Without a terminal there are no control characters, and the end is always stderr."""
    assert list(track([10, 20, 30], "work", 5, done=2)) == [10, 20, 30]

    stderr = capsys.readouterr().err
    assert "work 5/5" in stderr
    assert "\r" not in stderr


def test_a_log_gets_a_line_in_ten_seconds_at_most(capsys, clock):
    """With the rate of this call and the time left by it, whatever was done before."""
    for _ in track(range(8), "work", 10, done=2):
        clock[0] += 4

    assert capsys.readouterr().err.splitlines() == [
        "work 5/10, 0.25/s, 20 s left",
        "work 8/10, 0.25/s, 8 s left",
        "work 10/10, 0.25/s, 0 s left",
    ]


def test_the_first_of_several_processes_reports(capsys, monkeypatch):
    """The others would write the same lines again."""
    monkeypatch.setenv("RANK", "1")

    assert list(track([1, 2], "work", 2)) == [1, 2]
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch):
    """It begins with what was done before, and shows items per second."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(progress.sys, "stderr", terminal)

    assert list(track([1, 2], "work", 5, done=3)) == [1, 2]
    assert "60%" in terminal.getvalue().split("\r")[1]
    assert "5/5" in terminal.getvalue()
    assert "it/s" in terminal.getvalue()
