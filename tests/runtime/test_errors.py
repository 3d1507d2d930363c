"""Messages: without secrets, in one line of bounded length."""

import pytest
from hypothesis import given, settings, strategies

from stages.runtime.errors import MAX_LENGTH, InputError, shown, warn, without_password

PASSWORDS = strategies.text(
    strategies.characters(
        codec="ascii", exclude_characters=" \t\n\r\x0b\x0c\x1c\x1d\x1e\x1f", exclude_categories=["Cc"]
    ),
    min_size=4,
    max_size=24,
)
"""Passwords of any letters, encoded or not."""


@settings(max_examples=300, deadline=None)
@given(password=PASSWORDS)
def test_no_part_of_a_password_survives(password):
    """Encoded or not, in the address of a server, a database or a repository."""
    for scheme in ("http", "postgresql", "https"):
        text = without_password(f"API request to {scheme}://someone:{password}@host.example:9/api failed")
        assert text == f"API request to {scheme}://host.example:9/api failed"


@pytest.mark.parametrize(
    "text",
    [
        "Invalid header value b'AWS4-HMAC-SHA256 Credential=hunter2:tester\\n/2026/s3, Signature=hunter2'",
        "https://host/object?X-Amz-Signature=hunter2&X-Amz-Credential=hunter2&part=1",
        "https://host/x?access_token=hunter2",
        "X-Amz-Security-Token=hunter2, next",
        "{'Authorization': 'Basic hunter2'}",
        "Authorization: Bearer hunter2",
        "https://host/object?sv=2022&sig=hunter2&se=2026",
        "https://host/object?AWSAccessKeyId=hunter2&Expires=9",
        "https://host/object?Expires=9;Policy=hunter2",
        "GET 'https://host/x?auth=hunter2' failed",
    ],
)
def test_a_signed_request_keeps_no_secret(text):
    """Keys, signatures and tokens are removed; the rest stays."""
    assert "hunter2" not in without_password(text)


@pytest.mark.parametrize(
    "text",
    ["http://127.0.0.1:5000/api is away", "sqlite:////home/a@b/mlflow.db", "models:/name@champion", "prune.key is 3"],
)
def test_other_addresses_stay(text):
    """A port is no password, and a path may hold an @."""
    assert without_password(text) == text


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("a\nError: forged", "a\\nError: forged"),
        ("a\r\nb", "a\\r\\nb"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("\x9b2J", "\\x9b2J"),  # the same escape sequence in one character
        ("a\u202eb\u2028c\u200b", "a\\u202eb\\u2028c\\u200b"),
        ("caf\xe9 中 \U0001f600", "caf\xe9 中 \U0001f600"),
        ("\udcff.png", "\\udcff.png"),  # a file name that is not UTF-8
    ],
)
def test_what_is_not_printed_is_escaped(capsys, text, printed):
    """In errors and warnings alike; letters of all languages stay."""
    InputError(text).show()
    warn(text)

    assert capsys.readouterr().err.splitlines() == [f"Error: {printed}", f"Warning: {printed}"]


@given(text=strategies.text(max_size=700))
def test_any_text_becomes_one_line_of_bounded_length(text):
    """Whatever a server, a file or a name holds."""
    line = shown(text)

    assert line.isprintable()
    assert len(line) <= MAX_LENGTH
    assert shown(line) == line
    assert len(line) == MAX_LENGTH - 1 or " … " not in line or " … " in text


def test_a_long_message_is_cut_in_its_middle():
    """What was found and what to change stay; 300 characters in all."""
    message = InputError("found " + "x" * 15_000 + "; remove the prefix").format_message()

    assert len(message) <= MAX_LENGTH
    assert message.startswith("found xxx")
    assert message.endswith("; remove the prefix")
