"""What happens when a notification cannot be sent."""

from types import SimpleNamespace

import pytest
from prefect.blocks.core import Block
from prefect.blocks.notifications import NotificationBlock

from flows.tasks import notifications


class Chat(NotificationBlock):
    """Keeps what it gets, or fails."""

    def notify(self, body, subject=None):
        """Keep a message."""
        if subject.endswith("Crashed"):
            raise RuntimeError("the service is away\nfor long")
        SENT.append((subject, body))


SENT = []


@pytest.mark.parametrize(
    ("block", "state", "sent", "warning"),
    [
        (Chat(), "Completed", True, None),
        (Chat(), "Crashed", False, "notification chat/x was not sent: the service is away"),
        (SimpleNamespace(), "Completed", False, "notification chat/x was not sent: the block sends no notifications"),
        (None, "Completed", False, "notification chat/x was not sent: there is no block"),
    ],
)
def test_a_notification_that_fails_costs_a_warning(monkeypatch, block, state, sent, warning):
    """In one line, and the flow ends as it would without."""

    def load(_slug):
        if block is None:
            raise ValueError("there is no block")
        return block

    warnings = []
    logger = SimpleNamespace(warning=lambda text, *values: warnings.append(text % values))
    SENT.clear()
    monkeypatch.setenv(notifications.VARIABLE, "chat/x")
    monkeypatch.setattr(Block, "load", load)
    monkeypatch.setattr(notifications, "get_logger", lambda: logger)
    found = SimpleNamespace(name=state, message="in 3 s")
    notifications.notify(SimpleNamespace(name="compress"), SimpleNamespace(name="7", id="1"), found)

    assert [subject for subject, _ in SENT] == ([f"Espalier: compress {state}"] if sent else [])
    assert all("in 3 s" in body for _, body in SENT)
    assert len(warnings) == (0 if warning is None else 1)
    assert all(line.startswith(warning) for line in warnings)
