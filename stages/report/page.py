"""Report data -> reports/index.html, one page that needs no other file and no network."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.protocol.costs import Cost
from stages.protocol.evaluation import DENSE, EvaluationRecord, Model
from stages.protocol.verdict import FINETUNED
from stages.report.by_class import describe_classes
from stages.report.grid_section import read_section
from stages.report.pairs import describe_pairs
from stages.report.report_data import ReportData, read_picture
from stages.report.speed import rows_by_setting
from stages.report.table import (
    ALIKE,
    HEADER,
    describe_protocol,
    latency_to_text,
    shares_to_text,
    to_rows,
    write_count,
    write_size,
    write_speed_up,
    write_target,
)
from stages.report.templates import WORDS, embed, embed_figures, render
from stages.report.tiles import headline_tiles
from stages.report.variants import VARIANTS_HEADER, variants_to_rows, variants_to_text
from stages.runtime.errors import InputError
from stages.runtime.schema import flatten
from stages.runtime.text import printable
from stages.storage.files import read_bytes

SIGN = b"Made by Espalier."
"""Marks a page as written by this stage."""
CONTENTS = {
    "pairs": "Pictures",
    "classes": "By class",
    "results": "Results",
    "cost": "Time and memory",
    "grid": "Steps and guidance",
    "variants": "Variants",
    "recovery": "Recovery",
    "importance": "Importance",
    "protocol": "Protocol",
    "lineage": "Lineage",
}
"""Anchor of a section -> its entry in the contents."""
SHOWN_CLASSES = 12
"""Classes that are shown at once; the others are folded."""
COST_HEADER = {
    "model": "model",
    "batch": "batch",
    "precision of a pass": "precision",
    "mode": "mode",
    "passes": "passes",
    "median": "median",
    "p95": "p95",
    "images/s": "images/s",
    "peak memory": "peak memory",
    "speed-up": "speed-up",
    "MACs ratio": "MACs ratio",
    "efficiency": "efficiency",
}.items()
"""Term that explains a column of the table of costs -> its heading."""


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
    record, images = report.record, _embed_images(report, reports)  # which checks them, before others read them
    others = [name for name in record.models if name != DENSE]
    grid = read_section(reports, record)
    energy = next((row.energy_source for row in report.costs.costs if row.energy_source), "")
    classes = describe_classes(record)
    optional = {"classes": classes, "grid": grid, "variants": report.variants}
    return render(
        "page.html.j2",
        report=report,
        record=record,
        verdict=report.verdict(),
        word=WORDS[report.verdict().level],
        contents=list_contents(optional),
        grid=grid,
        pairs=describe_pairs(report, reports),
        classes=classes,
        shown_classes=SHOWN_CLASSES,
        cost_header=[*COST_HEADER, *([("energy", "energy")] if energy else [])],
        energy=energy,
        target=write_target(report.prune.target),
        tiles=list(headline_tiles(record, report.costs, report.recovered)),
        header=HEADER,
        rows=to_rows(record, report.costs),
        texts=_write_texts(report),
        figures=embed_figures({**figures, **(grid.figures if grid else {})}),
        images=images,
        variants_header=VARIANTS_HEADER,
        variants=variants_to_rows(report.variants),
        others=others,
        worst={name: write_worst(record.models[name]) for name in others},
        costs=list(rows_by_setting(report)),
        speed_up=_write_speed_up,
        write_energy=write_energy,
        with_attention=_each(record, lambda model: write_count(model.macs + model.attention_macs)),
        on_disk=_each(record, lambda model: write_size(model.size_bytes)),
        protocol=[(key, "–" if it is None else it) for key, it in flatten(record.protocol.model_dump(mode="json"))],
        lineage=list(lineage(report)),
    )


def _write_texts(report: ReportData) -> dict[str, str]:
    """Write the sentences below the tables."""
    return {
        "protocol": describe_protocol(report.record),
        "latency": latency_to_text(report.costs),
        "shares": shares_to_text(report.record),
        "variants": variants_to_text(report.variants) if report.variants else "",
    }


def list_contents(optional: Mapping[str, object]) -> list[tuple[str, str]]:
    """List the sections that the page has; one of `optional` only if there is something in it."""
    return [entry for entry in CONTENTS.items() if optional.get(entry[0], True)]


def _embed_images(report: ReportData, reports: Path) -> dict[str, str]:
    """Embed the pictures of the evaluation, and those of the finetuning if it drew any."""
    models = report.record.models
    names = [*models, *(f"{name}-strip" for name in models), *(f"{name}-worst" for name in models if name != DENSE)]
    images = {name: embed(read_picture(reports / "evaluate" / f"{name}.png"), "png") for name in names}
    if report.finetune.samples:
        images["samples"] = embed(read_picture(reports / "finetune" / "samples.png"), "png")
    return images


def write_worst(model: Model) -> str:
    """Format the SSIM of the least similar pairs."""
    return ", ".join(f"{pair.ssim:.2f}" for pair in model.worst_pairs)


def write_energy(joules: float | None) -> str:
    """Format the joules of an image to three digits."""
    return "–" if joules is None else f"{joules:.3g} J"


def _each(record: EvaluationRecord, write: Callable[[Model], str]) -> str:
    return ", ".join(f"{name} {write(model)}" for name, model in record.models.items())


def _write_speed_up(cost: Cost) -> str:
    """Format a speed-up with its interval, and the mark `ALIKE` if the interval contains 1."""
    low, high = cost.speed_up_low or 0.0, cost.speed_up_high or 0.0
    return f"{write_speed_up(cost)}{f' {ALIKE}' if low <= 1 <= high and low < high else ''}"


def lineage(report: ReportData, planned: str = FINETUNED) -> Iterator[tuple[str, str]]:
    """Hashes of weights and of the plan of a model, and code, commit and device of each stage."""
    yield "base", printable(", ".join(f"{key} {value}" for key, value in report.source.items() if value))
    for name, model in report.record.models.items():
        yield f"weights, {name}", f"sha256 {model.weights_sha256}"
    yield "pruning plan", f"sha256 {report.plans[planned]}"
    for stage in report.runs:
        yield stage, printable(_describe_provenance(report.provenance.get(stage)))
    run = report.runs["evaluate"]
    versions = [f"python {run['python']}", *(f"{key} {version}" for key, version in run["packages"].items())]
    yield "versions", printable(", ".join(versions))


def _describe_provenance(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "not known; the output came from DVC's cache"
    commit = found.get("git_commit") or "none"
    state = " with changes" if found.get("git_commit") and found.get("git_dirty") else ""
    device = f"{found['device'].get('name')}, {found['device'].get('threads')} threads"
    return f"code {found.get('code_sha256', '')[:12]}, commit {commit}{state}, {device}"
