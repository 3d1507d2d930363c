"""Report data -> reports/index.html, one page that needs no other file and no network."""

import base64
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from stages.protocol.evaluation import DENSE, EvaluationRecord, Model
from stages.report.report_data import ReportData, read_picture
from stages.report.speed import rows_by_setting
from stages.report.table import (
    ALIKE,
    HEADER,
    latency_to_text,
    protocol_to_text,
    to_rows,
    write_count,
    write_speed_up,
    write_target,
)
from stages.runtime.errors import InputError
from stages.runtime.schema import flatten
from stages.runtime.text import printable
from stages.storage.files import read_bytes

SIGN = b"Made by Espalier."
"""Marks a page as written by this stage."""


def environment(*, autoescape: bool) -> Environment:
    """Load the templates of this folder; an undefined name is an error. HTML is escaped, Markdown is not."""
    folder = FileSystemLoader(Path(__file__).parent)
    templates = Environment(loader=folder, autoescape=autoescape, undefined=StrictUndefined)  # noqa: S701
    templates.trim_blocks = templates.lstrip_blocks = True
    return templates


def check_page(page: Path, folders: Sequence[Path]) -> None:
    """Check that the page overwrites nothing else and lies in no folder that a stage writes.

    Raises:
        InputError: It would overwrite another file, or lies in such a folder.
    """
    if any(page.resolve().is_relative_to(folder.resolve()) for folder in folders):
        raise InputError(f"{page} lies in an output folder of a stage; choose another --page")
    if not page.name or page.is_dir() or (page.exists() and SIGN not in read_bytes(page)):
        raise InputError(f"{page} was not written by this stage; move it away or choose another --page")


def write_page(report: ReportData, figures: Mapping[str, Mapping[str, bytes]], reports: Path) -> str:
    """Render the page."""
    record = report.record
    others = [name for name in record.models if name != DENSE]
    names = [*record.models, *(f"{name}-strip" for name in record.models), *(f"{name}-worst" for name in others)]
    images = {name: _embed(read_picture(reports / "evaluate" / f"{name}.png"), "png") for name in names}
    images["importance"] = _embed(read_picture(reports / "importance" / "importance.png"), "png")
    if report.finetune.samples:
        images["samples"] = _embed(read_picture(reports / "finetune" / "samples.png"), "png")
    template = environment(autoescape=True).get_template("page.html.j2")
    return template.render(
        report=report,
        record=record,
        target=write_target(report.prune.target),
        tiles=list(_tiles(report)),
        header=HEADER,
        rows=to_rows(record, report.costs),
        protocol_text=protocol_to_text(record),
        latency_text=latency_to_text(report.costs),
        figures={name: {theme: _embed(svg, "svg+xml") for theme, svg in one.items()} for name, one in figures.items()},
        images=images,
        others=others,
        worst={name: write_worst(record.models[name]) for name in others},
        costs=list(rows_by_setting(report.costs)),
        speed_up=write_speed_up,
        with_attention=_each(record, lambda model: write_count(model.macs + model.attention_macs)),
        on_disk=_each(record, lambda model: f"{model.size_bytes / 1e6:.2f} MB"),
        protocol=[(key, "–" if it is None else it) for key, it in flatten(record.protocol.model_dump(mode="json"))],
        lineage=list(lineage(report)),
    )


def write_worst(model: Model) -> str:
    """Format the SSIM of the least similar pairs."""
    return ", ".join(f"{pair.ssim:.2f}" for pair in model.worst_pairs)


def _embed(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _each(record: EvaluationRecord, write: Callable[[Model], str]) -> str:
    return ", ".join(f"{name} {write(model)}" for name, model in record.models.items())


def _tiles(report: ReportData) -> Iterator[tuple[str, str]]:
    """Headline numbers, each with its label."""
    dense, finetuned = (report.record.models[name] for name in (DENSE, "finetuned"))
    yield f"−{1 - finetuned.macs / dense.macs:.1%}", "MACs"
    yield f"−{1 - finetuned.params / dense.params:.1%}", "parameters"
    cost = report.costs.first("finetuned")
    if cost.speed_up:
        yield f"{cost.speed_up:.2f}×", f"speed at batch {cost.batch}, {cost.precision}, measured"
    above = finetuned.fid.above_dense
    verdict = f", {ALIKE}" if above and above.is_distinct is False else ""
    yield f"{dense.fid.mean:.2f} → {finetuned.fid.mean:.2f}", f"FID, dense → finetuned{verdict}"
    if finetuned.fid_dense:
        floor = report.record.fid_dense_floor
        scale = "" if floor is None else f"; dense sets from different noise {floor:.2f}"
        yield f"{finetuned.fid_dense.mean:.3f}", f"FID to the dense model's images{scale}"
    yield f"{finetuned.ssim.mean:.3f}", "SSIM against dense"
    if report.recovered is not None:
        yield f"{report.recovered:.1%}", "of the FID lost by pruning, recovered"


def lineage(report: ReportData) -> Iterator[tuple[str, str]]:
    """Hashes of weights and plan, and code, commit and device of each stage."""
    yield "base", printable(", ".join(f"{key} {value}" for key, value in report.source.items() if value))
    for name, model in report.record.models.items():
        yield f"weights, {name}", f"sha256 {model.weights_sha256}"
    yield "pruning plan", f"sha256 {report.plan_sha256}"
    for stage in report.runs:
        yield stage, printable(_describe_provenance(report.provenance.get(stage)))
    run = report.runs["evaluate"]
    versions = [f"python {run['python']}", *(f"{key} {version}" for key, version in run["packages"].items())]
    yield "versions", printable(", ".join(versions))


def _describe_provenance(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "output restored from DVC's cache"
    commit = found.get("git_commit") or "none"
    state = " with changes" if found.get("git_commit") and found.get("git_dirty") else ""
    device = f"{found['device'].get('name')}, {found['device'].get('threads')} threads"
    return f"code {found.get('code_sha256', '')[:12]}, commit {commit}{state}, {device}"
