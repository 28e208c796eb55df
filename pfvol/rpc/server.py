"""The server's side of the control RPC: accepts, authenticates, and hands sessions to a service.

Owns the listener and every session's task. Promises that nobody unauthenticated reaches the service, and that whatever
comes in on a connection ends that connection at worst, with a logged reason.
"""

from __future__ import annotations

from typing import Any, Protocol

import trio

from pfvol.config import Address
from pfvol.constants import HANDSHAKE_TIMEOUT_SECONDS
from pfvol.errors import ConflictError, Error, TimedOutError
from pfvol.log import get_logger
from pfvol.rpc import hello, transport
from pfvol.rpc.messages import Params
from pfvol.rpc.session import Session
from pfvol.rpc.transport import Transport

CONNECTIONS_MAX = 4096
HANDSHAKES_MAX = 128

_log = get_logger(__name__)


class Service(Protocol):
    def opened(self, session: Session) -> None:
        """A peer has proven itself; before anything that it sends is handled."""

    def closed(self, session: Session) -> None:
        """The session has ended."""

    async def handle(self, session: Session, method: str, params: Params) -> Any:
        """A request (the result is the answer) or a notification."""


class Server:
    """Listens and serves while ``run`` runs."""

    def __init__(self, service: Service, *, secret: bytes, cluster_id: bytes) -> None:
        self._service = service
        self._secret = secret
        self._cluster_id = cluster_id
        self._connections = 0
        self._handshakes = 0

    async def run(
        self, host: str, port: int, *, task_status: trio.TaskStatus[Address] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Serves until cancelled; started with the bound (host, port).

        Raises ``ConflictError`` for a port in use, ``ConfigError`` for an address that cannot be bound.
        """
        listener = await transport.listen(host, port)
        async with listener, trio.open_nursery() as nursery:
            task_status.started(listener.socket.getsockname()[:2])
            await trio.serve_listeners(self._accept, [listener], handler_nursery=nursery)

    async def _accept(self, stream: trio.SocketStream) -> None:
        self._connections += 1
        connection = Transport(stream)
        try:
            session = await self._authenticate(connection)
            self._service.opened(session)
            _log.info("connected", peer=str(session.peer))
            try:
                await session.run()
            finally:
                self._service.closed(session)
                _log.info("disconnected", peer=str(session.peer), reason=session.close_reason)
        except Error as error:
            _log.warning("connection refused", address=connection.address, code=error.code, reason=error.message)
        except Exception:
            _log.exception("a connection has failed", address=connection.address)
        finally:
            self._connections -= 1
            with trio.CancelScope(shield=True):
                await connection.close()

    async def _authenticate(self, connection: Transport) -> Session:
        if self._handshakes >= HANDSHAKES_MAX or self._connections > CONNECTIONS_MAX:
            raise ConflictError("too many connections")
        self._handshakes += 1
        try:
            # Each step has its own limit too; this one is for all of them together.
            with trio.fail_after(2 * HANDSHAKE_TIMEOUT_SECONDS):
                peer = await hello.greet_client(connection, secret=self._secret, cluster_id=self._cluster_id)
        except trio.TooSlowError:
            raise TimedOutError("the handshake was not finished in time") from None
        finally:
            self._handshakes -= 1
        session: Session

        async def handle(method: str, params: Params) -> Any:
            return await self._service.handle(session, method, params)

        session = Session(connection, peer, handle)
        return session
