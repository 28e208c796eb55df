"""A thin volume may be larger than its pool: a write that finds no room gets ENOSPC, and nothing else is lost."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support.waiting import poll_until

MIB = 1024**2
CHUNK_BYTES = 4 * MIB
POOL_CHUNKS = 16
BLOCK_BYTES = 128 * 1024


def test_a_full_pool_refuses_the_write_and_keeps_the_rest(fresh_cluster: Callable[..., Any]) -> None:
    cluster = fresh_cluster(sds=2, devices=1, device_size_bytes=POOL_CHUNKS * CHUNK_BYTES)
    cluster.volume("thin", "200MiB", sdc="host")
    mount = cluster.mount(sdc="host")
    content = [os.urandom(CHUNK_BYTES) for _ in range(POOL_CHUNKS)]
    descriptor = os.open(mount.volume("thin"), os.O_RDWR | os.O_DIRECT)
    try:
        for index, chunk in enumerate(content):
            os.pwrite(descriptor, chunk, index * CHUNK_BYTES)
        with pytest.raises(OSError, match="No space") as full:
            os.pwrite(descriptor, content[0], POOL_CHUNKS * CHUNK_BYTES)
        assert full.value.errno == errno.ENOSPC
        # What has room already is still written; the rest is as it was, in both copies.
        content[3] = os.urandom(CHUNK_BYTES)
        os.pwrite(descriptor, content[3], 3 * CHUNK_BYTES)
        os.fsync(descriptor)
        for index, chunk in enumerate(content):
            assert os.pread(descriptor, CHUNK_BYTES, index * CHUNK_BYTES) == chunk
        assert os.pread(descriptor, 4096, POOL_CHUNKS * CHUNK_BYTES) == bytes(4096)
        assert cluster.run("vol", "verify", "thin").code == 0
        poll_until(lambda: os.statvfs(mount.path).f_bfree == 0, what="df showing a full pool")
        assert cluster.run("vol", "create", "default", "thick", "4MiB", "--thick").code == 5
        # Room that is given back is room to write in.
        punch = ["fallocate", "--punch-hole", "--offset", "0", "--length", str(CHUNK_BYTES), str(mount.volume("thin"))]
        subprocess.run(punch, check=True)
        poll_until(lambda: os.statvfs(mount.path).f_bfree > 0, what="df showing room")
        os.pwrite(descriptor, content[0], POOL_CHUNKS * CHUNK_BYTES)
        assert os.pread(descriptor, CHUNK_BYTES, POOL_CHUNKS * CHUNK_BYTES) == content[0]
        assert os.pread(descriptor, CHUNK_BYTES, 0) == bytes(CHUNK_BYTES)
        assert cluster.run("vol", "verify", "thin").code == 0
    finally:
        os.close(descriptor)


class Writers:
    """Fill a volume that is larger than its pool: the blocks of a chunk one after another, so that they are under way
    at the same time."""

    OFFSETS = range(0, 100 * CHUNK_BYTES, CHUNK_BYTES // 8)

    def __init__(self, file: Path) -> None:
        self.written: dict[int, bytes] = {}
        self.refused: list[int | None] = []
        self._file = file

    def fill(self) -> None:
        descriptor = os.open(self._file, os.O_RDWR | os.O_DIRECT)
        try:
            with ThreadPoolExecutor(16) as pool:
                list(pool.map(partial(self._write, descriptor), self.OFFSETS))
        finally:
            os.close(descriptor)

    def _write(self, descriptor: int, offset: int) -> None:
        block = os.urandom(BLOCK_BYTES)
        try:
            os.pwrite(descriptor, block, offset)
        except OSError as error:
            self.refused.append(error.errno)
        else:
            self.written[offset] = block

    def check(self) -> None:
        """What was acknowledged is there, and nothing of what was refused."""
        assert set(self.refused) == {errno.ENOSPC}
        descriptor = os.open(self._file, os.O_RDWR | os.O_DIRECT)
        try:
            for offset in self.OFFSETS:
                assert os.pread(descriptor, BLOCK_BYTES, offset) == self.written.get(offset, bytes(BLOCK_BYTES))
        finally:
            os.close(descriptor)


def test_writers_at_once_find_the_pool_full(fresh_cluster: Callable[..., Any]) -> None:
    """Goal: servers that fill up unevenly, with several writes to one new chunk under way, refuse all or none of each:
    no chunk is left with copies that differ, and what was acknowledged is there."""
    cluster = fresh_cluster(sds=3, devices=1, device_size_bytes=POOL_CHUNKS * CHUNK_BYTES)
    cluster.volume("thin", "400MiB", sdc="host")
    mount = cluster.mount(sdc="host", options=["io_deadline=20"])
    writers = Writers(mount.volume("thin"))
    writers.fill()
    writers.check()
    assert cluster.run("vol", "verify", "thin").code == 0


def test_a_server_that_dies_while_the_pool_fills_up_loses_nothing(fresh_cluster: Callable[..., Any]) -> None:
    """Goal: a new chunk whose other copy was lost while it was asked for room serves on, with it or without it."""
    cluster = fresh_cluster(sds=3, devices=1, device_size_bytes=POOL_CHUNKS * CHUNK_BYTES)
    cluster.volume("thin", "400MiB", sdc="host")
    mount = cluster.mount(sdc="host", options=["io_deadline=60"])
    writers = Writers(mount.volume("thin"))
    with ThreadPoolExecutor(1) as background:
        filling = background.submit(writers.fill)
        poll_until(lambda: len(writers.written) > 40, what="some chunks written")
        cluster.kill("sds2")
        filling.result()
    writers.check()
    cluster.cli("cluster", "start-node", "sds2")
    again = Writers(mount.volume("thin"))
    again.fill()
    assert set(writers.written) <= set(again.written)  # what has room keeps it
    again.check()
    # Servers went on alone, and there is no room for as many second copies. Nothing else is wrong.
    assert {problem["problem"] for problem in verify(cluster)} <= {"one copy"}
    punch = ["fallocate", "--punch-hole", "--offset", "0", "--length", "200MiB", str(mount.volume("thin"))]
    subprocess.run(punch, check=True)
    poll_until(lambda: verify(cluster) == [], 60, what="two copies of everything in the room that was given back")


def verify(cluster: Any) -> list[dict[str, Any]]:
    problems: list[dict[str, Any]] = cluster.cli("vol", "verify", "thin", check=False)["problems"]
    return problems
