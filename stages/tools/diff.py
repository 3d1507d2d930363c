"""Two evaluations under one protocol -> the difference of each metric, with its interval."""

from pathlib import Path

from stages.protocol.evaluation import TO_DENSE, read_evaluation
from stages.protocol.intervals import Estimate, paired_difference
from stages.protocol.protocol import check_same
from stages.runtime.errors import InputError
from stages.storage.files import RUN_RECORD, read_json
from stages.storage.run_record import read_provenance


def diff_evaluations(one: Path, other: Path, model: str) -> dict[str, Estimate]:
    """Estimate metric(other) − metric(one) of a model for each metric, paired by set.

    What compares with the dense model (`TO_DENSE`) is left out if the two evaluations have different ones, and a metric
    that an older evaluation does not have.

    Raises:
        InputError: The protocols differ, or a folder holds no evaluation or not this model.
    """
    records = [read_evaluation(folder) for folder in (one, other)]
    check_same(records[0].protocol, records[1].protocol, (str(one), str(other)))
    for record, folder in zip(records, (one, other), strict=True):
        if model not in record.models:
            raise InputError(f"{folder} holds no model {model!r}; choose one of {', '.join(record.models)}")
    same_dense = records[0].dense_sha256 == records[1].dense_sha256
    left, right = (record.models[model].metrics() for record in records)
    return {
        name: paired_difference(right[name].sets, left[name].sets)
        for name in left
        if name in right and (same_dense or name not in TO_DENSE)
    }


def version_warning(one: Path, other: Path) -> str | None:
    """Name what differs between two evaluations' code and packages, which the protocol does not contain.

    The code is known only of folders with provenance. None if nothing differs.
    """
    runs = [{**read_json(folder / RUN_RECORD), **(read_provenance(folder) or {})} for folder in (one, other)]
    known = [key for key in ("code_sha256", "packages") if all(key in run for run in runs)]
    changed = [key for key in known if runs[0][key] != runs[1][key]]
    return f"{one} and {other} were measured with different {', '.join(changed)}" if changed else None
