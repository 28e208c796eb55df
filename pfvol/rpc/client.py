"""The client's side of the control RPC: one session, or a session that comes back whenever it is lost."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from pfvol.config import Address, format_address
from pfvol.constants import RPC_TIMEOUT_SECONDS
from pfvol.errors import Error, ProtocolError, TimedOutError, UnauthorizedError, UnreachableError, VersionError
from pfvol.log import get_logger
from pfvol.rpc import hello, transport
from pfvol.rpc.messages import Params
from pfvol.rpc.session import Handler, Session

__all__ = ["Handler", "Reconnecting", "Session", "connect"]

RETRY_SECONDS_MIN = 0.05
RETRY_SECONDS_MAX = 1.0

_log = get_logger(__name__)


async def connect(
    address: Address, *, secret: bytes, role: str, name: str, handler: Handler, cluster_id: bytes | None = None
) -> Session:
    """An authenticated session; the caller starts its ``run`` in a nursery, else nothing happens on it.

    Raises ``UnreachableError``, ``TimedOutError``, ``UnauthorizedError``, ``VersionError``, ``ConflictError`` (another
    cluster) or ``ProtocolError`` (something else listens there).
    """
    connection = await transport.connect(address)
    try:
        peer = await hello.greet_server(connection, secret=secret, role=role, name=name, cluster_id=cluster_id)
    except BaseException:
        with trio.CancelScope(shield=True):
            await connection.close()
        raise
    return Session(connection, peer, handler)


class Reconnecting:
    """A session to one address that is made anew, with growing pauses, each time it is lost. ``run`` owns it.

    ``on_connected(session)`` runs on each new session, before anybody else may use it; when it raises an ``Error`` the
    session is given up and the next one tried.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        secret: bytes,
        role: str,
        name: str,
        handler: Handler,
        on_connected: Callable[[Session], Awaitable[None]] | None = None,
    ) -> None:
        self.address = (host, port)
        self.last_error: Error | None = None
        """Why there is no session now."""
        self._secret = secret
        self._role = role
        self._name = name
        self._handler = handler
        self._on_connected = on_connected
        self._session: Session | None = None
        self._changed = trio.Event()

    @property
    def connected(self) -> bool:
        return self._session is not None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Runs until cancelled; started at once, connected or not."""
        task_status.started()
        pause = RETRY_SECONDS_MIN
        while True:
            try:
                session = await connect(
                    self.address, secret=self._secret, role=self._role, name=self._name, handler=self._handler
                )
                if await self._use(session):
                    pause = RETRY_SECONDS_MIN
                self._failed(UnreachableError(f"no connection to {session.peer}: {session.close_reason}"))
            except Error as error:
                self._failed(error)
            # Jitter: after an MDM's restart not everybody comes in the same instant.
            await trio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(pause * 2, RETRY_SECONDS_MAX)

    async def call(  # The deadline belongs to the protocol: expired, it is a TimedOutError of ours.
        self,
        method: str,
        params: Params | None = None,
        *,
        timeout: float = RPC_TIMEOUT_SECONDS,  # noqa: ASYNC109
    ) -> Any:
        """As ``Session.call``; waits for a session while there is none.

        Raises ``UnreachableError`` when there was none within the timeout (or the reason, when the MDM refuses us).
        """
        deadline = trio.current_time() + timeout
        with trio.move_on_after(timeout):
            session = await self._wait()
            return await session.call(method, params, timeout=max(deadline - trio.current_time(), 0))
        if isinstance(self.last_error, UnauthorizedError | VersionError):
            raise self.last_error
        if self._session is not None:
            raise TimedOutError(f"{format_address(self.address)} did not answer {method} within {timeout:g} s")
        reason = f": {self.last_error.message}" if self.last_error else ""
        raise UnreachableError(f"no MDM at {format_address(self.address)} within {timeout:g} s{reason}")

    async def notify(self, method: str, params: Params | None = None) -> None:
        """As ``Session.notify``; raises ``UnreachableError`` at once while there is no session."""
        if self._session is None:
            raise UnreachableError(f"not connected to {format_address(self.address)}")
        await self._session.notify(method, params)

    async def _wait(self) -> Session:
        while self._session is None:
            await self._changed.wait()
        return self._session

    async def _use(self, session: Session) -> bool:
        """Serves a session to its end; whether it was ever of use."""
        useful = False
        async with trio.open_nursery() as nursery:
            nursery.start_soon(session.run)
            try:
                if self._on_connected is not None:
                    await self._introduce(session)
                if not session.closed.is_set():
                    useful = True
                    self._begin(session)
                await session.closed.wait()
            finally:
                self._session = None
        return useful

    async def _introduce(self, session: Session) -> None:
        assert self._on_connected is not None
        try:
            await self._on_connected(session)
        except Error as error:
            session.close(error.message)

    def _begin(self, session: Session) -> None:
        if self.last_error is not None:
            _log.info("connected again", peer=str(session.peer))
        self.last_error = None
        self._session = session
        self._changed.set()
        self._changed = trio.Event()

    def _failed(self, error: Error) -> None:
        """Tells each reason once, not at every try."""
        if self.last_error is None or self.last_error.message != error.message:
            serious = isinstance(error, UnauthorizedError | VersionError | ProtocolError)
            (_log.error if serious else _log.warning)(
                "no connection", address=format_address(self.address), reason=error.message
            )
        self.last_error = error
