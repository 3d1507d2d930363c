"""An option of a command -> a finite number within bounds."""

import math
from typing import Any

import click


class FiniteRange(click.FloatRange):
    """A range of finite numbers; click's own lets nan through, which no bound excludes."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:  # noqa: ANN401  # as click has it
        """Return the number.

        Raises:
            click.BadParameter: It is nan, infinite or out of the range.
        """
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{number} is not a finite number", param, ctx)
        return number
