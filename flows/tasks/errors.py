"""A flow's InputError -> its Failed state in one line, without a traceback."""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec

from prefect import State
from prefect.logging import get_run_logger
from prefect.states import Failed

from stages.runtime.errors import InputError

P = ParamSpec("P")


def fail_on_input_error(function: Callable[P, State[Any]]) -> Callable[P, State[Any]]:
    """Wrap a flow or task so that an InputError becomes its Failed state, with the error's message."""

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> State[Any]:
        """Call the function; a mistake is a failed state with its line."""
        try:
            return function(*args, **kwargs)
        except InputError as error:
            get_run_logger().error(error.format_message())
            return Failed(message=error.format_message())

    return wrapped
