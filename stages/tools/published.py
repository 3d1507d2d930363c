"""The methods of the paper's tables, and the numbers that it prints for them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field

from stages.runtime.schema import Frozen, read_yaml

METHODS: Mapping[str, str] = {
    "scratch": "scratch",
    "random": "random",
    "magnitude": "magnitude",
    "taylor": "taylor",
    "diff-pruning-0": "diff-pruning T = 0",
    "diff-pruning-0.02": "diff-pruning T = .02",
    "diff-pruning-0.05": "diff-pruning T = .05",
    "ours": "ours",
}
"""Rows of a comparison in order -> their titles; the dense model is no row of its own."""
BASELINE = "diff-pruning-0.05"
"""What the others are compared with."""
ABLATION = "ablation"
"""The row of cells that differ in the number of timesteps used."""


class PublishedRow(Frozen):
    """One line of a table of the paper."""

    method: str
    params: float = Field(gt=0)
    macs: float = Field(gt=0)
    fid: float = Field(gt=0)
    ssim: float | None = Field(None, ge=0, le=1)
    steps: int | None = Field(None, gt=0)
    """Of training or finetuning; None where it is not told."""


class Published(Frozen):
    """What the paper prints for one system, and how it was measured."""

    source: Literal["read", "recalled"]
    """recalled was not checked again."""
    protocol: str
    rows: tuple[PublishedRow, ...] = Field(min_length=1)
    ablation: dict[int, float] = Field(default_factory=dict)
    """Timesteps used -> SSIM, at ratio .15 and without finetuning."""


class _File(Frozen):
    presets: dict[str, Published]


def read_published() -> dict[str, Published]:
    """Read what the paper prints: preset -> its numbers; a system of our own has none."""
    return read_yaml(Path(__file__).with_name("published.yaml"), _File).presets
