"""What code of others would try, on a machine that is named in JSON: attempt -> what it got, empty for nothing.

It runs in the sandbox, alone or at the end of a version's draw.py, so it needs the standard library only.
"""

import ctypes
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

CLONE, CLONE3, NEW_USER = {"x86_64": 56, "aarch64": 220}.get(os.uname().machine, -1), 435, 0x10000000


def read(path):
    """Read a file, or list a folder."""
    return (
        str(list(Path(path).iterdir()))
        if Path(path).is_dir()
        else Path(path).read_bytes()[:100].decode(errors="replace")
    )


def open_to_all(path):
    """Let every user read and write a file."""
    Path(path).chmod(0o777)
    return "changed" if Path(path).stat().st_mode & 0o777 == 0o777 else ""


def find_secret(secret):
    """Search the own environment, and that of every other process that is visible."""
    for path in ["self", *(it.name for it in Path("/proc").iterdir() if it.name.isdigit())]:
        try:
            if secret in Path(f"/proc/{path}/environ").read_text(errors="replace"):
                return path
        except OSError:
            continue
    return ""


def read_memory(process, address):
    """Read the memory of another process, by its file and by a system call."""
    try:
        with Path(f"/proc/{process}/mem").open("rb") as memory:
            memory.seek(address)
            return memory.read(8).hex()
    except OSError:
        found = ctypes.create_string_buffer(8)
        ours, theirs = (ctypes.c_ulong * 2)(ctypes.addressof(found), 8), (ctypes.c_ulong * 2)(address, 8)
        count = ctypes.CDLL(None).process_vm_readv(process, ours, 1, theirs, 1, 0)
        return found.raw.hex() if count > 0 else ""


def connect(family, kind, address):
    """Send a word to a server."""
    with socket.socket(family, kind) as client:
        client.settimeout(2)
        client.connect(address)
        client.send(b"hello")
    return "connected"


def signal_process(process):
    """Send the null signal, which only checks whether one could be sent."""
    os.kill(process, 0)
    return "allowed"


def leave_child(seconds):
    """Leave a process in another session whose parent has ended."""
    subprocess.run(["/bin/sh", "-c", f"setsid sleep {seconds} >/dev/null 2>&1 &"], check=True)
    return ""


def clone_arguments():
    """Make what clone3 takes: the flags, and the signal at the end of the process."""
    return (ctypes.c_uint64 * 8)(NEW_USER, 0, 0, 0, signal.SIGCHLD)


def make_namespace(number, *arguments):
    """Make a process in a user namespace of its own by a system call; returns its id, and ends it."""
    child = ctypes.CDLL(None).syscall(number, *arguments)
    if child == 0:
        os._exit(0)
    if child > 0:
        os.waitpid(child, 0)
    return child if child > 0 else ""


def fork_many(most):
    """Fork until the system refuses, at most `most` times; returns how many processes there are."""
    children = []
    try:
        while len(children) < most:
            child = os.fork()
            if child == 0:
                signal.pause()
                os._exit(0)
            children.append(child)
    except OSError:
        pass
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return len(children)


def take_memory(num_bytes):
    """Take memory of its own, and memory to share."""
    for take in (lambda: bytearray(num_bytes), lambda: mmap.mmap(-1, num_bytes)):
        try:
            take()
        except (MemoryError, OSError):
            continue
        return "taken"
    return ""


def fill_home(num_bytes):
    """Write files of 32 MiB until the disk is full or they hold `num_bytes`; returns the size in MiB."""
    written = 0
    try:
        while written < num_bytes:
            Path(os.environ["HOME"], f"{written}.bin").write_bytes(bytes(1 << 25))
            written += 1 << 25
    except OSError:
        pass
    return written >> 20


def attack(target):
    """Try everything: attempt -> what it got."""
    attempts = {
        **{f"file {path}": lambda path=path: read(path) for path in target["files"]},
        **{f"write {path}": lambda path=path: Path(path).write_text("x") for path in target["write"]},
        "permissions": lambda: open_to_all(target["files"][1]),
        "environment": lambda: [key for key, value in os.environ.items() if target["secret"] in value],
        "environ of any process": lambda: find_secret(target["secret"]),
        "memory of the parent": lambda: read_memory(target["process"], target["address"]),
        "signal": lambda: signal_process(target["process"]),
        "tcp": lambda: connect(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", target["tcp"])),
        "udp": lambda: connect(socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", target["udp"])),
        "outside": lambda: connect(socket.AF_INET, socket.SOCK_DGRAM, ("192.0.2.1", 53)),
        "unix socket": lambda: connect(socket.AF_UNIX, socket.SOCK_STREAM, target["unix"]),
        "abstract socket": lambda: connect(socket.AF_UNIX, socket.SOCK_STREAM, "\0" + target["abstract"]),
        "namespace by clone": lambda: make_namespace(CLONE, NEW_USER | signal.SIGCHLD, 0, 0, 0, 0),
        "namespace by clone3": lambda: make_namespace(CLONE3, clone_arguments(), 64),
        "child": lambda: leave_child(target["seconds"]),
        "10 GiB of memory": lambda: take_memory(10 << 30),
        "processes": lambda: fork_many(target["forks"]),
        "files in MiB": lambda: fill_home(5 << 26),
    }
    found = {}
    for name, attempt in attempts.items():
        try:
            found[name] = attempt() or ""
        except OSError:
            found[name] = ""
    time.sleep(0.3)  # the child that is left has started
    return found


if __name__ == "__main__":
    print(json.dumps(attack(json.loads(sys.argv[1]))))
