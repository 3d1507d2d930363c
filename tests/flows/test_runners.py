"""Where the cells of a series run."""

import os
from typing import get_args
from unittest.mock import MagicMock

import pytest
from click.testing import CliRunner
from prefect.exceptions import ObjectNotFound

from flows.__main__ import main
from flows.options import RUNNERS
from flows.tasks import runners
from flows.tasks.runners import RunnerName, open_runner
from stages.runtime.environment import SHARED_VARIABLE
from stages.runtime.errors import InputError


def test_the_runners_of_the_command_are_those_that_there_are():
    """Threads and a pool; one that no test runs is not offered."""
    assert list(get_args(RunnerName)) == RUNNERS == ["threads", "pool"]
    for command in ("sweep", "compare"):
        assert "--address" not in CliRunner().invoke(main, [command, "--help"]).output


def test_each_gpu_is_one_slot_and_its_parts_are_none(tmp_path, monkeypatch):
    """nvidia-smi lists the instances of a divided GPU below it, and they have no number of their own."""
    listed = ["GPU 0: X (UUID: GPU-a)", "  MIG 1g.10gb Device 0: (UUID: MIG-b)", "GPU 1: X (UUID: GPU-c)"]
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in listed))
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with open_runner("threads", 3) as (_, slots):
        assert [slots.get()["CUDA_VISIBLE_DEVICES"] for _ in range(3)] == ["0", "1", "0"]


def test_threads_run_as_many_cells_as_there_are_jobs():
    """Each has a slot, and the runner as many threads; cells side by side know that their seconds show no cost."""
    with open_runner("threads", 3) as (runner, slots):
        assert slots.qsize() == 3
        assert runner._max_workers == 3
        assert slots.get()[SHARED_VARIABLE] == "1"
    with open_runner("threads", 1) as (_, slots):
        assert slots.get() == {}


def test_a_pool_takes_no_number_of_jobs():
    """Its own limit counts; the option would be ignored."""
    with pytest.raises(InputError, match="jobs 2 is for cells on this machine"), open_runner("pool", 2):
        pass


def test_a_pool_needs_the_deployment_of_cells(monkeypatch):
    """The line has the command that makes it."""
    client = MagicMock()
    client.__enter__().read_deployment_by_name.side_effect = ObjectNotFound(None)
    monkeypatch.setattr(runners, "get_client", lambda **_: client)

    with (
        pytest.raises(InputError, match=r"^the server has no deployment compress/compress; deploy it first: "),
        open_runner("pool", 1),
    ):
        pass
