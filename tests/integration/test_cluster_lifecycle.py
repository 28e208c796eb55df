"""A local cluster from up to down: what it writes, what comes back, and what a failed start leaves behind (nothing)."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pfvol import childprocess, localcluster
from pfvol.errors import DeviceError, Error, NotFoundError
from tests.support.cli import environment
from tests.support.cluster import DEVICE_SIZE_BYTES, DEVICES, TestCluster
from tests.support.processes import running
from tests.support.waiting import poll_until

MIB = 1024**2
SMALL = {"sds": 2, "devices": 1, "device_size_bytes": 64 * MIB}

Factory = Callable[..., TestCluster]


def pids(cluster: TestCluster) -> dict[str, int | None]:
    return {node["name"]: node["pid"] for node in cluster.document["nodes"]}


def states(cluster: TestCluster) -> dict[str, str]:
    return {node["name"]: node["state"] for node in cluster.document["nodes"]}


def identities(cluster: TestCluster) -> dict[str, str]:
    return {sds["name"]: sds["id"] for sds in cluster.cli("sds", "list")}


def test_document_is_the_contracts(cluster: TestCluster) -> None:
    """Goal: scripts find in cluster.json what they were promised, and nobody else can read the token in it."""
    path = cluster.data_dir / "cluster.json"
    document = json.loads(path.read_text())
    assert {"data_dir", "mdm", "control_address", "api", "token", "nodes"} <= set(document)
    for node in document["nodes"]:
        assert {"name", "pid", "capabilities", "control_address", "data_address", "data_dir", "sds"} <= set(node)
        os.kill(node["pid"], 0)
    assert [node["capabilities"] for node in document["nodes"]] == [["mdm"], ["sds"], ["sds"], ["sds"]]
    assert [node["sds"] for node in document["nodes"]] == [None, "sds1", "sds2", "sds3"]
    assert document["data_dir"] == str(cluster.data_dir)
    assert document["api"].startswith("http://127.0.0.1:")
    for secret in (path, cluster.data_dir / "secret"):
        assert stat.S_IMODE(secret.stat().st_mode) == 0o600


def test_everything_is_up_and_in_the_pool(cluster: TestCluster) -> None:
    """Goal: up returns when all SDSs serve, and the pool has half of what they have, as everything is kept twice."""
    assert set(states(cluster).values()) == {"UP"}
    assert cluster.document["state"] == "UP"
    assert [sds["state"] for sds in cluster.cli("sds", "list")] == ["UP"] * 3
    assert all(sds["node"] == sds["name"] for sds in cluster.cli("sds", "list"))
    (pool,) = cluster.cli("pool", "list")
    assert (pool["name"], pool["policy"]) == ("default", "two_copies")
    assert pool["total_capacity_bytes"] == 3 * DEVICES * DEVICE_SIZE_BYTES // 2


def test_up_again_changes_nothing(cluster: TestCluster) -> None:
    """Goal: up is idempotent, and the shape of a cluster that exists is not changed by asking for another."""
    before = pids(cluster)
    cluster.up(sds=5)
    again = cluster.run("cluster", "up", "--sds", "5")
    assert again.code == 0
    assert "keeps its shape" in again.stderr
    assert "shape" not in cluster.run("cluster", "up").stderr
    assert pids(cluster) == before


def test_down_and_up_bring_everything_back(fresh_cluster: Factory) -> None:
    """Goal: ports, ids and objects survive a clean stop; nothing runs in between."""
    cluster = fresh_cluster(**SMALL, fault_sets=2)
    assert [sds["fault_set_name"] for sds in cluster.cli("sds", "list")] == ["fs1", "fs2"]
    cluster.volume("kept", "8MiB")
    before = cluster.document
    ids = identities(cluster)
    processes = [
        (node["pid"], node["start_ticks"], str(Path(node["data_dir"]) / "node.toml")) for node in before["nodes"]
    ]
    assert all(childprocess.find(*process) for process in processes)
    cluster.cli("cluster", "down")
    assert set(states(cluster).values()) == {"STOPPED"}
    # Not whether /proc has the pid still: an init that does not reap keeps it there, and another process may have it.
    assert not any(childprocess.find(*process) for process in processes)
    cluster.cli("cluster", "up")
    after = cluster.document
    for key in ("mdm", "api", "token"):
        assert after[key] == before[key]
    assert [node["data_address"] for node in after["nodes"]] == [node["data_address"] for node in before["nodes"]]
    assert identities(cluster) == ids
    assert [volume["name"] for volume in cluster.cli("vol", "list")] == ["kept"]


def test_nodes_stop_start_and_restart_alone(fresh_cluster: Factory) -> None:
    """Goal: work on one node leaves the others' processes alone."""
    cluster = fresh_cluster(**SMALL)
    before = pids(cluster)
    cluster.cli("cluster", "stop-node", "sds2")
    assert states(cluster) == {"mdm1": "UP", "sds1": "UP", "sds2": "STOPPED"}
    assert cluster.document["state"] == "DEGRADED"
    poll_until(lambda: cluster.cli("sds", "show", "sds2")["state"] == "DOWN", what="the MDM notices")
    cluster.cli("cluster", "start-node", "sds2")
    assert set(states(cluster).values()) == {"UP"}
    cluster.cli("cluster", "restart", "--node", "mdm1")
    after = pids(cluster)
    assert after["sds1"] == before["sds1"]
    assert after["sds2"] != before["sds2"]
    assert after["mdm1"] != before["mdm1"]
    assert set(states(cluster).values()) == {"UP"}


def test_added_node_joins_the_pool(fresh_cluster: Factory) -> None:
    """Goal: one more SDS is one more in the pool, also after a restart."""
    cluster = fresh_cluster(**SMALL)
    cluster.cli("cluster", "add-node", "extra")
    assert states(cluster)["extra"] == "UP"
    (pool,) = cluster.cli("pool", "list")
    assert pool["total_capacity_bytes"] == 3 * 64 * MIB // 2
    cluster.cli("cluster", "restart")
    assert set(states(cluster)) == {"mdm1", "sds1", "sds2", "extra"}
    assert set(states(cluster).values()) == {"UP"}


def test_bare_cluster_waits_for_its_administrator(fresh_cluster: Factory) -> None:
    """Goal: --bare makes no object; its SDSs serve once they are added by hand."""
    cluster = fresh_cluster(**SMALL, bare=True)
    assert cluster.cli("pd", "list") == []
    assert cluster.cli("sds", "list") == []
    cluster.cli("pd", "create", "own")
    cluster.cli("sds", "add", "own", "sds1", "64MiB")
    poll_until(lambda: cluster.cli("sds", "show", "sds1")["state"] == "UP", what="sds1 serves")


def test_killed_cluster_comes_back(fresh_cluster: Factory) -> None:
    """Goal: after SIGKILL of everything, up finds no process to trust and starts all of it again."""
    cluster = fresh_cluster(**SMALL)
    ids = identities(cluster)
    document = json.loads((cluster.data_dir / "cluster.json").read_text())
    processes = [childprocess.Identity(node["pid"], node["start_ticks"]) for node in document["nodes"]]
    childprocess.kill(processes)
    assert set(states(cluster).values()) == {"STOPPED"}
    cluster.up()
    assert set(states(cluster).values()) == {"UP"}
    assert identities(cluster) == ids


def test_node_that_cannot_start_is_explained(fresh_cluster: Factory) -> None:
    """Goal: the error has the node's own last words, and what was started with it is stopped again."""
    cluster = fresh_cluster(start=False)
    cluster.data_dir.mkdir()
    (cluster.data_dir / "secret").write_bytes(b"short")
    with pytest.raises(Error, match=r"(?s)node mdm1 ended.*secret"):
        cluster.up(**SMALL)
    assert set(states(cluster).values()) == {"STOPPED"}
    # The directory is still that of an unfinished cluster: with the cause gone, up goes on.
    (cluster.data_dir / "secret").unlink()
    cluster.up()
    assert set(states(cluster).values()) == {"UP"}


def test_a_device_that_is_gone_is_named_at_once(fresh_cluster: Factory) -> None:
    """Goal: what can never come up is not waited for; with the device back, up goes on."""
    cluster = fresh_cluster(**SMALL)
    cluster.cli("cluster", "down")
    device, elsewhere = cluster.data_dir / "sds2" / "devices" / "dev0", cluster.data_dir / "sds2" / "elsewhere"
    device.rename(elsewhere)
    started = time.monotonic()
    with pytest.raises(DeviceError, match=f"sds2 does not serve.*{device}"):
        cluster.up()
    assert time.monotonic() - started < localcluster.START_TIMEOUT_SECONDS / 2
    assert set(states(cluster).values()) == {"STOPPED"}
    elsewhere.rename(device)
    cluster.up()
    assert set(states(cluster).values()) == {"UP"}


def test_two_at_once_make_one_cluster(fresh_cluster: Factory) -> None:
    """Goal: commands of one data directory take turns."""
    cluster = fresh_cluster(start=False)
    argv = [sys.executable, "-m", "pfvol.cli", "--data-dir", str(cluster.data_dir), "--json", "cluster", "up"]
    argv += ["--sds", "2", "--devices", "1", "--device-size", "64MiB"]
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "text": True, "env": environment()}
    with running(argv, **options) as one, running(argv, **options) as other:
        documents = [json.loads(process.communicate(timeout=100)[0]) for process in (one, other)]
        assert [one.returncode, other.returncode] == [0, 0]
    first, second = ([node["pid"] for node in document["nodes"]] for document in documents)
    assert first == second


def test_status_of_nothing(tmp_path: Path, cli: Callable[..., Any]) -> None:
    """Goal: no cluster is exit code 3 and a line that says how to get one."""
    result = cli("cluster", "status", data_dir=tmp_path)
    assert result.code == 3
    assert "cluster up" in result.stderr
    with pytest.raises(NotFoundError):
        localcluster.status(tmp_path)


def test_a_clean_stop_leaves_nobody_out(fresh_cluster: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Goal: the MDM stops before any SDS, so that there is nobody to leave out those who stop a moment earlier."""
    stopped: list[list[int]] = []
    stop = childprocess.stop

    def noted(identities: Any, grace_seconds: float) -> Any:
        stopped.append([identity.pid for identity in identities])
        return stop(identities, grace_seconds)

    monkeypatch.setattr(childprocess, "stop", noted)
    cluster = fresh_cluster(**SMALL)
    before = pids(cluster)
    localcluster.down(cluster.data_dir)
    assert stopped == [[before["mdm1"]], [before["sds1"], before["sds2"]]]
    assert not any("left out" in log.read_text() for log in cluster.data_dir.glob("*/log"))
