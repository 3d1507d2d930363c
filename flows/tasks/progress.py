"""The progress of a long stage -> a bar on Prefect's page."""

import time
from collections.abc import Mapping
from typing import Any
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.logging import get_run_logger

from stages.runtime.errors import first_line

PAUSE_S = 300.0
"""Time without updates after one that failed: each may wait for a server while nobody reads what the stage prints."""


class ProgressBar:
    """The bar of one task; Prefect shows it from the first update on.

    Args:
        stage: Name of the stage, part of the artifact's key.
    """

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.artifact: UUID | None = None
        self.paused_until = 0.0

    def update(self, progress: Mapping[str, Any]) -> None:
        """Move the bar to what `stages.runtime.result.write_progress` wrote; a failure stops no stage."""
        if not progress["total"] or time.monotonic() < self.paused_until:
            return
        try:
            self._update(progress)
        except Exception as error:  # noqa: BLE001  # whatever Prefect raises, such as for a bar that somebody deleted
            get_run_logger().warning("Prefect took no progress of %s: %s", self.stage, first_line(error))
            self.artifact, self.paused_until = None, time.monotonic() + PAUSE_S

    def _update(self, progress: Mapping[str, Any]) -> None:
        percent = 100 * progress["done"] / progress["total"]
        text = "{label}: {done} of {total}, {rate_per_s:.3g}/s, {left_s:.0f} s left".format_map(progress)
        if self.artifact is None:
            artifact = create_progress_artifact(percent, key=f"progress-{self.stage}", description=text)
            self.artifact = artifact if isinstance(artifact, UUID) else None
        else:
            update_progress_artifact(self.artifact, percent, description=text)
