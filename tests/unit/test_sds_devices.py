"""Goal: an SDS's devices open together or say what is wrong, and a lost device never turns into an empty one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from datapath.blockfile import BlockDevice
from pfvol.errors import ConfigError, ConflictError, ProtocolError, VersionError
from pfvol.sds.devices import STATE_FILE, Devices, DeviceSpec, SdsState, load_state, parse_specs, save_state

CLUSTER = bytes(range(1, 17))
SLOTS = 4


@pytest.fixture
async def made(tmp_path: Path) -> Path:
    """A node directory with two devices, closed clean."""
    devices = Devices(tmp_path, SdsState())
    devices.adopt(CLUSTER, 3)
    await devices.make(parse_specs(tmp_path, [{"index": i, "path": None, "slots": SLOTS} for i in range(2)]))
    assert devices.failed == {}
    await devices.close()
    return tmp_path


async def reopened(directory: Path) -> Devices:
    devices = Devices(directory, load_state(directory))
    await devices.open()
    return devices


def device_path(directory: Path, index: int) -> Path:
    return directory / "devices" / f"dev{index}"


async def test_devices_are_made_as_told_and_found_again(made: Path) -> None:
    devices = await reopened(made)
    assert devices.failed == {}
    assert [(one["index"], one["slots"]) for one in devices.describe()] == [(0, SLOTS), (1, SLOTS)]
    assert len({one["device_id"] for one in devices.describe()}) == 2
    assert devices.state.devices == (
        DeviceSpec(0, str(device_path(made, 0)), SLOTS),
        DeviceSpec(1, str(device_path(made, 1)), SLOTS),
    )
    assert all(device.sds_id == 3 for device in devices.opened.values())
    await devices.close()


async def test_the_incarnation_rises_with_each_start_and_is_the_same_on_all_devices(made: Path) -> None:
    first = await reopened(made)
    incarnation = first.incarnation
    await first.close()
    BlockDevice.open(device_path(made, 1)).close()  # a start that device 0 has missed
    second = await reopened(made)
    assert second.incarnation > incarnation + 1
    assert {device.incarnation for device in second.opened.values()} == {second.incarnation}
    assert second.durable_incarnation <= second.incarnation
    await second.close()


async def test_a_device_that_is_gone_is_reported_and_never_made_again(made: Path) -> None:
    shutil.rmtree(device_path(made, 1))
    devices = await reopened(made)
    assert list(devices.opened) == [0]
    assert str(device_path(made, 1)) in devices.failed[1]
    assert devices.missing(parse_specs(made, [{"index": i, "path": None, "slots": SLOTS} for i in range(2)])) == []
    await devices.close()
    assert not device_path(made, 1).exists()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES = [("superblock", Path.unlink)] + [
    (file, damage) for file in ("slots", "tags", "blocks", "journal") for damage in (truncate, Path.unlink)
]


@pytest.mark.parametrize(("file", "damage"), DAMAGES)
async def test_a_damaged_device_is_named_and_the_others_open(
    made: Path, file: str, damage: Callable[[Path], None]
) -> None:
    damage(device_path(made, 1) / file)
    devices = await reopened(made)
    assert list(devices.opened) == [0]
    assert str(device_path(made, 1)) in devices.failed[1]
    assert "\n" not in devices.failed[1]
    await devices.close()


@pytest.mark.parametrize("damage", [flip, truncate])
async def test_a_superblock_that_has_rotted_takes_the_device_out_only_with_the_one_before(
    made: Path, damage: Callable[[Path], None]
) -> None:
    damage(device_path(made, 1) / "superblock")
    devices = await reopened(made)
    assert (sorted(devices.opened), devices.unsure) == ([0, 1], False)
    await devices.close()
    for name in ("superblock", "superblock.new"):
        damage(device_path(made, 1) / name)
    devices = await reopened(made)
    assert list(devices.opened) == [0]
    assert str(device_path(made, 1)) in devices.failed[1]
    await devices.close()


async def test_a_slot_whose_chunk_cannot_be_told_makes_the_device_unsure(made: Path) -> None:
    device = BlockDevice.open(device_path(made, 1))
    device.recover()
    device.alloc(9, 0)
    device.checkpoint()
    device.close()
    (device_path(made, 1) / "slots").write_bytes(b"\1" * SLOTS * 32)
    devices = await reopened(made)
    assert (sorted(devices.opened), devices.unsure) == ([0, 1], True)
    await devices.close()


async def test_a_device_that_another_process_has_is_reported(made: Path) -> None:
    first = await reopened(made)
    second = await reopened(made)
    assert second.opened == {}
    assert all("in use" in reason for reason in second.failed.values())
    await first.close()


async def test_devices_that_were_swapped_are_found_out(made: Path) -> None:
    one, two = device_path(made, 0), device_path(made, 1)
    one.rename(made / "aside")
    two.rename(one)
    (made / "aside").rename(two)
    devices = await reopened(made)
    assert devices.opened == {}
    assert "device 1" in devices.failed[0]


async def test_devices_of_another_cluster_or_sds_are_refused(made: Path, tmp_path: Path) -> None:
    state = load_state(made)
    for other in ({"cluster_id": bytes(15) + b"x"}, {"sds_id": 4}):
        save_state(made, SdsState(**{**{n: getattr(state, n) for n in ("cluster_id", "sds_id", "devices")}, **other}))
        devices = await reopened(made)
        assert devices.opened == {}
        assert sorted(devices.failed) == [0, 1]


async def test_a_device_made_but_not_yet_listed_is_taken_and_listed(made: Path) -> None:
    state = load_state(made)
    save_state(made, SdsState(state.cluster_id, state.sds_id, 0, state.devices[:1]))
    devices = await reopened(made)
    missing = devices.missing(parse_specs(made, [{"index": i, "path": None, "slots": SLOTS} for i in range(2)]))
    assert [spec.index for spec in missing] == [1]
    await devices.make(missing)
    assert devices.failed == {}
    assert load_state(made).devices == state.devices
    await devices.close()


async def test_a_device_that_cannot_be_made_is_reported_and_not_listed(tmp_path: Path) -> None:
    (tmp_path / "devices").mkdir()
    device_path(tmp_path, 0).write_text("a file")
    devices = Devices(tmp_path, SdsState())
    devices.adopt(CLUSTER, 3)
    await devices.make(parse_specs(tmp_path, [{"index": 0, "path": None, "slots": SLOTS}]))
    assert str(device_path(tmp_path, 0)) in devices.failed[0]
    assert load_state(tmp_path).devices == ()


def test_an_sds_does_not_change_its_cluster_or_number(tmp_path: Path) -> None:
    devices = Devices(tmp_path, SdsState())
    devices.adopt(CLUSTER, 3)
    devices.adopt(CLUSTER, 3)
    for cluster_id, sds_id in ((bytes(16), 3), (CLUSTER, 4)):
        with pytest.raises(ConflictError, match=str(tmp_path)):
            devices.adopt(cluster_id, sds_id)
    assert load_state(tmp_path) == SdsState(CLUSTER, 3)


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "{}", '{"format": 1}', "\xff"])
def test_a_state_file_that_cannot_be_read_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / STATE_FILE).write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=STATE_FILE):
        load_state(tmp_path)


def test_a_state_file_of_another_version_is_named(tmp_path: Path) -> None:
    save_state(tmp_path, SdsState(CLUSTER, 3))
    document = json.loads((tmp_path / STATE_FILE).read_text())
    (tmp_path / STATE_FILE).write_text(json.dumps({**document, "format": 2}))
    with pytest.raises(VersionError, match="format 2"):
        load_state(tmp_path)


@pytest.mark.parametrize(
    "body",
    [
        None,
        [{}],
        [{"index": 0, "path": None, "slots": 0}],
        [{"index": 0, "path": None, "slots": 1}] * 2,
        [{"index": i, "path": None, "slots": 1} for i in range(2000)],
    ],
)
def test_a_list_of_devices_that_is_none_is_refused(tmp_path: Path, body: object) -> None:
    with pytest.raises(ProtocolError):
        parse_specs(tmp_path, body)


def test_a_first_start_that_is_killed_at_any_step_is_made_good_by_the_next(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.support.killed_start", str(tmp_path / "node")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert int(done.stdout.split()[-1]) > 40, "the kills were not where the devices are made"
