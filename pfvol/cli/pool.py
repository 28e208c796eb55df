"""``pfvol pool``: storage pools."""

from __future__ import annotations

from typing import Annotated

import typer

from pfvol.cli.context import (
    CapacityArgument,
    NameArgument,
    PdArgument,
    PdOption,
    PoolArgument,
    noun,
    settings,
    size_bytes,
)
from pfvol.cli.output import field, size
from pfvol.errors import InvalidError
from pfvol.ids import Noun, route

app = noun("Storage pools.")

LIST = (
    field("NAME", "name"),
    field("ID", "id"),
    field("PD", "pd_name"),
    field("HEALTH", "health"),
    field("POLICY", "policy"),
    size("CAPACITY", "total_capacity_bytes"),
    size("USED", "used_capacity_bytes"),
    size("RESERVED", "reserved_capacity_bytes"),
    size("FREE", "free_capacity_bytes"),
    field("VOLUMES", "volume_count", right=True),
    field("REBUILD", "rebuild_state"),
)
DETAIL = (
    field("Name", "name"),
    field("Id", "id"),
    field("Protection domain", "pd_name"),
    field("Health", "health"),
    field("Policy", "policy"),
    field("Durability", "durability"),
    size("Capacity", "total_capacity_bytes"),
    size("Used", "used_capacity_bytes"),
    size("Reserved", "reserved_capacity_bytes"),
    size("Free", "free_capacity_bytes"),
    size("Provisioned", "provisioned_capacity_bytes"),
    field("Spare percent", "spare_percent"),
    field("Volumes", "volume_count"),
    field("SDSs", "sds_count"),
    field("Rebuild", "rebuild_state"),
    field("Rebuild progress %", "rebuild_progress_percent"),
    field("Rebuild rate limit MB/s", "rebuild_rate_limit_mbps"),
    field("Rebuild delay s", "rebuild_delay_seconds"),
    field("Created", "created_at"),
)
HEALTH = (
    field("Name", "name"),
    field("Health", "health"),
    field("SDSs up", "sds_up"),
    field("SDSs down", "sds_down"),
    field("Volumes", "volume_count"),
    field("Chunks", "chunk_count"),
    field("Degraded chunks", "degraded_chunk_count"),
    field("Failed chunks", "failed_chunk_count"),
    field("Rebuild", "rebuild_state"),
    field("Reasons", "reasons"),
)

PolicyOption = Annotated[str | None, typer.Option("--policy", metavar="two_copies|ec", help="Protection.")]
RateOption = Annotated[
    int | None, typer.Option("--rebuild-rate-limit", metavar="MBPS", help="Rebuild at most this fast, in MB/s.")
]
DelayOption = Annotated[
    int | None, typer.Option("--rebuild-delay", metavar="S", help="Rebuild after an SDS was away this long.")
]
SpareOption = Annotated[
    int | None, typer.Option("--spare-percent", metavar="N", help="Capacity kept free for rebuilds.")
]
DurabilityOption = Annotated[
    str | None,
    typer.Option("--durability", metavar="flush|commit", help="Acknowledge from both page caches, or both disks."),
]


@app.command("create")
def create(
    ctx: typer.Context,
    pd: PdArgument,
    name: NameArgument,
    capacity: CapacityArgument,
    policy: PolicyOption = None,
    rebuild_rate_limit: RateOption = None,
    rebuild_delay: DelayOption = None,
    spare_percent: SpareOption = None,
    durability: DurabilityOption = None,
) -> None:
    """Create a pool of CAPACITY (net: user data, before copies)."""
    cli = settings(ctx)
    capacity_bytes = size_bytes(capacity)
    with cli.client() as api:
        row = api.post(
            "/pool/create",
            pd_id=pd,
            name=name,
            capacity_bytes=capacity_bytes,
            policy=policy,
            rebuild_rate_limit_mbps=rebuild_rate_limit,
            rebuild_delay_seconds=rebuild_delay,
            spare_percent=spare_percent,
            durability=durability,
        )
    cli.out.created(row, f"pool {name} created")


@app.command("list")
def list_(ctx: typer.Context, pd: PdOption = None) -> None:
    """List the pools."""
    cli = settings(ctx)
    with cli.client() as api:
        cli.out.table(api.get("/pool/list", pd_id=pd), LIST)


@app.command("show")
def show(ctx: typer.Context, pool: PoolArgument) -> None:
    """Show one pool."""
    cli = settings(ctx)
    with cli.client() as api:
        cli.out.detail(api.get(route(Noun.POOL, pool)), DETAIL)


@app.command("health")
def health(ctx: typer.Context, pool: PoolArgument) -> None:
    """Show why a pool is healthy or not."""
    cli = settings(ctx)
    with cli.client() as api:
        cli.out.detail(api.get(route(Noun.POOL, pool, "health")), HEALTH)


@app.command("set")
def set_(
    ctx: typer.Context,
    pool: PoolArgument,
    name: Annotated[str | None, typer.Option("--name", help="Rename it.")] = None,
    capacity: Annotated[str | None, typer.Option("--capacity", metavar="SIZE", help="New net capacity.")] = None,
    rebuild_rate_limit: RateOption = None,
    rebuild_delay: DelayOption = None,
    spare_percent: SpareOption = None,
    durability: DurabilityOption = None,
) -> None:
    """Change properties of a pool; what is not given stays."""
    cli = settings(ctx)
    changes = {
        "name": name,
        "capacity_bytes": None if capacity is None else size_bytes(capacity),
        "rebuild_rate_limit_mbps": rebuild_rate_limit,
        "rebuild_delay_seconds": rebuild_delay,
        "spare_percent": spare_percent,
        "durability": durability,
    }
    if all(value is None for value in changes.values()):
        raise InvalidError("nothing to change: give at least one option (`pfvol pool set --help`)")
    with cli.client() as api:
        row = api.patch(route(Noun.POOL, pool), **changes)
    cli.out.done(row, f"pool {pool} changed")


@app.command("delete")
def delete(ctx: typer.Context, pool: PoolArgument) -> None:
    """Delete a pool that has no volumes."""
    cli = settings(ctx)
    with cli.client() as api:
        row = api.delete(route(Noun.POOL, pool))
    cli.out.done(row, f"pool {pool} deleted")
