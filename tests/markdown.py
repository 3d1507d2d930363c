"""Pages in Markdown -> their code blocks, the commands in them, and what an invisible comment says about a block."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).parents[1]
HISTORY = ("docs/adr", "docs/log.md", "CHANGELOG.md")
"""Pages that report how things were."""
FENCE = re.compile(r"^ *(?:<!-- (not run|serves): ([^\n]+?) -->\n+ *)?```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:espalier|make|python -m) [^`]+)`")
OPERATORS = re.compile(r"^[;&|()]+$")
REDIRECTION = re.compile(r"^[<>]+$")
DUPLICATED = re.compile(r"\d?>&\d")
ASSIGNMENT = re.compile(r"^\w+=")
KEYWORDS = {"do", "then", "else", "!", "if", "while", "{"}
ENDS = {"done", "fi", "}"}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    """Path from the root."""
    line: int
    language: str
    text: str
    not_run: str | None
    """Why no test runs it, by the comment before it: <!-- not run: needs a GPU -->."""
    serves: str | None
    """Address that answers once it has started, by the comment before it: <!-- serves: http://… -->. It runs on."""

    @property
    def place(self) -> str:
        """Name page and line, for a message."""
        return f"{self.page}:{self.line}"


def pages() -> list[str]:
    """List the pages that say how things are, as paths from the root."""
    found = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md")]
    names = sorted({str(path.relative_to(ROOT)) for path in found})
    return [name for name in names if not name.startswith(HISTORY)]


def blocks(page: str, language: str | None = None) -> list[Block]:
    """Read the blocks of a page, of one language or of all."""
    text = (ROOT / page).read_text()
    found = []
    for match in FENCE.finditer(text):
        mark, argument, its_language, body = match.groups()
        line = text[: match.start()].count("\n") + 1
        marks = {"not run": None, "serves": None, **({mark: argument} if mark else {})}
        found.append(Block(page, line, its_language, dedent(body), marks["not run"], marks["serves"]))
    return [block for block in found if language in (None, block.language)]


def inline_commands(page: str) -> list[str]:
    """List the commands of this project that the sentences of a page name in backticks."""
    return [" ".join(text.split()) for text in INLINE.findall(FENCE.sub("", (ROOT / page).read_text()))]


def commands(script: str) -> Iterator[list[str]]:
    """Yield the words of each simple command of a shell script, without assignments, redirections and keywords."""
    for line in _lines(script):
        words: list[str] = []
        for word in [*_split(line), ";"]:
            if OPERATORS.match(word):
                words = words[:-1] if words[-1:] == ["$"] else words
                yield from _simple(words)
                words = []
            else:
                words.append(word)


def _lines(script: str) -> Iterator[str]:
    """Yield whole lines: a backslash or an open quote at the end goes on with the next."""
    pending = ""
    for line in script.splitlines():
        pending = f"{pending}\n{line}" if pending else line
        if pending.endswith("\\"):
            pending = pending[:-1]
            continue
        try:
            _split(pending)
        except ValueError:
            continue
        yield pending
        pending = ""
    assert not pending.strip(), f"a quote is never closed: {pending}"


def _split(line: str) -> list[str]:
    lexer = shlex.shlex(DUPLICATED.sub("", line), posix=True, punctuation_chars=";&|()<>")
    lexer.wordchars += "~:@%+,!{}[]^$…"
    lexer.whitespace_split = True
    return list(lexer)


def _simple(words: list[str]) -> Iterator[list[str]]:
    """Yield the command in some words, if there is one."""
    kept: list[str] = []
    position = 0
    while position < len(words):
        word = words[position]
        if REDIRECTION.match(word):
            position += 2
            continue
        if not (not kept and (ASSIGNMENT.match(word) or word in KEYWORDS)):
            kept.append(word)
        position += 1
    if kept and kept[0] not in ENDS and kept[0] != "for":
        yield kept


def tables(text):
    """Read the tables of a Markdown text, each as a list of rows: column -> text."""
    read = []
    for block in text.split("\n\n"):
        if block.startswith("|"):
            lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
            assert {len(line) for line in lines} == {len(lines[0])}
            read.append([dict(zip(lines[0], line, strict=True)) for line in lines[2:]])
    return read
