"""The progress of a long stage -> a bar on Prefect's page."""

from collections.abc import Mapping
from typing import Any
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact


class ProgressBar:
    """The bar of one task; Prefect shows it from the first update on.

    Args:
        stage: Name of the stage, part of the artifact's key.
    """

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.artifact: UUID | None = None

    def update(self, progress: Mapping[str, Any]) -> None:
        """Move the bar to what `stages.runtime.result.write_progress` wrote."""
        if not progress["total"]:
            return
        percent = 100 * progress["done"] / progress["total"]
        text = "{label}: {done} of {total}, {rate_per_s:.3g}/s, {left_s:.0f} s left".format_map(progress)
        if self.artifact is None:
            artifact = create_progress_artifact(percent, key=f"progress-{self.stage}", description=text)
            self.artifact = artifact if isinstance(artifact, UUID) else None
        else:
            update_progress_artifact(self.artifact, percent, description=text)
