"""A story -> reports/index.html: one page that needs no other file and no network."""

import base64
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from stages.artifacts import read_bytes
from stages.report.costs import compare_costs
from stages.report.story import DENSE, Story
from stages.report.table import ALIKE, HEADER, latency_to_text, protocol_to_text, to_rows, write_count, write_target


def environment(*, autoescape: bool) -> Environment:
    """Give the templates of this folder; a name that is missing is an error. HTML is escaped, Markdown is not."""
    folder = FileSystemLoader(Path(__file__).parent)
    templates = Environment(loader=folder, autoescape=autoescape, undefined=StrictUndefined)  # noqa: S701
    templates.trim_blocks = templates.lstrip_blocks = True
    return templates


def write_page(story: Story, figures: Mapping[str, Mapping[str, bytes]], reports: Path) -> str:
    """Fill the template in."""
    evaluation, models = story.evaluation, story.evaluation["models"]
    others = [name for name in models if name != DENSE]
    names = [*models, *(f"{name}-strip" for name in models), *(f"{name}-worst" for name in others)]
    images = {name: _embed(read_bytes(reports / "evaluate" / f"{name}.png"), "png") for name in names}
    images["importance"] = _embed(read_bytes(reports / "importance" / "importance.png"), "png")
    worst = {name: ", ".join(f"{pair['ssim']:.2f}" for pair in models[name]["worst_pairs"]) for name in others}
    template = environment(autoescape=True).get_template("page.html.j2")
    return template.render(
        base=story.base,
        criterion=story.plan["criterion"],
        target=write_target(story.plan["prune"]["target"]),
        evaluation=evaluation,
        tiles=list(_tiles(story)),
        header=HEADER,
        rows=to_rows(evaluation),
        protocol_text=protocol_to_text(evaluation),
        latency_text=latency_to_text(evaluation),
        figures={name: {theme: _embed(svg, "svg+xml") for theme, svg in one.items()} for name, one in figures.items()},
        images=images,
        others=others,
        worst=worst,
        num_worst=len(next(iter(models.values()))["worst_pairs"]),
        costs=list(compare_costs(evaluation)),
        with_attention=_each(models, lambda model: write_count(model["macs"] + model["attention_macs"])),
        on_disk=_each(models, lambda model: f"{model['size_bytes'] / 1e6:.2f} MB"),
        protocol=list(_flatten(evaluation["protocol"])),
        lineage=list(lineage(story)),
    )


def _embed(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _each(models: Mapping[str, Any], write: Any) -> str:  # noqa: ANN401
    return ", ".join(f"{name} {write(model)}" for name, model in models.items())


def _tiles(story: Story) -> Iterator[dict[str, str]]:
    dense, finetuned = (story.evaluation["models"][name] for name in (DENSE, "finetuned"))
    for key, label in (("macs", "MACs"), ("params", "parameters")):
        yield {"value": f"−{1 - finetuned[key] / dense[key]:.1%}", "label": label}
    if finetuned["speed_up"]:
        batch = story.evaluation["costs"][0]["batch"]
        yield {"value": f"{finetuned['speed_up']:.2f}×", "label": f"as fast, batch {batch}, measured"}
    fids = [model["metrics"]["fid"]["mean"] for model in (dense, finetuned)]
    verdict = f", {ALIKE}" if finetuned["metrics"]["fid"]["above_dense"]["is_distinct"] is False else ""
    yield {"value": f"{fids[0]:.2f} → {fids[1]:.2f}", "label": f"FID, dense → finetuned{verdict}"}
    yield {"value": f"{finetuned['metrics']['ssim']['mean']:.3f}", "label": "SSIM against dense"}
    if story.recovered is not None:
        yield {"value": f"{story.recovered:.1%}", "label": "of the FID lost by the cut, taken back"}


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", "–" if value is None else value


def lineage(story: Story) -> Iterator[tuple[str, str]]:
    """Where everything comes from: weights, plan, and the run of every stage."""
    source = story.runs["fetch"]["params"]["fetch"]["model"]
    yield "base", ", ".join(f"{key} {value}" for key, value in source.items() if value)
    for name, sha256 in story.weights_sha256.items():
        yield f"weights, {name}", f"sha256 {sha256}"
    yield "pruning plan", f"sha256 {story.plan_sha256}"
    for stage, run in story.runs.items():
        commit, device = run["git_commit"] or "no commit", run["device"]
        yield stage, f"commit {commit}, code {run['code_sha256'][:12]}, {device['name']}, {device['threads']} threads"
    run = story.runs["evaluate"]
    yield "versions", ", ".join([f"python {run['python']}", *(f"{key} {it}" for key, it in run["packages"].items())])
