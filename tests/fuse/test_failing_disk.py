"""Goal: disks that fail below a running server are seen by no program, and the copies are made again elsewhere."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable

from tests.support.cluster import TestCluster
from tests.support.waiting import poll_until

Factory = Callable[..., TestCluster]
MIB = 1024**2
SIZE = 48 * MIB


def test_who_writes_does_not_see_that_a_servers_disks_fail(fresh_cluster: Factory) -> None:
    cluster = fresh_cluster(sds=3, devices=2, device_size_bytes=128 * MIB)
    cluster.volume("data", "48MiB", sdc="host")
    mount = cluster.mount(sdc="host")
    old, new = os.urandom(SIZE), os.urandom(SIZE)
    with mount.volume("data").open("r+b", buffering=0) as volume:
        os.pwrite(volume.fileno(), old, 0)
        os.fsync(volume.fileno())
        (pid,) = (node["pid"] for node in cluster.document["nodes"] if node["sds"] == "sds1")
        # From now on its writes past the beginning of a file fail (EFBIG), those of its devices among them.
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (MIB, MIB))
        for at in range(0, SIZE, MIB):
            assert os.pwrite(volume.fileno(), new[at : at + MIB], at) == MIB
        os.fsync(volume.fileno())
        os.posix_fadvise(volume.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert b"".join(os.pread(volume.fileno(), MIB, at) for at in range(0, SIZE, MIB)) == new
    (sds1,) = (sds for sds in cluster.cli("sds", "list") if sds["name"] == "sds1")
    assert sds1["state"] != "DOWN"
    poll_until(lambda: cluster.cli("vol", "show", "data")["health"] == "OK", 60, what="all copies made again")
    assert cluster.run("vol", "verify", "data").code == 0
