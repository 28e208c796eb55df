"""Goal: disks that take long to sync hold up who asked for that, and no cold reads; nor do reads hold up syncs.

Real engines on real files; the disks are slow by the filters in front of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from datapath import disk, wire
from tests.support.dataclient import DataClient
from tests.support.engines import running_engines
from tests.support.waiting import poll_until_async

VOLUME, READER = 5, 7
ONE = 1
DISKS = 4
READERS = 12  # three for each thread of the pool
SYNC_SECONDS = 1.0
READ_NS = 1_000_000  # with a delay, reads count as cold


@pytest.fixture(autouse=True)
def fast_again() -> Iterator[None]:
    yield
    disk.clear()


async def test_cold_reads_do_not_wait_for_syncs(tmp_path: Path) -> None:
    async with running_engines(tmp_path, 1, devices=DISKS) as engines:
        engines.place(VOLUME, [(ONE, 0, 0)] * DISKS)
        reader = await engines[ONE].client(VOLUME, READER)
        writers = [await engines[ONE].client(VOLUME, READER + 1 + index) for index in range(DISKS)]
        data = os.urandom(4096)
        for chunk in range(DISKS):  # one on each disk
            await engines.write(reader, VOLUME, data, chunk)
        disk.inject_delay("fdatasync", int(SYNC_SECONDS * 1e9))
        disk.inject_delay("pread", READ_NS)
        before = engines[ONE].target.stats()["reads_pooled"]
        syncs = disk.injected()["fdatasync"][1]
        answered = 0

        async def write(client: DataClient, chunk: int) -> None:
            nonlocal answered
            reply = await client.write(VOLUME, data, chunk, 8192, flags=wire.FLAG_COMMIT)
            assert reply.status == wire.ST_OK
            answered += 1

        async with trio.open_nursery() as nursery:
            for chunk, client in enumerate(writers):
                nursery.start_soon(write, client, chunk)
            await poll_until_async(lambda: disk.injected()["fdatasync"][1] > syncs + 1, what="two disks sync")
            since = trio.current_time()
            for chunk in range(DISKS):
                assert await engines.read(reader, VOLUME, chunk, 0, 4096) == data
            assert trio.current_time() - since < SYNC_SECONDS / 2
            assert answered == 0
        assert engines[ONE].target.stats()["reads_pooled"] - before == DISKS


async def test_syncs_do_not_wait_until_nobody_reads(tmp_path: Path) -> None:
    async with running_engines(tmp_path, 1) as engines:
        engines.place(VOLUME, [(ONE, 0, 0)])
        data = os.urandom(4096) * READERS
        writer = await engines[ONE].client(VOLUME, READER)
        await engines.write(writer, VOLUME, data)
        disk.inject_delay("pread", 20 * READ_NS)

        async def read(block: int) -> None:
            reader = await engines[ONE].client(VOLUME, READER + 1 + block)
            while True:
                assert await engines.read(reader, VOLUME, 0, 4096 * block, 4096) == data[:4096]

        async with trio.open_nursery() as nursery:
            for block in range(READERS):
                nursery.start_soon(read, block)
            before = engines[ONE].target.stats()["reads_pooled"]
            await poll_until_async(
                lambda: engines[ONE].target.stats()["reads_pooled"] > before + 2 * READERS, what="all read"
            )
            with trio.fail_after(5):
                await engines.flush(writer, VOLUME)
            nursery.cancel_scope.cancel()
