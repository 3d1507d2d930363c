"""prefect.yaml -> checked deployments, with the checks that Prefect itself does not make."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

from cronsim import CronSim, CronSimError
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule, RRuleSchedule
from prefect.utilities.schema_tools.validation import ValidationError, validate
from pydantic import Field
from ruamel.yaml import YAML

from flows.workspaces.grid import check_grid, combine
from flows.workspaces.method_rows import check_plan, plan_rows
from flows.workspaces.overrides import apply
from flows.workspaces.recipe_rows import plan_rows_of_curve, with_steps
from flows.workspaces.workspace import current_checkout
from stages.params import Params
from stages.runtime.bounded import parse_yaml
from stages.runtime.errors import InputError, first_line
from stages.runtime.schema import Frozen, read_tree, validate_tree
from stages.tools.preset import find_preset

PARAMS = Path("params.yaml")
CRON_FIELDS = 5
"""A sixth field is refused, since Prefect and cron disagree on the position of the seconds."""


class Schedule(Frozen):
    """When a deployment runs by itself: the keys that Prefect reads."""

    cron: str | None = None
    interval: float | None = Field(None, gt=0)
    """Seconds."""
    rrule: str | None = None
    timezone: str | None = None
    anchor_date: Any = None
    day_or: bool | None = None
    active: bool = True
    slug: str | None = None
    parameters: dict[str, Any] | None = None

    @property
    def times(self) -> str | float | None:
        """The expression of its times: a cron or rrule expression, or seconds."""
        return self.cron or self.rrule or self.interval


class PoolOfDeployment(Frozen):
    """Work pool of a deployment."""

    name: str | None = None
    work_queue_name: str | None = None
    job_variables: dict[str, Any] | None = None


class Deployment(Frozen):
    """An entry of prefect.yaml; a key that Prefect does not read is refused."""

    name: str = Field(pattern=r"^[^/%&<>]+$")
    entrypoint: str = Field(pattern=r"^\w+(/\w+)*\.py(:\w+)?$")
    description: str | None = None
    version: str | None = None
    tags: tuple[str, ...] | None = None
    parameters: dict[str, Any] | None = None
    work_pool: PoolOfDeployment | None = None
    schedules: tuple[Schedule, ...] | None = None
    concurrency_limit: Any = None
    enforce_parameter_schema: bool = True
    build: Any = None
    push: Any = None
    pull: Any = None
    triggers: Any = None

    @property
    def full_name(self) -> str:
        """FLOW/NAME, as Prefect shows it."""
        return f"{self.entrypoint.rpartition(':')[2].replace('_', '-')}/{self.name}"


class Deployments(Frozen):
    """All entries of prefect.yaml."""

    deployments: tuple[Deployment, ...]


def read_deployments(path: Path) -> tuple[Deployment, ...]:
    """Read and check every deployment of a file.

    Raises:
        InputError: A deployment would never run, or not as written.
    """
    entries = _read(path)
    for entry in entries:
        _check(entry, f"{path}: {entry.name}")
    return entries


def _read(path: Path) -> tuple[Deployment, ...]:
    tree = read_tree(path, YAML(typ="safe"))
    entries = tree.get("deployments") if isinstance(tree, dict) else None
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{path} lists no deployments")
    if not all(isinstance(entry, dict) and {"name", "entrypoint"} <= set(entry) for entry in entries):
        raise InputError(f"{path}: a deployment needs a name and an entrypoint such as flows/compress.py:compress")
    found = validate_tree({"deployments": entries}, Deployments, str(path)).deployments
    names = [(entry.entrypoint, entry.name) for entry in found]
    for entrypoint, name in names:
        if names.count((entrypoint, name)) > 1:
            raise InputError(f"{path}: {name} of {entrypoint} is listed twice; give each a name of its own")
    return found


def _check(entry: Deployment, where: str) -> None:
    for schedule in entry.schedules or ():
        _check_schedule(schedule, where)
    schema = _schema(entry.entrypoint, where)
    _check_parameters(entry.parameters or {}, schema, where, is_whole=False)
    for schedule in entry.schedules or ():  # no one adds what is missing to a run that begins by itself
        given = {**(entry.parameters or {}), **(schedule.parameters or {})}
        _check_parameters(given, schema, f"{where}, schedule {schedule.times}", is_whole=schedule.active)


def _check_parameters(given: dict[str, Any], schema: Mapping[str, Any], where: str, *, is_whole: bool) -> None:
    unknown = sorted(set(given) - set(schema["properties"]))
    if unknown:
        allowed = ", ".join(schema["properties"])
        raise InputError(f"{where}: unknown parameter {', '.join(unknown)}; the flow takes {allowed}")
    try:
        validate(given, schema, raise_on_error=True, preprocess=False, ignore_required=not is_whole)
    except ValidationError as error:
        raise InputError(f"{where}: {first_line(error)}") from None
    overrides, grid = given.get("overrides") or {}, given.get("grid", {})
    if not all(isinstance(key, str) for key in (*overrides, *grid)):
        raise InputError(f"{where}: keys of overrides and grid are text; write them as prune.target.macs")
    if PARAMS.is_file():
        try:
            check_params(given, schema)
        except InputError as error:
            raise InputError(f"{where}: {error.message}") from None


def check_params(given: Mapping[str, Any], schema: Mapping[str, Any]) -> None:
    """Check the parameters of a deployment against the project in the current folder.

    Args:
        given: Parameters of the flow.
        schema: JSON schema of all of its parameters.

    Raises:
        InputError: Overrides, a cell of the grid, rows, seeds or limits are not allowed.
    """
    overrides = given.get("overrides") or {}
    params_path = PARAMS if given.get("preset") is None else find_preset(given["preset"])
    cells = combine(given["grid"]) if "grid" in given else [{}]
    check_grid(given.get("grid", {}), overrides)
    steps = given.get("steps")
    for cell in cells:
        apply(with_steps({**overrides, **cell}, steps), params_path)
    if "seeds" in schema["properties"]:
        text = apply(with_steps(overrides, steps), params_path).decode()
        params = Params.model_validate(parse_yaml(text, str(params_path)))
        seeds = given.get("seeds", schema["properties"]["seeds"]["default"])
        if "recipes" in schema["properties"]:
            names, steps, recipes = (given.get(key) for key in ("rows", "steps", "recipes"))
            plan_rows_of_curve(params, names, seeds, steps, recipes or {}, overrides)
        else:
            check_plan(plan_rows(params), given.get("rows") or [], seeds, overrides)
    current_checkout().check_limits(given.get("limits") or {})


def _check_schedule(schedule: Schedule, where: str) -> None:
    """Build the schedule as Prefect does, so that Prefect cannot refuse it halfway through the file."""
    kinds = [schedule.cron, schedule.interval, schedule.rrule]
    if sum(kind is not None for kind in kinds) != 1:
        raise InputError(f"{where}: give exactly one of cron, interval, rrule in a schedule")
    given = schedule.model_dump(include={"timezone", "anchor_date", "day_or"}, exclude_none=True)
    try:
        if schedule.cron is not None:
            _check_cron(schedule.cron, where)
            CronSchedule(cron=schedule.cron, **given)
        elif schedule.interval is not None:
            IntervalSchedule(interval=timedelta(seconds=schedule.interval), **given)
        else:
            RRuleSchedule(rrule=str(schedule.rrule), **given)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{where}: invalid schedule ({reason})") from None


def _check_cron(cron: str, where: str) -> None:
    expected = "expected minute hour day month weekday, such as 0 2 * * *"
    if len(cron.split()) != CRON_FIELDS:
        raise InputError(f"{where}: invalid cron expression {cron!r}: {expected}")
    try:
        next(CronSim(cron, datetime.now(UTC)))
    except CronSimError as error:
        raise InputError(f"{where}: invalid cron expression {cron!r} ({first_line(error)}): {expected}") from None
    except StopIteration:
        raise InputError(
            f"{where}: cron expression {cron!r} never fires, since no such day exists; correct it"
        ) from None


def _schema(entrypoint: str, where: str) -> dict[str, Any]:
    """Return the parameters of a flow as a JSON schema."""
    file, _, name = entrypoint.partition(":")
    try:
        flow = getattr(import_module(file.removesuffix(".py").replace("/", ".")), name)
        return dict(flow.parameters.model_dump_for_openapi())
    except (Exception, SystemExit) as error:  # noqa: BLE001  # an import may raise anything
        raise InputError(f"{where}: there is no flow {entrypoint} ({first_line(error)})") from None
