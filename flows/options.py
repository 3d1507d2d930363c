"""Options that several commands of the flows share."""

import click

RUNNERS = ["threads", "pool"]

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
