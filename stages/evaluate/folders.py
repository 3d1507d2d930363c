"""Model folders and a reference -> the report of their evaluation."""

from collections.abc import Mapping
from pathlib import Path

import torch

from stages.evaluate.evaluation import evaluate
from stages.evaluate.opened import open_reference
from stages.evaluate.report import write_report
from stages.models.layout import SNAPSHOTS
from stages.models.pipeline import read_unet, weights_file
from stages.protocol.evaluation import DENSE, SNAPSHOT
from stages.protocol.params import ReferenceParams
from stages.runtime.processes import Processes
from stages.storage.provenance import write_provenance, write_run_record
from stages.storage.rows import scratch_folder, writing_together


def find_snapshots(finetuned: Path) -> dict[str, Path]:
    """Find the snapshots in the folder of a finetuned model: name -> model folder, in the order of their steps."""
    steps = sorted(int(folder.name) for folder in (finetuned / SNAPSHOTS).glob("*") if folder.name.isdecimal())
    return {f"{SNAPSHOT}{step}": finetuned / SNAPSHOTS / str(step) for step in steps}


def evaluate_folders(
    folders: Mapping[str, Path],
    reference_path: Path,
    report: Path,
    params: ReferenceParams,
    seed: int,
    processes: Processes,
) -> None:
    """Evaluate the models in some folders, by name, under the protocol of a reference, and write the report.

    Raises:
        InputError: A folder is damaged, they do not belong together, or the reference has another protocol.
    """
    cpu = torch.device("cpu")  # there may be many snapshots, of which one draws at a time
    places = {name: cpu if name.startswith(SNAPSHOT) else processes.device for name in folders}
    models = {name: read_unet(folder, places[name]) for name, folder in folders.items()}
    opened = open_reference(reference_path, folders[DENSE], params, seed, processes.device)
    opened.check_models(models, reference_path)
    files = {name: weights_file(folder) for name, folder in folders.items()}
    with writing_together(report, processes) as folder:
        with scratch_folder(folder, processes) as scratch:
            evaluation = evaluate(models, files, opened, scratch, processes)
        if evaluation:
            write_report(evaluation, folder)
            write_run_record(folder, "evaluate", seed=seed, reference=params)
    if processes.is_main:
        write_provenance(report)
