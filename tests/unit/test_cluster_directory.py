"""What a local cluster refuses before it touches anything: its data directory, its shape, its ports."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pfvol import localcluster
from pfvol.constants import STATE_VERSION
from pfvol.errors import ConfigError, ConflictError, InvalidError, NotFoundError

MIB = 1024**2


def snapshot(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


@pytest.fixture
def document(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A cluster.json as ``up`` writes it, with nothing running, some of it changed."""

    def write(**changes: Any) -> dict[str, Any]:
        plan = localcluster._plan(tmp_path, 2, 0, 5, 64 * MIB, False) | {"provisioned": True} | changes
        for node in plan["nodes"]:
            directory = Path(node["data_dir"])
            directory.mkdir()
            (directory / "node.toml").write_text("")
        (tmp_path / "secret").write_bytes(bytes(32))
        (tmp_path / "cluster.json").write_text(json.dumps(plan))
        return plan

    return write


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ({"sds": 0}, "1 to 64 SDSs"),
        ({"sds": 65}, "1 to 64 SDSs"),
        ({"fault_sets": 1}, "fault sets"),
        ({"sds": 3, "fault_sets": 4}, "fault sets"),
        ({"devices": 0}, "devices"),
        ({"device_size_bytes": 4096}, "64 MiB"),
    ],
)
def test_impossible_shape_is_refused(tmp_path: Path, shape: dict[str, int], says: str) -> None:
    """Goal: a shape that cannot be is refused by its own message, and no directory is made for it."""
    with pytest.raises(InvalidError, match=says):
        localcluster.up(tmp_path / "new", **shape)
    assert not (tmp_path / "new").exists()


def test_directory_of_somebody_else_is_refused(tmp_path: Path) -> None:
    """Goal: a directory with other things in it is never taken over."""
    (tmp_path / "thesis.tex").write_text("years of work")
    before = snapshot(tmp_path)
    with pytest.raises(ConfigError, match=r"thesis\.tex"):
        localcluster.up(tmp_path)
    assert snapshot(tmp_path) == before


def test_an_up_that_was_killed_at_once_is_no_obstacle(tmp_path: Path) -> None:
    """Goal: what is there before cluster.json is, is not taken for another program's, nor is one being made."""
    for name in ("lock", "secret.new", "cluster.json.new"):
        (tmp_path / name).write_text("")
    localcluster._make_data_dir(tmp_path)
    (tmp_path / "mdm1").mkdir()
    with pytest.raises(ConfigError, match="mdm1"):
        localcluster._make_data_dir(tmp_path)
    (tmp_path / "cluster.json").write_text("{}")
    localcluster._make_data_dir(tmp_path)


def test_path_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--data-dir"):
        localcluster.up(tmp_path / "file")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[]", "no document"),
        ('{"version": "1"}', "no document"),
        (json.dumps({"version": STATE_VERSION + 1}), f"version {STATE_VERSION + 1}"),
        (json.dumps({"version": STATE_VERSION}), "has no"),
    ],
)
def test_damaged_cluster_file_is_refused(tmp_path: Path, content: str, says: str) -> None:
    """Goal: a cluster.json that is not this version's is named as what it is, by every command, and left alone."""
    (tmp_path / "cluster.json").write_text(content)
    before = snapshot(tmp_path)
    for command in (localcluster.up, localcluster.status, localcluster.down, localcluster.restart):
        with pytest.raises(ConfigError, match=says):
            command(tmp_path)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("gone", ["secret", "sds1/node.toml", "mdm1/node.toml"])
def test_half_deleted_directory_is_refused(tmp_path: Path, document: Callable[..., Any], gone: str) -> None:
    """Goal: with a part missing, nothing is made anew over what is left."""
    document()
    (tmp_path / gone).unlink()
    before = snapshot(tmp_path)
    with pytest.raises(ConfigError, match="is missing"):
        localcluster.up(tmp_path)
    assert snapshot(tmp_path) == before


def test_copied_directory_is_refused(tmp_path: Path, document: Callable[..., Any]) -> None:
    """Goal: two clusters never share ports and ids because a directory was copied."""
    document(data_dir="/somewhere/else")
    with pytest.raises(ConfigError, match="cannot be moved or copied"):
        localcluster.up(tmp_path)


def test_commands_without_a_cluster_say_so(tmp_path: Path) -> None:
    for command in (localcluster.status, localcluster.down, localcluster.restart):
        with pytest.raises(NotFoundError, match="cluster up"):
            command(tmp_path)
    assert snapshot(tmp_path) == {}


def test_taken_port_is_named(tmp_path: Path, document: Callable[..., Any]) -> None:
    """Goal: a port that another program took meanwhile is reported with its number, and nothing is started."""
    plan = document()
    port = int(plan["nodes"][1]["data_address"].rpartition(":")[2])
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        with pytest.raises(ConflictError, match=f"port {port} of node sds1"):
            localcluster.up(tmp_path)
    assert {node["state"] for node in localcluster.status(tmp_path)["nodes"]} == {"STOPPED"}


@pytest.mark.parametrize("name", ["", ".hidden", "-x", "a/b", "x" * 32, "naïve"])
def test_illegal_node_name_is_refused(tmp_path: Path, document: Callable[..., Any], name: str) -> None:
    document()
    with pytest.raises(InvalidError, match="not a name"):
        localcluster.add_node(tmp_path, name)


def test_added_node_can_only_be_an_sds(tmp_path: Path, document: Callable[..., Any]) -> None:
    document()
    with pytest.raises(InvalidError, match="only be sds"):
        localcluster.add_node(tmp_path, "mdm2", ("mdm",))


def test_add_node_needs_a_running_cluster(tmp_path: Path, document: Callable[..., Any]) -> None:
    document()
    with pytest.raises(ConflictError, match="down"):
        localcluster.add_node(tmp_path, "sds9")
    with pytest.raises(ConflictError, match="already"):
        localcluster.add_node(tmp_path, "sds1")


def test_unknown_node_is_named(tmp_path: Path, document: Callable[..., Any]) -> None:
    document()
    with pytest.raises(NotFoundError, match="mdm1, sds1, sds2"):
        localcluster.stop_node(tmp_path, "sds7")


def test_plan_spreads_fault_sets_and_ports() -> None:
    """Goal: SDSs take the fault sets in turn, and no two nodes share a port."""
    plan = localcluster._plan(Path("/nowhere"), 5, 2, 5, 64 * MIB, False)
    assert [node["fault_set"] for node in plan["nodes"]] == [None, "fs1", "fs2", "fs1", "fs2", "fs1"]
    ports = [port for node in plan["nodes"] for port in localcluster._ports(node)]
    assert len(ports) == len(set(ports)) == 7
    assert all(port in localcluster.PORT_RANGE for port in ports)
