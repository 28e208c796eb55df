"""Goal: a learner gets exactly what its primary has, within its rate, whatever is written or breaks meanwhile."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import time
from itertools import cycle
from pathlib import Path

import pytest
import trio

from datapath import tags, wire
from tests.support.dataclient import ClosedError, DataClient, Reply
from tests.support.engines import Engines, running_engines
from tests.support.waiting import pass_time, poll_until_async

VOLUME, OWNER = 5, 7
BLOCK, MIB = 4096, 1 << 20
CHUNK = 4 * MIB
PRIMARY, LEARNER, THIRD = 1, 2, 3


async def filled(engines: Engines, client: DataClient, chunk: int, size: int = CHUNK) -> bytes:
    data = os.urandom(size)
    await engines.write(client, VOLUME, data, chunk)
    return data


async def degraded(engines: Engines, chunks: int) -> DataClient:
    """Full chunks of a pair whose secondary was stopped then, and is to learn when it starts; the primary's client."""
    engines.place(VOLUME, [(PRIMARY, LEARNER, 0)] * chunks)
    client = await engines[PRIMARY].client(VOLUME, OWNER)
    for chunk in range(chunks):
        await filled(engines, client, chunk)
    await engines.stop(LEARNER, checkpoint=True)
    engines.change_all(VOLUME, dict.fromkeys(range(chunks), (PRIMARY, 0, LEARNER)))
    return client


async def content(engines: Engines, client: DataClient, chunk: int) -> bytes:
    parts = [await engines.read(client, VOLUME, chunk, offset, MIB) for offset in range(0, CHUNK, MIB)]
    return b"".join(parts)


async def learned(engines: Engines, chunks: int = 1, primary: int = PRIMARY) -> None:
    """Waits until the primary has said of so many chunks, with their newest epochs, that the learner has them."""

    def told() -> bool:
        said = [chunk for _, found, _ in engines[primary].told("learned") for chunk in found]
        return len({chunk for chunk in said if chunk[2] == engines.epoch(*chunk[:2])}) >= chunks

    await poll_until_async(told, what=f"{chunks} chunks learned")


def join(engines: Engines, chunk: int = 0, primary: int = PRIMARY, learner: int = LEARNER) -> None:
    engines.change(VOLUME, chunk, primary, learner)


class Writers:
    """Write, discard and read back at random in one chunk; ``blocks`` is what has to be there."""

    def __init__(self, engines: Engines, chunk: int = 0) -> None:
        self.engines, self.chunk = engines, chunk
        self.blocks = [bytes(BLOCK)] * (CHUNK // BLOCK)
        self.operations = 0
        self._stop = trio.CancelScope()
        self._running = 0

    async def run(self, client: DataClient, lane: int, lanes: int) -> None:
        """In its own part of the chunk, so that what is there is known."""
        chooser = random.Random(lane)
        size = CHUNK // BLOCK // lanes
        self._running += 1
        while not self._stop.cancel_called:
            first = lane * size + chooser.randrange(size)
            count = min(chooser.choice([1, 1, 2, 16]), (lane + 1) * size - first)
            place = (self.chunk, first * BLOCK)
            if chooser.random() < 0.2:
                await self.engines.discard(client, VOLUME, *place, count * BLOCK)
                data = bytes(count * BLOCK)
            else:
                data = chooser.randbytes(count * BLOCK)
                await self.engines.write(client, VOLUME, data, *place)
            self.blocks[first : first + count] = [data[at : at + BLOCK] for at in range(0, len(data), BLOCK)]
            assert await self.engines.read(client, VOLUME, *place, count * BLOCK) == data
            self.operations += 1
        self._running -= 1

    async def over(self) -> None:
        await poll_until_async(lambda: self._running == 0, what="the last writes")

    def stop(self) -> None:
        self._stop.cancel()


async def test_a_chunk_that_is_written_all_the_time_is_learned_and_joined(tmp_path: Path) -> None:
    async with running_engines(tmp_path, 2) as engines:
        engines.place(VOLUME, [(PRIMARY, 0, 0)])
        clients = [await engines[PRIMARY].client(VOLUME, OWNER + lane) for lane in range(4)]
        writers = Writers(engines)
        data = await filled(engines, clients[0], 0)
        writers.blocks = [data[at : at + BLOCK] for at in range(0, CHUNK, BLOCK)]
        engines.set_rate(20_000_000)
        async with trio.open_nursery() as nursery:
            for lane, client in enumerate(clients):
                nursery.start_soon(writers.run, client, lane, len(clients))
            engines.change(VOLUME, 0, PRIMARY, 0, LEARNER)
            await learned(engines)
            join(engines)
            joined_at = writers.operations
            await poll_until_async(lambda: writers.operations > joined_at + 200, what="writes as a pair")
            writers.stop()
        await engines.equal(VOLUME, 0, PRIMARY, LEARNER)
        assert await content(engines, clients[0], 0) == b"".join(writers.blocks)
        other = await engines[LEARNER].client(VOLUME, OWNER)
        assert await content(engines, other, 0) == b"".join(writers.blocks)


async def test_only_what_was_written_while_the_learner_was_away_is_copied(tmp_path: Path) -> None:
    async with running_engines(tmp_path, 2) as engines:
        client = await degraded(engines, 4)
        for chunk in range(4):
            await engines.write(client, VOLUME, os.urandom(MIB // 4), chunk, chunk * MIB)
        engines.start(LEARNER)
        await learned(engines, 4)
        assert engines[PRIMARY].target.stats()["resync_bytes"] == MIB
        for chunk in range(4):
            join(engines, chunk)
            await engines.equal(VOLUME, chunk, PRIMARY, LEARNER)


async def test_discarded_blocks_and_chunks_are_given_up_by_the_learner(tmp_path: Path) -> None:
    async with running_engines(tmp_path, 2) as engines:
        client = await degraded(engines, 3)
        await engines.discard(client, VOLUME, 0, MIB, MIB)
        await engines.discard(client, VOLUME, 1, 0, CHUNK)
        await engines.discard(client, VOLUME, 2, 0, CHUNK)
        await engines.write(client, VOLUME, b"new" * MIB, 2, MIB // 2)  # 3 MiB
        engines.start(LEARNER)
        await learned(engines, 3)
        present = [len(await engines.equal(VOLUME, chunk, PRIMARY, LEARNER)) for chunk in range(3)]
        assert present == [1024, 0, 1024]
        slots = [engines[sds_id].target.stats()["slots_used"] for sds_id in (PRIMARY, LEARNER)]
        assert slots == [2, 2]
        holes = await engines.equal(VOLUME, 0, PRIMARY, LEARNER)
        assert all(tags.unpack(tag)[2] & tags.HOLE for tag in holes[256:512])
        for chunk in range(3):
            join(engines, chunk)
        other = await engines[LEARNER].client(VOLUME, OWNER)
        assert await engines.read(other, VOLUME, 0, MIB, MIB) == bytes(MIB)
        assert await content(engines, other, 2) == bytes(MIB // 2) + b"new" * MIB + bytes(MIB // 2)


async def test_newer_tags_at_the_learner_do_not_stand(tmp_path: Path) -> None:
    """It led alone, and wrote what its primary of now never had: the map has spoken against that."""
    async with running_engines(tmp_path, 2) as engines:
        engines.place(VOLUME, [(PRIMARY, 0, 0), (PRIMARY, 0, 0)])
        client = await engines[PRIMARY].client(VOLUME, OWNER)
        data = await filled(engines, client, 0)
        engines.change_all(VOLUME, {0: (LEARNER, 0, PRIMARY), 1: (LEARNER, 0, PRIMARY)})
        engines.set_rate(0)
        other = await engines[LEARNER].client(VOLUME, OWNER)
        for chunk in range(2):
            await filled(engines, other, chunk, MIB)
        engines.change_all(VOLUME, {0: (PRIMARY, 0, LEARNER), 1: (PRIMARY, 0, LEARNER)})
        engines.set_rate(100_000_000)
        await learned(engines, 2)
        assert len(await engines.equal(VOLUME, 0, PRIMARY, LEARNER)) == 1024
        assert await engines.equal(VOLUME, 1, PRIMARY, LEARNER) == []
        assert await content(engines, client, 0) == data


async def test_a_learner_that_is_killed_in_the_middle_goes_on_where_it_was(tmp_path: Path) -> None:
    async with running_engines(tmp_path, 2) as engines:
        engines.set_rate(10_000_000)
        engines.place(VOLUME, [(PRIMARY, 0, LEARNER)])
        client = await engines[PRIMARY].client(VOLUME, OWNER)
        engines.change(VOLUME, 0, PRIMARY)
        data = await filled(engines, client, 0)
        engines.change(VOLUME, 0, PRIMARY, 0, LEARNER)
        primary = engines[PRIMARY].target
        await poll_until_async(lambda: primary.stats()["resync_bytes"] > MIB, what="a quarter of the chunk")
        await engines.stop(LEARNER)
        copied = primary.stats()["resync_bytes"]
        assert copied < CHUNK
        await engines.write(client, VOLUME, data[:BLOCK], 0, 0)  # waits for nobody
        engines.start(LEARNER)
        await learned(engines)
        assert primary.stats()["resync_bytes"] < CHUNK + 3 * MIB
        join(engines)
        await engines.write(client, VOLUME, data[:BLOCK], 0, 0)
        await engines.equal(VOLUME, 0, PRIMARY, LEARNER)


@pytest.mark.parametrize("joined", [False, True], ids=["left out", "joined"])
async def test_a_write_waits_for_a_learner_that_was_lost_after_it_was_told_of(tmp_path: Path, joined: bool) -> None:
    async with running_engines(tmp_path, 2) as engines:
        engines.place(VOLUME, [(PRIMARY, 0, 0)])
        client = await engines[PRIMARY].client(VOLUME, OWNER)
        await filled(engines, client, 0, MIB)
        engines.change(VOLUME, 0, PRIMARY, 0, LEARNER)
        await learned(engines)
        await engines.stop(LEARNER)
        assert await engines[PRIMARY].hears("learner_lost") == [(LEARNER, [(VOLUME, 0)])]
        written = trio.Event()

        async def write() -> None:
            await engines.write(client, VOLUME, b"x" * BLOCK)
            written.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            with trio.move_on_after(1):
                await written.wait()
            assert not written.is_set()
            if joined:
                join(engines)
                engines.start(LEARNER)
            else:
                engines.change(VOLUME, 0, PRIMARY, 0, LEARNER)
            with trio.fail_after(10):
                await written.wait()
        if not joined:
            engines.start(LEARNER)
            await learned(engines)
            join(engines)
        await engines.write(client, VOLUME, b"y" * BLOCK, 0, BLOCK)
        await engines.equal(VOLUME, 0, PRIMARY, LEARNER)
        other = await engines[LEARNER].client(VOLUME, OWNER)
        assert await engines.read(other, VOLUME, 0, 0, 2 * BLOCK) == b"x" * BLOCK + b"y" * BLOCK


@pytest.mark.parametrize(("rate", "retold"), [(20_000_000, False), (40_000_000, False), (20_000_000, True)])
async def test_copying_keeps_to_its_rate(tmp_path: Path, rate: int, retold: bool) -> None:
    """Goal: also while its share of the pool's limit changes all the time."""
    chunks = rate // 2_000_000
    async with running_engines(tmp_path, 2) as engines:
        engines.set_rate(0)
        engines.place(VOLUME, [(PRIMARY, 0, LEARNER)] * chunks)
        client = await engines[PRIMARY].client(VOLUME, OWNER)
        for chunk in range(chunks):
            await filled(engines, client, chunk)
        primary = engines[PRIMARY].target
        assert primary.stats()["resync_bytes"] == 0
        engines.set_rate(rate)
        began = time.monotonic()
        shares = cycle([rate * 99 // 100, rate * 101 // 100] if retold else [rate])

        def all_of_it() -> bool:
            engines.set_rate(next(shares))
            return primary.stats()["resync_bytes"] == chunks * CHUNK

        await poll_until_async(all_of_it, what="all of it")
        seconds = time.monotonic() - began
        assert abs(chunks * CHUNK / seconds / rate - 1) < 0.15
        await learned(engines, chunks)
        await poll_until_async(lambda: primary.stats()["resync_left"] == 0, what="nothing left to copy")
        assert primary.stats()["resync_chunks"] == chunks


async def test_a_full_learner_is_tried_again_and_holds_nobody_up(tmp_path: Path) -> None:
    async with running_engines(tmp_path, 2, slots=2, devices=1) as engines:
        engines.place(VOLUME, [(PRIMARY, 0, 0), (PRIMARY, 0, 0), (LEARNER, 0, 0)])
        client = await engines[PRIMARY].client(VOLUME, OWNER)
        other = await engines[LEARNER].client(VOLUME, OWNER)
        for chunk in range(2):
            await filled(engines, client, chunk)
        await engines.write(other, VOLUME, b"x" * BLOCK, 2)
        engines.change_all(VOLUME, dict.fromkeys(range(2), (PRIMARY, 0, LEARNER)))
        primary = engines[PRIMARY].target
        await learned(engines, 1)
        learner = engines[LEARNER].target
        for together in (0, 16):
            before, began = learner.stats()["replicate_ops"], time.monotonic()
            await poll_until_async(
                lambda most=before + together: learner.stats()["replicate_ops"] > most, what="the next time"
            )
        assert time.monotonic() - began > 0.9  # steps that are refused together are tried again a second later
        (_, chunks, _), *more = engines[PRIMARY].told("learned")
        assert (len(chunks), more) == (1, [])
        left = 1 - chunks[0][1]
        for _ in range(10):
            await engines.write(client, VOLUME, os.urandom(BLOCK), left, 0)
        await engines.discard(other, VOLUME, 2, 0, CHUNK)
        engines[LEARNER].target.checkpoint()  # the slot may be used again after it
        await learned(engines, 2)
        for chunk in range(2):
            await engines.equal(VOLUME, chunk, PRIMARY, LEARNER)
        assert primary.stats()["resync_left"] == 0


async def test_chunks_that_were_never_written_cost_little(tmp_path: Path) -> None:
    chunks = 8192  # 32 GiB
    async with running_engines(tmp_path, 2) as engines:
        engines.place(VOLUME, [(PRIMARY, 0, LEARNER)] * chunks)
        client = await engines[PRIMARY].client(VOLUME, OWNER)
        began = time.process_time()
        await learned(engines, chunks)
        assert time.process_time() - began < 4
        assert engines[PRIMARY].target.stats()["resync_bytes"] == 0
        await engines.write(client, VOLUME, b"x" * BLOCK, chunks - 1)
        await engines.equal(VOLUME, chunks - 1, PRIMARY, LEARNER)
        engines.change_all(VOLUME, dict.fromkeys(range(chunks), (PRIMARY, LEARNER, 0)))
        await poll_until_async(lambda: engines[PRIMARY].target.stats()["known_chunks"] == 1, what="one chunk known")


async def test_who_was_lost_learns_from_who_has_taken_over(tmp_path: Path) -> None:
    async with running_engines(tmp_path, 2) as engines:
        engines.place(VOLUME, [(PRIMARY, LEARNER, 0)])
        client = await engines[PRIMARY].client(VOLUME, OWNER)
        data = bytearray(await filled(engines, client, 0))
        await engines.stop(PRIMARY)
        engines.change(VOLUME, 0, LEARNER, 0, PRIMARY, left=PRIMARY)
        other = await engines[LEARNER].client(VOLUME, OWNER)
        for offset in range(0, CHUNK, MIB):
            data[offset : offset + 3 * BLOCK] = os.urandom(3 * BLOCK)
            await engines.write(other, VOLUME, bytes(data[offset : offset + 3 * BLOCK]), 0, offset)
        engines.start(PRIMARY)
        await learned(engines, 1, LEARNER)
        assert engines[LEARNER].target.stats()["resync_bytes"] == 4 * 3 * BLOCK
        engines.change(VOLUME, 0, LEARNER, PRIMARY)
        await engines.write(other, VOLUME, bytes(data[:BLOCK]), 0, 0)
        await engines.equal(VOLUME, 0, PRIMARY, LEARNER)
        back = await engines[PRIMARY].client(VOLUME, OWNER)
        assert await content(engines, back, 0) == data


class PlayedMdm:
    """Lets learners join that SDS 1 has taught, in place of a secondary too; gives those up that it has lost."""

    def __init__(self, engines: Engines, chooser: random.Random) -> None:
        self.engines, self.chooser = engines, chooser
        self.joined = self.given_up = 0

    async def run(self) -> None:
        said, seen = self.engines[PRIMARY].said, 0
        while True:
            later_first = self.chooser.random() < 0.5
            for event in sorted(said[seen:], key=lambda event: event[0], reverse=later_first):
                if event[0] == "learned":
                    self._join(event[1], event[2])
                elif event[0] == "learner_lost":
                    self._give_up(event[1], event[2])
            seen = len(said)
            await pass_time(self.chooser.choice([0.01, 0.5]))

    def _join(self, learner: int, chunks: list[tuple[int, int, int]]) -> None:
        for volume_id, chunk, epoch in chunks:
            known, primary, secondary, current, _ = self.engines.volumes[volume_id][chunk]
            if (known, current) == (epoch, learner):
                self.joined += 1
                self.engines.change(volume_id, chunk, primary, learner, 0, left=secondary)

    def _give_up(self, learner: int, chunks: list[tuple[int, int]]) -> None:
        for volume_id, chunk in chunks:
            _, primary, secondary, current, left = self.engines.volumes[volume_id][chunk]
            if current == learner:
                self.given_up += 1
                self.engines.change(volume_id, chunk, primary, secondary, learner, left)


async def come_and_go(engines: Engines, chooser: random.Random, chunks: int, seconds: float) -> None:
    """Members and learners of SDS 1 are killed and cut off at any moment; now and then a chunk is to move."""
    until = trio.current_time() + seconds
    while trio.current_time() < until:
        victim = chooser.choice([LEARNER, THIRD])
        await pass_time(chooser.uniform(0, 0.7))
        killed = chooser.random() < 0.5
        if killed:
            await engines.stop(victim)
        else:
            engines.cut(PRIMARY, victim)
        await engines.leave_out(victim, PRIMARY)
        await pass_time(chooser.uniform(0, 0.5))
        if killed:
            engines.start(victim)
        else:
            engines.connect(PRIMARY, victim)
        for chunk in range(chunks):
            _, primary, secondary, learner, _ = engines.volumes[VOLUME][chunk]
            other = LEARNER + THIRD - (secondary or learner)
            if secondary and not learner and chooser.random() < 0.7:
                engines.change(VOLUME, chunk, primary, secondary, other)


async def test_whoever_comes_and_goes_the_pair_is_the_same_in_the_end(tmp_path: Path) -> None:
    chunks, seed = 3, int.from_bytes(os.urandom(4), "little")
    print("seed", seed)
    async with running_engines(tmp_path, 3) as engines, trio.open_nursery() as nursery:
        engines.place(VOLUME, [(PRIMARY, LEARNER, 0)] * chunks)
        mdm = PlayedMdm(engines, random.Random(seed + 1))
        nursery.start_soon(mdm.run)
        all_writers = [Writers(engines, chunk) for chunk in range(chunks)]
        for at, writers in enumerate(all_writers):
            for lane in range(2):
                client = await engines[PRIMARY].client(VOLUME, OWNER + 10 * at + lane)
                nursery.start_soon(writers.run, client, lane, 2)
        await come_and_go(engines, random.Random(seed), chunks, 12)

        def settled() -> bool:
            return all(entry[2] and not entry[3] for entry in engines.volumes[VOLUME])

        await poll_until_async(settled, what="pairs")
        done = [writers.operations for writers in all_writers]
        await poll_until_async(
            lambda: all(writers.operations > before + 20 for writers, before in zip(all_writers, done, strict=True)),
            what="writes as pairs",
        )
        for writers in all_writers:
            writers.stop()
        for chunk, writers in enumerate(all_writers):
            await writers.over()
            await engines.equal(VOLUME, chunk, PRIMARY, engines.volumes[VOLUME][chunk][2])
            client = await engines[PRIMARY].client(VOLUME, OWNER)
            assert await content(engines, client, chunk) == b"".join(writers.blocks)
        print("joined", mdm.joined, "given up", mdm.given_up, "operations", sum(done))
        assert mdm.joined > 5
        nursery.cancel_scope.cancel()


async def test_a_third_learns_from_a_pair_that_goes_on(tmp_path: Path) -> None:
    """In place of the secondary, as when that is removed."""
    async with running_engines(tmp_path, 3) as engines:
        engines.place(VOLUME, [(PRIMARY, LEARNER, 0)])
        clients = [await engines[PRIMARY].client(VOLUME, OWNER + lane) for lane in range(2)]
        writers = Writers(engines)
        async with trio.open_nursery() as nursery:
            for lane, client in enumerate(clients):
                nursery.start_soon(writers.run, client, lane, len(clients))
            await poll_until_async(lambda: writers.operations > 100, what="some writes")
            engines.change(VOLUME, 0, PRIMARY, LEARNER, THIRD)
            await learned(engines)
            engines.change(VOLUME, 0, PRIMARY, THIRD)
            now = writers.operations
            await poll_until_async(lambda: writers.operations > now + 100, what="writes with the third")
            writers.stop()
        await engines.equal(VOLUME, 0, PRIMARY, THIRD)
        assert await content(engines, clients[0], 0) == b"".join(writers.blocks)
        await poll_until_async(
            lambda: engines[LEARNER].target.stats()["slots_used"] == 0, what="the slot of the one that went"
        )


async def test_who_was_killed_and_has_learned_is_sure_of_what_it_has(tmp_path: Path) -> None:
    """Goal: it takes over when its primary is lost, although it came in a place that somebody else has left."""
    async with running_engines(tmp_path, 3) as engines:
        engines.place(VOLUME, [(PRIMARY, THIRD, 0)])
        client = await engines[PRIMARY].client(VOLUME, OWNER)
        data = await filled(engines, client, 0)
        await engines.stop(THIRD)
        engines.change(VOLUME, 0, PRIMARY, 0, LEARNER, left=THIRD)
        await learned(engines)
        engines.change(VOLUME, 0, PRIMARY, LEARNER)
        engines.change(VOLUME, 0, PRIMARY, LEARNER, THIRD)
        engines.start(THIRD)
        await learned(engines)
        engines.change(VOLUME, 0, PRIMARY, THIRD, left=LEARNER)
        await engines.stop(PRIMARY)
        await engines.leave_out(PRIMARY, by=THIRD)
        engines.change(VOLUME, 0, THIRD, 0, 0, left=PRIMARY)
        other = await engines[THIRD].client(VOLUME, OWNER)
        assert await content(engines, other, 0) == data


async def test_what_the_page_cache_has_not_is_read_from_the_disk(tmp_path: Path) -> None:
    chunks = 4
    async with running_engines(tmp_path, 2) as engines:
        engines.place(VOLUME, [(PRIMARY, 0, 0)] * chunks)
        client = await engines[PRIMARY].client(VOLUME, OWNER)
        for chunk in range(chunks):
            await filled(engines, client, chunk)
        for path in engines[PRIMARY].paths:
            with (path / "blocks").open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        engines.change_all(VOLUME, dict.fromkeys(range(chunks), (PRIMARY, 0, LEARNER)))
        await learned(engines, chunks)
        for chunk in range(chunks):
            join(engines, chunk)
            await engines.equal(VOLUME, chunk, PRIMARY, LEARNER)
        print("read by pool threads:", engines[PRIMARY].target.stats()["reads_pooled"])


class PlayedSecondary:
    """An SDS, by hand, that confirms no write: it is asked on the connection that SDS 1 has made."""

    def __init__(self, engines: Engines, sds_id: int) -> None:
        ours, theirs = socket.socketpair()
        engines[PRIMARY].target.add_peer(theirs.detach(), sds_id, 1, outgoing=True)
        self.link = DataClient(trio.SocketStream(trio.socket.from_stdlib_socket(ours)), sds_id, 1)
        self.writes: list[Reply] = []
        self._sending = trio.Lock()

    async def run(self) -> None:
        with contextlib.suppress(ClosedError, trio.ClosedResourceError):
            while True:
                request = await self.link.receive()
                if request.header["opcode"] == wire.OP_REPLICATE:
                    self.writes.append(request)
                else:
                    await self.answer(request)

    async def answer(self, request: Reply, status: int = wire.ST_OK) -> None:
        names = ("request_id", "volume_id", "chunk_index", "offset", "length", "op_id", "seq")
        kept = {name: request.header[name] for name in names}
        async with self._sending:
            await self.link.send(wire.pack_header(request.header["opcode"] | wire.OP_REPLY, **kept, status=status))


@pytest.mark.parametrize("then", ["silent", "confirmed", "refused", "lost"])
async def test_a_first_write_that_a_secondary_has_when_it_goes_is_kept(tmp_path: Path, then: str) -> None:
    """It may have been read there. It is answered when the new secondary has it."""
    async with running_engines(tmp_path, 2) as engines, trio.open_nursery() as nursery:
        engines.place(VOLUME, [(PRIMARY, THIRD, LEARNER)])
        played = PlayedSecondary(engines, THIRD)
        nursery.start_soon(played.run)
        client = await engines[PRIMARY].client(VOLUME, OWNER)
        await learned(engines)
        written = trio.Event()

        async def write() -> None:
            await engines.write(client, VOLUME, b"x" * BLOCK)
            written.set()

        nursery.start_soon(write)
        await poll_until_async(lambda: played.writes, what="a write at the secondary")
        engines.change(VOLUME, 0, PRIMARY, LEARNER)
        await poll_until_async(lambda: engines[LEARNER].target.stats()["slots_used"], what="a copy at the learner")
        if then == "lost":
            await trio.aclose_forcefully(played.link.stream)
        elif then != "silent":
            await played.answer(played.writes[0], wire.ST_OK if then == "confirmed" else wire.ST_NOT_MEMBER)
        with trio.fail_after(10):
            await written.wait()
        assert len(await engines.equal(VOLUME, 0, PRIMARY, LEARNER)) == 1024
        assert await engines.read(client, VOLUME, 0, 0, BLOCK) == b"x" * BLOCK
        nursery.cancel_scope.cancel()
        await trio.aclose_forcefully(played.link.stream)


async def test_a_block_that_is_bad_here_is_not_copied(tmp_path: Path) -> None:
    async with running_engines(tmp_path, 2, devices=1) as engines:
        engines.place(VOLUME, [(PRIMARY, 0, 0)])
        client = await engines[PRIMARY].client(VOLUME, OWNER)
        data = await filled(engines, client, 0)
        path = engines[PRIMARY].paths[0] / "blocks"
        at = path.read_bytes().index(data[5 * BLOCK : 6 * BLOCK])
        with path.open("r+b") as file:
            file.seek(at)
            file.write(b"rot")
        engines.change(VOLUME, 0, PRIMARY, 0, LEARNER)
        repairs = await engines[PRIMARY].hears("repair_needed")
        assert repairs[0][:3] == (VOLUME, 0, 5)
        await pass_time(0.5)  # the disks would be synced after 0.2 s
        assert engines[PRIMARY].told("learned") == []
        await engines.write(client, VOLUME, data[5 * BLOCK : 6 * BLOCK], 0, 5 * BLOCK)  # nobody waits for the learner
