"""Progress of long work."""

from stages.runtime.progress import track


def test_a_log_gets_plain_lines_and_the_last_step(capsys):
    """Without a terminal there are no control characters, and the end is always stderr."""
    assert list(track([10, 20, 30], "work", 5, done=2)) == [10, 20, 30]

    stderr = capsys.readouterr().err
    assert "work 5/5" in stderr
    assert "\r" not in stderr
