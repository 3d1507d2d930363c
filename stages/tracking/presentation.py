"""The params, metrics and reports of a compression -> how MLflow's pages show it: name, text, first metrics, data."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from stages.runtime.errors import without_password
from stages.runtime.git import git_output
from stages.runtime.schema import Frozen
from stages.storage.files import read_json

VERDICT = Path("summary") / "verdict.json"
"""Report file whose `sentence` a description begins with; without it, the description begins with the numbers."""
TABLE, PICTURE = Path("summary") / "results.md", Path("summary") / "summary.png"
"""Report files that a description shows."""
ENTRY_POINT = "dvc repro"
UNITS = {"macs": "MACs", "params": "params", "latency_ms": "ms", "ratio": "ratio"}
LOSSES = ("noise", "output", "feature", "jacobian")
USUAL_LOSSES = ["output", "feature"]
"""Terms of the loss that are not named, since they are the project's own recipe."""
FIRST_METRICS = {
    "1 FID": "evaluate.finetuned.fid",
    "2 FID to dense": "evaluate.finetuned.fid_dense",
    "3 SSIM": "evaluate.finetuned.ssim",
}
"""Metrics that come first on MLflow's pages, which sort by name, and the metrics that they repeat."""


NUMBERS = (
    ("FID", "evaluate.finetuned.fid", "dense", "evaluate.dense.fid"),
    ("FID to dense", "evaluate.finetuned.fid_dense", "floor", "evaluate.dense.fid_dense_unpaired"),
    ("SSIM", "evaluate.finetuned.ssim", "dense", "evaluate.dense.ssim"),
)
"""Name of a number, its metric, and the name and metric of what it is compared with."""
NAMES = ("repo", "name", "system", "path", "uri")
"""Keys of a source of models or images of which one names it."""


class DatasetRecord(Frozen):
    """Images that a compression used."""

    name: str
    digest: str
    """Start of the hash of the images."""
    source: dict[str, Any]
    num_images: int
    context: str
    """What they were used for."""


def short_name(source: Mapping[str, Any]) -> str:
    """Name the source of a model or of images by the last part of its name, repository, address or path.

    Raises:
        LookupError: It has none of these.
    """
    name = next((str(source[key]) for key in NAMES if source.get(key)), "")
    if not name:
        raise LookupError("the source has no name")
    if source["source"] == "registry":
        name = name.rpartition("/")[0]  # models:/NAME/VERSION
    return name.rstrip("/").rsplit("/")[-1]


def run_name(params: Mapping[str, Any]) -> str:
    """Name a run by model, criterion and budget, such as "digits · diff-pruning · ratio 0.3", and what is unusual.

    Args:
        params: Block -> its params.
    """
    name = short_name(params["fetch"]["model"]).removeprefix("espalier-")
    return " · ".join([name, params["importance"]["criterion"], _budget(params["prune"]["target"]), *_unusual(params)])


def _budget(target: Mapping[str, Any]) -> str:
    key, amount = next((key, amount) for key, amount in target.items() if amount is not None)
    return f"{amount} {UNITS[key]}" if key == "latency_ms" else f"{UNITS[key]} {amount}"


def _unusual(params: Mapping[str, Any]) -> Iterator[str]:
    """Name rounds, recipe and seed where they are not the usual ones."""
    if (count := params["rounds"]["count"]) > 1:
        yield f"{count} rounds"
    finetune = params["finetune"]
    if finetune["init"] != "pruned":
        yield str(finetune["init"])
    losses = [name for name in LOSSES if finetune["loss"].get(name)]
    if losses != USUAL_LOSSES:
        yield f"{' + '.join(losses)} loss"
    if params["prune"].get("compensate"):
        yield "compensated"
    if params["seed"]:
        yield f"seed {params['seed']}"


def first_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Repeat the metrics that matter first under names that come first, where they were measured."""
    found = {name: metrics[key] for name, key in FIRST_METRICS.items() if key in metrics}
    if {"evaluate.finetuned.macs", "evaluate.dense.macs"} <= metrics.keys():
        found["4 MACs share of dense"] = metrics["evaluate.finetuned.macs"] / metrics["evaluate.dense.macs"]
    if "costs.finetuned.speed_up" in metrics:
        found["5 speed-up"] = metrics["costs.finetuned.speed_up"]
    return found


def describe(metrics: Mapping[str, float], reports: Path) -> str:
    """Describe a compression in Markdown: the verdict, or the numbers it would be drawn from, and the table."""
    parts = [verdict_line(reports) or _numbers(metrics)]
    if (table := reports / TABLE).is_file():
        parts.append("\n".join(line for line in table.read_text().splitlines() if line.startswith("|")))
    return "\n\n".join(part for part in parts if part)


def _numbers(metrics: Mapping[str, float]) -> str:
    """Put the first metrics into a sentence, each beside that of the dense model."""
    said = []
    for name, key, beside, other in NUMBERS:
        if key in metrics:
            more = f" ({beside} {metrics[other]:.3g})" if other in metrics else ""
            said.append(f"{name} {metrics[key]:.3g}{more}")
    return f"{', '.join(said)}." if said else ""


def verdict_line(reports: Path) -> str:
    """Return the verdict of the report stage in bold; empty if there is none yet."""
    path = reports / VERDICT
    return f"**{read_json(path)['sentence']}**" if path.is_file() else ""


def show_picture(run_id: str, reports: Path) -> str:
    """Return the Markdown of the picture among a run's reports, which MLflow's pages load from their own server."""
    if not (reports / PICTURE).is_file():
        return ""
    query = urlencode({"path": f"reports/{PICTURE}", "run_uuid": run_id})
    return f"![samples of each model from the same noise](get-artifact?{query})"


def source_tags() -> dict[str, str]:
    """Return the tags of a run's source: repository, commit, branch and entry point, and no path of this machine."""
    top, remote = _git("rev-parse", "--show-toplevel"), _find_remote(Path())
    found = {
        "mlflow.source.type": "PROJECT",
        "mlflow.source.name": remote or Path(top).name,
        "mlflow.source.git.repoURL": remote,
        "mlflow.source.git.branch": _git("symbolic-ref", "--short", "--quiet", "HEAD"),
        "mlflow.project.entryPoint": ENTRY_POINT,
    }
    commit = _git("rev-parse", "--verify", "--quiet", "HEAD")
    return {key: value for key, value in found.items() if value} | {"mlflow.source.git.commit": commit}


def _find_remote(folder: Path, depth: int = 3) -> str:
    """Find the address of a repository's origin, without a password; a clone of a local one has that one's origin."""
    origin = _git("config", "--get", "remote.origin.url", folder=folder)
    if re.match(r"(?!file:)[\w+]+://|[\w.-]+@[\w.-]+:", origin):
        return without_password(origin)
    local = folder / origin.removeprefix("file://")
    return _find_remote(local, depth - 1) if origin and depth and local.is_dir() else ""


def _git(*arguments: str, folder: Path = Path()) -> str:
    return git_output(folder, *arguments) or ""


def without_folders(value: object) -> str:
    """Write a param's value without the folders of this machine: of an absolute path, the last part stays."""
    text = str(value)
    return f"…/{Path(text).name}" if re.match(r"[/~]|\$.*/|[A-Za-z]:\\", text) else text
