"""The name of a process, by which another one knows when it has ended."""

import os
import subprocess
import sys

import psutil

from stages.runtime.process_identity import describe_process, has_ended


def test_a_process_has_ended_by_id_and_start():
    """A process of another host, PID namespace or user counts as running."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    name = describe_process(process.pid)
    assert not has_ended(name)
    host, namespace, user, pid, _ = name.split(" ")
    for place in (f"elsewhere {namespace} {user}", f"{host} 1 {user}", f"{host} {namespace} {int(user) + 1}"):
        assert not has_ended(f"{place} {pid} 0")
    process.communicate(b"")

    assert has_ended(name)
    assert has_ended(f"{name}1")


def test_a_clock_that_is_set_ends_no_process(monkeypatch):
    """The time of the boot, which the system derives from its clock, has then changed."""
    name, boot, began = describe_process(os.getpid()), psutil.boot_time(), psutil.Process().create_time()
    monkeypatch.setattr(psutil._psplatform, "boot_time", lambda: boot + 1)
    assert psutil.Process().create_time() == began + 1
    assert not has_ended(name)
