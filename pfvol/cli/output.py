"""What the command line prints: data on stdout, everything else on stderr.

Owns the two forms of every answer: one JSON document (``--json``), or text for people: tables with health colours on a
terminal, aligned plain columns without truncation when piped. Promises that an error is one line on stderr, and with
``--json`` also ``{"error": {...}}`` on stdout.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pfvol.errors import Error
from pfvol.units import format_size

Row = Mapping[str, Any]

HEALTH_STYLES = {
    "OK": "green",
    "UP": "green",
    "AVAILABLE": "green",
    "IN_USE": "green",
    "RUNNING": "green",
    "HEALTHY": "green",
    "DEGRADED": "yellow",
    "CREATING": "yellow",
    "DELETING": "yellow",
    "STALLED": "yellow",
    "IN_PROGRESS": "yellow",
    "DOWN": "red",
    "FAILED": "red",
    "STOPPED": "red",
    "DEAD": "red",
}
WIDTH = 1000


@dataclass(frozen=True)
class Column:
    """A column of a table or a line of a detail: its title, and how its text is got from the object."""

    title: str
    text: Callable[[Row], str]
    right: bool = False


def field(title: str, key: str, *, right: bool = False) -> Column:
    return Column(title, lambda row: plain(row.get(key)), right)


def names(title: str, key: str) -> Column:
    """The names of a list of objects."""
    return Column(title, lambda row: plain([item["name"] for item in row.get(key, [])]))


def size(title: str, key: str) -> Column:
    return Column(title, lambda row: human_size(row.get(key)), right=True)


def plain(value: Any) -> str:
    """A JSON value as a cell."""
    if value is None or value == "" or value == []:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(plain(item) for item in value)
    return str(value)


def human_size(bytes_count: Any) -> str:
    return format_size(bytes_count) if isinstance(bytes_count, int) else "-"


@dataclass(frozen=True)
class Output:
    """How one invocation prints."""

    json: bool = False
    color: bool = True
    quiet: bool = False
    verbose: bool = False

    def document(self, value: Any) -> None:
        print(json.dumps(value, indent=2))

    def table(self, rows: Sequence[Row], columns: Sequence[Column]) -> None:
        """A list of objects."""
        if self.json:
            self.document(rows)
        elif self._terminal():
            self._rich_table(rows, columns)
        else:
            cells = [[column.text(row) for column in columns] for row in rows]
            self._plain([[column.title for column in columns], *cells], [column.right for column in columns])

    def detail(self, row: Row, columns: Iterable[Column]) -> None:
        """One object, a line per property."""
        if self.json:
            self.document(row)
            return
        lines = [[column.title + ":", column.text(row)] for column in columns]
        if self._terminal():
            self._rich_lines(lines)
        else:
            self._plain(lines, [False, False])

    def created(self, row: Row, note: str) -> None:
        """What a create or add prints: the object with ``--json``, else its id (and a note for people)."""
        self.note(note)
        if self.json:
            self.document(row)
        else:
            print(row["id"])

    def done(self, row: Any, note: str) -> None:
        """What a change without data of its own prints: the object with ``--json``, else only a note."""
        if self.json:
            self.document(row)
        self.note(note)

    def note(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr)

    def error(self, code: str, message: str, details: Mapping[str, Any]) -> None:
        line = " ".join(message.split())
        print(f"pfvol: {line}", file=sys.stderr)
        if self.json:
            self.document({"error": {"code": code, "message": line, "details": dict(details)}})

    def raised(self, error: Error) -> None:
        self.error(error.code, error.message, error.details)

    def _terminal(self) -> bool:
        return sys.stdout.isatty()

    def _rich_table(self, rows: Sequence[Row], columns: Sequence[Column]) -> None:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
        for column in columns:
            table.add_column(column.title, justify="right" if column.right else "left", no_wrap=True)
        for row in rows:
            table.add_row(*(_styled(column.text(row)) for column in columns))
        self._console().print(table)

    def _rich_lines(self, lines: Iterable[Sequence[str]]) -> None:
        from rich.table import Table

        grid = Table.grid(padding=(0, 2))
        for title, text in lines:
            grid.add_row(f"[bold]{title}[/bold]", _styled(text))
        self._console().print(grid)

    def _console(self) -> Any:
        from rich.console import Console

        # Wider than any table: a long row goes on in the next line of the terminal, its ids and names in one piece.
        return Console(no_color=True if not self.color else None, highlight=False, width=WIDTH, soft_wrap=True)

    def _plain(self, cells: Sequence[Sequence[str]], right: Sequence[bool]) -> None:
        widths = [max(len(row[index]) for row in cells) for index in range(len(right))]
        for row in cells:
            padded = (
                cell.rjust(width) if flush else cell.ljust(width)
                for cell, width, flush in zip(row, widths, right, strict=True)
            )
            print("  ".join(padded).rstrip())


def _styled(text: str) -> str:
    from rich.markup import escape

    style = HEALTH_STYLES.get(text)
    return f"[{style}]{escape(text)}[/{style}]" if style else escape(text)
