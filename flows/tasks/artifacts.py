"""What a run found -> artifacts on Prefect's page: results, pictures, links."""

import base64
import io
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from prefect.artifacts import create_link_artifact, create_markdown_artifact

from flows.workspaces.workspace import Workspace
from stages.runtime.errors import without_password

if TYPE_CHECKING:
    from flows.tasks.stages import Outcome

LIGHT_BYTES, PICTURE_PIXELS = 1_000_000, 1200
"""A picture that is heavier becomes this wide; the page gets slow beyond two megabytes."""


def results(place: Workspace, outcome: "Outcome") -> None:
    """Show the results table, the picture of equal seeds, cost against quality, and the way to MLflow."""
    summary = place.path / "reports" / "summary"
    create_markdown_artifact(
        (summary / "results.md").read_text(), key="results", description="Dense, pruned, finetuned"
    )
    picture("samples", summary / "summary.png", "The same seeds drawn by each model")
    picture("pareto", summary / "pareto.svg", "Quality against cost")
    if outcome.mlflow_run:
        link(outcome.mlflow_run)


def link(run_id: str) -> None:
    """Show where in MLflow a run is; without a server there is nothing to link to."""
    uri = without_password(os.environ.get("MLFLOW_TRACKING_URI", ""))
    if uri.startswith("http"):
        create_link_artifact(f"{uri.rstrip('/')}/#/runs/{run_id}", key="mlflow", link_text=f"MLflow run {run_id}")


def picture(key: str, path: Path, description: str) -> None:
    """Show a picture within the page itself, since a browser cannot reach the files of a worker."""
    kind, content = ("svg+xml", _on_white(path)) if path.suffix == ".svg" else ("png", _shrink(path))
    text = f"![{description}](data:image/{kind};base64,{base64.b64encode(content).decode()})"
    create_markdown_artifact(text, key=key, description=description)


def _on_white(path: Path) -> bytes:
    """Put paper behind a figure, since the page is dark."""
    return re.sub(rb"(<svg\b[^>]*>)", rb'\1<rect width="100%" height="100%" fill="white"/>', path.read_bytes(), count=1)


def _shrink(path: Path) -> bytes:
    if path.stat().st_size <= LIGHT_BYTES:
        return path.read_bytes()
    from PIL import Image

    with Image.open(path) as image:
        image.thumbnail((PICTURE_PIXELS, 10 * PICTURE_PIXELS))
        target = io.BytesIO()
        image.save(target, format="PNG", optimize=True)
    return target.getvalue()
