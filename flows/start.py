"""A deployment's name -> a run of it on the Prefect server, which can be followed to its end."""

import sys
import time
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, NoReturn
from uuid import UUID

import click
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowFilter, FlowFilterId, FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun, WorkerStatus
from prefect.client.schemas.responses import DeploymentResponse
from prefect.utilities.schema_tools.validation import ValidationError, validate
from prefect.utilities.urls import url_for

from flows.deployments import PARAMS, check_params
from flows.tasks.server import find_server, server_errors
from stages.runtime.errors import InputError, first_line, warn
from stages.runtime.text import printable

POLL_S = 2.0


def start_deployment(name: str, overrides: Mapping[str, Any], given: Mapping[str, Any]) -> FlowRun:
    """Start a deployment now, and print the address of the run's page.

    Args:
        name: NAME or FLOW/NAME of a deployment.
        overrides: Dotted keys of params.yaml -> values, in addition to those of the deployment.
        given: Parameters of the flow, in place of those of the deployment.

    Raises:
        InputError: There is no server or no such deployment, or the flow does not take a parameter or its value.
        UnavailableError: The server does not answer.
    """
    if not find_server():
        raise InputError("PREFECT_API_URL is not set; start a server (espalier server) and set it")
    with server_errors(), get_client(sync_client=True) as client:
        full_name, deployment = _find(client, name)
        parameters = _merge(full_name, deployment, overrides, given)
        run = client.create_flow_run_from_deployment(deployment.id, parameters=parameters)
        click.echo(f"{full_name} was started as {printable(run.name)}")
        click.echo(f"Look at it: {url_for('flow-run', run.id) or run.id}")
        _warn_without_worker(client, deployment)
    return run


def follow(run: FlowRun) -> NoReturn:
    """Print each new state of a run and its stages until it ends; the exit code is 0 only if it completed.

    Raises:
        UnavailableError: The server does not answer any more; the run itself goes on.
    """
    seen: dict[UUID, str] = {}
    with server_errors(), get_client(sync_client=True) as client:
        while True:
            run = client.read_flow_run(run.id)
            tasks = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run.id])))
            for task in sorted(tasks, key=lambda it: str(it.created)):
                _print_new(seen, task.id, task.name, task.state_name or "")
            state = run.state
            message = f": {state.message}" if state and state.message else ""
            _print_new(seen, run.id, run.name, f"{run.state_name or ''}{message}")
            if state is not None and state.is_final():
                sys.exit(0 if state.is_completed() and state.name == "Completed" else 1)
            time.sleep(POLL_S)


def _find(client: SyncPrefectClient, name: str) -> tuple[str, DeploymentResponse]:
    """Find a deployment by NAME or FLOW/NAME.

    Raises:
        InputError: None or several have this name; the message lists the nearest.
    """
    deployments = client.read_deployments()
    flow_filter = FlowFilter(id=FlowFilterId(any_=[it.flow_id for it in deployments]))
    flows = {flow.id: flow.name for flow in client.read_flows(flow_filter=flow_filter)} if deployments else {}
    found = {f"{flows[it.flow_id]}/{it.name}": it for it in deployments}
    matches = [full for full, it in found.items() if name in (full, it.name)]
    if len(matches) == 1:
        return matches[0], found[matches[0]]
    if matches:
        raise InputError(f"several deployments are named {name}; give one of {', '.join(sorted(matches))}")
    if not found:
        raise InputError("the server has no deployments; create them: espalier deploy")
    short = sorted({it.name for it in deployments})
    near = get_close_matches(name, [*short, *found])
    advice = f"did you mean {near[0]}?" if near else f"it has {', '.join(short)}"
    raise InputError(f"the server has no deployment {name!r}; {advice}")


def _merge(
    name: str, deployment: DeploymentResponse, overrides: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the parameters of a run that differ from the deployment's, after a check of all of them.

    Raises:
        InputError: The flow does not take one of them, or its value is not allowed.
    """
    schema = deployment.parameter_openapi_schema or {}
    taken = schema.get("properties", {})
    changes = dict(given)
    if overrides:
        if "overrides" not in taken:
            raise InputError(f"the flow of {name} takes no overrides of params.yaml; leave --set out")
        if "overrides" in given:
            raise InputError("--set and --param overrides=… both set overrides; give one of them")
        changes["overrides"] = {**(deployment.parameters.get("overrides") or {}), **overrides}
    if unknown := sorted(set(changes) - set(taken)):
        near = get_close_matches(unknown[0], taken)
        advice = f"did you mean {near[0]}?" if near else f"it takes {', '.join(taken)}"
        raise InputError(f"the flow of {name} has no parameter {unknown[0]!r}; {advice}")
    merged = {**deployment.parameters, **changes}
    try:
        validate(merged, schema, raise_on_error=True, preprocess=False)
    except ValidationError as error:
        raise InputError(f"{name}: {first_line(error)}; give it with --param NAME=VALUE") from None
    if PARAMS.is_file():
        check_params(merged, {**schema, "properties": taken})
    return changes


def _warn_without_worker(client: SyncPrefectClient, deployment: DeploymentResponse) -> None:
    """Warn if no worker polls the deployment's pool, since the run then waits."""
    pool = deployment.work_pool_name
    if pool and not any(it.status == WorkerStatus.ONLINE for it in client.read_workers_for_work_pool(pool)):
        warn(
            f"no worker of the pool {pool} is running, so the run waits; start one: prefect worker start --pool {pool}"
        )


def _print_new(seen: dict[UUID, str], key: UUID, name: str, state: str) -> None:
    """Print a state that was not printed yet; two tasks of a run may have one name, but not one id."""
    if state and seen.get(key) != state:
        seen[key] = state
        click.echo(f"{printable(name)}: {printable(state)}")
