"""Frames over one TCP connection: the seam at which the operating system's errors become ``pfvol.errors``.

Owns the socket and the bytes received but not yet used. Assumes one reader and one writer at a time. Promises that
every wait has an end, and that what leaves here is an ``UnreachableError``, ``TimedOutError`` or ``ProtocolError``,
never an ``OSError``.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import trio

from pfvol.config import Address, format_address
from pfvol.constants import CONNECT_TIMEOUT_SECONDS, RPC_MESSAGE_BYTES_MAX, RPC_TIMEOUT_SECONDS, SDS_DOWN_AFTER_SECONDS
from pfvol.errors import ConfigError, ConflictError, TimedOutError, UnreachableError
from pfvol.rpc import codec

RECEIVE_BYTES = 64 * 1024
BACKLOG_CONNECTIONS = 256


class Transport:
    """Made around a connected stream; ``close`` it when done."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._received = bytearray()
        _set_options(stream.socket)
        self.address = _name_of(stream.socket)

    async def receive(
        self, limit: int = RPC_MESSAGE_BYTES_MAX, *, idle_seconds: float, frame_seconds: float = RPC_TIMEOUT_SECONDS
    ) -> Any:
        """The next value. It must begin within idle_seconds, and be here frame_seconds after that."""
        if not self._received:
            await self._receive_more(idle_seconds)
        deadline = trio.current_time() + frame_seconds
        header = await self._take(codec.LENGTH.size, deadline)
        body = await self._take(codec.body_length(header, limit), deadline)
        return codec.decode(body)

    async def send(self, frames: bytes, timeout_seconds: float = RPC_TIMEOUT_SECONDS) -> None:
        """Hands encoded frames to the kernel. After an error, or a cancellation, the connection can only be closed."""
        with _mapped(self.address):
            with trio.move_on_after(timeout_seconds):
                await self._stream.send_all(frames)
                return
            raise TimedOutError(f"{self.address} does not read what it is sent")

    async def close(self) -> None:
        await trio.aclose_forcefully(self._stream)

    async def _take(self, count: int, deadline: float) -> bytes:
        while len(self._received) < count:
            await self._receive_more(deadline - trio.current_time())
        taken = bytes(self._received[:count])
        del self._received[:count]
        return taken

    async def _receive_more(self, timeout_seconds: float) -> None:
        with _mapped(self.address):
            with trio.move_on_after(max(timeout_seconds, 0)):
                data = await self._stream.receive_some(RECEIVE_BYTES)
                if not data:
                    raise UnreachableError(f"{self.address} closed the connection")
                self._received += data
                return
            raise TimedOutError(f"nothing heard from {self.address} in time")


async def connect(address: Address, timeout_seconds: float = CONNECT_TIMEOUT_SECONDS) -> Transport:
    """A connection to an address; raises ``UnreachableError`` when there is none within the time."""
    where = format_address(address)
    with _mapped(where):
        with trio.move_on_after(timeout_seconds):
            return Transport(await trio.open_tcp_stream(*address))
        raise UnreachableError(f"{where} does not answer within {timeout_seconds:g} s")


async def listen(host: str, port: int) -> trio.SocketListener:
    """A listener on the first address of host; port 0 is any free one.

    Raises ``ConflictError`` for a port in use and ``ConfigError`` for an address that cannot be bound.
    """
    try:
        listeners = await trio.open_tcp_listeners(port, host=host or None, backlog=BACKLOG_CONNECTIONS)
    except OSError as error:
        where = format_address((host, port))
        if error.errno == errno.EADDRINUSE:
            raise ConflictError(
                f"{where} is in use by another program: stop it (ss -ltnp shows it) or choose another port"
            ) from error
        raise ConfigError(f"{where} cannot be listened on: {error.strerror or error}") from error
    for other in listeners[1:]:
        await other.aclose()
    return listeners[0]


@contextmanager
def _mapped(where: str) -> Iterator[None]:
    try:
        yield
    except trio.BrokenResourceError as error:
        reason = error.__cause__.strerror if isinstance(error.__cause__, OSError) else "closed"
        raise UnreachableError(f"the connection to {where} was lost: {reason}") from error
    except trio.ClosedResourceError as error:
        raise UnreachableError(f"the connection to {where} is closed") from error
    except OSError as error:
        raise UnreachableError(f"cannot connect to {where}: {error.strerror or error}") from error


def _set_options(sock: trio.socket.SocketType) -> None:
    """Small messages at once, and a peer whose machine is gone noticed by the kernel too."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, int(SDS_DOWN_AFTER_SECONDS)))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(SDS_DOWN_AFTER_SECONDS * 1000))


def _name_of(sock: trio.socket.SocketType) -> str:
    try:
        host, port, *_ = sock.getpeername()
    except OSError:
        return "a peer that has gone"
    return format_address((host, port))
