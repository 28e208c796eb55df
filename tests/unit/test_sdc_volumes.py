"""What the MDM says of volumes is checked, and the difference between two tellings is exact."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from pfvol.constants import INODE_VOLUME_BASE, VOLUME_SIZE_BYTES_MAX
from pfvol.errors import ProtocolError
from pfvol.sdc.volumes import Changes, Volume, VolumeTable, diff, volumes_from_wire


def body(volume_id: int = 1, **changes: Any) -> dict[str, Any]:
    return {
        "volume_id": volume_id,
        "name": f"vol{volume_id}",
        "size_bytes": 1 << 30,
        "read_only": False,
        "thick": False,
        "capability": bytes(64),
        "iops_limit": None,
        "bandwidth_limit_mbps": None,
        "created_at": 1_700_000_000.5,
        "used_bytes": 4096,
        "used_blocks_bytes": 8192,
        "pool": {"total_bytes": 100, "free_bytes": 50},
    } | changes


def volume(volume_id: int = 1, **changes: Any) -> Volume:
    return dataclasses.replace(Volume.from_wire(body(volume_id)), **changes)


def by_id(*volumes: Volume) -> dict[int, Volume]:
    return {volume.volume_id: volume for volume in volumes}


def test_a_volume_is_read_with_its_units() -> None:
    read = Volume.from_wire(body(7, bandwidth_limit_mbps=3, iops_limit=5))
    assert read.inode == INODE_VOLUME_BASE + 7
    assert read.created_at_ns == 1_700_000_000_500_000_000
    assert (read.bandwidth_limit_bytes, read.iops_limit) == (3_000_000, 5)


@pytest.mark.parametrize(
    "changes",
    [
        {"volume_id": 0},
        {"volume_id": 2**32},
        {"size_bytes": 0},
        {"size_bytes": VOLUME_SIZE_BYTES_MAX + 1},
        {"size_bytes": "large"},
        {"name": ""},
        {"name": ".."},
        {"name": "a/b"},
        {"pool": None},
        {"capability": None},
    ],
)
def test_what_cannot_be_a_volume_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        Volume.from_wire(body(**changes))
    incomplete = body()
    del incomplete[next(iter(changes))]
    with pytest.raises(ProtocolError):
        volumes_from_wire([incomplete])


def test_no_change_is_no_change() -> None:
    assert diff({}, {}) == Changes()
    assert diff(by_id(volume(1)), by_id(volume(1))) == Changes()


def test_figures_and_renewed_capabilities_are_no_change() -> None:
    newer = volume(1, used_blocks_bytes=1 << 20, capability=bytes(24) + b"\1" * 40)
    assert diff(by_id(volume(1)), by_id(newer)) == Changes()
    assert newer.permission == volume(1).permission


def test_mapped_and_unmapped() -> None:
    assert diff(by_id(volume(1)), by_id(volume(2))) == Changes(added=(volume(2),), removed=(volume(1),))


@pytest.mark.parametrize(
    "change", [{"size_bytes": 2 << 30}, {"read_only": True}, {"iops_limit": 9}, {"name": "b"}, {"thick": True}]
)
def test_what_matters_is_a_change(change: dict[str, Any]) -> None:
    old, new = volume(1), volume(1, **change)
    assert diff(by_id(old, volume(2)), by_id(new, volume(2))) == Changes(changed=((old, new),))


def test_the_table_finds_by_inode_and_name() -> None:
    table = VolumeTable()
    table.replace(by_id(volume(1), volume(2)))
    assert table.by_name(b"vol2") is table.by_inode(INODE_VOLUME_BASE + 2) is table.by_id[2]
    assert table.by_name(b"vol3") is None
    assert table.by_inode(1) is None
    assert {volume.name for volume in table} == {"vol1", "vol2"}


def test_a_volume_that_comes_back_is_another_file() -> None:
    table = VolumeTable()
    table.replace(by_id(volume(1)))
    first = table.file(volume(1))
    first.mode = 0o600
    table.replace(by_id(volume(1, size_bytes=2 << 30)))
    assert table.file(volume(1)) is first
    table.replace({})
    table.replace(by_id(volume(1)))
    assert table.file(volume(1)).generation > first.generation
    assert table.file(volume(1)).mode is None
