"""The progress of a worker -> lines of JSON for its caller: kind, number of a shard, number of images."""

from typing import Any

READY, BATCH, DONE, FOUND, ERROR = "ready", "batch", "done", "found", "error"
"""It begins; it has so many images of a shard; it finished a shard; others did; a mistake with exit code and text."""
WorkerReport = tuple[Any, ...]
