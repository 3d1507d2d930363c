"""Faults of the machine that checks a version, which refuse no version."""

import errno
import os
import re
import resource
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from flows.__main__ import main
from stages.register import canary
from stages.register.limits import run_check
from stages.register.promotion import promote, roll_back
from stages.register.sandbox import run as sandbox
from stages.runtime.errors import InputError, MachineError
from stages.storage.files import write_json
from stages.storage.tensors import read_tensors, write_tensors
from tests.register.conftest import NAME, outcomes
from tests.servers import ROOT

pytestmark = pytest.mark.usefixtures("quick_canary")
REAL_DRAW = canary.draw_isolated


def copy_to_a_full_disk(*_):
    """Copy a program as the sandbox does, to a device that is always full."""
    shutil.copyfile(__file__, "/dev/full")


@contextmanager
def without_free_files():
    """Let this process open no more files."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def open_too_many_files(*_):
    """Open more files than this process may."""
    with without_free_files():
        write_json(Path("one-more.json"), {})


def read_too_many_weights(*_):
    """Open more files of weights than this process may, of which safetensors says that they do not exist."""
    write_tensors(Path("one-more.safetensors"), {"a": torch.zeros(1)})
    with without_free_files():
        read_tensors(Path("one-more.safetensors"))


def start_nothing(folder, seeds, *_):
    """Draw on a machine that allows no isolation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox, "ISOLATIONS", ())
        return REAL_DRAW(folder, seeds)


FAULTS = [
    (copy_to_a_full_disk, "this machine failed ([Errno 28] No space left on device"),
    (open_too_many_files, "this machine failed ([Errno 24] Too many open files"),
    (read_too_many_weights, "this machine failed ([Errno 24] Too many open files"),
    (start_nothing, "this machine cannot start the code of a version (no isolation is allowed)"),
]


@pytest.mark.parametrize(("fail", "message"), FAULTS)
def test_a_fault_of_the_machine_refuses_no_version(publish, policy, aliases, registry, monkeypatch, fail, message):
    """The promotion ends in one line and records nothing, so that it can be repeated once the fault is mended."""
    publish()
    with monkeypatch.context() as patch:
        patch.setattr(canary, "draw_isolated", fail)
        result = CliRunner().invoke(main, ["promote", NAME, "--policy", str(ROOT / "mlflow/promotion.yaml")])
        with pytest.raises(MachineError) as error:
            promote(NAME, None, policy, None)

    assert error.value.message.startswith(message)
    assert ", so nothing was decided or changed; " in error.value.message
    assert (result.exit_code, len(result.output.splitlines())) == (1, 1)
    assert aliases() == {"challenger": 1}
    assert outcomes(registry) == []
    assert "espalier.gate" not in registry.find(f"models:/{NAME}/1").tags
    assert promote(NAME, None, policy, None).passed


def test_a_fault_of_the_machine_rolls_nothing_back(publish, policy, aliases, monkeypatch):
    """It ends the rollback in one line, without a traceback."""
    for _ in range(2):
        publish()
        promote(NAME, None, policy, None)
    monkeypatch.setattr(canary, "draw_isolated", copy_to_a_full_disk)
    with pytest.raises(MachineError, match="No space left on device"):
        roll_back(NAME, policy, "bad")
    assert aliases() == {"champion": 2, "previous": 1}


def test_a_temporary_folder_that_cannot_be_made_is_one_line(publish, policy, monkeypatch, tmp_path):
    """The folder that the environment names has been deleted."""
    publish()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "deleted"))
    with pytest.raises(MachineError, match=r"^this machine failed \(\[Errno 2\].*deleted"):
        promote(NAME, None, policy, None)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EMFILE, errno.EACCES, errno.EROFS, errno.EIO, errno.ENOMEM])
def test_a_fault_of_the_machine_is_found_behind_the_error_that_replaced_it(number):
    """A reader turns what the system says into a line about its file."""

    def fail():
        raise OSError(number, os.strerror(number))

    def read():
        try:
            fail()
        except OSError as error:
            raise InputError(f"cannot read it: {error}") from None

    with pytest.raises(MachineError, match=re.escape(os.strerror(number))):
        run_check("lineage", read)


@pytest.mark.parametrize("name", ["missing", "file/below", ".", "x" * 300, "loop"])
def test_a_file_that_a_version_lacks_is_damaged_evidence(tmp_path, name):
    """Its evidence may name a file that cannot be one; that refuses the version."""
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    check = run_check("lineage", (tmp_path / name).read_text)

    assert not check.passed
    assert check.reason.startswith("the evidence is damaged ([Errno ")
