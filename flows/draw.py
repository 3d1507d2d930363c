"""A model and seeds -> shards of images, drawn by the command draw below a Prefect flow."""

from collections.abc import Mapping
from typing import Any, Literal

from prefect import State, flow, task
from prefect.logging import get_run_logger
from prefect.states import Completed
from pydantic import NonNegativeInt, PositiveInt

from flows.tasks.errors import fail_on_input_error
from flows.tasks.notifications import HOOKS
from flows.tasks.progress import ProgressBar
from flows.tasks.stages import RETRIED, fail
from flows.workspaces.commands import run
from stages.runtime.errors import InputError


@flow(flow_run_name="{model}", persist_result=False, **HOOKS)
@fail_on_input_error
def draw(
    model: str,
    out: str,
    num_images: PositiveInt = 1000,
    seed: NonNegativeInt = 0,
    format: Literal["parquet", "webdataset"] = "parquet",  # noqa: A002  # the option's name
    options: dict[str, str | int] | None = None,
    *,
    check: bool = False,
) -> State[Any]:
    """Draw images into shards; a run of an interrupted job continues it, and several runs of one job share it.

    Args:
        model: A version, models:/NAME/3 or models:/NAME@champion, or a folder on the worker.
        out: s3://BUCKET/PREFIX, or a folder on the worker.
        num_images: Number of images.
        seed: Seed of the first image; +1 for each next.
        format: parquet or webdataset.
        check: Draw nothing, and compare the finished shards with their hashes.
        options: Further options of `espalier draw`, such as {labels: labels.txt, shard-size: 1000, shards: 0:50}.
    """
    given = {"model": model, "out": out, "num-images": num_images, "seed": seed, "format": format, **(options or {})}
    state = draw_shards(to_arguments(given, check=check), return_state=True)
    if not state.is_completed():
        raise InputError(state.message or "drawing failed")
    return Completed(message=state.message)


def to_arguments(options: Mapping[str, str | int], *, check: bool) -> list[str]:
    """Write options of `espalier draw` as its arguments."""
    return [*(f"--{name}={value}" for name, value in options.items()), *(["--check"] if check else [])]


@task(**RETRIED)
@fail_on_input_error
def draw_shards(arguments: list[str]) -> State[None]:
    """Run the command, which shows its progress; an unavailable server or a killed command is tried again."""
    command = ["python", "-m", "stages.tools", "draw", *arguments]
    result = run(command, get_run_logger().info, on_progress=ProgressBar("draw").update)
    if result.code:
        return fail(result, is_transient=result.is_transient)
    return Completed(message=result.lines[-1])
