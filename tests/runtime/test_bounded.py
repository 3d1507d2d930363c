"""JSON and YAML of any size and depth end in one line, before they take time or memory."""

import os
import time

import pytest
from ruamel.yaml import YAML

from flows.workspaces.overrides import apply, parse_overrides
from stages.report.report_data import _read_licence
from stages.runtime.bounded import MAX_YAML_BYTES, parse_json, parse_yaml, read_bounded
from stages.runtime.errors import InputError
from stages.storage.files import read_json

LAUGHS = "a0: &a0 {x: 1}\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 10)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{level}: &a{level} {{<<: [{', '.join([f'*a{level - 1}'] * 9)}]}}\n" for level in range(1, 10)
)
"""Nine levels of nine aliases each: 400 million values."""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "more than 50000 values"),
        (MERGES, "more than 50000 values"),
        ("a: &a [*a]", "is part of what it stands for"),
        ("a: *b", "is part of what it stands for, or of nothing"),
        ("[" * 100_000, "more than 64 levels"),
        ("a: " * 5000, "not valid YAML"),
        ("x" * (MAX_YAML_BYTES + 1), "larger than 256 KiB"),
        ("!!bool maybe", "not valid YAML"),
        ("!!timestamp x", "not valid YAML"),
        ("!!int ''", "not valid YAML"),
        ("9" * 5000, "not valid YAML"),
        ("2026-13-45", "not valid YAML"),
    ],
)
def test_yaml_that_passes_a_limit_is_refused_at_once(text, message):
    """Aliases and merges count as what they stand for; tags on other text are errors like any."""
    begin = time.monotonic()
    for loader in (None, YAML()):
        with pytest.raises(InputError, match=message) as caught:
            parse_yaml(text, "params.yaml", loader)
        assert "\n" not in caught.value.message
    assert time.monotonic() - begin < 2


def test_ordinary_aliases_are_allowed():
    """A value that is written once and used twice."""
    assert parse_yaml("a: &a {x: 1}\nb: *a\nc: {<<: *a, y: 2}", "x") == {
        "a": {"x": 1},
        "b": {"x": 1},
        "c": {"x": 1, "y": 2},
    }


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b"[" * 65 + b"]" * 65, b'"\\ud800"', b'{"\\udfff": 1}', b"\xff", b""]
)
def test_json_that_passes_a_limit_is_refused(content, tmp_path):
    """In levels, and in text that no terminal takes."""
    with pytest.raises(ValueError):  # noqa: PT011  # of several libraries
        parse_json(content)
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.json is not valid JSON"):
        read_json(tmp_path / "a.json")
    assert parse_json(b"[" * 64 + b"]" * 64)
    assert parse_json(b'[["\\ud83d\\ude42"]]') == [["🙂"]]


def test_a_pipe_is_refused_and_a_large_file_is_not_read_whole(tmp_path):
    """Nobody writes into the pipe, so opening it would wait for ever."""
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(InputError, match="is a pipe, device or socket; give a regular file"):
        read_json(tmp_path / "pipe.json")
    with pytest.raises(InputError, match="is a pipe, device or socket"):
        read_json(tmp_path.__class__("/dev/zero"))
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(InputError, match="larger than 1 KiB"):
        read_bounded(tmp_path / "large", 1024)


@pytest.mark.parametrize(
    "text",
    [
        "seed=!!bool maybe",
        "seed=!!binary aGk=",
        "seed=!!set {a}",
        "seed=2026-01-01",
        "seed=" + "[" * 3000,
        "seed=&a [*a]",
        "prune.target=? [a]\n: b",
        "seed." * 3000 + "x=1",
    ],
)
def test_an_override_that_is_no_json_is_refused(root, text):
    """Dates, sets and bytes, values in themselves, and keys of thousands of parts."""
    with pytest.raises(InputError) as caught:
        apply(parse_overrides([text]), root / "params.yaml")
    assert "\n" not in caught.value.message


def test_overrides_may_nest(root):
    """A block and a key inside of it; the later one counts."""
    text = apply(parse_overrides(["prune.target={ratio: 0.5}", "prune.target.ratio=0.2"]), root / "params.yaml")

    assert YAML(typ="safe").load(text.decode())["prune"]["target"] == {"ratio": 0.2}


def test_a_card_is_read_within_the_same_limits(tmp_path):
    """Its metadata are YAML, of which only the licence is shown, in one line."""
    card = tmp_path / "README.md"
    card.write_text(f"---\n{LAUGHS}---\n")
    with pytest.raises(InputError, match="more than 50000 values"):
        _read_licence(card)
    card.write_text('---\nlicense: [mit, "apache-2.0\\nError: \\e[2J"]\nmodel-index: 3\n---\n# A model\n')
    assert _read_licence(card) == {"license": "mit or apache-2.0\\nError: \\x1b[2J"}
    card.write_text("# A model without metadata\n\n---\nlicense: no\n---\n")
    assert _read_licence(card) == {}
