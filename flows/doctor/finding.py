"""What a check finds."""

from typing import Literal, NamedTuple

Status = Literal["ok", "warn", "fail"]


class Finding(NamedTuple):
    """One line of the doctor."""

    status: Status
    """ok; warn: a run works, but something may surprise; fail: a run would end."""
    text: str
    """What was found, and after a semicolon what to do."""
