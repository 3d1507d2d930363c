"""Text from outside -> text that cannot forge lines or move the cursor of a terminal."""

from collections.abc import Iterator


def strings(tree: object) -> Iterator[str]:
    """Yield all texts of a JSON value, keys included."""
    pending = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, str):
            yield node
        elif isinstance(node, dict):
            pending += [*node.keys(), *node.values()]
        elif isinstance(node, list):
            pending += node


def printable(text: str) -> str:
    r"""Escape line breaks, control characters and marks that reorder text: a newline becomes \n, ESC \x1b."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
