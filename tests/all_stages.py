"""The stages of dvc.yaml, one after the other, in this process."""

import shlex
from importlib import import_module

from click.testing import CliRunner
from ruamel.yaml import YAML

from tests.servers import ROOT


def run_all_stages():
    """Run every command of dvc.yaml on the files of the current folder."""
    for stage in YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"].values():
        for command in [stage["cmd"]] if isinstance(stage["cmd"], str) else stage["cmd"]:
            _, _, module, *arguments = shlex.split(command)
            result = CliRunner().invoke(import_module(f"{module}.__main__").main, arguments)
            assert result.exit_code == 0, (command, result.output, result.exception)
