"""Two evaluations of one protocol -> how their models differ, with intervals; anything else is refused."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from stages.evaluate.intervals import Estimate

METRICS = {"fid": "FID", "kid": "KID", "precision": "precision", "recall": "recall", "ssim": "SSIM", "mse": "MSE"}


def compare(one: Path, other: Path, model: str) -> dict[str, "Estimate"]:
    """Estimate how much each metric of the second evaluation's model is above that of the first, set by set.

    SSIM and MSE are left out where the two were compared with different dense models.

    Raises:
        InputError: The protocols differ, or a folder holds no evaluation or no such model.
    """
    from stages.artifacts import read_json
    from stages.evaluate.intervals import paired_difference
    from stages.protocol.protocol import check_same
    from stages.protocol.reference import read_protocol

    records = [read_json(folder / "evaluation.json") for folder in (one, other)]
    protocols = [read_protocol(folder / "protocol.json") for folder in (one, other)]
    check_same(protocols[0], protocols[1], (str(one), str(other)))
    found = [_metrics(record, folder, model) for record, folder in zip(records, (one, other), strict=True)]
    shared = records[0]["dense_sha256"] == records[1]["dense_sha256"]
    names = [name for name in METRICS if shared or name not in ("ssim", "mse")]
    return {name: paired_difference(found[1][name]["sets"], found[0][name]["sets"]) for name in names}


def _metrics(record: dict[str, Any], folder: Path, model: str) -> dict[str, Any]:
    from stages.errors import InputError

    if model not in record["models"]:
        raise InputError(f"{folder} holds no model {model!r}; it holds {', '.join(record['models'])}")
    metrics: dict[str, Any] = record["models"][model]["metrics"]
    return metrics


@click.command()
@click.argument("one", type=Path)
@click.argument("other", type=Path)
@click.option("--model", default="finetuned", help="Which of the models.")
def main(one: Path, other: Path, model: str) -> None:
    """Compare a model in two folders that evaluate wrote, ONE and OTHER: how much OTHER is above ONE."""
    for name, difference in compare(one, other, model).items():
        text = f"{METRICS[name]:<10} {difference.mean:+.6g}"
        if difference.half_width is not None:
            verdict = "differs" if difference.is_distinct else "no difference beyond the interval"
            text += f" ± {difference.half_width:.3g}, {verdict}"
        click.echo(text)


if __name__ == "__main__":
    main()
