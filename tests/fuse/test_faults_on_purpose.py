"""Goal: faults on purpose are real: servers stop, disks err, and who reads and writes sees none of it."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pfvol import localcluster
from pfvol.errors import ConflictError
from tests.support.cluster import TestCluster
from tests.support.waiting import poll_until

Factory = Callable[..., TestCluster]
MIB = 1024**2
SIZE = 32 * MIB
BLOCK = 4096


class Application:
    """Writes and reads a volume, and knows what must be there."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDWR)
        self.expected = bytearray(SIZE)

    def write(self) -> None:
        self.expected[:] = os.urandom(SIZE)
        for at in range(0, SIZE, MIB):
            assert os.pwrite(self.descriptor, self.expected[at : at + MIB], at) == MIB
        os.fsync(self.descriptor)

    def read(self) -> None:
        os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        for at in range(0, SIZE, MIB):
            assert os.pread(self.descriptor, MIB, at) == self.expected[at : at + MIB]


@pytest.fixture
def world(fresh_cluster: Factory) -> Iterator[tuple[TestCluster, Application]]:
    cluster = fresh_cluster(sds=3, devices=2, device_size_bytes=128 * MIB)
    cluster.volume("data", "32MiB", sdc="host")
    mount = cluster.mount(sdc="host")
    application = Application(mount.volume("data"))
    try:
        application.write()
        yield cluster, application
    finally:
        os.close(application.descriptor)


def get(cluster: TestCluster, path: str) -> Any:
    with cluster.client() as client:
        return client.get(path)


def post(cluster: TestCluster, path: str, **body: Any) -> Any:
    with cluster.client() as client:
        return client.post(path, **body)


def show(cluster: TestCluster, sds: str) -> Any:
    return get(cluster, f"/sds/{sds}")


def healthy(cluster: TestCluster) -> None:
    """All copies are there, in sync, and good."""
    poll_until(lambda: get(cluster, "/system/status")["health"] == "OK", 60, what="health is OK")
    assert post(cluster, "/vol/data/verify")["problems"] == []


def events(cluster: TestCluster, kind: str) -> list[str]:
    return [event["message"] for event in get(cluster, "/event/list") if event["type"] == kind]


def test_an_sds_fails_and_recovers_also_across_its_restart(world: tuple[TestCluster, Application]) -> None:
    cluster, application = world
    row = cluster.cli("sds", "fail", "sds1")
    assert (row["state"], row["faults"]["failed"], row["faults"]["until"]) == ("DOWN", True, None)
    host, port = row["data_address"].rsplit(":", 1)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)), 5).close()
    application.read()
    application.write()
    # Its process is killed and started again: it fails still, and can be told so.
    cluster.kill("sds1")
    localcluster.start_node(cluster.data_dir, "sds1")
    row = show(cluster, "sds1")
    assert (row["state"], row["connected"], row["faults"]["failed"]) == ("DOWN", True, True)
    application.write()
    row = cluster.cli("sds", "recover", "sds1")
    assert (row["state"], row["faults"]["failed"]) == ("UP", False)
    with pytest.raises(ConflictError, match="has not failed"):
        post(cluster, "/sds/sds1/recover")
    healthy(cluster)
    post(cluster, "/sds/sds2/fail", duration=0.5)
    poll_until(lambda: show(cluster, "sds2")["state"] == "UP", what="it recovers by itself")
    healthy(cluster)
    application.read()
    assert len(events(cluster, "SDS_FAILED")) == 2
    assert events(cluster, "SDS_RECOVERED") == [f"SDS {name} fails on purpose no more" for name in ("sds1", "sds2")]


def test_disks_misbehave(world: tuple[TestCluster, Application]) -> None:
    cluster, application = world
    # Reads that fail cost the copy, and it is made again.
    row = cluster.cli("sds", "inject", "sds1", "--error", "pread=EIO@50%")
    assert row["faults"]["rules"] == ["pread=EIO@50%"]
    application.read()
    application.read()
    application.write()
    poll_until(lambda: show(cluster, "sds1")["faults"]["errors_injected"] > 0, what="errors were met")
    assert show(cluster, "sds1")["failed_devices"] == []
    post(cluster, "/sds/sds1/inject", clear=True)
    healthy(cluster)
    # A full disk takes nothing out of service; nor does a slow one.
    post(cluster, "/sds/sds3/inject", full=True)
    application.write()
    application.read()
    assert show(cluster, "sds3")["failed_devices"] == []
    post(cluster, "/sds/sds3/inject", clear=True)
    healthy(cluster)
    post(cluster, "/sds/sds3/inject", delays=["pwrite=1ms"])
    application.write()
    poll_until(lambda: show(cluster, "sds3")["faults"]["delays_injected"] > 0, what="writes had to wait")
    post(cluster, "/sds/sds3/inject", clear=True)
    healthy(cluster)
    # A sync that fails costs the device, until it is opened anew.
    post(cluster, "/sds/sds2/inject", errors=["fdatasync=EIO"])
    application.write()
    poll_until(lambda: show(cluster, "sds2")["state"] == "DEGRADED", what="a device is out of service")
    post(cluster, "/sds/sds2/inject", clear=True)
    assert show(cluster, "sds2")["failed_devices"] != []
    assert post(cluster, "/sds/sds2/recover")["failed_devices"] == []
    healthy(cluster)
    application.read()


def test_a_block_is_corrupted_and_repaired(world: tuple[TestCluster, Application]) -> None:
    cluster, application = world
    chunks = get(cluster, "/vol/data/chunks")
    chosen = [chunk["index"] for chunk in chunks if any(copy["sds_name"] == "sds1" for copy in chunk["replicas"])][:2]
    row = cluster.cli("sds", "inject", "sds1", "--corrupt", f"data/{chosen[0]}:5", "--corrupt", f"{chosen[1]}:1023")
    assert row["faults"]["blocks_corrupted"] == 2
    application.read()
    post(cluster, "/vol/data/verify", first=chosen[0], count=1, repair=True)
    post(cluster, "/vol/data/verify", repair=True)
    poll_until(lambda: not post(cluster, "/vol/data/verify")["problems"], what="both blocks are good again")
    application.read()
