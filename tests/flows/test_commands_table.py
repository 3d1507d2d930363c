"""espalier: one table of commands, whose help appears at once, names every default and ends with a line to type."""

import json
import shlex
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from flows.__main__ import main
from flows.commands.table import SECTIONS
from tests.servers import ROOT

NAMES = [name for commands in SECTIONS.values() for name in commands]
LIGHT = {"click", "psutil"}
"""The packages that help may import."""
HELP = """
import json, sys

before = {*sys.modules}
from click.testing import CliRunner
from flows.__main__ import main

for arguments in ([], *([name] for name in NAMES)):
    result = CliRunner().invoke(main, [*arguments, "--help"])
    assert result.exit_code == 0, result.output
names = {name.partition(".")[0] for name in {*sys.modules} - before}
print(json.dumps([it for it in names if "site-packages" in (getattr(sys.modules[it], "__file__", None) or "")]))
"""
START, RUN = ["init", "plan", "doctor"], ["run", "compress", "sweep", "compare"]
LOOK, REGISTRY = ["draw", "export", "report", "ui"], ["register", "promote", "rollback", "reproduce", "ledger"]
EXPECTED = {*START, *RUN, *LOOK, *REGISTRY, "deploy", "start", "clean"}


def run_help(*arguments):
    """Show the help of the group or of a command, as a terminal of 80 columns does."""
    result = CliRunner().invoke(main, [*arguments, "--help"], prog_name="espalier", terminal_width=80)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_console_script_is_the_module():
    """`espalier` and `python -m flows` are one object."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, attribute = scripts["espalier"].partition(":")

    assert list(scripts) == ["espalier"]
    assert getattr(import_module(module), attribute) is main


def test_the_help_lists_every_command_once_below_a_heading():
    """In the order of the table, each in one line of 80 columns."""
    lines = run_help().splitlines()
    listed = [line.split()[0] for line in lines if line.startswith("  ") and line.split()[0] in main.commands]

    assert [line[:-1] for line in lines if line.endswith(":") and line != "Options:"] == list(SECTIONS)
    assert listed == list(main.commands)
    assert set(listed) >= EXPECTED
    for commands in SECTIONS.values():
        for entry in commands.values():
            assert any(line.endswith(entry.help) for line in lines), entry.help


@pytest.mark.parametrize("name", NAMES)
def test_the_help_of_a_command_ends_with_an_example_that_parses(name):
    """Its defaults are shown, and every option of the example is one of the command."""
    command = main.get_command(click.Context(main), name)
    shown = run_help(name)
    example = shlex.split(shown.splitlines()[-1])
    defaults = [
        option.default
        for option in command.params
        if isinstance(option, click.Option) and isinstance(option.default, str | int | Path) and not option.is_flag
    ]

    assert shown.startswith(f"Usage: espalier {name} ")
    assert example[:2] == ["espalier", name]
    with command.make_context(name, example[2:]):
        pass
    words = " ".join(shown.split())
    assert [value for value in defaults if f"[default: {value}" not in words] == []


def test_help_imports_light_packages_alone():
    """Neither that of the group nor that of a command, so that it appears at once."""
    code = f"NAMES = {NAMES}\n{HELP}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)

    assert result.returncode == 0, result.stderr
    assert {*json.loads(result.stdout)} <= LIGHT
