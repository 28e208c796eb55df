"""The store alone: slots, intents, verification of one device, with no engine and no network around it."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

from datapath.blockfile import BlockDevice
from tools.bench.layers import Row, main, rate

MIB = 1024**2
SLOTS = 64
CHUNK_BLOCKS = 1024


def measure(seconds: float) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="pfvol-bench-") as scratch:
        path, cluster_id = Path(scratch, "dev0"), os.urandom(16)
        BlockDevice.create(path, cluster_id=cluster_id, sds_id=1, size_bytes=SLOTS * 4 * MIB)
        device = BlockDevice.open(path, cluster_id=cluster_id)
        try:
            device.recover()
            return measure_device(device, seconds)
        finally:
            device.close()


def measure_device(device: BlockDevice, seconds: float) -> list[Row]:
    block, seq = os.urandom(4096), 0
    slot = device.alloc(1, 0)

    def write() -> float:
        nonlocal seq
        for index in range(CHUNK_BLOCKS):
            seq += 1
            device.write_block(slot, index, block, 1, seq)
        return CHUNK_BLOCKS

    def read() -> float:
        for index in range(CHUNK_BLOCKS):
            device.read_block(slot, index)
        return CHUNK_BLOCKS

    def verify() -> float:
        device.verify_slot(slot)
        return 4 * MIB / 1e6

    def group_commit() -> float:
        for _ in range(8):
            try:
                device.intent(1, 0, slot)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                # The journal's half is full, as it becomes in service too: a checkpoint empties it.
                device.checkpoint()
                device.intent(1, 0, slot)
        device.commit()
        return 8

    def allocate() -> float:
        # First: it makes room in the journal, and has slots that were given back given out again.
        device.checkpoint()
        slots = [device.alloc(1, chunk) for chunk in range(1, SLOTS // 2)]
        for each in slots:
            device.free_slot(each)
        return len(slots)

    return [
        rate("4 KiB blocks written with their tags", "blocks/s", seconds, write),
        rate("4 KiB blocks read and verified", "blocks/s", seconds, read),
        rate("chunks verified", "MB/s", seconds, verify),
        rate("intents made durable, 8 a commit", "intents/s", seconds, group_commit),
        rate("slots given out and back, checkpointed", "slots/s", seconds, allocate),
    ]


if __name__ == "__main__":
    main("store", measure)
