"""Names of task runs as Prefect takes them: as templates, which braces of a user's value are no part of."""


def literal_name(name: str) -> str:
    """Return the template of a name, in which braces are doubled; without that `{remove: 1}` would be a field."""
    return name.replace("{", "{{").replace("}", "}}")
