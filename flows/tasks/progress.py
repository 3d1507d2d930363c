"""The lines of a long stage -> a progress bar that Prefect's page shows."""

import re
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact

LINE = re.compile(r"(?P<label>.+?) (?P<done>\d+)/(?P<total>\d+), (?P<rate>[\d.]+)/s, (?P<left>\d+) s left$")
"""As stages.progress writes it in a log."""


class Progress:
    """The bar of one task; nothing is shown before the first line that tells of progress.

    Args:
        stage: Whose.
    """

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.artifact: UUID | None = None

    def on_line(self, line: str) -> None:
        """Move the bar if the line tells how far the stage is."""
        found = LINE.match(line)
        if not found or not int(found["total"]):
            return
        percent = 100 * int(found["done"]) / int(found["total"])
        told = f"{found['label']}: {found['done']} of {found['total']}, {found['rate']}/s, {found['left']} s left"
        if self.artifact is None:
            artifact = create_progress_artifact(percent, key=f"progress-{self.stage}", description=told)
            self.artifact = artifact if isinstance(artifact, UUID) else None
        else:
            update_progress_artifact(self.artifact, percent, description=told)
