"""Random work on one device through its Python methods, with marks of what was done and flushed."""

from __future__ import annotations

import errno
import itertools
import random

from datapath.blockfile import BlockDevice
from tests.crashstates.recording import Recording

BLOCK = 4096
BLOCKS = 5  # of each chunk, the first ones
_numbers = itertools.count(1 << 40)


class DeviceWork:
    """Gives chunks slots, writes blocks, takes slots back, commits, syncs, makes checkpoints."""

    def __init__(self, device: BlockDevice, recording: Recording, rng: random.Random, sds: int, *, volume: int) -> None:
        self.device, self.recording, self.rng, self.sds = device, recording, rng, sds
        self.volume, self.fresh = volume, itertools.count()
        self.slots = {(volume_id, chunk): slot for slot, volume_id, chunk, _ in device.used_slots()}
        self.count = itertools.count((device.incarnation << 42) + 1)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step(self.rng.choice(["write"] * 6 + ["alloc"] * 3 + ["free", "commit", "sync", "checkpoint", "half"]))

    def step(self, action: str) -> None:
        try:
            if action == "alloc" and self.device.free:
                chunk = (self.volume, next(self.fresh))  # never one that was there before: that one may still come back
                self.slots[chunk] = self.device.alloc(*chunk, 1)
            elif action == "write" and self.slots:
                self.write(self.rng.choice(sorted(self.slots)))
            elif action == "free" and self.slots:
                self.free(self.rng.choice(sorted(self.slots)))
            elif action == "commit":
                self.device.commit()
            elif action == "sync":
                self.sync()
            elif action == "checkpoint":
                self.checkpoint()
            elif action == "half":
                self.half_checkpoint()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EAGAIN):
                raise
            self.checkpoint()  # the journal's half is full

    def write(self, chunk: tuple[int, int]) -> None:
        slot = self.slots[chunk]
        self.device.intent(*chunk, slot)
        self.device.commit()
        for _ in range(self.rng.randrange(1, 4)):
            block, data, number = self.rng.randrange(BLOCKS), self.rng.randbytes(BLOCK), next(_numbers)
            self.recording.mark(
                "sent",
                number=number,
                volume=chunk[0],
                chunk=chunk[1],
                offset=block * BLOCK,
                length=BLOCK,
                data=data.hex(),
                commit=False,
                copies=[self.sds],
            )
            self.device.write_block(slot, block, data, 1, next(self.count))
            self.recording.mark("acknowledged", number=number)

    def free(self, chunk: tuple[int, int]) -> None:
        """As of a volume that is deleted: nobody asks for the chunk any more."""
        self.recording.mark("purging", volume=chunk[0], chunk=chunk[1])
        self.device.free_slot(self.slots.pop(chunk))

    def sync(self) -> None:
        number = next(_numbers)
        self.recording.mark("flush", sds=self.sds, number=number)
        self.device.sync()
        self.recording.mark("flushed", sds=self.sds, number=number)

    def checkpoint(self) -> None:
        number = next(_numbers)
        self.recording.mark("flush", sds=self.sds, number=number)
        self.device.checkpoint_begin()
        self.device.sync()
        self.recording.mark("flushed", sds=self.sds, number=number)
        self.void()

    def void(self) -> None:
        self.recording.mark("forgiven", sds=self.sds)
        self.device.journal_void()
        self.device.checkpoint_end()

    def half_checkpoint(self) -> None:
        """With what is between its parts, and a write in flight that is told again in the new generation."""
        self.device.checkpoint_begin()
        if self.slots and self.rng.random() < 0.7:
            self.write(self.rng.choice(sorted(self.slots)))
        self.sync()
        if self.rng.random() < 0.5 and self.slots:
            self.write(self.rng.choice(sorted(self.slots)))
        self.void()
