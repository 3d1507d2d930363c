"""The pruning methods of Fang et al. (arXiv 2305.10924), and the numbers that they report."""

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
"""Row of a method comparison -> title, in the order of the table; the dense model, which comes first, is left out."""
BASELINE = "diff-pruning-0.05"
"""The row that differences are taken from."""
ABLATION = "ablation"
"""The row of cells that vary the number of timesteps used."""


class PublishedRow(Frozen):
    """One row of a table in the paper."""

    method: str
    params: float = Field(gt=0)
    macs: float = Field(gt=0)
    fid: float = Field(gt=0)
    ssim: float | None = Field(None, ge=0, le=1)
    steps: int | None = Field(None, gt=0)
    """Steps of training or finetuning; None where the paper does not give them."""


class Published(Frozen):
    """The numbers that the paper reports for one preset, and how they were measured."""

    source: Literal["read", "recalled"]
    """read: copied from the paper; recalled: written from memory and not checked."""
    protocol: str
    rows: tuple[PublishedRow, ...] = Field(min_length=1)
    ablation: dict[int, float] = Field(default_factory=dict)
    """Number of timesteps used -> SSIM, at ratio .15 and without finetuning."""


class _File(Frozen):
    presets: dict[str, Published]


def read_published() -> dict[str, Published]:
    """Read the published numbers: preset -> numbers; presets that the paper does not measure are absent."""
    return read_yaml(Path(__file__).with_name("published.yaml"), _File).presets
