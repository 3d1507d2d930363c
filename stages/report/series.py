"""CSV files of the stages' reports -> curves, the SSIM of the pairs, and the contribution of each module."""

import io
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from stages.models.layer_order import in_run_order, module_name
from stages.runtime.errors import InputError, first_line
from stages.storage.files import read_bytes


def read_curve(path: Path) -> list[tuple[float, float]]:
    """Read (step, held-out loss) of a recovery; raises InputError if the file is damaged."""
    rows = _read_csv(path, ["step", "heldout_loss"])
    return list(zip(rows["step"], rows["heldout_loss"], strict=True))


def read_ssim(path: Path, models: Sequence[str]) -> dict[str, list[float]]:
    """Read the SSIM of the pairs of some models, by set and image; raises InputError if the file is damaged."""
    rows = _read_csv(path, ["ssim"], texts=["model"])
    return {name: rows["ssim"][rows["model"] == name].tolist() for name in models}


def read_importance(path: Path) -> pd.DataFrame:
    """Read the contributions, summed over the layers of each module: a row for each, a column for each timestep.

    Raises:
        InputError: The file is missing, or a value is no number.
    """
    try:
        table = pd.read_csv(io.BytesIO(read_bytes(path)), index_col="layer").astype(float)
    except ValueError as error:
        raise InputError(f"{path} is invalid ({first_line(error)}); run its stage again") from None
    return table.loc[in_run_order(table.index)].groupby(module_name, sort=False).sum()


def read_losses(path: Path) -> list[tuple[float, float]]:
    """Read (timestep, loss) of the importance, or nothing; raises InputError if the file is damaged."""
    if not read_bytes(path).strip().partition(b"\n")[2]:
        return []
    rows = _read_csv(path, ["timestep", "loss"])
    return list(zip(rows["timestep"], rows["loss"], strict=True))


def _read_csv(path: Path, numbers: list[str], texts: Sequence[str] = ()) -> pd.DataFrame:
    """Read columns of a CSV; rows in which a number is missing are left out.

    Raises:
        InputError: There are no rows, no such columns, or a value is no number.
    """
    try:
        table = pd.read_csv(io.BytesIO(read_bytes(path)), dtype=dict.fromkeys(numbers, float))[
            [*texts, *numbers]
        ].dropna()
    except (KeyError, ValueError) as error:
        raise InputError(f"{path} is invalid ({first_line(error)}); run its stage again") from None
    if table.empty:
        raise InputError(f"{path} holds no rows; run its stage again")
    return table
