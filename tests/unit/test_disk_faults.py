"""The filters in front of a device's calls: errors come where a disk's would, as often as was said, until cleared."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from datapath import disk
from datapath.blockfile import BlockDevice

CLUSTER = bytes(range(16))
SLOT_BYTES = 4 << 20


@pytest.fixture
def device(tmp_path: Path) -> Iterator[BlockDevice]:
    BlockDevice.create(tmp_path / "dev", cluster_id=CLUSTER, size_bytes=4 * SLOT_BYTES)
    device = BlockDevice.open(tmp_path / "dev")
    device.recover()
    yield device
    disk.clear()
    device.close(clean=False)


def test_a_sync_that_fails_takes_the_device_out_of_service(device: BlockDevice) -> None:
    device.alloc(1, 0)
    disk.inject_error("fdatasync", errno.EIO, 1_000_000)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        device.sync()
    disk.clear()
    assert device.failed == errno.EIO
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        device.sync()


def test_no_room_is_an_answer_and_not_the_end_of_a_device(device: BlockDevice) -> None:
    """Goal: what has its room is written and synced on a full disk; a slot whose tags need room is not given out."""
    device.alloc(1, 0)
    disk.inject_error("pwrite", errno.ENOSPC, 1_000_000)
    disk.inject_error("fallocate", errno.ENOSPC, 1_000_000)
    device.commit()
    device.sync()
    device.alloc(1, 1)  # tags have their room in groups
    assert device.failed == 0


def test_a_share_of_the_calls_fails(device: BlockDevice) -> None:
    before = disk.injected()["pread"][0]
    slot = device.alloc(1, 0)
    device.write_block(slot, 0, b"x" * 4096, 1, 1)
    disk.inject_error("pread", errno.EIO, 100_000)
    failed = 0
    for _ in range(2000):
        try:
            device.read_block(slot, 0)
        except OSError:
            failed += 1
    assert 100 < failed < 320
    assert disk.injected()["pread"][0] - before == failed
    disk.clear()
    device.read_block(slot, 0)


def test_a_delay_is_waited_for(device: BlockDevice) -> None:
    slot = device.alloc(1, 0)
    disk.inject_delay("pread", 30_000_000)
    begun = time.monotonic()
    device.read_block(slot, 0)
    assert time.monotonic() - begun >= 0.03
    assert disk.injected()["pread"][1] >= 1
    disk.inject_delay("pread", 0)


@pytest.mark.parametrize(
    ("call", "error", "share"), [("open", 5, 1), ("pread", 0, 1), ("pread", 5, 0), ("pread", 5, 1_000_001)]
)
def test_what_cannot_be_injected(call: str, error: int, share: int) -> None:
    with pytest.raises(ValueError, match=r"pread|errno"):
        disk.inject_error(call, error, share)
    assert set(disk.injected()) == set(disk.CALLS)
