"""A cluster and its mounts: down refuses while one is there, and a demonstration's worth of data goes in and out."""

from __future__ import annotations

import os
from collections.abc import Callable

from tests.support.cluster import TestCluster, is_mounted

Factory = Callable[..., TestCluster]
MIB = 1024**2


def test_down_names_the_mounts(fresh_cluster: Factory) -> None:
    """Goal: servers are not pulled away under a mount, and the message says which mount it is."""
    cluster = fresh_cluster(sds=2, devices=1, device_size_bytes=64 * MIB)
    mount = cluster.mount()
    result = cluster.run("cluster", "down")
    assert result.code == 4
    assert str(mount.path) in result.stderr
    assert {node["state"] for node in cluster.document["nodes"]} == {"UP"}
    mount.unmount()
    assert not is_mounted(mount.path)
    assert cluster.run("cluster", "down").code == 0


def test_restart_keeps_mount_and_data(fresh_cluster: Factory) -> None:
    """Goal: IO of a mount that was there before a restart of every node goes on after it."""
    cluster = fresh_cluster(sds=2, devices=1, device_size_bytes=64 * MIB)
    cluster.volume("data", "16MiB", sdc="host")
    mount = cluster.mount(sdc="host")
    content = os.urandom(3 * MIB + 123)
    with mount.volume("data").open("r+b") as volume:
        volume.write(content)
        volume.flush()
        os.fsync(volume.fileno())
    cluster.cli("cluster", "restart")
    with mount.volume("data").open("r+b") as volume:
        os.posix_fadvise(volume.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert volume.read(len(content)) == content
        volume.seek(5 * MIB)
        volume.write(content)
        volume.flush()
        os.fsync(volume.fileno())
    assert cluster.run("vol", "verify", "data").code == 0
