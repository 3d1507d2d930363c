"""Exceptions of the Hub's client -> one line: what was found, what is allowed, what to change."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError

from stages.runtime.environment import check_hub, check_numbers
from stages.runtime.errors import InputError, UnavailableError, without_password
from stages.runtime.network import is_outage

REPOSITORY = r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}"
REFUSED = r"--|\.\.|[.-](/|$)|\.git$"
"""What the Hub allows in no name."""

BY_KIND: dict[type[Exception], str] = {
    OfflineModeIsEnabled: "HF_HUB_OFFLINE is set; unset it",
    RevisionNotFoundError: "it has no such revision; give one of its commits, branches or tags",
    RepositoryNotFoundError: "there is none, or the token may not see it; correct the name or set HF_TOKEN",
}
BY_STATUS: dict[int | None, str] = {
    401: "the Hub refuses the token; set HF_TOKEN to a valid one, or run hf auth login",
    403: "the token has no right to; use one with write access to {owner}",
    409: "somebody else changed it meanwhile; look at it and push again",
    412: "somebody else changed it meanwhile; look at it and push again",
}
"""Kind or status of an error -> what was found and what to change."""


@contextmanager
def hub_errors(repo: str, verb: str) -> Iterator[None]:
    """Check the environment and the name of a repository (`check_repository`), and explain what the client raises.

    Args:
        repo: OWNER/NAME.
        verb: What is tried, for messages: "read" or "written".

    Raises:
        InputError: The name, a variable or the token is wrong, or the Hub refuses a request.
        UnavailableError: The Hub does not answer.
    """
    check_repository(repo)
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001  # the client raises exceptions of any kind on unexpected answers
        raise explain(error, repo, verb) from None


def check_repository(repo: str) -> None:
    """Check the environment and the name of a repository; nothing is sent.

    Raises:
        InputError: The name or a variable is wrong.
    """
    check_hub()
    check_numbers()
    if not re.fullmatch(REPOSITORY, repo) or re.search(REFUSED, repo):
        raise InputError(f"{repo!r} is no repository of the Hub; write OWNER/NAME, such as me/my-small-ddpm")


def explain(error: Exception, repo: str, verb: str) -> InputError:
    """Make the error of one line for an exception of the client."""
    found = f"{repo} cannot be {verb}"
    if is_outage(error) and not isinstance(error, OfflineModeIsEnabled):
        return UnavailableError(f"{found}: the Hub does not answer ({_line(error)}); check network and HF_ENDPOINT")
    status = getattr(getattr(error, "response", None), "status_code", None)
    known = next((text for kind, text in BY_KIND.items() if isinstance(error, kind)), None) or BY_STATUS.get(status)
    reason = known.format(owner=repo.partition("/")[0]) if known else _line(error)
    return InputError(f"{found}: {reason}")


def _line(error: Exception) -> str:
    return without_password(" ".join(str(error).split())) or type(error).__name__
