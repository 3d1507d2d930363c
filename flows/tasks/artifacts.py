"""What a run found -> artifacts on Prefect's page: results, pictures, links."""

import base64
import io
import os
import re
from pathlib import Path

from prefect.artifacts import create_link_artifact, create_markdown_artifact

from flows.tasks.outcome import Outcome
from flows.workspaces.overrides import Overrides
from flows.workspaces.workspace import Workspace
from stages.report.markdown import markdown_table
from stages.runtime.errors import without_password
from stages.runtime.text import printable

LIGHT_BYTES, PICTURE_PIXELS = 1_000_000, 1200
"""A heavier PNG is scaled down to this width; the page gets slow beyond two megabytes."""


def results(workspace: Workspace, outcome: Outcome) -> None:
    """Show the results table, samples of equal seeds, quality against cost, and a link to MLflow."""
    summary = workspace.path / "reports" / "summary"
    create_markdown_artifact(
        (summary / "results.md").read_text(), key="results", description="Dense, pruned, finetuned"
    )
    picture("samples", summary / "summary.png", "Samples of each model from the same seeds")
    picture("pareto", summary / "pareto.svg", "Quality against cost")
    if outcome.mlflow_run:
        link(outcome.mlflow_run)


def changes(overrides: Overrides, preset: str | None) -> None:
    """Show which params a run changes, each with its whole key; the run's name has the last parts only."""
    rows = [(f"`{key}`", _code(str(value))) for key, value in overrides.items()]
    if preset:
        rows.insert(0, ("preset", _code(preset)))
    if rows:
        table = markdown_table(["key", "value"], rows, text_columns=2)
        create_markdown_artifact(table, key="changes", description="What this run changes in params.yaml")


def _code(text: str) -> str:
    """Write a text as code in a table of Markdown, whose columns a | would divide."""
    return f"`{printable(text)}`".replace("|", r"\|")


def link(run_id: str) -> None:
    """Link to an MLflow run; does nothing where MLflow has no server."""
    uri = without_password(os.environ.get("MLFLOW_TRACKING_URI", ""))
    if uri.startswith("http"):
        create_link_artifact(f"{uri.rstrip('/')}/#/runs/{run_id}", key="mlflow", link_text=f"MLflow run {run_id}")


def picture(key: str, path: Path, description: str) -> None:
    """Show a picture as part of the page, since a browser cannot read the files of a worker."""
    kind, content = ("svg+xml", _on_white(path)) if path.suffix == ".svg" else ("png", _shrink(path))
    text = f"![{description}](data:image/{kind};base64,{base64.b64encode(content).decode()})"
    create_markdown_artifact(text, key=key, description=description)


def _on_white(path: Path) -> bytes:
    """Add a white background to an SVG, since the page is dark."""
    return re.sub(rb"(<svg\b[^>]*>)", rb'\1<rect width="100%" height="100%" fill="white"/>', path.read_bytes(), count=1)


def _shrink(path: Path) -> bytes:
    """Read a PNG, scaled down if it is heavy."""
    if path.stat().st_size <= LIGHT_BYTES:
        return path.read_bytes()
    from PIL import Image

    with Image.open(path) as image:
        image.thumbnail((PICTURE_PIXELS, 10 * PICTURE_PIXELS))
        target = io.BytesIO()
        image.save(target, format="PNG", optimize=True)
    return target.getvalue()
