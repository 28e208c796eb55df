"""Goal: the whole story of a forced promotion, as its operator and the programs on a mount see it.

A goes, B serves alone, B goes too, A comes back: A's data is older, so nobody serves. The operator decides; from then
on A's data is what there is, whatever B brings when it returns, and who has not flushed what only B had is told.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pfvol.errors import EXIT_CONFLICT
from tests.support.cluster import TestCluster
from tests.support.waiting import poll_until

MIB = 1024**2
SIZE = 8 * MIB
A, B = "sds1", "sds2"
WRITE_AND_WAIT = 7  # sync_file_range(2): all three flags


def shown(cluster: TestCluster) -> Any:
    return cluster.cli("vol", "show", "data")


def wait_for(cluster: TestCluster, health: str) -> Any:
    def there() -> Any:
        volume = shown(cluster)
        return volume if volume["health"] == health else None

    return poll_until(there, 60, what=f"a volume that is {health}")


def wipe(directory: Path) -> None:
    """Its disks are destroyed; the machine gets new ones, empty."""
    for device in [path.parent for path in directory.rglob("blocks")]:
        shutil.rmtree(device)
    for state in directory.rglob("sds.json"):
        state.unlink()


def write_unflushed(path: Path, data: bytes, offset: int) -> int:
    """Acknowledged by the SDSs, not flushed. The descriptor stays open."""
    descriptor = os.open(path, os.O_RDWR)
    os.pwrite(descriptor, data, offset)
    libc = ctypes.CDLL(None, use_errno=True)
    done = libc.sync_file_range(descriptor, ctypes.c_long(offset), ctypes.c_long(len(data)), WRITE_AND_WAIT)
    assert done == 0, os.strerror(ctypes.get_errno())
    return descriptor


def read(path: Path, size: int) -> bytes:
    with path.open("rb", buffering=0) as file:
        return os.pread(file.fileno(), size, 0)


class Reader(threading.Thread):
    """Reads what is not in the page cache: waits until somebody serves it."""

    def __init__(self, path: Path, size: int, offset: int) -> None:
        super().__init__(daemon=True)
        self._descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(self._descriptor, offset, size, os.POSIX_FADV_DONTNEED)
        self._place = size, offset
        self.found: bytes | OSError | None = None
        self.start()

    def run(self) -> None:
        try:
            self.found = os.pread(self._descriptor, *self._place)
        except OSError as error:
            self.found = error
        os.close(self._descriptor)


@pytest.mark.parametrize("wiped", [False, True])
def test_an_operator_has_older_data_served(fresh_cluster: Callable[..., TestCluster], wiped: bool) -> None:
    cluster = fresh_cluster(sds=2, devices=1, device_size_bytes=64 * MIB)
    cluster.volume("data", "8MiB", sdc="host")
    path = cluster.mount(sdc="host").volume("data")
    older, newer = os.urandom(SIZE), os.urandom(2 * MIB)
    with path.open("r+b", buffering=0) as volume:
        os.pwrite(volume.fileno(), older, 0)
        os.fsync(volume.fileno())
        cluster.kill(A)
        os.pwrite(volume.fileno(), newer, 0)
        os.fsync(volume.fileno())
    unflushed = write_unflushed(path, newer[:MIB], 4 * MIB)
    assert read(path, 2 * MIB) == newer  # into the page cache
    cluster.kill(B)
    if wiped:
        wipe(cluster.data_dir / B)
    cluster.cli("cluster", "start-node", A)

    volume = wait_for(cluster, "FAILED")
    assert volume["state"] == "FAILED"
    assert "waiting for SDS sds2" in volume["reasons"][0]
    assert "promote sds1" in volume["reasons"][0]
    reader = Reader(path, MIB, 6 * MIB)
    refused = cluster.run("sds", "promote", A)
    assert refused.code == EXIT_CONFLICT
    for part in ("2 chunks of volume data as they were when it left", "SDS sds2", "--accept-data-loss"):
        assert part in refused.stderr
    assert shown(cluster)["health"] == "FAILED"
    assert reader.found is None, "nothing was served"

    assert cluster.cli("sds", "promote", A, "--volume", "data", "--accept-data-loss")["chunks"] == 2
    wait_for(cluster, "DEGRADED")
    poll_until(lambda: reader.found, what="an answer of the copy that serves now")
    assert reader.found == older[6 * MIB : 7 * MIB]
    poll_until(lambda: read(path, SIZE) == older, what="a page cache without the newer data")
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        os.fsync(unflushed)
    os.fsync(unflushed)
    os.close(unflushed)
    assert [event["type"] for event in cluster.cli("event", "list")].count("DATA_LOSS_ACCEPTED") == 1
    after = os.urandom(MIB)
    with path.open("r+b", buffering=0) as again:
        os.pwrite(again.fileno(), after, MIB // 2)
        os.fsync(again.fileno())

    cluster.cli("cluster", "start-node", B)
    wait_for(cluster, "OK")
    assert cluster.run("vol", "verify", "data").code == 0
    cluster.kill(A)
    with path.open("rb", buffering=0) as volume:
        os.posix_fadvise(volume.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(volume.fileno(), SIZE, 0) == older[: MIB // 2] + after + older[MIB // 2 + MIB :]
