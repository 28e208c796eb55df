"""``pfvol pd``: protection domains."""

from __future__ import annotations

from typing import Annotated

import typer

from pfvol.cli.context import NameArgument, PdArgument, noun, settings
from pfvol.cli.output import field, names, size
from pfvol.ids import Noun, route

app = noun("Protection domains.")

LIST = (
    field("NAME", "name"),
    field("ID", "id"),
    field("POOLS", "pool_count", right=True),
    field("SDS", "sds_count", right=True),
    size("CAPACITY", "total_capacity_bytes"),
    field("DESCRIPTION", "description"),
)
DETAIL = (
    field("Name", "name"),
    field("Id", "id"),
    field("Description", "description"),
    names("Pools", "pools"),
    names("Fault sets", "fault_sets"),
    names("SDSs", "sds"),
    size("Capacity", "total_capacity_bytes"),
    field("Created", "created_at"),
)


@app.command("create")
def create(
    ctx: typer.Context,
    name: NameArgument,
    description: Annotated[str | None, typer.Option("--description", "-d", help="Free text.")] = None,
) -> None:
    """Create a protection domain."""
    cli = settings(ctx)
    with cli.client() as api:
        row = api.post("/pd/create", name=name, description=description)
    cli.out.created(row, f"protection domain {name} created")


@app.command("list")
def list_(ctx: typer.Context) -> None:
    """List the protection domains."""
    cli = settings(ctx)
    with cli.client() as api:
        cli.out.table(api.get("/pd/list"), LIST)


@app.command("show")
def show(ctx: typer.Context, pd: PdArgument) -> None:
    """Show one protection domain."""
    cli = settings(ctx)
    with cli.client() as api:
        cli.out.detail(api.get(route(Noun.PROTECTION_DOMAIN, pd)), DETAIL)


@app.command("delete")
def delete(
    ctx: typer.Context,
    pd: PdArgument,
    cascade: Annotated[bool, typer.Option("--cascade", help="With its pools, fault sets and SDSs.")] = False,
) -> None:
    """Delete a protection domain."""
    cli = settings(ctx)
    with cli.client() as api:
        row = api.delete(route(Noun.PROTECTION_DOMAIN, pd), cascade=cascade)
    cli.out.done(row, f"protection domain {pd} deleted")
