"""``pfvol rebuild``: copies that are made again or moved."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from pfvol.cli.context import PoolArgument, Settings, noun, settings
from pfvol.cli.output import Row, field, size
from pfvol.client import Client
from pfvol.errors import ConflictError
from pfvol.ids import Noun, route

app = noun("Rebuilds: copies that are made again or moved.")

WATCH_SECONDS = 1.0
STOPPED = ("STALLED", "FAILED", "CANCELLED")

DETAIL = (
    field("Pool", "pool_name"),
    field("State", "state"),
    field("Reason", "reason"),
    field("Progress %", "progress_percent"),
    size("Copied", "bytes_rebuilt"),
    size("Total", "total_bytes"),
    field("Rate MB/s", "rate_mbps"),
    field("Rate limit MB/s", "rebuild_rate_limit_mbps"),
    field("Seconds left", "estimated_time_remaining_seconds"),
    field("Degraded chunks", "degraded_chunks"),
)

WatchOption = Annotated[bool, typer.Option("--watch", help="Wait until it has ended, and show how far it is.")]


@app.command("status")
def status(ctx: typer.Context, pool: PoolArgument, watch: WatchOption = False) -> None:
    """Show how far a pool's rebuild is."""
    cli = settings(ctx)
    with cli.client() as api:
        row = api.get(_route("status", pool))
        cli.out.detail(_watched(cli, api, pool, row) if watch else row, DETAIL)


@app.command("start")
def start(ctx: typer.Context, pool: PoolArgument, watch: WatchOption = False) -> None:
    """Start it now: without waiting for SDSs that are DOWN, and after a cancel."""
    cli = settings(ctx)
    with cli.client() as api:
        row = api.post(_route("start", pool))
        cli.out.note(f"rebuild of pool {pool} started")
        if watch:
            cli.out.detail(_watched(cli, api, pool, row), DETAIL)
        elif cli.out.json:
            cli.out.document(row)


@app.command("cancel")
def cancel(ctx: typer.Context, pool: PoolArgument) -> None:
    """Copy nothing in this pool until it is started again."""
    cli = settings(ctx)
    with cli.client() as api:
        row = api.post(_route("cancel", pool))
    cli.out.done(row, f"rebuild of pool {pool} cancelled")


def _route(verb: str, pool: str) -> str:
    return f"/rebuild/{verb}" + route(Noun.POOL, pool).removeprefix("/pool")


def _watched(cli: Settings, api: Client, pool: str, row: Row) -> Row:
    """The status when the rebuild has ended. Raises ConflictError when it does not go on by itself."""
    with _bar(cli) as show:
        while True:
            show(row)
            if row["state"] in STOPPED:
                raise ConflictError(f"the rebuild of pool {pool} is {row['state']}: {row['reason']}")
            if row["state"] != "IN_PROGRESS" and not row["degraded_chunks"]:
                return row
            time.sleep(WATCH_SECONDS)
            row = api.get(_route("status", pool))


@contextmanager
def _bar(cli: Settings) -> Iterator[Any]:
    """Shows one status after the other on stderr: a bar on a terminal, else a line whenever it has changed."""
    if cli.out.quiet or not sys.stderr.isatty():
        shown = ""

        def line(row: Row) -> None:
            nonlocal shown
            text = f"{row['state']} {row['progress_percent']:.1f} %"
            if text != shown:
                cli.out.note(text)
            shown = text

        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.1f} %"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("rebuild", total=100)

        def bar(row: Row) -> None:
            text = f"{row['state']} {row['rate_mbps']:.0f} MB/s"
            progress.update(task, completed=row["progress_percent"], description=text)

        yield bar
