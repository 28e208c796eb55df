"""``pfvol cluster``: a local cluster, one operating-system process per node."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from pfvol.cli.context import Settings, noun, settings, size_bytes
from pfvol.cli.output import field
from pfvol.constants import DEVICE_SIZE_BYTES_DEFAULT, DEVICES_PER_SDS_DEFAULT

app = noun("A local cluster, one process per node.")

NODES = (
    field("NODE", "name"),
    field("CAPABILITIES", "capabilities"),
    field("STATE", "state"),
    field("PID", "pid", right=True),
    field("CONTROL", "control_address"),
    field("DATA", "data_address"),
    field("SDS", "sds"),
)
# What `cluster up` says it prints; the rest of cluster.json is between its writer and itself.
DOCUMENT = ("data_dir", "mdm", "control_address", "api", "token", "state", "nodes")
SHAPE = ("sds", "fault_sets", "devices", "device_size", "bare")
NODE = ("name", "pid", "capabilities", "control_address", "data_address", "data_dir", "sds", "state")

DataDirOption = Annotated[
    Path | None, typer.Option("--data-dir", metavar="D", help="Where it lives (also before the command).")
]
NodeArgument = Annotated[str, typer.Argument(metavar="NAME", help="The node's name.", show_default=False)]


def _print(cli: Settings, cluster: Mapping[str, Any], note: str) -> None:
    nodes = [{key: node[key] for key in NODE if key in node} for node in cluster["nodes"]]
    cli.out.note(note)
    if cli.out.json:
        cli.out.document({key: cluster[key] for key in DOCUMENT if key in cluster} | {"nodes": nodes})
    else:
        cli.out.table(nodes, NODES)


def _given(ctx: typer.Context, parameter: str) -> bool:
    source = ctx.get_parameter_source(parameter)
    return source is not None and source.name == "COMMANDLINE"


def _change(ctx: typer.Context, data_dir: Path | None, change: Callable[[Path], Mapping[str, Any]], note: str) -> None:
    """Runs one function of ``pfvol.localcluster`` and shows the cluster as it is afterwards."""
    from pfvol import localcluster

    cli = settings(ctx)
    where = data_dir or cli.data_dir
    change(where)
    _print(cli, localcluster.status(where), note)


@app.command("up")
def up(
    ctx: typer.Context,
    data_dir: DataDirOption = None,
    sds: Annotated[int, typer.Option("--sds", min=1, help="How many SDSs, each a process.")] = 3,
    fault_sets: Annotated[int, typer.Option("--fault-sets", min=0, help="Spread them over N fault sets.")] = 0,
    devices: Annotated[int, typer.Option("--devices", min=1, help="Block files per SDS.")] = DEVICES_PER_SDS_DEFAULT,
    device_size: Annotated[
        str | None, typer.Option("--device-size", metavar="SIZE", help="Of each (sparse) block file; default 1GiB.")
    ] = None,
    bare: Annotated[bool, typer.Option("--bare", help="No protection domain, no pool.")] = False,
) -> None:
    """Start the cluster, made first if there is none; returns when it is healthy."""
    from pfvol import localcluster

    cli = settings(ctx)
    where = data_dir or cli.data_dir
    existing = (where / "cluster.json").exists()
    device_size_bytes = DEVICE_SIZE_BYTES_DEFAULT if device_size is None else size_bytes(device_size)
    localcluster.up(
        where, sds=sds, fault_sets=fault_sets, devices=devices, device_size_bytes=device_size_bytes, bare=bare
    )
    _print(cli, localcluster.status(where), f"cluster up in {where}")
    if existing and any(_given(ctx, name) for name in SHAPE):
        cli.out.note("it was there already and keeps its shape; `pfvol cluster add-node` adds an SDS")


@app.command("status")
def status(ctx: typer.Context, data_dir: DataDirOption = None) -> None:
    """Show the nodes."""
    from pfvol import localcluster

    cli = settings(ctx)
    cluster = localcluster.status(data_dir or cli.data_dir)
    _print(cli, cluster, f"cluster {cluster['data_dir']}: {cluster['state']}, API {cluster['api']}")


@app.command("down")
def down(ctx: typer.Context, data_dir: DataDirOption = None) -> None:
    """Stop every node; the data stays."""
    from pfvol import localcluster

    _change(ctx, data_dir, localcluster.down, "cluster down; `pfvol cluster up` brings it back")


@app.command("restart")
def restart(
    ctx: typer.Context,
    node: Annotated[str | None, typer.Option("--node", metavar="NAME", help="Only this node.")] = None,
    data_dir: DataDirOption = None,
) -> None:
    """Stop and start every node, or one."""
    from pfvol import localcluster

    _change(ctx, data_dir, lambda where: localcluster.restart(where, node), f"{node or 'cluster'} restarted")


@app.command("add-node")
def add_node(
    ctx: typer.Context,
    name: NodeArgument,
    capabilities: Annotated[str, typer.Option("--capabilities", metavar="LIST", help="Comma-separated.")] = "sds",
    fault_set: Annotated[str | None, typer.Option("--fault-set", metavar="F", help="Its fault set.")] = None,
    data_dir: DataDirOption = None,
) -> None:
    """Add a node and start it; its capacity joins the pool."""
    from pfvol import localcluster

    wanted = tuple(part.strip() for part in capabilities.split(",") if part.strip())
    _change(
        ctx,
        data_dir,
        lambda where: localcluster.add_node(where, name, capabilities=wanted, fault_set=fault_set),
        f"node {name} added",
    )


@app.command("start-node")
def start_node(ctx: typer.Context, name: NodeArgument, data_dir: DataDirOption = None) -> None:
    """Start one node."""
    from pfvol import localcluster

    _change(ctx, data_dir, lambda where: localcluster.start_node(where, name), f"node {name} started")


@app.command("stop-node")
def stop_node(ctx: typer.Context, name: NodeArgument, data_dir: DataDirOption = None) -> None:
    """Stop one node cleanly."""
    from pfvol import localcluster

    _change(ctx, data_dir, lambda where: localcluster.stop_node(where, name), f"node {name} stopped")
