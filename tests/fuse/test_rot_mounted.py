"""Goal: what rots on an SDS's disk is never seen through a mount: it is repaired, or an error when no copy is good."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from pfvol import localcluster
from tests.support.cluster import TestCluster
from tests.support.waiting import poll_until

MIB = 1024**2
BLOCK = 4096


def written(
    fresh_cluster: Callable[..., TestCluster], volume_size: str, content_bytes: int
) -> tuple[TestCluster, Path, bytes]:
    """Two SDSs and a mounted volume, and what was written to the start of it."""
    cluster = fresh_cluster(sds=2, devices=1, device_size_bytes=64 * MIB)
    cluster.volume("data", volume_size, sdc="host")
    volume = cluster.mount(sdc="host").volume("data")
    content = os.urandom(content_bytes)
    with volume.open("r+b") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return cluster, volume, content


def rot(cluster: TestCluster, node: str, block: bytes) -> None:
    """Flips a bit of the block in the node's block files, through another descriptor than the SDS's."""
    for path in (cluster.data_dir / node).rglob("blocks"):
        at = path.read_bytes().find(block)
        if at >= 0:
            with path.open("r+b") as file:
                file.seek(at + 99)
                file.write(bytes([block[99] ^ 4]))
            return
    raise AssertionError(f"{node} has no such block")


def read(volume: Path, size: int) -> bytes:
    """From the SDSs, not from the page cache."""
    with volume.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return os.pread(file.fileno(), size, 0)


def events(cluster: TestCluster) -> list[str]:
    with cluster.client() as client:
        return [event["type"] for event in client.get("/event/list", limit=100)]


def test_rot_in_one_copy_is_repaired_and_in_both_an_error(fresh_cluster: Callable[..., TestCluster]) -> None:
    cluster, volume, content = written(fresh_cluster, "16MiB", 2 * MIB)
    blocks = random.sample(range(len(content) // BLOCK), 20)
    for index, block in enumerate(blocks):
        rot(cluster, ("sds1", "sds2")[index % 2], content[block * BLOCK : (block + 1) * BLOCK])

    def clean() -> bool:
        assert read(volume, len(content)) == content
        return cluster.run("vol", "verify", "data").code == 0

    poll_until(clean, what="a repair of every block that is read")
    poll_until(lambda: "BLOCKS_REPAIRED" in events(cluster), what="an event")
    for node in ("sds1", "sds2"):
        rot(cluster, node, content[:BLOCK])
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        read(volume, BLOCK)
    poll_until(lambda: "BLOCKS_UNREPAIRABLE" in events(cluster), what="an event")
    with volume.open("r+b") as file:
        file.write(content[:BLOCK])
    assert read(volume, len(content)) == content
    assert cluster.run("vol", "verify", "data").code == 0


def test_a_slot_table_that_rots_while_its_sds_is_away_costs_nothing(fresh_cluster: Callable[..., TestCluster]) -> None:
    """Nobody has to do anything: what the table told of is compared with the other copy, and then both are whole."""
    cluster, volume, content = written(fresh_cluster, "32MiB", 18 * MIB)
    localcluster.stop_node(cluster.data_dir, "sds2")
    for table in (cluster.data_dir / "sds2").rglob("slots"):
        table.write_bytes(random.randbytes(table.stat().st_size))
    with volume.open("r+b") as file:
        file.seek(5 * MIB)
        file.write(b"meanwhile")
    content = content[: 5 * MIB] + b"meanwhile" + content[5 * MIB + 9 :]
    localcluster.start_node(cluster.data_dir, "sds2")
    poll_until(lambda: "SLOTS_LOST" in events(cluster), what="an event")
    assert read(volume, len(content)) == content

    def whole() -> bool:
        assert read(volume, len(content)) == content
        return bool(cluster.cli("vol", "show", "data")["health"] == "OK")

    poll_until(whole, 60, what="two whole copies")
    assert cluster.run("vol", "verify", "data").code == 0
    cluster.kill("sds1")
    assert read(volume, len(content)) == content
