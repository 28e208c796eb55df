"""``pfvol sdc``: the clients that mount volumes."""

from __future__ import annotations

from typing import Annotated

import typer

from pfvol.cli.context import NameArgument, SdcArgument, noun, settings
from pfvol.cli.output import Column, Row, field
from pfvol.ids import Noun, route

app = noun("Clients that mount volumes.")


def _volumes(row: Row) -> str:
    mapped = (f"{volume['volume_name']} ({volume['access_mode']})" for volume in row["mappings"])
    return ", ".join(mapped) or "-"


LIST = (
    field("NAME", "name"),
    field("ID", "id"),
    field("CONNECTED", "connected"),
    field("IP", "ip"),
    field("VOLUMES", "mapping_count", right=True),
)
DETAIL = (
    field("Name", "name"),
    field("Id", "id"),
    field("Connected", "connected"),
    field("IP", "ip"),
    Column("Volumes", _volumes),
    field("Incarnation", "incarnation"),
    field("Created", "created_at"),
)


@app.command("add")
def add(
    ctx: typer.Context,
    name: NameArgument,
    ip: Annotated[str | None, typer.Option("--ip", metavar="IP", help="Where it is.")] = None,
) -> None:
    """Add an SDC, so that volumes can be mapped to it before its first mount."""
    cli = settings(ctx)
    with cli.client() as api:
        row = api.post("/sdc/add", name=name, ip=ip)
    cli.out.created(row, f"SDC {name} added")


@app.command("list")
def list_(ctx: typer.Context) -> None:
    """List the SDCs."""
    cli = settings(ctx)
    with cli.client() as api:
        cli.out.table(api.get("/sdc/list"), LIST)


@app.command("show")
def show(ctx: typer.Context, sdc: SdcArgument) -> None:
    """Show one SDC and the volumes mapped to it."""
    cli = settings(ctx)
    with cli.client() as api:
        cli.out.detail(api.get(route(Noun.SDC, sdc)), DETAIL)


@app.command("remove")
def remove(ctx: typer.Context, sdc: SdcArgument) -> None:
    """Remove an SDC that no volume is mapped to."""
    cli = settings(ctx)
    with cli.client() as api:
        row = api.delete(route(Noun.SDC, sdc))
    cli.out.done(row, f"SDC {sdc} removed")
