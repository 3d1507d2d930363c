"""A project with a tiny dense model, two smaller ones and the reference of the dense one; and the command on it."""

import shutil
import signal

import pytest
from click.testing import CliRunner

from stages.grid.__main__ import main
from tests.small_project import make_small_project


@pytest.fixture
def write_project(tmp_path, make_once, make_unet, monkeypatch):
    """Copy models, images, params and the reference, which are made once; `classes` makes the models conditional."""

    def write(classes=None):
        made = make_once(f"small-project-{classes}", lambda folder: make_small_project(folder, make_unet, classes))
        shutil.copytree(made, tmp_path, dirs_exist_ok=True)
        monkeypatch.chdir(tmp_path)

    return write


@pytest.fixture
def grid():
    """Run the command with options; its handlers of signals end with the test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield lambda *options: CliRunner().invoke(main, [str(option) for option in options])
    for number, handler in before.items():
        signal.signal(number, handler)
