"""A run that failed, crashed or refused a promotion -> a message through Prefect's notification blocks."""

import os
from typing import Any, TypedDict

from prefect import Flow, State
from prefect.blocks.abstract import NotificationBlock
from prefect.blocks.core import Block
from prefect.client.schemas.objects import FlowRun
from prefect.logging import get_logger
from prefect.settings import PREFECT_UI_URL

VARIABLE = "ESPALIER_NOTIFY"
"""Environment variable: Prefect blocks as TYPE/NAME, separated by commas, such as slack-webhook/ops."""
REFUSED = "Refused"
"""Name of a completed state of a run that promoted nothing."""


def notify(flow: Flow[..., Any], flow_run: FlowRun, state: State) -> None:
    """Send name, state and message of a run to every block; a block that fails is logged."""
    page = f"{PREFECT_UI_URL.value()}/runs/flow-run/{flow_run.id}" if PREFECT_UI_URL.value() else ""
    body = f"{flow.name} ({flow_run.name}): {state.name}\n{state.message or ''}\n{page}".strip()
    for slug in filter(None, (part.strip() for part in os.environ.get(VARIABLE, "").split(","))):
        try:
            _send(slug, body, f"Espalier: {flow.name} {state.name}")
        except Exception as error:  # noqa: BLE001  # any fault of a service
            reason = str(error).strip().splitlines() or [type(error).__name__]
            get_logger().warning("notification %s was not sent: %s", slug, reason[0])


def _send(slug: str, body: str, subject: str) -> None:
    block = Block.load(slug)
    if not isinstance(block, NotificationBlock):
        raise TypeError("the block sends no notifications; name one such as slack-webhook/ops")
    block.notify(body, subject)  # type: ignore[unused-coroutine]  # outside an event loop it runs to its end


def _notify_if_refused(flow: Flow[..., Any], flow_run: FlowRun, state: State) -> None:
    if state.name == REFUSED:
        notify(flow, flow_run, state)


class Hooks(TypedDict):
    """Functions that Prefect calls when a flow ends."""

    on_failure: list[Any]
    on_crashed: list[Any]
    on_completion: list[Any]


HOOKS = Hooks(on_failure=[notify], on_crashed=[notify], on_completion=[_notify_if_refused])
