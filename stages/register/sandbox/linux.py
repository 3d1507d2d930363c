"""Calls of the Linux kernel that Python lacks; each raises OSError, which names the call."""

import ctypes
import os
import sys

PR_SET_PDEATHSIG, PR_GET_DUMPABLE, PR_SET_DUMPABLE, PR_SET_SECCOMP = 1, 3, 4, 22
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 36, 38
"""Options of prctl(2)."""


def call(name: str, *arguments: int | bytes | None) -> int:
    """Call a function of the C library that returns -1 and sets errno on failure."""
    given = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    result = int(getattr(ctypes.CDLL(None, use_errno=True), name)(*given))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return result


def syscall(name: str, number: int, *arguments: int | bytes | None) -> int:
    """Call the kernel by number; those above 423 are the same on every processor."""
    try:
        return call("syscall", number, *arguments)
    except OSError as error:
        raise OSError(error.errno, f"{name}: {os.strerror(error.errno or 0)}") from None


def prctl(option: int, value: int = 0, extra: int = 0) -> int:
    """Set or read an attribute of this process; on other systems than Linux it does nothing."""
    return call("prctl", option, value, extra, 0, 0) if sys.platform == "linux" else 0
