"""``pfvol event``: what happened in the cluster."""

from __future__ import annotations

from typing import Annotated

import typer

from pfvol.cli.context import noun, settings
from pfvol.cli.output import field

app = noun("What happened in the cluster.")

LIST = (field("TIME", "time"), field("TYPE", "type"), field("MESSAGE", "message"))


@app.callback()
def event() -> None:
    """What happened in the cluster."""


@app.command("list")
def list_(
    ctx: typer.Context,
    since: Annotated[
        str | None, typer.Option("--since", metavar="T", help="From this time on: 2026-01-31T12:00:00Z.")
    ] = None,
    type_: Annotated[str | None, typer.Option("--type", metavar="T", help="Only of this type.")] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, max=10000, help="The last N at most.")] = 1000,
) -> None:
    """List events, oldest first."""
    cli = settings(ctx)
    with cli.client() as api:
        cli.out.table(api.get("/event/list", since=since, type=type_, limit=limit), LIST)
