"""What SDSs do while they are recorded: the real engine, a pair of them, and devices through their own methods.

Each workload leaves a recording of a directory in which ``one`` and ``two`` are the SDSs. They are small: few slots,
few blocks, but every kind of operation on the disk, in many orders.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import trio

from datapath import wire
from datapath.blockfile import BlockDevice
from tests.crashstates.devicework import DeviceWork
from tests.crashstates.recording import EXT4, XFS, Recording
from tests.support.dataclient import DataClient
from tests.support.sdspair import CLUSTER, Pair, PlayedMdm, RunningSds, running_pair
from tests.support.waiting import poll_until_async

SLOTS: Final = 4
BLOCK: Final = 4096
SYNC_DELAY_US: Final = 1500
VOLUMES: Final = (5, 6)
SDC: Final = 7
ROOTS: Final = {1: "one/", 2: "two/"}
AGAIN: Final = (wire.ST_NOT_READY, wire.ST_BUSY)


@dataclass
class Cluster:
    """A recorded pair, and a client of each that marks what it was told."""

    pair: Pair
    recording: Recording
    rng: random.Random
    clients: dict[int, DataClient]
    locks: dict[int, trio.Lock] = field(default_factory=lambda: {1: trio.Lock(), 2: trio.Lock()})
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def sds(self, number: int) -> RunningSds:
        return self.pair.one if number == 1 else self.pair.two

    def primary(self, chunk: int) -> int:
        return 1 if chunk % 2 == 0 else 2

    async def request(self, sds: int, number: int, opcode: int, body: bytes = b"", **fields: int) -> None:
        async def taken() -> bool:
            async with self.locks[sds]:
                reply = await self.clients[sds].request(opcode, body, **fields)
            assert reply.status in (wire.ST_OK, *AGAIN), f"status {reply.status}"
            return reply.status == wire.ST_OK

        await poll_until_async(taken, what=f"operation {number}")

    async def write(
        self, volume: int, chunk: int, offset: int, length: int, *, commit: bool = False, discard: bool = False
    ) -> None:
        number, data = next(self.numbers), None if discard else self.rng.randbytes(length)
        self.recording.mark(
            "sent",
            number=number,
            volume=volume,
            chunk=chunk,
            offset=offset,
            length=length,
            commit=commit,
            copies=[1, 2],
            data=None if data is None else data.hex(),
        )
        place = {"volume_id": volume, "chunk_index": chunk, "offset": offset, "length": length, "epoch": 1}
        flags = wire.FLAG_COMMIT if commit else 0
        if data is None:
            await self.request(self.primary(chunk), number, wire.OP_DISCARD, flags=flags, **place)
        else:
            body = DataClient.body(volume, chunk, offset, data)
            await self.request(self.primary(chunk), number, wire.OP_WRITE, body, flags=flags, **place)
        self.recording.mark("acknowledged", number=number)

    async def discard(self, volume: int, chunk: int, block: int, count: int, *, commit: bool = False) -> None:
        await self.write(volume, chunk, block * BLOCK, count * BLOCK, discard=True, commit=commit)

    async def flush(self, *sdss: int) -> None:
        for sds in sdss or (1, 2):
            number = next(self.numbers)
            self.recording.mark("flush", sds=sds, number=number)
            await self.request(sds, number, wire.OP_FLUSH, volume_id=VOLUMES[0])
            self.recording.mark("flushed", sds=sds, number=number)

    async def checkpoint(self, *sdss: int) -> None:
        for number in sdss or (1, 2):
            target = self.sds(number).target
            before, devices = target.stats()["checkpoints"], len(self.sds(number).devices.opened)
            self.recording.mark("forgiven", sds=number)
            target.checkpoint()
            await poll_until_async(self._reached(number, before + devices), what="a checkpoint")

    def _reached(self, number: int, checkpoints: int) -> Callable[[], Awaitable[bool]]:
        async def reached() -> bool:
            return bool(self.sds(number).target.stats()["checkpoints"] >= checkpoints)

        return reached

    async def purge(self, volume: int, chunks: int) -> None:
        for chunk in range(chunks):
            self.recording.mark("purging", volume=volume, chunk=chunk)
        for number in (1, 2):
            self.sds(number).target.purge_volume(volume)

            async def purged(number: int = number) -> bool:
                return volume not in self.sds(number).target.stats()["volumes"]

            await poll_until_async(purged, what="a purged volume")

    async def fill(self, volume: int, chunks: int, blocks: int = 3) -> None:
        for chunk in range(chunks):
            await self.write(volume, chunk, 0, blocks * BLOCK)


@asynccontextmanager
async def cluster(
    directory: Path, recording: Recording, rng: random.Random, *, devices: int = 1, chunks: int = 4
) -> AsyncIterator[Cluster]:
    mdm = PlayedMdm()
    for volume in VOLUMES:
        mdm.add_volume(volume, chunks)
    async with running_pair(directory, mdm, slots=SLOTS, device_count=devices) as pair:
        clients = {}
        try:
            for number, sds in ((1, pair.one), (2, pair.two)):
                names = [f"devices/dev{index}" for index in range(devices)]
                recording.mark(
                    "opened",
                    sds=number,
                    incarnation=sds.devices.incarnation,
                    devices=[ROOTS[number] + n for n in names],
                )
                clients[number] = await sds.client(SDC)
                for volume in VOLUMES:
                    reply = await clients[number].capability(volume, mdm.map(volume, SDC))
                    assert reply.status == wire.ST_OK
            yield Cluster(pair, recording, rng, clients)
        finally:
            for client in clients.values():
                await trio.aclose_forcefully(client.stream)


Steps = Callable[[Cluster], Awaitable[None]]


def engine(steps: Steps, *, devices: int = 1) -> Callable[[Path, Recording, random.Random], None]:
    def run(directory: Path, recording: Recording, rng: random.Random) -> None:
        async def main() -> None:
            async with cluster(directory, recording, rng, devices=devices) as made:
                await steps(made)

        trio.run(main)

    return run


# -- the engine's


async def first_writes(c: Cluster) -> None:
    for chunk in range(4):
        await c.write(5, chunk, c.rng.randrange(4) * BLOCK, c.rng.randrange(1, 4) * BLOCK)
        if chunk % 2:
            await c.flush()


async def overwrites(c: Cluster) -> None:
    await c.fill(5, 2)
    for _ in range(14):
        await c.write(5, c.rng.randrange(2), c.rng.randrange(3) * BLOCK, BLOCK)
        if c.rng.random() < 0.3:
            await c.flush(c.rng.choice((1, 2)))
    await c.flush()


async def unaligned_edges(c: Cluster) -> None:
    await c.fill(5, 2)
    await c.flush()
    for _ in range(12):
        offset = c.rng.randrange(2 * BLOCK)
        await c.write(5, c.rng.randrange(2), offset, c.rng.randrange(1, 3 * BLOCK - offset))
        if c.rng.random() < 0.25:
            await c.flush()


async def discards(c: Cluster) -> None:
    await c.fill(5, 2, 4)
    await c.flush()
    for _ in range(12):
        chunk, block = c.rng.randrange(2), c.rng.randrange(4)
        if c.rng.random() < 0.5:
            await c.discard(5, chunk, block, c.rng.randrange(1, 5 - block), commit=c.rng.random() < 0.3)
        else:
            await c.write(5, chunk, block * BLOCK, BLOCK)
        if c.rng.random() < 0.25:
            await c.flush()


async def reused_slots(c: Cluster) -> None:
    """Chunks that were discarded whole give their slots back; others get them, of this volume and of another."""
    await c.fill(5, 3)
    await c.flush()
    for turn in range(3):
        await c.discard(5, turn, 0, 1024)
        if turn % 2:
            await c.flush()
        await c.checkpoint()
        await c.write(6, turn, 0, 2 * BLOCK)
        await c.write(5, turn, BLOCK, BLOCK, commit=turn == 2)
        await c.flush(1 + turn % 2)
        await c.discard(6, turn, 0, 1024)


async def flushes_between(c: Cluster) -> None:
    """Several writers at once, and flushes while they write."""

    async def writer(chunk: int) -> None:
        for _ in range(6):
            await c.write(5, chunk, c.rng.randrange(3) * BLOCK, BLOCK)

    async with trio.open_nursery() as nursery:
        for chunk in range(3):
            nursery.start_soon(writer, chunk)
        for _ in range(4):
            await c.flush()


async def committed_writes(c: Cluster) -> None:
    async def writer(chunk: int) -> None:
        for _ in range(6):
            await c.write(5, chunk, c.rng.randrange(3) * BLOCK, BLOCK, commit=c.rng.random() < 0.7)

    async with trio.open_nursery() as nursery:
        for chunk in range(3):
            nursery.start_soon(writer, chunk)


async def checkpoints_in_the_middle(c: Cluster) -> None:
    async def writer(chunk: int) -> None:
        for _ in range(8):
            await c.write(5, chunk, c.rng.randrange(3) * BLOCK, BLOCK, commit=c.rng.random() < 0.2)

    async with trio.open_nursery() as nursery:
        for chunk in range(2):
            nursery.start_soon(writer, chunk)
        for _ in range(3):
            await c.checkpoint()
    await c.flush()


async def volume_purge(c: Cluster) -> None:
    await c.fill(5, 2)
    await c.fill(6, 2)
    await c.flush()
    await c.purge(6, 4)
    await c.write(5, 2, 0, BLOCK, commit=True)
    await c.checkpoint()
    await c.fill(5, 4, 1)
    await c.flush()


async def large_writes(c: Cluster) -> None:
    for chunk in range(2):
        await c.write(5, chunk, 3 * BLOCK, 40 * BLOCK)
        await c.write(5, chunk, 100, 20 * BLOCK, commit=True)
    await c.discard(5, 0, 8, 20)
    await c.flush()


async def several_devices(c: Cluster) -> None:
    """Chunks go from one device to the other, with COMMIT, flushes and checkpoints as it comes."""
    await c.fill(5, 3, 2)
    for _ in range(10):
        chunk = c.rng.randrange(3)
        await c.discard(5, chunk, 0, 1024)
        if c.rng.random() < 0.3:
            await c.write(6, c.rng.randrange(4), 0, BLOCK)
        await c.write(5, chunk, 0, BLOCK, commit=c.rng.random() < 0.7)
        if c.rng.random() < 0.2:
            await c.checkpoint(c.rng.choice((1, 2)))


# -- of devices alone


@contextmanager
def device(directory: Path, recording: Recording, rng: random.Random) -> Iterator[DeviceWork]:
    path = directory / "one" / "dev0"
    BlockDevice.create(path, cluster_id=CLUSTER, size_bytes=SLOTS * BLOCK * 1024)
    opened = BlockDevice.open(path, boot_id=b"the same boot it")
    opened.recover()
    recording.mark("opened", sds=1, incarnation=opened.incarnation, devices=["one/dev0"])
    work = DeviceWork(opened, recording, rng, 1, volume=5)
    yield work
    work.device.close(clean=False)


def random_work(directory: Path, recording: Recording, rng: random.Random) -> None:
    with device(directory, recording, rng) as work:
        work.run(70)


def killed_and_started(directory: Path, recording: Recording, rng: random.Random) -> None:
    """The process ends at once, again and again; the host stays up."""
    with device(directory, recording, rng) as work:
        for turn in range(6):
            work.run(12)
            path = work.device.path
            work.device.close(clean=False)
            work.device = BlockDevice.open(path, boot_id=b"the same boot it")
            work.device.recover()
            recording.mark("opened", sds=1, incarnation=work.device.incarnation, devices=["one/dev0"])
            work = DeviceWork(work.device, recording, rng, 1, volume=50 + turn)
        work.device.close(clean=False)


def full_journal(directory: Path, recording: Recording, rng: random.Random) -> None:
    """The open half is filled up to the refusal, twice; each time a checkpoint has to make room."""
    with device(directory, recording, rng) as work:
        for _ in range(2):
            for action in ("alloc", "write", "alloc", "write"):
                work.step(action)
            with contextlib.suppress(OSError):  # ENOSPC
                while True:
                    chunk = rng.choice(sorted(work.slots))
                    work.device.intent(*chunk, work.slots[chunk])
            for _ in range(6):
                work.step("write")


def two_generations_at_once(directory: Path, recording: Recording, rng: random.Random) -> None:
    """One commit writes the last records of a generation and the first ones of the next, of one slot or chunk."""
    with device(directory, recording, rng) as work:
        moving = (VOLUMES[1], 0)  # never written to: it may be in its old slot, in its new one, or in none
        slot = work.device.alloc(*moving, 1)
        for _ in range(8):
            if work.device.free < 2:
                work.step("free")
            work.checkpoint()
            work.step("alloc")
            work.device.free_slot(slot)
            work.device.checkpoint_begin()
            slot = work.device.alloc(*moving, 1)
            work.write(max(work.slots))
            work.sync()
            work.void()


@dataclass(frozen=True)
class Workload:
    name: str
    run: Callable[[Path, Recording, random.Random], None]
    file_system: int = EXT4


WORKLOADS: Final = (
    Workload("first writes", engine(first_writes)),
    Workload("overwrites", engine(overwrites)),
    Workload("unaligned edges", engine(unaligned_edges)),
    Workload("discards", engine(discards)),
    Workload("reused slots", engine(reused_slots)),
    Workload("flushes between", engine(flushes_between)),
    Workload("flushes between, not in place", engine(flushes_between), XFS),
    Workload("committed writes", engine(committed_writes)),
    Workload("checkpoints in the middle", engine(checkpoints_in_the_middle)),
    Workload("a volume is purged", engine(volume_purge)),
    Workload("large writes", engine(large_writes)),
    Workload("several devices", engine(several_devices, devices=2)),
    Workload("random work on a device", random_work),
    Workload("killed and started", killed_and_started),
    Workload("full journal", full_journal),
    Workload("two generations at once", two_generations_at_once),
)
