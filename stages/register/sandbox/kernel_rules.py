"""This process -> one that may open the named files only (Landlock), and may not make some system calls (seccomp)."""

import ctypes
import errno
import os
import platform
import struct
from pathlib import Path
from typing import Any

from stages.register.sandbox import linux

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
"""Numbers of Landlock's system calls."""
VERSION, PATH_BENEATH = 1, 1
FILE_RIGHTS = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 14 | 1 << 15
"""Rights that a rule for a file can hold: execute, write, read, truncate, control a device."""
READ_RIGHTS = 1 << 0 | 1 << 2 | 1 << 3
"""Execute, read a file, list a folder."""
RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
"""Version of Landlock -> all its rights to files."""
MIN_VERSION = 3
"""Older ones do not keep files from being emptied. Only 6 and newer close signals to other processes."""
FIELDS = {1: 1, 4: 2, 6: 3}
"""Version of Landlock -> number of its kinds of rules: files, TCP, signals and abstract sockets."""
TCP, SIGNALS_AND_SOCKETS = 3, 3
READABLE = ("/proc/self", "/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/sys/devices/system", "/dev/random")
WRITABLE = ("/dev/null", "/dev/zero", "/dev/urandom")

REFUSED_CALLS = {
    "x86_64": (41, 101, 165, 248, 249, 250, 272, 298, 308, 310, 311, 321, 29, 30, 64, 68, 240, 425, 438),
    "aarch64": (198, 117, 40, 217, 218, 219, 97, 241, 268, 270, 271, 280, 194, 196, 190, 186, 180, 425, 438),
}
"""socket, ptrace, mount, add_key, request_key, keyctl, unshare, perf_event_open, setns, process_vm_readv and writev,
bpf, shmget, shmat, semget, msgget, mq_open, io_uring_setup, pidfd_getfd."""
IGNORED_CALLS = {
    "x86_64": (90, 91, 92, 93, 94, 132, 188, 189, 190, 197, 198, 199, 235, 260, 261, 268, 280, 452),
    "aarch64": (5, 6, 7, 14, 15, 16, 52, 53, 54, 55, 88, 452),
}
"""chmod, chown, utime, setxattr, removexattr and their variants, which Landlock does not know. They seem to succeed,
because programs that copy a file use them."""
CLONE, CLONE3 = {"x86_64": 56, "aarch64": 220}, 435
"""Calls that make processes and threads. The flags of clone3 are behind a pointer, which a filter cannot follow; it
seems to be missing, and the C library then takes clone."""
NAMESPACES = 0x7E020000
"""CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET."""
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
LOAD, JUMP_IF_EQUAL, JUMP_IF_AT_LEAST, JUMP_IF_ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
"""Operations of classic BPF."""
NUMBER, ARCHITECTURE, FIRST_ARGUMENT = 0, 4, 16
"""Places of what is loaded; the lower half of an argument comes first."""
KILL, REFUSE, MISSING = 0x80000000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS
IGNORE, ALLOW = 0x50000, 0x7FFF0000
OTHER_ABI = 0x40000000
"""Numbers from here on are x86's second set of system calls."""
FILTER_MODE = 2


def restrict_files(settings: dict[str, Any]) -> None:
    """Allow only to read the files of the sandbox and to write its home; close sockets, signals and /proc as well."""
    linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
    version = linux.syscall("Landlock", CREATE_RULESET, None, 0, VERSION)
    if version < MIN_VERSION or platform.machine() not in REFUSED_CALLS:
        raise OSError(errno.ENOSYS, f"Landlock: version {version}, {MIN_VERSION} or newer is needed")
    rights, fields = (table[max(known for known in table if known <= version)] for table in (RIGHTS, FIELDS))
    handled = struct.pack("QQQ", rights, TCP, SIGNALS_AND_SOCKETS)[: 8 * fields]
    rules = linux.syscall("Landlock", CREATE_RULESET, handled, len(handled), 0)
    for path in (*(source for source, _ in settings["files"]), *READABLE):
        _allow(rules, path, READ_RIGHTS)
    for path in (settings["home"], *WRITABLE):
        _allow(rules, path, rights)
    linux.syscall("Landlock", RESTRICT_SELF, rules, 0)
    os.close(rules)


def _allow(rules: int, path: str, rights: int) -> None:
    """Allow rights to a file, or to a folder and everything in it."""
    if not Path(path).exists():
        return
    opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
    allowed = rights if Path(path).is_dir() else rights & FILE_RIGHTS
    linux.syscall("Landlock", ADD_RULE, rules, PATH_BENEATH, struct.pack("=Qi", allowed, opened), 0)
    os.close(opened)


def refuse_calls() -> None:
    """Refuse system calls that open sockets, read other processes or make namespaces; ignore changes of permissions."""
    machine = platform.machine()
    if machine not in REFUSED_CALLS:
        return
    linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
    refused, ignored = REFUSED_CALLS[machine], IGNORED_CALLS[machine]
    program = [
        (LOAD, 0, 0, ARCHITECTURE),
        (JUMP_IF_EQUAL, 1, 0, ARCHITECTURES[machine]),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER),
        (JUMP_IF_AT_LEAST, 0, 1, OTHER_ABI),
        (RETURN, 0, 0, REFUSE),
        *_return_if((CLONE3,), MISSING),
        (JUMP_IF_EQUAL, 0, 4, CLONE[machine]),
        (LOAD, 0, 0, FIRST_ARGUMENT),
        (JUMP_IF_ANY_BIT, 0, 1, NAMESPACES),
        (RETURN, 0, 0, REFUSE),
        (RETURN, 0, 0, ALLOW),
        *_return_if(refused, REFUSE),
        *_return_if(ignored, IGNORE),
        (RETURN, 0, 0, ALLOW),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    header = ctypes.create_string_buffer(struct.pack("HP", len(program), ctypes.addressof(code)))
    linux.prctl(linux.PR_SET_SECCOMP, FILTER_MODE, ctypes.addressof(header))


def _return_if(numbers: tuple[int, ...], result: int) -> list[tuple[int, int, int, int]]:
    """Return `result` if the loaded number is one of these; the jumps lead behind the rest, to it or past it."""
    last = len(numbers) - 1
    jumps = [(JUMP_IF_EQUAL, last - place, 0 if place < last else 1, number) for place, number in enumerate(numbers)]
    return [*jumps, (RETURN, 0, 0, result)]
