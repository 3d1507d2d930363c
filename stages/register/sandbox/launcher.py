"""Settings of a sandbox on the command line -> the sandboxed program; it needs nothing but the standard library.

The caller reads from the descriptor `status` what could not be set up. It closes without a word when the program
starts, so that the program cannot write there.
"""

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from stages.register.sandbox import kernel_rules, linux, namespaces


def _nothing(settings: dict[str, Any]) -> None:
    del settings


ISOLATIONS: dict[str, tuple[Callable[[dict[str, Any]], None], Callable[[dict[str, Any]], None]]] = {
    "namespaces": (namespaces.unshare, namespaces.enter),
    "landlock": (_nothing, kernel_rules.restrict_files),
    "limits": (_nothing, _nothing),
}
"""How the program is isolated -> what is done before the fork, and in its own process."""


def main() -> NoReturn:
    """Start the program in the sandbox, wait for it, and end every process that it leaves."""
    settings = json.loads(sys.argv[1])
    status = settings["status"]
    os.set_inheritable(status, False)  # noqa: FBT003  # the standard library's signature
    before, inside = ISOLATIONS[settings["isolation"]]
    try:
        linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
        linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)
        before(settings)
        child = os.fork()
        if child == 0:
            inside(settings)
            _start(settings)
    except (OSError, AttributeError, ValueError) as error:
        os.write(status, (str(error) or type(error).__name__).encode())
        os._exit(1)
    os.close(status)
    os._exit(_wait(child))


def _start(settings: dict[str, Any]) -> NoReturn:
    """Become the program, within the limits of resources; it is killed if this process's parent ends."""
    os.chdir(settings["home"])
    linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
    linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
    if settings["isolation"] != "limits" and sys.platform == "linux":
        kernel_rules.refuse_calls()
    for name, value in settings["limits"].items():
        number, (_, hard) = getattr(resource, name), resource.getrlimit(getattr(resource, name))
        most = value if hard == resource.RLIM_INFINITY else min(value, hard)
        with suppress(ValueError):  # macOS refuses some of them
            resource.setrlimit(number, (most, most))
    os.execve(settings["command"][0], settings["command"], settings["environment"])  # noqa: S606


def _wait(child: int) -> int:
    """Return the exit code of the program, after every other process of the sandbox has ended."""
    _, found = os.waitpid(child, 0)
    with suppress(ChildProcessError):
        while True:
            for process in _children():
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            os.waitpid(-1, 0)
    code = os.waitstatus_to_exitcode(found)
    return 128 - code if code < 0 else code


def _children() -> list[int]:
    """List this process's children; a process whose parent has ended is among them."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            if int(parent) == os.getpid():
                found.append(int(folder.name))
    return found


if __name__ == "__main__":
    main()
