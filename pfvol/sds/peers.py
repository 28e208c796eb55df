"""Connections to the other SDSs: one outgoing per SDS that the MDM lists, kept alive.

Owns the tasks that connect, and through the engine the connections that they made (the incoming ones, on which the
others replicate to us, come through the acceptor). Assumes one trio thread. Promises: while a peer is listed it is
tried again within RETRY_SECONDS_MAX (also when the MDM thinks that it is down: two who can talk need not wait for the
MDM to notice), the first time at once; a peer that is no longer listed is closed; an incarnation older than the MDM's
is never believed; from ``hold`` to ``release`` there is no new connection with a peer in either direction.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import trio

from datapath import wire
from pfvol import handshake
from pfvol.errors import Error, ProtocolError
from pfvol.log import get_logger

RETRY_SECONDS_MIN: Final = 0.02
RETRY_SECONDS_MAX: Final = 0.25
FIRST_TRY_SECONDS: Final = 0.3  # for the one after a loss: who is not there by then is in trouble
TRY_SECONDS: Final = 1.0


@dataclass(frozen=True, slots=True)
class PeerRecord:
    """Another SDS, as the MDM lists it."""

    sds_id: int
    host: str
    port: int
    incarnation: int
    up: bool


@dataclass(frozen=True, slots=True)
class Identity:
    """Who we are on the data plane."""

    secret: bytes
    cluster_id: bytes
    sds_id: int
    incarnation: int
    durable_incarnation: int


class Engine(Protocol):
    def add_peer(self, fd: int, sds_id: int, incarnation: int, *, outgoing: bool) -> int: ...
    def close_conn(self, conn_id: int) -> None: ...


def parse_peers(body: Any) -> list[PeerRecord]:
    """The MDM's list; ProtocolError when it is none."""
    try:
        return [
            PeerRecord(
                int(peer["sds_id"]),
                str(peer["data_address"][0]),
                int(peer["data_address"][1]),
                int(peer["incarnation"]),
                bool(peer["up"]),
            )
            for peer in body
            if peer["data_address"] is not None
        ]
    except (TypeError, KeyError, ValueError, IndexError) as error:
        raise ProtocolError(f"the MDM's list of SDSs cannot be read: {error!r}") from None


@dataclass(slots=True)
class _Link:
    record: PeerRecord
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    # Set when there is a reason to look again: the connection was lost, or the MDM told something new of the peer.
    wake: trio.Event = field(default_factory=trio.Event)
    conn_id: int | None = None
    incarnation: int | None = None  # of the process that was connected last


class Peers:
    """Started once with ``run``; told by ``update`` (the MDM's list) and ``lost`` (the engine's event).

    ``connected`` is called with each peer that our connection to was made, ``failed`` whenever one that was lost cannot
    be made again.
    """

    def __init__(
        self,
        identity: Identity,
        engine: Engine,
        connected: Callable[[int], None] = lambda _: None,
        failed: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._identity = identity
        self._engine = engine
        self._on_connected = connected
        self._on_failed = failed
        self._held: set[int] = set()
        self._records: dict[int, PeerRecord] = {}
        self._links: dict[int, _Link] = {}
        self._nursery: trio.Nursery | None = None
        self._log = get_logger("sds.peers")

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            self._reconcile()
            task_status.started()
            await trio.sleep_forever()

    @property
    def connected(self) -> int:
        return sum(link.conn_id is not None for link in self._links.values())

    def admits(self, sds_id: int, incarnation: int) -> int:
        """The status for an incoming connection that has proven to be of this SDS and incarnation."""
        record = self._records.get(sds_id)
        if record is None or sds_id == self._identity.sds_id:
            return wire.ST_NOT_AUTHORIZED
        if sds_id in self._held:
            return wire.ST_NOT_READY
        return wire.ST_OLD_SESSION if incarnation < record.incarnation else wire.ST_OK

    def update(self, records: Iterable[PeerRecord]) -> None:
        self._records = {record.sds_id: record for record in records if record.sds_id != self._identity.sds_id}
        if self._nursery is not None:
            self._reconcile()

    def knows(self, sds_id: int) -> bool:
        """Whether the MDM lists it: one that was removed is nobody's trouble."""
        return sds_id in self._records

    def lost(self, sds_id: int, conn_id: int) -> None:
        """The engine has closed an outgoing connection."""
        link = self._links.get(sds_id)
        if link is not None and link.conn_id == conn_id:
            link.conn_id = None
            link.wake.set()

    def hold(self, sds_id: int) -> None:
        """The engine is about to close what there is with the peer; nothing takes its place before ``release``."""
        self._held.add(sds_id)
        if (link := self._links.get(sds_id)) is not None:
            link.conn_id = None

    def release(self, sds_id: int) -> None:
        self._held.discard(sds_id)
        if (link := self._links.get(sds_id)) is not None:
            link.wake.set()

    def incarnation(self, sds_id: int) -> int | None:
        """Of the process that our last connection was with."""
        link = self._links.get(sds_id)
        return link.incarnation if link is not None else None

    async def refuses(self, sds_id: int) -> bool:
        """Whether nobody listens where the peer was: its machine says so at once."""
        if (record := self._records.get(sds_id)) is None:
            return False
        with trio.move_on_after(FIRST_TRY_SECONDS):
            try:
                stream = await trio.open_tcp_stream(record.host, record.port)
            except OSError as error:
                return _is_refusal(error)
            await trio.aclose_forcefully(stream)
        return False

    async def listens(self, sds_id: int) -> bool:
        """Whether something takes connections where the peer was: an SDS listens exactly while it serves. Of a machine
        that is cut off from this one nothing is known."""
        link, record = self._links.get(sds_id), self._records.get(sds_id)
        if record is None or (link is not None and link.conn_id is not None):
            return record is not None
        with trio.move_on_after(TRY_SECONDS), contextlib.suppress(OSError):
            stream = await trio.open_tcp_stream(record.host, record.port)
            await trio.aclose_forcefully(stream)
            return True
        return False

    def _reconcile(self) -> None:
        assert self._nursery is not None
        for sds_id in self._links.keys() - self._records.keys():
            self._links.pop(sds_id).scope.cancel()
        for sds_id, record in self._records.items():
            link = self._links.get(sds_id)
            if link is None:
                self._links[sds_id] = link = _Link(record)
                self._nursery.start_soon(self._keep, link)
            elif link.record != record:
                link.record = record
                link.wake.set()

    async def _keep(self, link: _Link) -> None:
        with link.scope:
            pause, patience = RETRY_SECONDS_MIN, FIRST_TRY_SECONDS
            while True:
                link.wake = trio.Event()
                if link.conn_id is not None or link.record.sds_id in self._held:
                    await link.wake.wait()
                    pause, patience = RETRY_SECONDS_MIN, FIRST_TRY_SECONDS
                elif not await self._connect(link, patience):
                    if link.incarnation is not None:
                        self._on_failed(link.record.sds_id)
                    pause, patience = min(pause * 2, RETRY_SECONDS_MAX), TRY_SECONDS
                    with trio.move_on_after(pause):
                        await link.wake.wait()
                        pause = RETRY_SECONDS_MIN
        if link.conn_id is not None:
            self._engine.close_conn(link.conn_id)

    async def _connect(self, link: _Link, patience_seconds: float) -> bool:
        me, peer = self._identity, link.record
        try:
            with trio.fail_after(patience_seconds):
                fd, info = await handshake.connect(
                    peer.host,
                    peer.port,
                    secret=me.secret,
                    cluster_id=me.cluster_id,
                    role=wire.ROLE_SDS,
                    node_id=me.sds_id,
                    incarnation=me.incarnation,
                    sds_id=peer.sds_id,
                )
        except trio.TooSlowError:
            self._log.debug("peer not connected", sds=peer.sds_id, reason=f"no answer in {patience_seconds:g} s")
            return False
        except Error as error:
            self._log.debug("peer not connected", sds=peer.sds_id, reason=error.message)
            return False
        # No await from here on: the fd always has an owner.
        if peer.sds_id in self._held:
            os.close(fd)
            return False
        if info.incarnation < link.record.incarnation:
            os.close(fd)
            self._log.warning("peer answered with an old incarnation", sds=peer.sds_id, incarnation=info.incarnation)
            return False
        link.conn_id = self._engine.add_peer(fd, peer.sds_id, info.incarnation, outgoing=True)
        link.incarnation = info.incarnation
        self._log.info("peer connected", sds=peer.sds_id, incarnation=info.incarnation)
        self._on_connected(peer.sds_id)
        return True


def _is_refusal(error: BaseException) -> bool:
    """trio wraps what each of the addresses said."""
    if isinstance(error, BaseExceptionGroup):
        return all(_is_refusal(inner) for inner in error.exceptions)
    return isinstance(error, ConnectionRefusedError) or (error.__cause__ is not None and _is_refusal(error.__cause__))
