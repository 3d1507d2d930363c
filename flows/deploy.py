"""prefect.yaml -> deployments on a Prefect server."""

import json
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import cast

import click
from prefect.automations import Automation, ChangeFlowRunState, EventTrigger, Posture, ResourceSpecification
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import DeploymentSchedule, StateType
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule, NoSchedule, RRuleSchedule
from prefect.exceptions import ObjectNotFound
from ruamel.yaml import YAML

from flows.deployments import Deployment, Schedule, read_deployments
from flows.tasks.notifications import REFUSED
from flows.tasks.server import find_server, server_errors
from flows.workspaces.commands import run
from stages.runtime.errors import InputError
from stages.runtime.schema import read_tree

POOL = "espalier"
"""Default work pool, and the tag of all deployments."""
LOST = "espalier: runs that were lost"
"""Name of the automation that crashes runs without heartbeats."""
LOST_AFTER_S = 90
"""Three heartbeats; the templates of the work pools set their interval."""


def deploy(path: Path, pool: str | None, *, with_schedules: bool) -> None:
    """Check every deployment of a file and create all of them on the server.

    Args:
        path: A prefect.yaml.
        pool: Work pool of the deployments that name none.
        with_schedules: Whether to switch the schedules on. Otherwise new ones are paused; those that are on stay on.

    Raises:
        InputError: A deployment would never run, or not as written; or the server's address or a pool is missing.
        UnavailableError: The server does not answer.
    """
    entries = read_deployments(path)
    pools = {(entry.work_pool and entry.work_pool.name) or pool or POOL for entry in entries}
    if not find_server():
        raise InputError("PREFECT_API_URL is not set; start a server (espalier server) and set it")
    for name in sorted(pools):
        _require_pool(name)
    with server_errors(), get_client(sync_client=True) as client:
        states = [schedule_states(entry, client, with_schedules=with_schedules) for entry in entries]
    _create_deployments(path, pool, states)
    with server_errors():
        _create_automation()
    for entry, active in zip(entries, states, strict=True):
        click.echo(f"{entry.full_name}: {_describe(entry.schedules or (), active)}")
    if states != [[it.active for it in entry.schedules or ()] for entry in entries]:
        click.echo("Nothing runs at the times that are paused; to switch them on: espalier deploy --schedules")


def schedule_states(entry: Deployment, client: SyncPrefectClient, *, with_schedules: bool) -> list[bool]:
    """Decide whether each schedule of a deployment is on: all that the file does not pause, or those that are already.

    A schedule is found again by its slug, or by its times where it has none.

    Args:
        entry: The deployment.
        client: Asks the server for the schedules that it has.
        with_schedules: Whether all are switched on that the file does not pause.
    """
    existing: list[DeploymentSchedule] = []
    if not with_schedules:
        with suppress(ObjectNotFound):
            existing = client.read_deployment_by_name(entry.full_name).schedules
    on = {key for it in existing if it.active for key in (it.slug, _times(it.schedule))}
    return [it.active and (with_schedules or (it.slug or it.times) in on) for it in entry.schedules or ()]


def _times(schedule: CronSchedule | IntervalSchedule | RRuleSchedule | NoSchedule) -> str | float | None:
    """Return what `Schedule.times` returns of the same schedule in the file."""
    interval = getattr(schedule, "interval", None)
    return interval.total_seconds() if interval else getattr(schedule, "cron", None) or getattr(schedule, "rrule", None)


def _create_deployments(path: Path, pool: str | None, states: Sequence[Sequence[bool]]) -> None:
    """Let Prefect create all deployments of a file, with their schedules on or paused.

    Raises:
        InputError: Prefect refuses the file.
    """
    tree = json.loads(json.dumps(read_tree(path, YAML(typ="safe")), default=str))  # no anchor shares a schedule
    for entry, active in zip(tree["deployments"], states, strict=True):
        for schedule, is_on in zip(entry.get("schedules") or [], active, strict=True):
            schedule["active"] = is_on
    environment = {
        "PREFECT_DEFAULT_WORK_POOL_NAME": pool or POOL,
        "ESPALIER_CODE": os.environ.get("ESPALIER_CODE") or str(Path.cwd()),
    }
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        copy.write_text(json.dumps(tree))  # JSON is YAML, too
        command = ["prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(copy)]
        result = run(command, lambda _line: None, environment=environment)
    if result.code:
        raise InputError(f"Prefect refused {path}: {' '.join(result.lines[-3:]) or result.message}")


def _describe(schedules: Sequence[Schedule], active: Sequence[bool]) -> str:
    """Say when a deployment runs: at 0 2 * * *, paused."""
    times = [f"{it.times}{'' if is_on else ', paused'}" for it, is_on in zip(schedules, active, strict=True)]
    return f"at {'; '.join(times)}" if times else "on request"


def _create_automation() -> None:
    """Let the server mark runs without heartbeats as crashed, since their machine can no longer report it."""
    beats = ["prefect.flow-run.heartbeat"]
    ends = [f"prefect.flow-run.{name}" for name in ("Completed", REFUSED, "Failed", "Cancelled", "Crashed")]
    lost = Automation(
        name=LOST,
        description="A run that sent heartbeats and sends none any more has crashed.",
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
        actions=[ChangeFlowRunState(state=StateType.CRASHED, message="The run sent no heartbeat any more.")],
    )
    with suppress(ValueError):  # it does not exist yet
        cast("Automation", Automation.read(name=LOST)).delete()
    lost.create()


def _require_pool(name: str) -> None:
    with server_errors(), get_client(sync_client=True) as client:
        try:
            client.read_work_pool(name)
        except ObjectNotFound:
            template = "flows/pools/process.json"
            raise InputError(
                f"the server has no work pool {name!r}; make it: prefect work-pool create {name} --type process "
                f"--base-job-template {template}"
            ) from None
