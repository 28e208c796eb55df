"""Goal: SDSs find each other and stay connected, and only those who may come get in (acceptor and peers, real
sockets)."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import trio
import trio.testing

from datapath import wire
from pfvol import handshake
from pfvol.errors import ConfigError, Error, ProtocolError, UnauthorizedError
from pfvol.sds import acceptor
from pfvol.sds.acceptor import Acceptor, Clients
from pfvol.sds.peers import FIRST_TRY_SECONDS, Identity, PeerRecord, Peers, parse_peers
from tests.support.waiting import pass_time, poll_until_async

SECRET = bytes(range(32))
CLUSTER = bytes(range(16))


@dataclass
class Engine:
    """Stands where the engine does: takes sockets over."""

    clients: list[tuple[int, int]] = field(default_factory=list)
    peers: list[tuple[int, int, bool]] = field(default_factory=list)
    fds: dict[int, int] = field(default_factory=dict)

    def add_client(self, fd: int, sdc_id: int, incarnation: int) -> int:
        self.clients.append((sdc_id, incarnation))
        return self._take(fd)

    def add_peer(self, fd: int, sds_id: int, incarnation: int, *, outgoing: bool) -> int:
        self.peers.append((sds_id, incarnation, outgoing))
        return self._take(fd)

    def close_conn(self, conn_id: int) -> None:
        os.close(self.fds.pop(conn_id))

    def _take(self, fd: int) -> int:
        conn_id = len(self.fds) + 1
        self.fds[conn_id] = fd
        return conn_id

    def close(self) -> None:
        for fd in self.fds.values():
            os.close(fd)


@dataclass
class Node:
    sds_id: int
    port: int
    engine: Engine
    peers: Peers

    def record(self, **changes: Any) -> PeerRecord:
        return replace(PeerRecord(self.sds_id, "127.0.0.1", self.port, 10, True), **changes)


@asynccontextmanager
async def sds(sds_id: int, incarnation: int = 10, port: int = 0, **callbacks: Any) -> AsyncIterator[Node]:
    sock = await acceptor.bind("127.0.0.1", port)
    engine = Engine()
    identity = Identity(SECRET, CLUSTER, sds_id, incarnation, incarnation)
    peers = Peers(identity, engine, **callbacks)
    node = Node(sds_id, sock.getsockname()[1], engine, peers)
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(peers.run)
            await nursery.start(Acceptor(sock, identity, engine, Clients(), peers).run)
            yield node
            nursery.cancel_scope.cancel()
    finally:
        engine.close()


async def until(condition: Callable[[], bool]) -> None:
    async def met() -> bool:
        return condition()

    await poll_until_async(met, timeout_seconds=5)


async def client(node: Node, **changes: Any) -> None:
    wanted: dict[str, Any] = {
        "secret": SECRET,
        "cluster_id": CLUSTER,
        "role": wire.ROLE_SDC,
        "node_id": 7,
        "incarnation": 1,
        "sds_id": node.sds_id,
    }
    fd, _ = await handshake.connect("127.0.0.1", node.port, **{**wanted, **changes})
    os.close(fd)


async def test_two_sdss_connect_both_ways() -> None:
    async with sds(1) as one, sds(2) as two:
        for node in (one, two):
            node.peers.update([one.record(), two.record()])
        await until(lambda: len(one.engine.peers) == len(two.engine.peers) == 2)
        assert sorted(one.engine.peers) == [(2, 10, False), (2, 10, True)]
        assert sorted(two.engine.peers) == [(1, 10, False), (1, 10, True)]
        assert one.peers.connected == 1


async def test_a_lost_connection_is_made_again_but_not_for_an_old_notice() -> None:
    async with sds(1) as one, sds(2) as two:
        for node in (one, two):
            node.peers.update([one.record(), two.record()])
        await until(lambda: one.peers.connected == 1)
        (conn_id,) = [conn for conn, peer in enumerate(one.engine.peers, 1) if peer[2]]
        one.peers.lost(2, conn_id + 1000)
        assert one.peers.connected == 1
        one.peers.lost(2, conn_id)
        assert one.peers.connected == 0
        await until(lambda: one.peers.connected == 1)


async def test_a_peer_that_starts_late_is_found() -> None:
    sock = await acceptor.bind("127.0.0.1", 0)
    port = sock.getsockname()[1]
    sock.close()
    async with sds(1) as one:
        late = PeerRecord(2, "127.0.0.1", port, 10, True)
        one.peers.update([one.record(), late])
        async with sds(2, port=port) as two:
            two.peers.update([one.record()])
            await until(lambda: one.peers.connected == 1)


async def test_a_lost_peer_that_cannot_be_reached_is_told_of_until_it_is_back() -> None:
    failed: list[int] = []
    connected: list[int] = []
    sock = await acceptor.bind("127.0.0.1", 0)
    port = sock.getsockname()[1]
    sock.close()
    async with sds(1, connected=connected.append, failed=failed.append) as one:
        one.peers.update([PeerRecord(2, "127.0.0.1", port, 10, True)])
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert failed == []  # it was never here
        async with sds(2, port=port) as two:
            two.peers.update([one.record()])
            await until(lambda: connected == [2])
            assert not await one.peers.refuses(2)
        assert one.peers.incarnation(2) == 10
        one.peers.lost(2, next(conn for conn, peer in enumerate(one.engine.peers, 1) if peer[2]))
        await until(lambda: len(failed) >= 3)
        assert await one.peers.refuses(2)
        async with sds(2, port=port) as two:
            two.peers.update([one.record()])
            await until(lambda: connected == [2, 2])
        assert set(failed) == {2}


async def test_a_peer_that_is_silent_is_given_up_in_a_moment(autojump_clock: trio.testing.MockClock) -> None:
    """A frozen process: its kernel accepts, nobody answers."""
    failed: list[float] = []
    sock = await acceptor.bind("127.0.0.1", 0)
    sock.listen(5)
    async with sds(1, failed=lambda _: failed.append(trio.current_time())) as one:
        one.peers.update([PeerRecord(2, *sock.getsockname(), 10, True)])
        one.peers._links[2].incarnation = 10  # as if it had been connected
        started = trio.current_time()
        await pass_time(5)
        assert failed[0] - started == pytest.approx(FIRST_TRY_SECONDS, abs=0.05)
        assert 3 <= len(failed) <= 6
        assert not await one.peers.refuses(2)
    sock.close()


async def test_a_peer_that_is_held_is_not_connected_in_either_direction_until_it_is_released() -> None:
    async with sds(1) as one, sds(2) as two:
        for node in (one, two):
            node.peers.update([one.record(), two.record()])
        await until(lambda: len(one.engine.peers) == len(two.engine.peers) == 2)
        one.peers.hold(2)
        two.peers.lost(1, next(conn for conn, peer in enumerate(two.engine.peers, 1) if peer[2]))
        with pytest.raises(handshake.NotReadyError):
            await client(one, role=wire.ROLE_SDS, node_id=2, incarnation=10)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert len(one.engine.peers) == 2
        assert (one.peers.connected, two.peers.connected) == (0, 0)
        one.peers.release(2)
        await until(lambda: len(one.engine.peers) == len(two.engine.peers) == 4)


async def test_a_handshake_that_ends_while_the_peer_is_held_is_thrown_away() -> None:
    async with sds(1) as one, sds(2) as two:
        two.peers.update([one.record()])
        one.peers.update([two.record()])
        one.peers.hold(2)  # the first attempt is under way
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert [peer for peer in one.engine.peers if peer[2]] == []
        one.peers.release(2)
        await until(lambda: one.peers.connected == 1)


async def test_a_peer_that_is_no_longer_listed_is_closed() -> None:
    async with sds(1) as one, sds(2) as two:
        for node in (one, two):
            node.peers.update([one.record(), two.record()])
        await until(lambda: one.peers.connected == 1 and len(one.engine.peers) == 2)
        one.peers.update([one.record()])
        await until(lambda: len(one.engine.fds) == 1)
        assert one.peers.connected == 0


async def test_a_peer_older_than_the_mdm_says_is_not_believed_in_either_direction() -> None:
    async with sds(1) as one, sds(2, incarnation=9) as two:
        two.peers.update([one.record()])
        one.peers.update([two.record(incarnation=10)])
        with pytest.raises(handshake.OldSessionError):
            await client(one, role=wire.ROLE_SDS, node_id=2, incarnation=9)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert one.peers.connected == 0
        assert one.engine.peers == []


async def test_an_sds_that_is_not_listed_is_refused() -> None:
    async with sds(1) as one:
        for node_id in (2, 1):
            with pytest.raises(UnauthorizedError):
                await client(one, role=wire.ROLE_SDS, node_id=node_id)
        assert one.engine.peers == []


async def test_an_older_session_of_an_sdc_is_refused_for_good() -> None:
    async with sds(1) as one:
        await client(one, incarnation=5)
        await client(one, incarnation=5)
        with pytest.raises(handshake.OldSessionError):
            await client(one, incarnation=4)
        await client(one, incarnation=6)
        with pytest.raises(handshake.OldSessionError):
            await client(one, incarnation=5)
        await client(one, node_id=8, incarnation=1)
        await until(lambda: len(one.engine.clients) == 4)
        assert one.engine.clients == [(7, 5), (7, 5), (7, 6), (8, 1)]


async def test_silent_strangers_fill_the_handshakes_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptor, "HANDSHAKES_MAX", 3)
    async with sds(1) as one:
        strangers = [await trio.open_tcp_stream("127.0.0.1", one.port) for _ in range(3)]
        extra = await trio.open_tcp_stream("127.0.0.1", one.port)
        with trio.fail_after(5):
            assert await extra.receive_some(1) == b""
        for stream in (*strangers, extra):
            await stream.aclose()
        await trio.testing.wait_all_tasks_blocked(0.02)
        await client(one)
        await until(lambda: one.engine.clients == [(7, 1)])


async def test_garbage_on_the_data_port_disturbs_nobody() -> None:
    async with sds(1) as one:
        for garbage in (b"", b"\0" * 500, b"GET / HTTP/1.1\r\n\r\n" * 10, os.urandom(4096)):
            async with await trio.open_tcp_stream("127.0.0.1", one.port) as stream:
                await stream.send_all(garbage)
        with pytest.raises(Error):
            await client(one, secret=bytes(32))
        await client(one)
        await until(lambda: one.engine.clients == [(7, 1)])


async def test_until_it_serves_a_bound_port_refuses_and_a_taken_one_is_named() -> None:
    sock = await acceptor.bind("127.0.0.1", 0)
    port = sock.getsockname()[1]
    with pytest.raises(OSError, match=r"refused|all attempts"):
        await trio.open_tcp_stream("127.0.0.1", port)
    sock.listen(1)
    with pytest.raises(ConfigError, match=rf"{port}.* in use"):
        await acceptor.bind("127.0.0.1", port)
    with pytest.raises(ConfigError, match="cannot be opened"):
        await acceptor.bind("192.0.2.1", 0)
    sock.close()


@pytest.mark.parametrize(
    "body", [None, [None], [{}], [{"sds_id": 1, "data_address": ["h"], "incarnation": 1, "up": True}], 5]
)
def test_a_list_of_peers_that_is_none_is_refused(body: Any) -> None:
    with pytest.raises(ProtocolError):
        parse_peers(body)
