"""Tasks -> worker processes on this machine, and what they report; none outlives the caller."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from stages.drawing.worker_reports import ERROR, WorkerReport
from stages.runtime.errors import InputError, UnavailableError

END_S = 10.0
"""Longest wait for a worker that was let go."""


class WorkerPool:
    """Worker processes that draw one job.

    Args:
        task: What all workers get; `worker` and `workers` are added.
        environments: Changes to the environment of each worker.
    """

    def __init__(self, task: Mapping[str, Any], environments: Sequence[Mapping[str, str]]) -> None:
        self.killed: list[str] = []
        """How the workers ended that reported no mistake of their own."""
        self._reports: queue.SimpleQueue[tuple[int, WorkerReport | None]] = queue.SimpleQueue()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._readers: list[threading.Thread] = []
        for index, environment in enumerate(environments):
            self._start({**task, "worker": index, "workers": len(environments)}, environment)

    def _start(self, task: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        process = subprocess.Popen(
            [sys.executable, "-m", "stages.drawing.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **environment, "RANK": str(task["worker"] + 1)},  # so that progress.py prints nothing
            start_new_session=True,  # Ctrl-C goes to the caller alone
        )
        self._processes.append(process)
        self._readers.append(threading.Thread(target=self._read, args=(len(self._processes) - 1,), daemon=True))
        self._readers[-1].start()
        assert process.stdin is not None
        with suppress(OSError):  # it has ended already, which its exit code shows
            process.stdin.write(json.dumps(task).encode() + b"\n")
            process.stdin.flush()

    def _read(self, index: int) -> None:
        stdout = self._processes[index].stdout
        assert stdout is not None
        with stdout:
            for line in stdout:
                with suppress(ValueError):  # half a line of a process that was killed
                    self._reports.put((index, tuple(json.loads(line))))
        self._reports.put((index, None))

    def reports(self) -> Iterator[WorkerReport]:
        """Yield what the workers report until all have ended; a worker that something kills does not end the others.

        Raises:
            InputError: A worker found a mistake.
            UnavailableError: A worker lost a server.
        """
        left = set(range(len(self._processes)))
        while left:
            index, report = self._reports.get()
            if report is None:
                left.discard(index)
                if code := self._processes[index].wait():
                    self.killed.append(_describe(code))
            elif report[0] == ERROR:
                kind = UnavailableError if report[1] == UnavailableError.exit_code else InputError
                raise kind(str(report[2]))
            else:
                yield report

    def close(self) -> None:
        """Let the workers go, and wait until they have ended."""
        for process in self._processes:
            assert process.stdin is not None
            with suppress(OSError):
                process.stdin.close()
        for process in self._processes:
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for reader in self._readers:
            reader.join(END_S)  # it closes the pipe


def _describe(code: int) -> str:
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
