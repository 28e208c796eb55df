"""How values look: sizes, tables on a terminal, health colours."""

from __future__ import annotations

import io
import sys

import pytest

from pfvol.cli.output import Output, field, human_size, plain, size


class Terminal(io.StringIO):
    """A stdout that says it is one."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("bytes_count", "text"), [(0, "0 B"), (800_000_000, "762.94 MiB"), (2**40, "1 TiB"), (None, "-")]
)
def test_sizes(bytes_count: int | None, text: str) -> None:
    assert human_size(bytes_count) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), ("", "-"), ([], "-"), (True, "yes"), (False, "no"), (0, "0"), (["a", "b"], "a, b"), (1.5, "1.5")],
)
def test_cells(value: object, text: str) -> None:
    assert plain(value) == text


ROWS = [
    {"name": "one[/]", "health": "OK", "used": 1024},
    {"name": "two", "health": "DEGRADED", "used": 2**30},
    {"name": "three", "health": "FAILED", "used": 0},
]
COLUMNS = (field("NAME", "name"), field("HEALTH", "health"), size("USED", "used"))


def test_plain_table(capsys: pytest.CaptureFixture[str]) -> None:
    Output().table(ROWS, COLUMNS)
    assert capsys.readouterr().out == (
        "NAME    HEALTH     USED\none[/]  OK        1 KiB\ntwo     DEGRADED  1 GiB\nthree   FAILED      0 B\n"
    )


def test_table_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: green, yellow, red; and a name is text, never markup."""
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    Output().table(ROWS, COLUMNS)
    text = terminal.getvalue()
    assert "\x1b[32mOK" in text
    assert "\x1b[33mDEGRADED" in text
    assert "\x1b[31mFAILED" in text
    assert "one[/]" in text


def test_table_on_a_terminal_without_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    monkeypatch.setenv("TERM", "xterm-256color")
    Output(color=False).table(ROWS, COLUMNS)
    for code in ("\x1b[32m", "\x1b[33m", "\x1b[31m"):
        assert code not in terminal.getvalue()


def test_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    Output().error("conflict", "first\n  second   third", {})
    captured = capsys.readouterr()
    assert captured.err == "pfvol: first second third\n"
    assert captured.out == ""
