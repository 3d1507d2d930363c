"""The options of `draw` -> PNGs in a folder, or a job of shards."""

import signal
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from stages.drawing.job import MAX_SEED
from stages.drawing.request import Request, choose_labels, parse_range
from stages.runtime.errors import InputError
from stages.runtime.stopping import stop_in_one_line

OF_SHARDS = ("shard_size", "shards", "jobs", "check")
"""Options that only shards have."""


def run(given: Mapping[str, Any], explicit: Collection[str]) -> str:
    """Draw as the options say; returns what was done, in one line.

    Args:
        given: Option -> value.
        explicit: The options that stand on the command line.

    Raises:
        InputError: Options exclude each other, or something that they name does not fit.
    """
    seeds = _seeds(given, explicit)
    params_path = given["params_path"] if "params_path" in explicit or not _is_version(given["model"]) else None
    if given["format"] == "png":
        return _draw_files(given, explicit, seeds, params_path)
    if given["trust"]:
        raise InputError(
            "--trust is for --format png; shards are drawn by other processes, which run no code of a model"
        )
    from stages.drawing.many import draw_many  # noqa: PLC0415  # a job needs none of what draws files, nor they it

    if given["check"] and (wrong := [name for name in ("shards", "jobs") if name in explicit]):
        raise InputError(f"--check compares every finished shard of the job; leave --{wrong[0]} out")
    stop_in_one_line((signal.SIGINT, signal.SIGTERM))
    shards = parse_range(given["shards"], "--shards") if given["shards"] is not None else None
    return draw_many(
        Request(
            model=given["model"],
            out=given["out"],
            seeds=seeds,
            format=given["format"],
            label=given["label"],
            labels_path=given["labels"],
            steps=given["steps"],
            batch_size=given["batch_size"],
            shard_size=given["shard_size"],
            shards=shards,
            jobs=given["jobs"],
            params_path=params_path,
            check=given["check"],
        )
    )


def _is_version(model: str) -> bool:
    return model.startswith("models:/")


def _seeds(given: Mapping[str, Any], explicit: Collection[str]) -> range:
    """Return the seeds of the images.

    Raises:
        InputError: They are given twice, or are no range.
    """
    if given["seeds"] is None:
        if given["seed"] + given["num_images"] > MAX_SEED:
            raise InputError(f"--seed {given['seed']} leaves no room for {given['num_images']} images; lower it")
        return range(given["seed"], given["seed"] + given["num_images"])
    if {"seed", "num_images"} & set(explicit):
        raise InputError("--seeds replaces --seed and --num-images; leave these out")
    return parse_range(given["seeds"], "--seeds")


def _draw_files(given: Mapping[str, Any], explicit: Collection[str], seeds: range, params_path: Path | None) -> str:
    """Draw a folder of PNGs.

    Raises:
        InputError: An option is for shards alone, or something does not fit.
    """
    if wrong := [name.replace("_", "-") for name in OF_SHARDS if name in explicit]:
        raise InputError(f"--{wrong[0]} is for shards; add --format parquet or --format webdataset")
    if "://" in given["out"]:
        raise InputError(f"--out {given['out']}: --format png writes a folder; add --format parquet or webdataset")
    from stages.tools.draw import draw_images  # noqa: PLC0415  # imports diffusers

    out, labels = Path(given["out"]), choose_labels(given["label"], given["labels"], seeds)
    draw_images(given["model"], out, seeds, labels, params_path, given["steps"], given["batch_size"])
    return f"Look at it: {out / 'grid.png'}"
