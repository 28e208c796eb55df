"""``pfvol sds``: storage servers."""

from __future__ import annotations

from typing import Annotated

import typer

from pfvol.cli.context import (
    CapacityArgument,
    NameArgument,
    PdArgument,
    PdOption,
    SdsArgument,
    noun,
    settings,
    size_bytes,
)
from pfvol.cli.output import Column, Row, field, size
from pfvol.ids import Noun, route

app = noun("Storage servers.")


def _failed_devices(row: Row) -> str:
    return "; ".join(f"{device['index']}: {device['message']}" for device in row["failed_devices"]) or "-"


LIST = (
    field("NAME", "name"),
    field("ID", "id"),
    field("PD", "pd_name"),
    field("FAULT SET", "fault_set_name"),
    field("STATE", "state"),
    field("REMOVING", "removing"),
    field("DATA ADDRESS", "data_address"),
    size("CAPACITY", "total_capacity_bytes"),
    size("USED", "used_capacity_bytes"),
)
DETAIL = (
    field("Name", "name"),
    field("Id", "id"),
    field("Protection domain", "pd_name"),
    field("Fault set", "fault_set_name"),
    field("State", "state"),
    field("Removing", "removing"),
    field("Node", "node"),
    field("Data address", "data_address"),
    size("Capacity", "total_capacity_bytes"),
    size("Used", "used_capacity_bytes"),
    field("Devices", "device_count"),
    Column("Failed devices", _failed_devices),
    field("Chunks", "chunk_count"),
    field("Incarnation", "incarnation"),
    field("Created", "created_at"),
)


@app.command("add")
def add(
    ctx: typer.Context,
    pd: PdArgument,
    name: NameArgument,
    capacity: CapacityArgument,
    fault_set: Annotated[str | None, typer.Option("--fault-set", metavar="F", help="Its fault set.")] = None,
    ip: Annotated[str | None, typer.Option("--ip", metavar="IP", help="Where it is expected to serve.")] = None,
    devices: Annotated[
        str | None,
        typer.Option("--devices", metavar="LIST", help="Comma-separated directories; default: in its data dir."),
    ] = None,
) -> None:
    """Add an SDS; the node of the same name becomes it when it registers."""
    cli = settings(ctx)
    capacity_bytes = size_bytes(capacity)
    with cli.client() as api:
        row = api.post(
            "/sds/add",
            pd_id=pd,
            name=name,
            capacity_bytes=capacity_bytes,
            fault_set_id=fault_set,
            ip=ip,
            devices=None if devices is None else [path.strip() for path in devices.split(",") if path.strip()],
        )
    cli.out.created(row, f"SDS {name} added; start a node of that name with the sds capability")


@app.command("list")
def list_(ctx: typer.Context, pd: PdOption = None) -> None:
    """List the SDSs."""
    cli = settings(ctx)
    with cli.client() as api:
        cli.out.table(api.get("/sds/list", pd_id=pd), LIST)


@app.command("show")
def show(ctx: typer.Context, sds: SdsArgument) -> None:
    """Show one SDS."""
    cli = settings(ctx)
    with cli.client() as api:
        cli.out.detail(api.get(route(Noun.SDS, sds)), DETAIL)


@app.command("remove")
def remove(
    ctx: typer.Context,
    sds: SdsArgument,
    cancel: Annotated[bool, typer.Option("--cancel", help="Keep it: take back a removal under way.")] = False,
) -> None:
    """Remove an SDS; one that holds copies is emptied first, and goes when that is done."""
    cli = settings(ctx)
    with cli.client() as api:
        if cancel:
            row = api.post(route(Noun.SDS, sds, "keep"))
            note = f"SDS {sds} stays"
        else:
            row = api.delete(route(Noun.SDS, sds))
            emptied = f"SDS {sds} is emptied and then removed: see `pfvol sds show {sds}`"
            note = f"SDS {sds} removed" if row["deleted"] else emptied
    cli.out.done(row, note)


@app.command("promote")
def promote(
    ctx: typer.Context,
    sds: SdsArgument,
    volume: Annotated[str | None, typer.Option("--volume", metavar="VOL", help="Only chunks of this volume.")] = None,
    accept_data_loss: Annotated[
        bool, typer.Option("--accept-data-loss", help="Do it. Without this the command says what would be lost.")
    ] = False,
    incomplete: Annotated[
        bool,
        typer.Option("--incomplete", help="Also chunks that were never whole here; what is missing reads as zeros."),
    ] = False,
) -> None:
    """Have an SDS serve its older copies of chunks whose newer ones are gone for good. Data is lost: what was written
    since this SDS left is forgotten, also if the others come back."""
    cli = settings(ctx)
    body = {"accept_data_loss": accept_data_loss, "incomplete": incomplete, "volume_id": volume}
    with cli.client() as api:
        row = api.post(route(Noun.SDS, sds, "promote"), **body)
    cli.out.done(row, f"SDS {sds} serves {row['chunks']} chunks alone now; what only other copies had is lost")
