"""The command line of Espalier: espalier NAME, or python -m flows NAME."""

import os

import click

from flows.commands.group import SectionedGroup
from flows.commands.table import SECTIONS
from stages.runtime import telemetry
from stages.runtime.environment import bypass_proxies, check_network


@click.group(
    cls=SectionedGroup,
    sections=SECTIONS,
    context_settings={"show_default": True, "help_option_names": ["-h", "--help"]},
    epilog="espalier NAME --help explains a command, with its defaults and an example.",
)
@click.pass_context
def main(context: click.Context) -> None:
    """Make a pretrained diffusion model smaller and faster, and measure that it still draws the same pictures."""
    telemetry.switch_off()
    bypass_proxies()
    if context.invoked_subcommand != "doctor":  # which reports this check with the others
        check_network()
    os.environ.setdefault("PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW", "ignore")


if __name__ == "__main__":
    main(prog_name="espalier")
