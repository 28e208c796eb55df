"""A real mount, engine, RPC and handshakes; the MDM and the SDSs at the other ends are fakes that a test can bend."""

from __future__ import annotations

import errno
import math
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from datapath import wire
from pfvol.errors import NotFoundError, UnauthorizedError, UnreachableError
from pfvol.rpc.server import Server
from pfvol.sdc import daemon
from pfvol.sdc.session import SdcSession, serving
from tests.integration.sdc_world import CLUSTER_ID, MIB, POOL, SDC_ID, SECRET, FakeMdm, World, value
from tests.support.cluster import is_mounted
from tests.support.waiting import poll_until_async
from tests.unit.sdcengine_fakes import only, segment


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
            lambda: value(any(r["volumes"].get(1, {}).get("write_bytes", 0) >= len(data) for r in it.mdm.reports)),
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
        await poll_until_async(lambda: value(it.mdm.count("map.segment")), what="the map fetched ahead")
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
        await poll_until_async(lambda: value(it.mdm.count("map.segment") == before + 1), what="the map fetched again")
        await it.mdm.tell("map.changed", volume_id=1, segments=[7])  # none of ours
        await it.mdm.tell("map.changed", volume_id=1, segments=None)
        await poll_until_async(lambda: value(it.mdm.count("map.segment") == before + 2), what="all of it again")


async def test_a_map_that_changes_while_it_is_fetched_for_the_first_time_is_fetched_again(tmp_path: Path) -> None:
    """The news may overtake an answer that was made before it."""
    async with world(tmp_path) as it:
        asked: list[int] = []

        async def change(params: dict[str, Any]) -> None:
            if params["volume_id"] == 2:
                asked.append(params["segment"])
                if len(asked) == 1:
                    await it.mdm.tell("map.changed", volume_id=2, segments=[0])

        it.mdm.before_segment = change
        it.mdm.map(2, 16 * MIB)
        await it.mdm.tell("volumes.changed")
        await poll_until_async(lambda: value(asked == [0, 0]), what="the map fetched again")


async def test_a_volume_that_was_away_for_a_moment_gets_its_map(tmp_path: Path) -> None:
    """Unmapped and mapped again before the SDC heard of it: it was denied the map, and the engine asks only once."""
    async with world(tmp_path) as it:
        denied: list[int] = []

        async def deny(params: dict[str, Any]) -> None:
            if params["volume_id"] == 2 and len(denied) < 2:
                denied.append(params["segment"])
                raise NotFoundError("volume number 2 is not mapped to me")

        it.mdm.before_segment = deny
        it.mdm.map(2, 16 * MIB)
        await it.mdm.tell("volumes.changed")
        await it.shows(it.file(2).exists, "the volume's file")
        with trio.fail_after(10):
            await thread(write, it.file(2), 0, b"x" * 4096)
        assert denied == [0, 0]


async def test_while_an_sds_is_away_the_map_of_what_it_serves_is_asked_for_again(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        await thread(write, it.file(1), 0, b"x" * 4096)
        before, connections = it.mdm.count("map.segment"), len(it.clients)
        address, it.mdm.peers[0]["data_address"] = it.mdm.peers[0]["data_address"], None
        await it.mdm.tell("peers", peers=it.mdm.peers)
        await it.mdm.tell("map.changed", volume_id=1, segments=[0])
        await poll_until_async(lambda: value(it.mdm.count("map.segment") > before), what="what was told before heard")
        it.sds[1].reset()
        await poll_until_async(lambda: value(it.mdm.count("map.segment") >= before + 4), what="the map asked for")
        it.mdm.peers[0]["data_address"] = address
        await it.mdm.tell("peers", peers=it.mdm.peers)
        await poll_until_async(lambda: value(len(it.clients) > connections), what="the SDS connected again")


async def test_unmounted_by_anybody_it_ends(tmp_path: Path) -> None:
    async with world(tmp_path) as it:
        await thread(daemon.mount.unmount, str(it.path))
        with trio.fail_after(10):
            await it.ended.wait()


def test_who_serves_a_segment() -> None:
    assert serving(segment((1, 1, 2), (4, 3, 0))) == {1, 2, 3}
    assert serving(bytes(12)) == frozenset()


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
