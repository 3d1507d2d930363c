"""Text from outside -> text that cannot forge lines or move the cursor of a terminal."""


def printable(text: str) -> str:
    r"""Escape line breaks, control characters and marks that reorder text: a newline becomes \n, ESC \x1b."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
