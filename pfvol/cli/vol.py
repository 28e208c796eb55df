"""``pfvol vol``: volumes."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pfvol.cli.context import (
    NameArgument,
    PoolArgument,
    SdcArgument,
    SizeArgument,
    VolumeArgument,
    noun,
    settings,
    size_bytes,
)
from pfvol.cli.output import Column, Row, field, human_size, size
from pfvol.client import Client
from pfvol.constants import SEGMENT_CHUNKS
from pfvol.errors import EXIT_INTEGRITY, InvalidError
from pfvol.ids import Noun, route

app = noun("Volumes.")

# Verifying reads every copy of every chunk: as long as it takes, but a dead connection is noticed by TCP.
VERIFY_TIMEOUT_SECONDS = 24 * 3600.0


def _mappings(row: Row) -> str:
    def one(mapping: Row) -> str:
        limits = [f"{mapping['iops_limit']} IOPS"] if mapping["iops_limit"] else []
        limits += [f"{mapping['bandwidth_limit_mbps']} MB/s"] if mapping["bandwidth_limit_mbps"] else []
        return f"{mapping['sdc_name']} ({', '.join([mapping['access_mode'], *limits])})"

    return "; ".join(one(mapping) for mapping in row["mappings"]) or "-"


def _replicas(row: Row) -> str:
    def one(replica: Row) -> str:
        flags = "" if replica["is_available"] else " unavailable"
        return f"{replica['sds_name']} ({replica['role']}{' rebuilding' if replica['is_rebuilding'] else flags})"

    return ", ".join(one(replica) for replica in row["replicas"])


LIST = (
    field("NAME", "name"),
    field("ID", "id"),
    field("POOL", "pool_name"),
    field("STATE", "state"),
    field("TYPE", "provisioning"),
    size("SIZE", "size_bytes"),
    size("USED", "used_capacity_bytes"),
    Column("MAPPED TO", _mappings),
)
DETAIL = (
    field("Name", "name"),
    field("Id", "id"),
    field("Pool", "pool_name"),
    field("State", "state"),
    field("Health", "health"),
    field("Reasons", "reasons"),
    field("Provisioning", "provisioning"),
    size("Size", "size_bytes"),
    size("Used", "used_capacity_bytes"),
    field("Chunks", "chunk_count"),
    Column("Mapped to", _mappings),
    field("Created", "created_at"),
)
CHUNKS = (
    field("CHUNK", "index", right=True),
    field("EPOCH", "epoch", right=True),
    field("DEGRADED", "is_degraded"),
    Column("COPIES", _replicas),
)
PROBLEMS = (
    field("CHUNK", "chunk", right=True),
    field("BLOCK", "block", right=True),
    field("PROBLEM", "problem"),
    field("SDS", "sds_name"),
    field("DETAIL", "detail"),
)


@app.command("create")
def create(
    ctx: typer.Context,
    pool: PoolArgument,
    name: NameArgument,
    size: SizeArgument,
    thin: Annotated[bool, typer.Option("--thin", help="Take capacity as it is written (the default).")] = False,
    thick: Annotated[bool, typer.Option("--thick", help="Reserve the whole size now.")] = False,
) -> None:
    """Create a volume."""
    cli = settings(ctx)
    if thin and thick:
        raise InvalidError("a volume is --thin or --thick, not both")
    body = {
        "pool_id": pool,
        "name": name,
        "size_bytes": size_bytes(size),
        "provisioning": "thick" if thick else "thin",
    }
    with cli.client() as api:
        row = api.post("/vol/create", **body)
    cli.out.created(row, f"{row['provisioning']} volume {name} created")


@app.command("list")
def list_(
    ctx: typer.Context,
    pool: Annotated[str | None, typer.Option("--pool", help="Only of this pool.")] = None,
) -> None:
    """List the volumes."""
    cli = settings(ctx)
    with cli.client() as api:
        cli.out.table(api.get("/vol/list", pool_id=pool), LIST)


@app.command("show")
def show(
    ctx: typer.Context,
    vol: VolumeArgument,
    chunks: Annotated[bool, typer.Option("--chunks", help="With every chunk and where its copies are.")] = False,
) -> None:
    """Show one volume."""
    cli = settings(ctx)
    with cli.client() as api:
        row = api.get(route(Noun.VOLUME, vol))
        if chunks:
            row["chunks"] = _all_chunks(api, row)
    cli.out.detail(row, DETAIL)
    if chunks and not cli.out.json:
        print()
        cli.out.table(row["chunks"], CHUNKS)


def _all_chunks(api: Client, volume: Row) -> list[Any]:
    """The whole map, in pages: a large volume has many chunks."""
    found: list[Any] = []
    while len(found) < volume["chunk_count"]:
        page = {"first": len(found), "count": SEGMENT_CHUNKS}
        more = api.get(route(Noun.VOLUME, volume["id"], "chunks"), **page)
        if not more:
            break
        found += more
    return found


@app.command("map")
def map_(
    ctx: typer.Context,
    vol: VolumeArgument,
    sdc: SdcArgument,
    ro: Annotated[bool, typer.Option("--ro", help="Read-only.")] = False,
    iops_limit: Annotated[
        int | None, typer.Option("--iops-limit", min=0, metavar="N", help="At most N operations a second; 0: no limit.")
    ] = None,
    bandwidth_limit: Annotated[
        int | None, typer.Option("--bandwidth-limit", min=0, metavar="MBPS", help="At most MBPS MB/s; 0: no limit.")
    ] = None,
) -> None:
    """Map a volume to an SDC: it appears under its mountpoint."""
    cli = settings(ctx)
    body = {
        "volume_id": vol,
        "sdc_id": sdc,
        "access_mode": "readOnly" if ro else "readWrite",
        "iops_limit": iops_limit,
        "bandwidth_limit_mbps": bandwidth_limit,
    }
    with cli.client() as api:
        row = api.post("/vol/map", **body)
    cli.out.done(row, f"volume {vol} mapped to {sdc}{' read-only' if ro else ''}")


@app.command("unmap")
def unmap(ctx: typer.Context, vol: VolumeArgument, sdc: SdcArgument) -> None:
    """Unmap a volume from an SDC; answered when no server accepts its IO any more."""
    cli = settings(ctx)
    with cli.client() as api:
        row = api.post("/vol/unmap", volume_id=vol, sdc_id=sdc)
    cli.out.done(row, f"volume {vol} unmapped from {sdc}")


@app.command("extend")
def extend(
    ctx: typer.Context,
    vol: VolumeArgument,
    additional: Annotated[
        str | None, typer.Argument(metavar="[ADDITIONAL]", help="How much more, such as 1GiB.", show_default=False)
    ] = None,
    to: Annotated[str | None, typer.Option("--to", metavar="SIZE", help="The new whole size instead.")] = None,
) -> None:
    """Extend a volume, by ADDITIONAL or to --to SIZE; mounts see it at once."""
    cli = settings(ctx)
    if (additional is None) == (to is None):
        raise InvalidError("give either ADDITIONAL or --to SIZE")
    change = {"additional_bytes": size_bytes(additional)} if additional else {"new_size_bytes": size_bytes(to or "")}
    with cli.client() as api:
        row = api.post("/vol/extend", volume_id=vol, **change)
    cli.out.done(row, f"volume {vol} now has {human_size(row['size_bytes'])}")


@app.command("delete")
def delete(ctx: typer.Context, vol: VolumeArgument) -> None:
    """Delete a volume that is not mapped, and its data."""
    cli = settings(ctx)
    with cli.client() as api:
        row = api.delete(route(Noun.VOLUME, vol))
    cli.out.done(row, f"volume {vol} deleted")


@app.command("verify")
def verify(
    ctx: typer.Context,
    vol: VolumeArgument,
    repair: Annotated[
        bool, typer.Option("--repair", help="Have bad blocks rewritten from their other copy; verify again to see.")
    ] = False,
) -> None:
    """Compare every chunk's copies: presence, tags, bytes, fault sets. Exit 9 on any difference."""
    cli = settings(ctx)
    with cli.client(timeout_seconds=VERIFY_TIMEOUT_SECONDS) as api:
        report = api.post(route(Noun.VOLUME, vol, "verify"), repair=repair)
    if cli.out.json:
        cli.out.document(report)
    elif report["problems"]:
        cli.out.table(report["problems"], PROBLEMS)
    cli.out.note(
        f"volume {vol}: {report['chunks_checked']} chunks, {report['blocks_checked']} written blocks checked, "
        f"{report['problem_count']} differences"
    )
    if report["problem_count"]:
        raise typer.Exit(EXIT_INTEGRITY)
