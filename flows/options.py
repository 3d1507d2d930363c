"""Options that several commands of the flows share."""

import math
from typing import Any

import click

RUNNERS = ["threads", "pool"]


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


policy_option = click.option("--policy", default="mlflow/promotion.yaml", help="The promotion policy.")
set_option = click.option("--set", "texts", multiple=True, metavar="KEY=VALUE", help="Override a key of params.yaml.")
preset_option = click.option("--preset", default=None, help="A preset of the commit that replaces its params.yaml.")
commit_option = click.option("--commit", default="HEAD", help="A branch, tag or hash.")
runner_option = click.option("--runner", type=click.Choice(RUNNERS), default="threads", help="Where cells run.")
jobs_option = click.option(
    "--jobs", type=click.IntRange(1), default=1, help="Cells at once on this machine; a pool has its own limit."
)
limit_option = click.option(
    "--limit", "limits", multiple=True, metavar="STAGE=MINUTES", help="Terminate a stage that takes longer."
)
