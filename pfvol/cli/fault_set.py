"""``pfvol fault-set``: fault sets."""

from __future__ import annotations

import typer

from pfvol.cli.context import FaultSetArgument, NameArgument, PdArgument, PdOption, noun, settings
from pfvol.cli.output import field, names
from pfvol.ids import Noun, route

app = noun("Fault sets: servers that fail together never hold both copies while there is another choice.")

LIST = (field("NAME", "name"), field("ID", "id"), field("PD", "pd_name"), field("SDS", "sds_count", right=True))
DETAIL = (
    field("Name", "name"),
    field("Id", "id"),
    field("Protection domain", "pd_name"),
    names("SDSs", "sds"),
    field("Created", "created_at"),
)


@app.command("create")
def create(ctx: typer.Context, pd: PdArgument, name: NameArgument) -> None:
    """Create a fault set."""
    cli = settings(ctx)
    with cli.client() as api:
        row = api.post("/fault-set/create", pd_id=pd, name=name)
    cli.out.created(row, f"fault set {name} created")


@app.command("list")
def list_(ctx: typer.Context, pd: PdOption = None) -> None:
    """List the fault sets."""
    cli = settings(ctx)
    with cli.client() as api:
        cli.out.table(api.get("/fault-set/list", pd_id=pd), LIST)


@app.command("show")
def show(ctx: typer.Context, fault_set: FaultSetArgument) -> None:
    """Show one fault set."""
    cli = settings(ctx)
    with cli.client() as api:
        cli.out.detail(api.get(route(Noun.FAULT_SET, fault_set)), DETAIL)


@app.command("delete")
def delete(ctx: typer.Context, fault_set: FaultSetArgument) -> None:
    """Delete a fault set that no SDS is in."""
    cli = settings(ctx)
    with cli.client() as api:
        row = api.delete(route(Noun.FAULT_SET, fault_set))
    cli.out.done(row, f"fault set {fault_set} deleted")
