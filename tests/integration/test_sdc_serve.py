"""A real mount, engine, RPC and handshakes; the MDM and the SDSs at the other ends are fakes that a test can bend."""

from __future__ import annotations

import errno
import math
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from datapath import wire
from pfvol import handshake
from pfvol.errors import NotFoundError, UnauthorizedError, UnreachableError
from pfvol.rpc.server import Server
from pfvol.sdc import daemon
from pfvol.sdc.options import parse_options
from pfvol.sdc.session import SdcSession
from tests.support.cluster import is_mounted
from tests.support.waiting import poll_until_async
from tests.unit.sdcengine_fakes import FakeSds, only, segment

MIB = 1024**2
SECRET = bytes(range(32))
CLUSTER_ID = b"c" * 16
SDC_ID = 3
POOL = {"total_bytes": 100 * MIB, "free_bytes": 60 * MIB}


class FakeMdm:
    """Answers an SDC from ``volumes``; counts what it is asked."""

    def __init__(self) -> None:
        self.volumes: dict[int, dict[str, Any]] = {}
        self.peers: list[dict[str, Any]] = []
        self.sessions: list[Any] = []
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.reports: list[dict[str, Any]] = []
        self.incarnation = 0
        self.renewals = 0

    def opened(self, session: Any) -> None:
        self.sessions.append(session)

    def closed(self, session: Any) -> None:
        self.sessions.remove(session)

    async def handle(self, session: Any, method: str, params: dict[str, Any]) -> Any:
        self.asked.append((method, params))
        match method:
            case "sdc.register":
                self.incarnation += 1
                return {
                    "cluster_id": CLUSTER_ID,
                    "sdc_id": SDC_ID,
                    "name": params["name"],
                    "incarnation": self.incarnation,
                    "volumes": self.list(),
                    "peers": self.peers,
                }
            case "sdc.volumes":
                return self.list()
            case "map.segment":
                return segment((1, 1, 2))
            case "sdc.report":
                self.reports.append(params["stats"])
        return None

    def count(self, method: str) -> int:
        return sum(asked == method for asked, _ in self.asked)

    def list(self) -> list[dict[str, Any]]:
        self.renewals += 1
        expiry = self.renewals.to_bytes(8, "little")
        return [volume | {"capability": volume["capability"] + expiry + bytes(32)} for volume in self.volumes.values()]

    def map(self, volume_id: int, size_bytes: int, *, read_only: bool = False) -> None:
        self.volumes[volume_id] = {
            "volume_id": volume_id,
            "name": f"vol{volume_id}",
            "size_bytes": size_bytes,
            "read_only": read_only,
            "thick": False,
            "capability": bytes(16) + os.urandom(8),
            "iops_limit": None,
            "bandwidth_limit_mbps": None,
            "created_at": 1e9,
            "used_bytes": 0,
            "used_blocks_bytes": 0,
            "pool": POOL,
        }

    async def tell(self, method: str, **params: Any) -> None:
        for session in self.sessions:
            await session.notify(method, params)


class World:
    """A mount at ``path`` and everything that it talks to."""

    def __init__(self, path: Path, nursery: trio.Nursery) -> None:
        self.path = path
        self.mdm = FakeMdm()
        self.chunks: dict[tuple[int, int], bytearray] = {}
        self.sds = {number: FakeSds(number, self.chunks) for number in (1, 2)}
        self.clients: list[handshake.Peer] = []
        self.stopping = trio.Event()
        self.ended = trio.Event()
        self.nursery = nursery
        self._mdm_scope = trio.CancelScope()
        self.address = ("127.0.0.1", 0)

    async def start_mdm(self) -> None:
        """(Again,) at the same address."""
        self._mdm_scope = trio.CancelScope()

        async def run(*, task_status: Any) -> None:
            with self._mdm_scope:
                server = Server(self.mdm, secret=SECRET, cluster_id=CLUSTER_ID)
                await server.run(*self.address, task_status=task_status)

        self.address = await self.nursery.start(run)

    async def stop_mdm(self) -> None:
        self._mdm_scope.cancel()
        await poll_until_async(lambda: _value(not self.mdm.sessions), what="the MDM gone")

    async def start_sds(self, number: int) -> None:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")

        async def accept(stream: trio.SocketStream) -> None:
            fd, peer = await handshake.accept(
                stream,
                secret=SECRET,
                cluster_id=CLUSTER_ID,
                sds_id=number,
                incarnation=1,
                durable_incarnation=1,
                admit=lambda _peer: wire.ST_OK,
            )
            self.clients.append(peer)
            sock = socket.socket(fileno=fd)
            sock.setblocking(True)
            sds = self.sds[number]
            sds._socket = sock
            threading.Thread(target=sds._serve, args=(sock,), daemon=True).start()

        self.nursery.start_soon(trio.serve_listeners, accept, listeners)
        address = listeners[0].socket.getsockname()[:2]
        self.mdm.peers.append({"sds_id": number, "data_address": list(address), "incarnation": 1, "up": True})

    async def serve(self, options: str = "") -> None:
        secret_file = self.path.with_name("secret")
        secret_file.write_bytes(SECRET)
        spec = daemon.MountSpec(str(self.path), "me", self.address, secret_file, parse_options(options), "pfvol:test")

        async def run(*, task_status: Any) -> None:
            await daemon.serve(spec, self.stopping, task_status=task_status)
            self.ended.set()

        await self.nursery.start(run)

    def file(self, volume_id: int) -> Path:
        return self.path / f"vol{volume_id}"

    async def shows(self, condition: Callable[[], Any], what: str) -> None:
        """Waits; the condition looks at files and so may not run in trio's thread."""
        await poll_until_async(lambda: trio.to_thread.run_sync(condition), what=what)


async def _value(value: Any) -> Any:
    return value


@asynccontextmanager
async def world(tmp_path: Path, options: str = "") -> AsyncIterator[World]:
    path = tmp_path / "mount"
    path.mkdir()
    async with trio.open_nursery() as nursery:
        it = World(path, nursery)
        it.mdm.map(1, 16 * MIB)
        for number in it.sds:
            await it.start_sds(number)
        await it.start_mdm()
        await it.serve(options)
        try:
            yield it
        finally:
            it.stopping.set()
            with trio.fail_after(20):
                await it.ended.wait()
            for sds in it.sds.values():
                sds.close()
            nursery.cancel_scope.cancel()
    assert not is_mounted(path)


def write(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), data, offset)
        os.fsync(file.fileno())


def read(path: Path, offset: int, length: int) -> bytes:
    """From the servers, not from the page cache."""
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return os.pread(file.fileno(), length, offset)


thread = trio.to_thread.run_sync


async def test_a_mount_serves_and_reports(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        assert await thread(os.listdir, it.path) == ["vol1"]
        data = os.urandom(3 * MIB)
        await thread(write, it.file(1), 2 * MIB + 77, data)
        assert await thread(read, it.file(1), 2 * MIB + 77, len(data)) == data
        assert {(peer.role, peer.node_id) for peer in it.clients} == {(wire.ROLE_SDC, SDC_ID)}
        await poll_until_async(
            lambda: _value(any(r["volumes"].get(1, {}).get("write_bytes", 0) >= len(data) for r in it.mdm.reports)),
            what="a report of the bytes written",
        )
        shown = await thread(os.statvfs, it.path)
        assert shown.f_blocks * shown.f_frsize == POOL["total_bytes"]
        assert shown.f_bavail * shown.f_frsize == POOL["free_bytes"]


async def test_volumes_come_grow_and_go(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        it.mdm.map(2, 4 * MIB, read_only=True)
        await it.mdm.tell("volumes.changed")
        await it.shows(it.file(2).exists, "a new volume")
        fd = await thread(os.open, it.file(1), os.O_RDWR)
        try:
            for volume_id in (1, 2):
                it.mdm.volumes[volume_id]["size_bytes"] += 4 * MIB
            await it.mdm.tell("volumes.changed")
            await it.shows(lambda: os.fstat(fd).st_size == 20 * MIB, "the new size of an open file")
            await it.shows(lambda: it.file(2).stat().st_size == 8 * MIB, "the new size of a read-only one")
            del it.mdm.volumes[1]
            await it.mdm.tell("volumes.changed")
            await it.shows(lambda: os.listdir(it.path) == ["vol2"], "a volume gone")
            with pytest.raises(OSError, match=r".*") as raised:
                await thread(os.pread, fd, 4096, 0)
            assert raised.value.errno == errno.ENODEV
        finally:
            await thread(_close, fd)


def _close(fd: int) -> None:
    try:
        os.close(fd)
    except OSError as error:
        if error.errno != errno.ENODEV:  # close(2) flushes
            raise


async def test_io_goes_on_without_the_mdm_and_news_comes_with_it(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        await poll_until_async(lambda: _value(it.mdm.count("map.segment")), what="the map fetched ahead")
        await it.stop_mdm()
        await thread(write, it.file(1), 12 * MIB, b"away" * 1024)  # a chunk never touched before
        for sds in it.sds.values():
            sds.reset()
        assert await thread(read, it.file(1), 12 * MIB, 4096) == b"away" * 1024
        assert (await thread(it.file(1).stat)).st_size == 16 * MIB
        it.mdm.map(2, 4 * MIB)
        await it.start_mdm()
        await it.shows(it.file(2).exists, "what was mapped meanwhile")
        it.sds[1].reset()
        assert await thread(read, it.file(1), 12 * MIB, 4096) == b"away" * 1024
        # Registering again makes no new session: a later one of another process must win over this one.
        assert it.mdm.incarnation > 1
        assert {peer.incarnation for peer in it.clients} == {1}


async def test_a_refused_capability_is_renewed(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        before = it.mdm.count("sdc.volumes")
        for sds in it.sds.values():
            sds.rule = only(wire.OP_CAPABILITY, wire.ST_NOT_AUTHORIZED, times=1)
        await thread(write, it.file(1), 0, b"x" * 4096)
        assert it.mdm.count("sdc.volumes") > before
        assert all(sds.count(wire.OP_CAPABILITY) >= 2 for sds in it.sds.values() if sds.connections or sds.seen)


async def test_a_changed_map_is_fetched(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        await thread(write, it.file(1), 0, b"x" * 4096)
        before = it.mdm.count("map.segment")
        await it.mdm.tell("map.changed", volume_id=1, segments=[0])
        await poll_until_async(lambda: _value(it.mdm.count("map.segment") == before + 1), what="the map fetched again")
        await it.mdm.tell("map.changed", volume_id=1, segments=[7])  # none of ours
        await it.mdm.tell("map.changed", volume_id=1, segments=None)
        await poll_until_async(lambda: _value(it.mdm.count("map.segment") == before + 2), what="all of it again")


async def test_unmounted_by_anybody_it_ends(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        await thread(daemon.mount.unmount, str(it.path))
        with trio.fail_after(10):
            await it.ended.wait()


async def test_a_wrong_secret_is_said_at_once() -> None:
    async with trio.open_nursery() as nursery:
        server = Server(FakeMdm(), secret=SECRET, cluster_id=CLUSTER_ID)
        address = await nursery.start(server.run, "127.0.0.1", 0)
        session = SdcSession(name="me", mdm=address, secret=SECRET[::-1], io_deadline_seconds=1.0)
        with pytest.RaisesGroup(UnauthorizedError):
            await session.run(math.inf)
        nursery.cancel_scope.cancel()


async def test_an_mdm_that_is_not_there_is_unreachable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = closed.getsockname()
    session = SdcSession(name="me", mdm=address, secret=SECRET, io_deadline_seconds=1.0)
    with pytest.RaisesGroup(UnreachableError):
        await session.run(0.3)


async def test_a_mountpoint_that_goes_wrong_leaves_nothing(tmp_path: Path) -> None:
    async with trio.open_nursery() as nursery:
        it = World(tmp_path / "missing", nursery)
        await it.start_mdm()
        with pytest.RaisesGroup(NotFoundError):
            await it.serve()
        nursery.cancel_scope.cancel()
