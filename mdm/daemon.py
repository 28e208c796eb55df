"""The MDM role: from a node's data directory to a control port and an API that answer.

Owns the order of things: database, token, control port, API. Promises that ports, once chosen, stay the node's (others
keep reconnecting to them), and that whatever was answered is in the database however the process ends.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import trio

from mdm.api.app import serve as serve_api
from mdm.control import Control
from mdm.manager import Manager
from mdm.membership import Membership
from mdm.orchestrator import Orchestrator
from mdm.rebuilder import Rebuilder
from pfvol.config import format_address
from pfvol.errors import ConfigError, ConflictError
from pfvol.node import Node
from pfvol.rpc import auth
from pfvol.rpc.server import Server

DATABASE = "mdm.sqlite"
TOKEN = "token"
PORTS = "ports.json"


async def run_role(node: Node, *, task_status: trio.TaskStatus[dict[str, Any]] = trio.TASK_STATUS_IGNORED) -> None:
    """Runs the MDM until the node stops; started with ``{"control_address": [host, port], "api": url}``.

    Raises ConfigError or VersionError for a directory that cannot be used, ConflictError for a port in use.
    """
    config, directory = node.config, node.node_dir
    secret = node.secret()
    _check_whole(directory)
    ports = _load_ports(directory / PORTS)
    wanted = {
        "control": config.mdm.control_port or ports.get("control", 0),
        "api": config.mdm.api_port or ports.get("api", 0),
    }
    async with Manager.open(directory / DATABASE) as manager:
        cluster = manager.state.cluster
        _write_token(directory / TOKEN, cluster.api_token)
        orchestrator = Orchestrator(manager, Membership())
        server = Server(Control(orchestrator), secret=secret, cluster_id=cluster.cluster_id)
        async with trio.open_nursery() as nursery:

            async def control(*, task_status: trio.TaskStatus[tuple[str, int]]) -> None:
                await server.run(config.node.bind, wanted["control"], task_status=task_status)

            async def api(*, task_status: trio.TaskStatus[tuple[str, int]]) -> None:
                await serve_api(
                    orchestrator,
                    host=config.node.bind,
                    port=wanted["api"],
                    token=cluster.api_token,
                    task_status=task_status,
                )

            await nursery.start(orchestrator.run)
            await nursery.start(Rebuilder(orchestrator).run)
            control_address = await nursery.start(control)
            api_address = await nursery.start(api)
            _keep_ports(directory / PORTS, ports, {"control": control_address[1], "api": api_address[1]})
            task_status.started(
                {
                    "control_address": list(control_address),
                    "api": f"http://{format_address((api_address[0], api_address[1]))}",
                }
            )
            await node.stopping.wait()
            nursery.cancel_scope.cancel()


def _check_whole(directory: Path) -> None:
    """A token without a database means that the cluster's state was deleted: a new one would not know its volumes."""
    if not (directory / DATABASE).exists() and (directory / TOKEN).exists():
        raise ConfigError(f"{directory / DATABASE} is missing although the MDM has run here: restore it")


def _load_ports(path: Path) -> dict[str, int]:
    try:
        ports = json.loads(path.read_text())
        return {key: int(ports[key]) for key in ("control", "api")}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path} is damaged: restore it, or delete it to have the ports chosen anew") from error


def _keep_ports(path: Path, old: dict[str, int], new: dict[str, int]) -> None:
    if old != new:
        path.unlink(missing_ok=True)
        auth.write_private(path, json.dumps(new).encode() + b"\n")


def _write_token(path: Path, token: str) -> None:
    with contextlib.suppress(OSError):
        if path.read_text().strip() == token and path.stat().st_mode & 0o077 == 0:
            return
    path.unlink(missing_ok=True)
    with contextlib.suppress(ConflictError):
        auth.write_private(path, token.encode() + b"\n")
