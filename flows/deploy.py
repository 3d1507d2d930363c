"""prefect.yaml -> deployments on a Prefect server, after checks of what Prefect itself would take without a word."""

import inspect
import os
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import click
from cronsim import CronSim, CronSimError
from prefect.automations import Automation, ChangeFlowRunState, EventTrigger, Posture, ResourceSpecification
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL
from ruamel.yaml import YAML

from flows.commands import run
from flows.notify import REFUSED
from flows.overrides import apply, plan_cells
from stages.errors import InputError, first_line
from stages.schema import read_tree

POOL = "espalier"
LOST = "espalier: runs that were lost"
LOST_AFTER_S = 90
"""Three heartbeats, as the pools' templates set them."""
PARAMS = Path("params.yaml")


def deploy(path: Path, pool: str | None) -> None:
    """Check every deployment of a file and hand all of them to the server.

    Args:
        path: A prefect.yaml.
        pool: The work pool of those that name none.

    Raises:
        InputError: A deployment would never run, or not as it is written; or the server or the pool is not there.
    """
    entries = list(_read(path))
    pools = {_check(entry, path) or pool or POOL for entry in entries}
    if not PREFECT_API_URL.value():
        raise InputError("no Prefect server is named; start one (prefect server start) and set PREFECT_API_URL")
    for name in sorted(pools):
        _require_pool(name)
    environment = {
        "PREFECT_DEFAULT_WORK_POOL_NAME": pool or POOL,
        "ESPALIER_CODE": os.environ.get("ESPALIER_CODE") or str(Path.cwd()),
    }
    command = ["prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(path)]
    lines: list[str] = []
    if run(command, lines.append, environment=environment).code:
        raise InputError(f"Prefect does not take {path}: {' '.join(lines[-3:])}")
    _watch_over()
    for entry in entries:
        schedules = ", ".join(str(it["cron"]) for it in entry.get("schedules") or [] if "cron" in it)
        when = f"at {schedules}" if schedules else "when it is asked for"
        click.echo(f"{entry['entrypoint'].rpartition(':')[2]}/{entry['name']}: {when}")


def _watch_over() -> None:
    """Let the server end runs of which nothing is heard: their machine is gone, and nobody else would say so."""
    beats = ["prefect.flow-run.heartbeat"]
    ends = [f"prefect.flow-run.{name}" for name in ("Completed", REFUSED, "Failed", "Cancelled", "Crashed")]
    lost = Automation(
        name=LOST,
        description="A run that gave signs of life and gives none any more has crashed.",
        trigger=EventTrigger(
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=LOST_AFTER_S),
            after=set(beats),
            expect={*beats, *ends},
            match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
            match_related=ResourceSpecification(
                {"prefect.resource.role": "tag", "prefect.resource.id": f"prefect.tag.{POOL}"}
            ),
            for_each={"prefect.resource.id"},
        ),
        actions=[ChangeFlowRunState(state=StateType.CRASHED, message="Nothing was heard of it any more.")],
    )
    with suppress(ValueError):  # there is none yet
        cast("Automation", Automation.read(name=LOST)).delete()
    lost.create()


def _read(path: Path) -> Iterator[dict[str, Any]]:
    tree = read_tree(path, YAML(typ="safe"))
    entries = tree.get("deployments") if isinstance(tree, dict) else None
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{path} lists no deployments")
    for entry in entries:
        if not isinstance(entry, dict) or not {"name", "entrypoint"} <= set(entry):
            raise InputError(f"{path}: a deployment needs a name and an entrypoint such as flows/compress.py:compress")
        yield entry


def _check(entry: dict[str, Any], path: Path) -> str | None:
    """Check one deployment: the pool that it names, if it does."""
    where = f"{path}: {entry['name']}"
    for schedule in entry.get("schedules") or []:
        if "cron" in schedule:
            _check_cron(str(schedule["cron"]), where)
    given = entry.get("parameters") or {}
    allowed = _parameters(str(entry["entrypoint"]), where)
    unknown = sorted(set(given) - set(allowed))
    if unknown:
        raise InputError(f"{where}: {', '.join(unknown)} is no parameter of its flow; it takes {', '.join(allowed)}")
    if PARAMS.is_file():
        cells = plan_cells(given["grid"]) if "grid" in given else [{}]
        for cell in cells:
            apply({**(given.get("overrides") or {}), **cell}, PARAMS)
    pool = (entry.get("work_pool") or {}).get("name")
    return str(pool) if pool else None


def _check_cron(cron: str, where: str) -> None:
    try:
        next(CronSim(cron, datetime.now(UTC)))
    except CronSimError as error:
        raise InputError(
            f"{where}: cron {cron!r} is none ({first_line(error)}); write minute hour day month weekday, as 0 2 * * *"
        ) from None
    except StopIteration:
        raise InputError(f"{where}: cron {cron!r} never fires, since there is no such day; correct it") from None


def _parameters(entrypoint: str, where: str) -> list[str]:
    file, _, name = entrypoint.partition(":")
    try:
        flow = getattr(import_module(file.removesuffix(".py").replace("/", ".")), name)
        return list(inspect.signature(flow.fn).parameters)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"{where}: there is no flow {entrypoint} ({first_line(error)})") from None


def _require_pool(name: str) -> None:
    with get_client(sync_client=True) as client:
        try:
            client.read_work_pool(name)
        except ObjectNotFound:
            template = "flows/pools/process.json"
            raise InputError(
                f"the server has no work pool {name!r}; make it: prefect work-pool create {name} --type process "
                f"--base-job-template {template}"
            ) from None
        except Exception as error:  # noqa: BLE001  # whatever a network does
            raise InputError(
                f"the Prefect server {PREFECT_API_URL.value()} does not answer: {first_line(error)}"
            ) from None
