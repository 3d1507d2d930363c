"""`dvc repro` in the current folder -> its lines, the stage that runs, the time left, and forecast beside fact."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from flows.workspaces.checkout import lock_checkout
from flows.workspaces.commands import run
from flows.workspaces.machine import at_work, machine_lock
from flows.workspaces.staleness import find_statuses, upstream
from flows.workspaces.status_line import StatusLine
from stages.params import load_params
from stages.runtime.bounded import parse_yaml
from stages.runtime.errors import InputError, first_line, warn
from stages.runtime.text import printable
from stages.runtime.wording import format_duration, format_table

PARAMS = Path("params.yaml")
BEGINS = re.compile(r"Running stage '(.+)':$")
NEEDS_NO_RUN = re.compile(r"Stage '(.+)' (didn't change, skipping|is cached - skipping run)")
LONG = ("reference", "importance", "rounds", "finetune", "evaluate")
"""Stages of which one is worth the timing of passes before a run."""
TRAINING, SETS = "finetune, step", re.compile(r"draw dense, set (\d+) of (\d+), batch")
"""Labels of the progress that covers a whole stage: finetuning, also a resumed one, and the sets of reference."""
FORECAST_LIMIT_S = 60
UNCHECKED = "what stages would refuse was not checked"
INTERRUPTED = 128 + signal.SIGINT


def run_stages(arguments: Sequence[str]) -> int:
    """Bring the stages of the current folder up to date by `dvc repro`, and show how far they are.

    It counts as one of the machine's runs, beside which no other run takes times. Its own times are not taken alone,
    since one DVC runs all stages.

    Args:
        arguments: Further arguments of `dvc repro`, such as the name of a stage.

    Returns:
        The exit code: that of DVC, or 130 after Ctrl-C.

    Raises:
        InputError: The current folder is no DVC project or cannot be written, or params.yaml has a value that is not
            allowed, or a stage is known to refuse something.
    """
    if PARAMS.is_file():
        load_params(PARAMS)

    def log(line: str) -> None:
        """Print a line to standard error."""
        click.echo(line, err=True)

    with lock_checkout(Path.cwd(), log), at_work(machine_lock(), log, alone=False):
        progress = RunProgress({})
        try:
            progress = RunProgress(_forecast(arguments))
            with _shown(progress):
                result = run(["dvc", "repro", *arguments], progress.read, on_progress=progress.update)
        except KeyboardInterrupt:
            progress.end()
            click.echo(progress.interrupted(), err=True)
            return INTERRUPTED
        progress.end()
    for line in progress.comparison(failed=result.code != 0):
        click.echo(line)
    return result.code


@dataclass
class RunProgress:
    """Follows DVC's lines: which stages ran, for how long, and what is left."""

    expected: dict[str, float | None]
    """Stages that are expected to run and have not begun -> their seconds, None where unknown."""
    forecast: Mapping[str, float | None] = field(init=False)
    ran: dict[str, float] = field(default_factory=dict)
    """Stages that have ended -> their seconds."""
    current: str | None = None
    begun: float = field(default_factory=time.monotonic)
    stage_begun: float = 0.0
    latest: Mapping[str, Any] = field(default_factory=dict)
    """The last progress that the current stage reported."""
    display: StatusLine | None = None

    def __post_init__(self) -> None:
        self.forecast = dict(self.expected)

    def read(self, line: str) -> None:
        """Take one line of DVC or of a stage, and print it; the beginning of a stage gets its place among all."""
        begins, idle = BEGINS.match(line), NEEDS_NO_RUN.match(line)
        if begins or idle:
            self.end()
        if idle:
            self.expected.pop(idle[1], None)
        if begins:
            self._begin(begins[1])
            line = f"── {self.place()}: {self.times()}"
        if self.display:
            self.display.print(line)
        else:
            click.echo(line)

    def update(self, latest: Mapping[str, Any]) -> None:
        """Take the progress of the current stage."""
        self.latest = latest

    def _begin(self, name: str) -> None:
        self.expected.pop(name, None)
        self.current, self.stage_begun, self.latest = name, time.monotonic(), {}

    def end(self) -> None:
        """Note that the current stage, if any, has ended."""
        if self.current:
            self.ran[self.current] = time.monotonic() - self.stage_begun
            self.current = None

    def place(self) -> str:
        """Name the current stage and its place: stage 3 of 8, reference."""
        number = len(self.ran) + 1
        return f"stage {number} of {number + len(self.expected)}, {self.current}"

    def times(self) -> str:
        """Return the time so far and, where a forecast is known, the time left in all."""
        elapsed = f"{format_duration(time.monotonic() - self.begun)} so far"
        left = self.left_s()
        return elapsed if left is None else f"{elapsed}, about {format_duration(left)} left in all"

    def left_s(self) -> float | None:
        """Estimate the seconds left: of the current stage by its forecast or its own report, of others by theirs."""
        reported, planned = self.latest.get("left_s"), self._planned_s(self.current or "")
        # Copies, since the line is written by a thread of its own.
        waiting = [seconds for name in list(self.expected) if (seconds := self._planned_s(name)) is not None]
        if len(waiting) < len(self.expected) or (self.current and planned is None and reported is None):
            return None
        if not self.current:
            return sum(waiting)
        spent, own = time.monotonic() - self.stage_begun, self._reported_s()
        return (max((planned or 0.0) - spent, reported or 0.0) if own is None else own) + sum(waiting)

    def _reported_s(self) -> float | None:
        """Return the seconds left of the whole current stage by its own report; None if this covers a part of it."""
        label, left_s = str(self.latest.get("label", "")), self.latest.get("left_s")
        if left_s is None or label == TRAINING:
            return left_s
        part = SETS.fullmatch(label)
        if self.current != "reference" or not part:
            return None
        return float(left_s + (int(part[2]) - int(part[1])) * self.latest["total"] / self.latest["rate_per_s"])

    def _planned_s(self, name: str) -> float | None:
        """Return the forecast of a stage; of a long one, times what the long ones before it took of theirs."""
        planned, took = self.forecast.get(name), {it: seconds for it, seconds in list(self.ran.items()) if it in LONG}
        if self.current == "reference" and (left_s := self._reported_s()) is not None:
            took["reference"] = time.monotonic() - self.stage_begun + left_s
        forecast_s = sum(self.forecast.get(it) or 0.0 for it in took)
        if planned is None or name not in LONG or not forecast_s:
            return planned
        return planned * sum(took[it] for it in took if self.forecast.get(it)) / forecast_s

    def status(self) -> str:
        """Describe the state of the run in one line for a terminal."""
        if not self.current:
            return ""
        latest = self.latest
        inside = f" ({latest['label']} {latest['done']}/{latest['total']})" if latest else ""
        return f"{self.place()}{inside}: {self.times()}"

    def interrupted(self) -> str:
        """Say what a run that was stopped leaves behind."""
        last = list(self.ran)[-1] if self.ran else None
        where = f" in {last}" if last else ""
        return (
            f"Stopped{where} after {format_duration(time.monotonic() - self.begun)}; run it again to go on from there."
        )

    def comparison(self, *, failed: bool) -> Iterator[str]:
        """Yield a table of forecast and fact of the stages that ran; none without a forecast."""
        done = list(self.ran.items())[: -1 if failed else None]
        pairs = [(name, expected, took) for name, took in done if (expected := self.forecast.get(name)) is not None]
        if not pairs:
            return
        total = ("together", sum(pair[1] for pair in pairs), sum(pair[2] for pair in pairs))
        rows = [[name, format_duration(expected), format_duration(took)] for name, expected, took in [*pairs, total]]
        yield from format_table(["stage", "forecast", "took"], rows)


@contextmanager
def _shown(progress: RunProgress) -> Iterator[None]:
    """Show the state of a run in the last line of a terminal; a pipe or file gets plain lines alone."""
    if not (sys.stderr.isatty() and sys.stdout.isatty()):
        yield
        return
    with StatusLine(progress.status) as progress.display:
        yield


def _forecast(arguments: Sequence[str]) -> dict[str, float | None]:
    """Return the stages that are expected to run and, where one of them is long, how long each takes.

    Options of `dvc repro` may change which stages run, so nothing is expected then.
    """
    if not PARAMS.is_file() or any(argument.startswith("-") for argument in arguments):
        return {}
    try:
        statuses = find_statuses(Path(), parse_yaml(PARAMS.read_text(), str(PARAMS)), in_place=True)
        wanted = upstream(Path(), arguments)
    except (InputError, OSError, KeyError, TypeError, AttributeError):  # DVC says what is wrong, in its own words
        return {}
    names = [it.name for it in statuses if it.state == "runs" and (not arguments or it.name in wanted)]
    found = _plan() if {*names} & {*LONG} else {}
    if download := found.get("download"):
        warn(download)
    refusals, possible = found.get("refusals", []), found.get("possible_refusals", [])
    if arguments:  # a stage alone may not need what is refused
        refusals, possible = [], refusals + possible
    refuse(refusals, possible)
    seconds = {stage["name"]: stage["seconds"] for stage in found.get("stages", []) if "seconds" in stage}
    return {name: seconds.get(name) for name in names}


def refuse(refusals: Sequence[str], possible: Sequence[str]) -> None:
    """Stop a run that a stage is known to refuse, and warn of what it may refuse.

    Args:
        refusals: What the plan knows.
        possible: What it cannot know.

    Raises:
        InputError: Something is refused; the line has the last refusal, and stderr those before it.
    """
    for message in possible:
        warn(f"a stage may refuse this: {message}")
    for message in refusals[:-1]:
        click.echo(f"Error: {printable(message)}", err=True)
    if refusals:
        raise InputError(f"{refusals[-1].rstrip('.')}; no stage was run")


def _plan() -> dict[str, Any]:
    """Plan the run and time a few passes, in a process of its own; a run without a forecast goes on."""
    command = [sys.executable, "-m", "flows.planning", "--json"]
    click.echo(f"timing a few passes for a forecast, {FORECAST_LIMIT_S} s at most …", err=True)
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:  # it may be killed
            environment = {**os.environ, "TMPDIR": temporary}
            ended = subprocess.run(
                command, capture_output=True, text=True, timeout=FORECAST_LIMIT_S, check=False, env=environment
            )
        found: dict[str, Any] = json.loads(ended.stdout)
    except subprocess.TimeoutExpired:
        warn(f"no forecast: a pass takes too long to time it within {FORECAST_LIMIT_S} s; {UNCHECKED}")
        return {}
    except OSError as error:
        warn(f"no forecast: {first_line(error)}; {UNCHECKED}")
        return {}
    except ValueError:
        warn(f"no forecast: {(ended.stderr.strip().splitlines() or ['nothing was printed'])[-1]}; {UNCHECKED}")
        return {}
    return found
