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
from pfvol.faults import CALLS, check_fail_seconds, parse_delay, parse_error, parse_place
from pfvol.ids import Noun, route

RECOVER_TIMEOUT_SECONDS = 150.0  # above what the MDM waits for: devices may have to be recovered

app = noun("Storage servers.")


def _failed_devices(row: Row) -> str:
    return "; ".join(f"{device['index']}: {device['message']}" for device in row["failed_devices"]) or "-"


def _faults(row: Row) -> str:
    faults = row["faults"]
    said = [*faults["rules"]]
    if faults["failed"]:
        said.insert(0, "failed" + (f" until {faults['until']}" if faults["until"] else ""))
    return "; ".join(said) or "-"


def _injected(row: Row) -> str:
    faults = row["faults"]
    counted = ("errors_injected", "delays_injected", "blocks_corrupted")
    return ", ".join(f"{faults[key]} {key.replace('_', ' ')}" for key in counted if faults[key]) or "-"


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
    Column("Faults on purpose", _faults),
    Column("Injected so far", _injected),
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


@app.command("fail")
def fail(
    ctx: typer.Context,
    sds: SdsArgument,
    duration: Annotated[
        float | None, typer.Option("--duration", metavar="S", help="Seconds until it recovers by itself.")
    ] = None,
) -> None:
    """Have an SDS fail on purpose: it stops serving and its connections are cut, as if its process had been killed."""
    cli = settings(ctx)
    if duration is not None:
        check_fail_seconds(duration)
    with cli.client() as api:
        row = api.post(route(Noun.SDS, sds, "fail"), duration=duration)
    end = f"`pfvol sds recover {sds}` ends that" if duration is None else f"it recovers in {duration:g} s"
    cli.out.done(row, f"SDS {sds} fails: {end}")


@app.command("recover")
def recover(ctx: typer.Context, sds: SdsArgument) -> None:
    """End an SDS's failure on purpose; devices that are out of service are opened anew."""
    cli = settings(ctx)
    with cli.client(timeout_seconds=RECOVER_TIMEOUT_SECONDS) as api:
        row = api.post(route(Noun.SDS, sds, "recover"))
    state = "is back" if row["state"] == "UP" else f"is {row['state']} still: see `pfvol sds show {sds}`"
    cli.out.done(row, f"SDS {sds} {state}")


@app.command("inject")
def inject(
    ctx: typer.Context,
    sds: SdsArgument,
    error: Annotated[
        list[str] | None,
        typer.Option(
            "--error",
            metavar="CALL=ERRNO@PERCENT%",
            help=f"Of these calls of its disks ({', '.join(CALLS)}) this share fails, such as pread=EIO@1%.",
        ),
    ] = None,
    delay: Annotated[
        list[str] | None,
        typer.Option("--delay", metavar="CALL=TIME", help="Each of these calls waits first, such as pwrite=20ms."),
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Its disks are full: what needs room gets ENOSPC.")] = False,
    corrupt: Annotated[
        list[str] | None,
        typer.Option(
            "--corrupt",
            metavar="[VOLUME/]CHUNK:BLOCK",
            help="Flip bytes of this block of its copy. Without a volume where only one can be meant.",
        ),
    ] = None,
    clear: Annotated[bool, typer.Option("--clear", help="End all faults of its disks, before any new ones.")] = False,
) -> None:
    """Make an SDS's disks misbehave on purpose; see `pfvol sds show` for what is in force."""
    cli = settings(ctx)
    errors = [str(parse_error(text)) for text in error or ()]
    delays = [str(parse_delay(text)) for text in delay or ()]
    for text in corrupt or ():
        parse_place(text)
    if not (errors or delays or corrupt or full or clear):
        raise typer.BadParameter("nothing to inject: give --error, --delay, --full, --corrupt or --clear")
    with cli.client() as api:
        row = api.post(
            route(Noun.SDS, sds, "inject"),
            errors=errors,
            delays=delays,
            full=full,
            corrupt=list(corrupt or ()),
            clear=clear,
        )
    said = [f"corrupted {text}" for text in corrupt or ()]
    rules = row["faults"]["rules"]
    said.append(f"faults of its disks: {', '.join(rules)}" if rules else "no faults of its disks")
    cli.out.done(row, f"SDS {sds}: {'; '.join(said)}")


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
    said = f"SDS {sds} serves {row['chunks']} chunks alone now"
    if older := row["chunks"] - row["member_chunks"]:
        said += f"; of {older} of them what only other copies had is lost"
    cli.out.done(row, said)
