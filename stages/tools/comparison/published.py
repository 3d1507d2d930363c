"""The methods that are compared, most of them of Fang et al. (arXiv 2305.10924), and what papers report of them."""

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
    "no-cancel-taylor": "no-cancel Taylor",
    "ours": "ours",
}
"""Row of a method comparison -> title, in the order of the table; the dense model, which comes first, is left out."""
PRUNES_ITSELF = frozenset(METHODS) - {"scratch"}
"""Rows that decide by which criterion is pruned; `scratch` has only the widths of what it is compared with."""
BASELINE = "diff-pruning-0.05"
"""The row that differences are taken from."""
ABLATION = "ablation"
"""The row of cells that vary the number of timesteps used."""
SIZE_TOLERANCE = 0.02
"""Relative difference of MACs up to which a published row has the size of a comparison."""


class PublishedRow(Frozen):
    """One row of a table in a paper; None stands for what the paper does not give."""

    method: str
    params: float | None = Field(None, gt=0)
    macs: float | None = Field(None, gt=0)
    """Multiply-accumulates per image; of methods that cache, the mean over the steps of sampling."""
    fid: float = Field(gt=0)
    ssim: float | None = Field(None, ge=0, le=1)
    steps: int | None = Field(None, ge=0)
    """Steps of training or finetuning."""
    speed: float | None = Field(None, gt=0)
    """Time of the dense model over that of this one."""

    def is_of_size(self, macs: float) -> bool:
        """Whether a model with `macs` has the row's size, up to the rounding of printed numbers."""
        return self.macs is not None and abs(macs / self.macs - 1) <= SIZE_TOLERANCE


class PublishedTable(Frozen):
    """The numbers that one paper reports for one system, and how they were measured."""

    paper: str
    source: Literal["read", "recalled"]
    """read: copied from the paper; recalled: written from memory and not checked."""
    protocol: str
    rows: tuple[PublishedRow, ...] = Field(min_length=1)
    ablation: dict[int, float] = Field(default_factory=dict)
    """Number of timesteps used -> SSIM, at ratio .15 and without finetuning."""


class _File(Frozen):
    systems: dict[str, tuple[PublishedTable, ...]]


def read_published() -> dict[str, tuple[PublishedTable, ...]]:
    """Read the published numbers: preset -> tables, the paper's of Diff-Pruning first."""
    return read_yaml(Path(__file__).with_name("published.yaml"), _File).systems
