"""``pfvol system``: the cluster as a whole."""

from __future__ import annotations

from typing import Annotated

import typer

from pfvol.cli.context import noun, settings
from pfvol.cli.output import Column, field, size
from pfvol.errors import EXIT_CONFLICT

app = noun("The cluster as a whole.")

DETAIL = (
    field("Health", "health"),
    field("Reasons", "reasons"),
    field("Cluster", "cluster_id"),
    field("Version", "version"),
    field("Protection domains", "pd_count"),
    Column(
        "Pools", lambda row: f"{row['pool_count']} ({row['pools_degraded']} degraded, {row['pools_failed']} failed)"
    ),
    Column("SDSs", lambda row: f"{row['sds_count']} ({row['sds_up']} up, {row['sds_down']} down)"),
    Column("SDCs", lambda row: f"{row['sdc_count']} ({row['sdc_connected']} connected)"),
    field("Volumes", "volume_count"),
    size("Capacity", "total_capacity_bytes"),
    size("Used", "used_capacity_bytes"),
    size("Free", "free_capacity_bytes"),
)


@app.callback()
def system() -> None:
    """The cluster as a whole."""


@app.command("status")
def status(
    ctx: typer.Context,
    check: Annotated[bool, typer.Option("--check", help="Exit 4 unless health is OK (for scripts).")] = False,
) -> None:
    """Show the health of everything."""
    cli = settings(ctx)
    with cli.client() as api:
        row = api.get("/system/status")
    cli.out.detail(row, DETAIL)
    if check and row["health"] != "OK":
        raise typer.Exit(EXIT_CONFLICT)
