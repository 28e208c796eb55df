"""Goal: an SDS engine gives back what it took, once, however its object is disposed of."""

from __future__ import annotations

import gc
import os
import select
from pathlib import Path

import pytest

from datapath.blockfile import BlockDevice
from datapath.tags import unpack
from datapath.target import Target

CLUSTER = bytes(range(16))
BOOT = b"a boot of a host"


def descriptors() -> dict[str, str]:
    """What each descriptor of this process stands for."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[name] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the listing's own
            continue
    return found


@pytest.mark.parametrize("in_a_cycle", [False, True], ids=["counted", "collected"])
@pytest.mark.parametrize("started", [False, True], ids=["unused", "stopped"])
def test_no_descriptor_of_another_is_closed_when_an_engine_goes(started: bool, in_a_cycle: bool) -> None:
    gc.collect()
    before = descriptors()
    target = Target(3, 1, 1)
    if started:
        target.start()
        target.stop()
    holder = [target]
    if in_a_cycle:
        holder.append(holder)  # type: ignore[arg-type]
    # These take the numbers that the stopped engine has given back already.
    pipes = [os.pipe() for _ in range(8)]
    del target, holder
    gc.collect()
    try:
        for end in (end for pipe in pipes for end in pipe):
            os.fstat(end)
    finally:
        for end in (end for pipe in pipes for end in pipe):
            os.close(end)
    assert descriptors() == before


def opened(path: Path) -> BlockDevice:
    device = BlockDevice.open(path, boot_id=BOOT)
    device.recover()
    return device


def verified(target: Target, volume_id: int, chunk: int) -> tuple[bool, bytes, bytes]:
    """(present, tags, bad) of what the engine holds of the chunk."""
    target.verify(1, volume_id, chunk)
    while True:
        assert select.select([target.event_fd], [], [], 10)[0], "no answer"
        for event in target.events():
            if event[0] == "verified":
                return event[2], event[3], event[4]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["older first", "newer first"])
def test_a_chunk_that_a_crash_left_on_two_devices_is_served_from_where_it_was_last_written(
    tmp_path: Path, order: tuple[int, int]
) -> None:
    paths = [tmp_path / "dev0", tmp_path / "dev1"]
    for index, path in enumerate(paths):
        BlockDevice.create(path, cluster_id=CLUSTER, index=index, size_bytes=8 << 22)
    old, new = (opened(path) for path in paths)
    slot = old.alloc(1, 0)
    old.commit()
    old.write_block(slot, 3, b"o" * 4096, 1, 1)
    old.free_slot(slot)  # discarded, and not in the journal on disk when the process dies
    slot = new.alloc(1, 0)
    new.commit()
    new.write_block(slot, 3, b"n" * 4096, 1, 2)
    latest = new.tag(slot, 3)
    old.close(clean=False)
    new.close(clean=False)
    devices = [opened(path) for path in paths]
    assert [device.used for device in devices] == [1, 1]
    target = Target(3, 1, 1)
    for at in order:
        target.add_device(devices[at])
    assert [device.used for device in devices] == [0, 1]
    target.start()
    present, tags, bad = verified(target, 1, 0)
    target.stop()
    check, epoch, seq = unpack(tags[3 * 16 : 4 * 16])
    assert (present, check, epoch, seq, any(bad)) == (True, *latest, False)
    assert target.stats()["slots_used"] == 1
    for device in devices:
        device.close()
    assert [opened(path).used for path in paths] == [0, 1]
