"""The API as an ASGI application, and the server that runs it in the MDM's own trio loop.

Routes are async and await nothing but the orchestrator, so a request sees one state and changes it through the one
admin path. ``serve`` owns its socket and its connections, and ends when it is cancelled.
"""

from __future__ import annotations

import logging
import socket
from typing import TYPE_CHECKING, Any

import trio
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from hypercorn.config import Config
from hypercorn.trio import serve as hypercorn_serve

from mdm.api import problem, schemas
from mdm.api.auth import OPEN_PATHS, Gate
from mdm.api.routes import event, fault_set, pd, pool, rebuild, sdc, sds, system, vol
from pfvol import __version__
from pfvol.errors import ConfigError, ConflictError

if TYPE_CHECKING:
    from mdm.orchestrator import Orchestrator

PORT_MAX = 65535
ROUTERS = (
    pd.router,
    fault_set.router,
    pool.router,
    sds.router,
    sdc.router,
    vol.router,
    rebuild.router,
    event.router,
    system.router,
)
PROBLEM_RESPONSES: dict[int | str, dict[str, Any]] = {
    422: {"model": schemas.Problem, "description": "The request does not fit the schema."},
    "default": {"model": schemas.Problem, "description": "Any other error."},
}


def create_app(orchestrator: Orchestrator) -> FastAPI:
    """The routes over ``orchestrator``, without the token: ``guarded`` adds it."""
    app = FastAPI(title="pfvol", version=__version__, responses=PROBLEM_RESPONSES)
    app.state.orchestrator = orchestrator
    problem.install(app)
    for router in ROUTERS:
        app.include_router(router)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def guarded(app: FastAPI, token: str) -> Gate:
    return Gate(app, token)


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document, with the token that the gate asks for."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"token": []}]
        for path in OPEN_PATHS & document["paths"].keys():
            for operation in document["paths"][path].values():
                operation["security"] = []
        app.openapi_schema = document
    return app.openapi_schema


def bind(host: str, port: int) -> socket.socket:
    """A bound socket; port 0 takes a free one. Raises ``ConflictError`` for a port in use."""
    if not 0 <= port <= PORT_MAX:
        raise ConfigError(f"the API's port {port} is not between 0 and {PORT_MAX}")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _name, where = found[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"the API cannot listen on {host}:{port}: {error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.bind(where)
        # Here and not in the server: with SO_REUSEADDR two sockets may bind a port, only one may listen on it.
        listener.listen()
    except OSError as error:
        listener.close()
        raise ConflictError(
            f"the API cannot listen on {host}:{port}: {error.strerror}; stop what listens there, "
            "or set api_port in the configuration",
            host=host,
            port=port,
        ) from error
    return listener


async def serve(
    orchestrator: Orchestrator,
    *,
    host: str,
    port: int,
    token: str,
    task_status: trio.TaskStatus[tuple[str, int]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serves until cancelled; started with the bound (host, port)."""
    listener = bind(host, port)
    bound = listener.getsockname()[:2]
    config = Config()
    config.bind = [f"fd://{listener.detach()}"]  # Hypercorn owns the descriptor from here on
    config.accesslog = None
    config.errorlog = log = logging.getLogger("hypercorn.error")
    log.setLevel(logging.WARNING)  # its notes about where it runs are for those who start it by hand
    app = guarded(create_app(orchestrator), token)
    async with trio.open_nursery() as nursery:
        await nursery.start(hypercorn_serve, app, config)
        task_status.started(bound)
