"""Two evaluations of one protocol -> how their models differ, with intervals; anything else is refused."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from stages.errors import InputError

if TYPE_CHECKING:
    from stages.protocol.intervals import Estimate


def compare(one: Path, other: Path, model: str) -> dict[str, "Estimate"]:
    """Estimate how much each metric of the second evaluation's model is above that of the first, set by set.

    SSIM and MSE are left out where the two were compared with different dense models.

    Raises:
        InputError: The protocols differ, or a folder holds no evaluation or no such model.
    """
    from stages.protocol.intervals import paired_difference
    from stages.protocol.protocol import check_same
    from stages.protocol.record import METRICS, read_record

    records = [read_record(folder) for folder in (one, other)]
    check_same(records[0].protocol, records[1].protocol, (str(one), str(other)))
    for record, folder in zip(records, (one, other), strict=True):
        if model not in record.models:
            raise InputError(f"{folder} holds no model {model!r}; it holds {', '.join(record.models)}")
    shared = records[0].dense_sha256 == records[1].dense_sha256
    left, right = (record.models[model] for record in records)
    return {
        name: paired_difference(right.metric(name).sets, left.metric(name).sets)
        for name in METRICS
        if shared or name not in ("ssim", "mse")
    }


def _check_versions(one: Path, other: Path) -> None:
    """Warn where other code or packages measured: the protocol does not hold them."""
    from stages.artifacts import RUN_RECORD, read_json

    runs = [read_json(folder / RUN_RECORD) for folder in (one, other)]
    unlike = [key for key in ("code_sha256", "packages", "device") if runs[0].get(key) != runs[1].get(key)]
    if unlike:
        click.echo(f"Warning: {one} and {other} were measured with other {', '.join(unlike)}", err=True)


@click.command()
@click.argument("one", type=Path)
@click.argument("other", type=Path)
@click.option("--model", default="finetuned", help="Which of the models.")
def main(one: Path, other: Path, model: str) -> None:
    """Compare a model in two folders that evaluate wrote, ONE and OTHER: how much OTHER is above ONE."""
    found = compare(one, other, model)
    _check_versions(one, other)
    for name, difference in found.items():
        text = f"{name:<10} {difference.mean:+.6g}"
        if difference.half_width is not None:
            verdict = "differs" if difference.is_distinct else "no difference beyond the interval"
            text += f" ± {difference.half_width:.3g}, {verdict}"
        click.echo(text)


if __name__ == "__main__":
    main()
