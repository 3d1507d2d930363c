"""Params, a dense model and images -> the model pruned in rounds, each made by the commands of the stages."""

import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from stages.finetune import __main__ as finetune
from stages.finetune.checkpoint import TRAINING
from stages.importance import __main__ as importance
from stages.models.pipeline import copy_plan, read_scheduler, read_unet, write_pipeline
from stages.prune import __main__ as prune
from stages.rounds.command import run_stage
from stages.rounds.params import Params
from stages.rounds.targets import find_targets
from stages.storage.files import write_json
from stages.storage.in_use import hold_folder
from stages.storage.provenance import fingerprint


@dataclass(frozen=True)
class Inputs:
    """The folders that rounds begin with."""

    model: Path
    """The dense model, which is the teacher of every recovery."""
    importance: Path
    """Its importance."""
    data: Path


def write_rounds(params: Params, inputs: Inputs, checkpoints: Path, out: Path) -> Path:
    """Prune in rounds, from the last finished stage of an earlier attempt if there was one, and write the pruned model.

    Args:
        params: The blocks of params.yaml.
        inputs: The folders to begin with.
        checkpoints: Parent of the folder for the outputs of the rounds.
        out: An existing folder.

    Returns:
        The folder with the outputs of the rounds, which `clear` removes once `out` is in its place.

    Raises:
        InputError: The model cannot be read, or cannot be pruned in so many rounds.
        SystemExit: A stage ended with an error, which it printed.
    """
    count, model = params.rounds.count, inputs.model
    blocks = {name: getattr(params, name) for name in ("seed", "rounds", "importance", "prune")}
    blocks["finetune"] = params.finetune.of_weights()
    work = checkpoints / fingerprint("rounds", [inputs.model, inputs.importance, inputs.data], **blocks)[:16]
    targets = find_targets(read_unet(inputs.model), params.prune, count)
    with hold_folder(work):
        write_json(work / TRAINING, params.last_training())
        for index, tree in enumerate(params.trees(targets), start=1):
            ((name, amount),) = tree["prune"]["target"].items()
            click.echo(f"round {index} of {count}: prune.target.{name} {amount}")
            model = _Round(work / f"round-{index}", tree, inputs).run(model, is_last=index == count)
        write_pipeline(out, read_unet(model), read_scheduler(model), model)
        copy_plan(model, out)
    return work


def clear(work: Path) -> None:
    """Remove the outputs of the rounds, which get another name first: half of one must not look like a finished one."""
    gone = work.with_name(f".{work.name}")
    shutil.rmtree(gone, ignore_errors=True)
    with suppress(OSError):  # `espalier clean` lists what is left
        work.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


@dataclass(frozen=True)
class _Round:
    """The stages of one round, each with its output in one folder."""

    folder: Path
    tree: Mapping[str, Any]
    """The content of params.yaml for them."""
    inputs: Inputs

    def run(self, model: Path, *, is_last: bool) -> Path:
        """Measure the importance of a model, prune it and, unless this is the last round, train the result.

        Returns:
            The folder of the result.
        """
        write_json(self.folder / "params.yaml", self.tree)
        scores = self.inputs.importance
        if model != self.inputs.model:
            scores = self._run(importance, "importance", model=model, report=self.folder / "losses")
        pruned = self._run(prune, "pruned", model=model, importance=scores)
        if is_last:
            return pruned
        places = {"checkpoints": self.folder / "checkpoints", "report": self.folder / "curve"}
        return self._run(finetune, "finetuned", model=pruned, teacher=self.inputs.model, **places)

    def _run(self, command: Any, name: str, **options: Path) -> Path:  # noqa: ANN401  # a module has no type of its own
        """Run a stage unless its output is there, which a stage writes whole; returns the folder of the output."""
        out = self.folder / name
        if not out.is_dir():
            common = {"params": self.folder / "params.yaml", "data": self.inputs.data, "out": out}
            run_stage(command.__package__, {**common, **options})
        return out
