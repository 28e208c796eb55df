"""``pfvol node``: one node of a cluster, in the foreground."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from pfvol.cli.context import noun, settings

app = noun("Run one node.")


@app.callback()
def node() -> None:
    """Run one node."""


@app.command("run")
def run(
    ctx: typer.Context,
    name: Annotated[str | None, typer.Option("--name", metavar="N", help="The node's name.")] = None,
    capabilities: Annotated[
        str | None, typer.Option("--capabilities", metavar="LIST", help="Of mdm, sds, sdc; comma-separated.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="Its configuration (also before the command).")
    ] = None,
) -> None:
    """Run a node until SIGTERM; what is not given here comes from the configuration."""
    given = {
        "--name": name,
        "--capabilities": capabilities,
        "--config": config or settings(ctx).config,
        "--data-dir": ctx.find_root().params.get("data_dir"),  # as given: a node's default is in its configuration
    }
    argv = [sys.executable, "-m", "pfvol.node"]
    for option, value in given.items():
        argv += [] if value is None else [option, str(value)]
    argv += ["--json"] if settings(ctx).out.json else []
    # Replaced, not called: the service manager's process is the node itself, and the command line's memory is gone.
    os.execv(sys.executable, argv)
