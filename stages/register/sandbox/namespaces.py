"""This process -> one in its own user, mount, process, network and IPC namespaces, with only the named files."""

import errno
import os
from pathlib import Path
from typing import Any

from stages.register.sandbox import linux

NEW_MOUNTS, NEW_IPC, NEW_USER, NEW_PIDS, NEW_NETWORK = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
"""Flags of unshare(2)."""
READ_ONLY, NO_SUID, NO_DEVICES, NO_EXEC, BIND, RECURSIVE, PRIVATE = 1, 2, 4, 8, 4096, 16384, 1 << 18
"""Flags of mount(2)."""
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 0x8000
DETACH = 2
"""Flag of umount2(2)."""
DEVICES = ("null", "zero", "full", "random", "urandom")
SYSTEM = "/sys/devices/system"
"""Processors and memory nodes; PyTorch chooses its kernels by them."""
TMPFS_BYTES = 256 << 20
"""Size of everything that can be written."""
INNER_ID = 1000


def unshare(settings: dict[str, Any]) -> None:
    """Leave the namespaces of the caller; the next child is the first process of the new ones.

    Root keeps its user namespace, so that the child can become another user of the machine.
    """
    flags = NEW_MOUNTS | NEW_IPC | NEW_PIDS | NEW_NETWORK
    user, group = os.geteuid(), os.getegid()
    if user == 0:
        try:
            linux.call("unshare", flags)
        except OSError as error:
            if error.errno != errno.EPERM:
                raise
        else:
            return
    settings["user"] = None
    linux.call("unshare", flags | NEW_USER)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{INNER_ID} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{INNER_ID} {group} 1")


def enter(settings: dict[str, Any]) -> None:
    """Build the new root from an empty file system in memory, enter it, and give up all privileges."""
    root, home, user = settings["root"], settings["home"], settings["user"]
    os.umask(0o022)
    linux.call("mount", None, b"/", None, RECURSIVE | PRIVATE, None)
    options = f"mode=755,size={TMPFS_BYTES}".encode()
    linux.call("mount", b"tmpfs", root.encode(), b"tmpfs", NO_SUID | NO_DEVICES, options)
    for source, target in settings["files"]:
        _bind(source, f"{root}{target}")
    for name in DEVICES:
        _bind(f"/dev/{name}", f"{root}/dev/{name}", read_only=False)
    _bind(SYSTEM, f"{root}{SYSTEM}")
    for folder in (home, "/dev/shm", "/proc"):  # noqa: S108  # of the new root
        Path(f"{root}{folder}").mkdir(parents=True, exist_ok=True)
    linux.call("mount", b"proc", f"{root}/proc".encode(), b"proc", NO_SUID | NO_DEVICES | NO_EXEC | READ_ONLY, None)
    os.chdir(root)
    linux.call("pivot_root", b".", b".")
    linux.call("umount2", b".", DETACH)
    if user is not None:
        for folder in (home, "/dev/shm"):  # noqa: S108
            os.chown(folder, user, user)
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)


def _bind(source: str, target: str, *, read_only: bool = True) -> None:
    """Show a file or folder of the machine in the new root; a symbolic link is copied."""
    place = Path(target)
    place.parent.mkdir(parents=True, exist_ok=True)
    if Path(source).is_symlink():
        place.symlink_to(Path(source).readlink())
        return
    if Path(source).is_dir():
        place.mkdir(exist_ok=True)
    else:
        place.touch()
    linux.call("mount", source.encode(), target.encode(), None, BIND | RECURSIVE, None)
    if read_only:
        attributes = (READ_ONLY | NO_SUID | NO_DEVICES).to_bytes(8, "little") + bytes(24)
        linux.syscall("mount_setattr", MOUNT_SETATTR, AT_FDCWD, target.encode(), AT_RECURSIVE, attributes, 32)
