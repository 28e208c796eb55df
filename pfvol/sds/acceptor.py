"""The data port: accepts, shakes hands, and gives each socket to the engine.

Owns the listening socket and the handshakes under way. Assumes that everything that connects is hostile until its
handshake is done. Promises: at most HANDSHAKES_MAX handshakes at a time, each with a deadline; nothing that arrives
ends the process; a session of an SDC that is older than one already admitted is refused.
"""

from __future__ import annotations

import errno
import os
from typing import Final, Protocol

import trio

from datapath import wire
from pfvol import handshake
from pfvol.errors import ConfigError, Error
from pfvol.log import get_logger
from pfvol.sds.peers import Identity

HANDSHAKES_MAX: Final = 128
LISTEN_BACKLOG: Final = 256
SDC_SESSIONS_MAX: Final = 65536


class Engine(Protocol):
    def add_client(self, fd: int, sdc_id: int, incarnation: int) -> int: ...
    def add_peer(self, fd: int, sds_id: int, incarnation: int, *, outgoing: bool) -> int: ...


class PeerAdmission(Protocol):
    def admits(self, sds_id: int, incarnation: int) -> int: ...


class Clients:
    """The connections that the engine serves (id -> SDC), and the highest session seen of each SDC."""

    def __init__(self) -> None:
        self._newest: dict[int, int] = {}
        self._connections: dict[int, int] = {}

    def admits(self, sdc_id: int, incarnation: int) -> int:
        """The status for a session; notes the session when it is the newest."""
        newest = self._newest.get(sdc_id, 0)
        if incarnation < newest:
            return wire.ST_OLD_SESSION
        if newest == 0 and len(self._newest) >= SDC_SESSIONS_MAX:
            return wire.ST_BUSY
        self._newest[sdc_id] = incarnation
        return wire.ST_OK

    def is_newest(self, sdc_id: int, incarnation: int) -> bool:
        return incarnation >= self._newest.get(sdc_id, 0)

    def opened(self, conn_id: int, sdc_id: int) -> None:
        self._connections[conn_id] = sdc_id

    def closed(self, conn_id: int) -> None:
        self._connections.pop(conn_id, None)

    def sdc_of(self, conn_id: int) -> int | None:
        return self._connections.get(conn_id)


async def bind(host: str, port: int) -> trio.socket.SocketType:
    """A bound socket that does not listen yet: until the SDS serves, who connects is refused at once."""
    try:
        (family, kind, proto, _, address), *_ = await trio.socket.getaddrinfo(
            host, port, type=trio.socket.SOCK_STREAM, flags=trio.socket.AI_PASSIVE
        )
        sock = trio.socket.socket(family, kind, proto)
    except OSError as error:
        raise ConfigError(f"the data port cannot be opened on {host!r}: {error}") from None
    try:
        sock.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_REUSEADDR, 1)
        await sock.bind(address)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            message = f"data port {port} on {host} is in use by another program"
        else:
            message = f"data port {port} on {host} cannot be opened: {error.strerror}"
        raise ConfigError(message, port=port) from None
    return sock


class Acceptor:
    """Takes the bound socket; ``run`` listens until it is cancelled."""

    def __init__(
        self, sock: trio.socket.SocketType, identity: Identity, engine: Engine, clients: Clients, peers: PeerAdmission
    ) -> None:
        self._sock = sock
        self._identity = identity
        self._engine = engine
        self._clients = clients
        self._peers = peers
        self._handshakes = 0
        self._log = get_logger("sds.acceptor")

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        self._sock.listen(LISTEN_BACKLOG)
        task_status.started()
        await trio.serve_listeners(self._serve, [trio.SocketListener(self._sock)])

    async def _serve(self, stream: trio.SocketStream) -> None:
        if self._handshakes >= HANDSHAKES_MAX:
            self._log.warning("connection refused: too many handshakes at a time", limit=HANDSHAKES_MAX)
            await trio.aclose_forcefully(stream)
            return
        self._handshakes += 1
        try:
            await self._shake_hands(stream)
        except handshake.NotReadyError as error:
            self._log.debug("connection refused", reason=error.message)  # A peer tries a few times a second.
        except Error as error:
            self._log.warning("connection refused", reason=error.message)
        except Exception:
            # Our bug, met by what a stranger sent: worth a traceback, not worth the data plane of everybody else.
            self._log.exception("handshake failed")
        finally:
            self._handshakes -= 1

    async def _shake_hands(self, stream: trio.SocketStream) -> None:
        me = self._identity
        fd, peer = await handshake.accept(
            stream,
            secret=me.secret,
            cluster_id=me.cluster_id,
            sds_id=me.sds_id,
            incarnation=me.incarnation,
            durable_incarnation=me.durable_incarnation,
            admit=self._admit,
        )
        # No await from here on: the fd always has an owner. While the WELCOME was sent a newer session may have been
        # let in.
        if self._outdated(peer):
            os.close(fd)
        elif peer.role == wire.ROLE_SDS:
            self._engine.add_peer(fd, peer.node_id, peer.incarnation, outgoing=False)
        else:
            self._clients.opened(self._engine.add_client(fd, peer.node_id, peer.incarnation), peer.node_id)

    def _admit(self, peer: handshake.Peer) -> int:
        if peer.role == wire.ROLE_SDS:
            return self._peers.admits(peer.node_id, peer.incarnation)
        return self._clients.admits(peer.node_id, peer.incarnation)

    def _outdated(self, peer: handshake.Peer) -> bool:
        if peer.role == wire.ROLE_SDS:
            return self._peers.admits(peer.node_id, peer.incarnation) != wire.ST_OK
        return not self._clients.is_newest(peer.node_id, peer.incarnation)
