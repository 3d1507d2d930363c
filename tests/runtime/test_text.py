"""Text from outside forges no line and moves no cursor."""

from hypothesis import given, strategies

from stages.runtime.text import printable, strings


@given(text=strategies.text())
def test_any_text_becomes_one_printable_line(text):
    """Line breaks, escape sequences, marks of direction and halves of pairs; printable text stays."""
    shown = printable(text)

    assert shown.isprintable()
    assert len(shown.splitlines()) <= 1
    assert printable(shown) == shown
    assert printable("naïve 模型 🙂") == "naïve 模型 🙂"
    assert printable("a\nb\x1b[2J\u202e") == "a\\nb\\x1b[2J\\u202e"


def test_all_texts_of_a_tree_are_found():
    """Keys and values at every depth."""
    assert set(strings({"a": ["b", {"c": "d"}], "e": 1, "f": None})) == {"a", "b", "c", "d", "e", "f"}
