"""The name of a cell, or the params of a comparison -> the name of a run, as Prefect takes it."""

from prefect.runtime import flow_run


def literal_name(name: str) -> str:
    """Return the template of a task run's name, in which braces are doubled; else `{remove: 1}` would be a field."""
    return name.replace("{", "{{").replace("}", "}}")


def name_comparison() -> str:
    """Name a comparison by its preset and the number of seeds."""
    given = flow_run.parameters
    return f"{given.get('preset')}, {len(given.get('seeds') or ())} seeds"
