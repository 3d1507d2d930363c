"""The losses over the timesteps -> losses.csv and metrics.json."""

from pathlib import Path

from stages.artifacts import Importance, write_atomically, write_json


def write_report(importance: Importance, folder: Path) -> None:
    """Write one row a timestep used, and how many there were."""
    rows = [f"{timestep},{loss}" for timestep, loss in zip(importance.timesteps, importance.losses, strict=True)]
    write_atomically(folder / "losses.csv", ("\n".join(["timestep,loss", *rows]) + "\n").encode())
    write_json(folder / "metrics.json", {"timesteps_used": len(importance.timesteps)})
