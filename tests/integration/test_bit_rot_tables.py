"""Goal: rot in the slot table, journal or superblock of one SDS costs nothing that the other copy has, and nothing that
is missing ever reads as zeros; what no copy has is an error."""

from __future__ import annotations

import os
import random
import struct
from pathlib import Path

import pytest

from datapath import wire
from tests.support.dataclient import DataClient
from tests.support.engines import Engines, RunningEngine, running_engines
from tests.support.waiting import poll_until_async

VOLUME, OWNER = 5, 7
BLOCK, MIB = 4096, 1 << 20
ONE, TWO = 1, 2
WRITTEN = 4  # chunks; as many again that never were
ENTRY, RECORD = 32, 64


def noise(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def lose_entries(engine: RunningEngine, chunks: set[int]) -> int:
    """Damages the entries of these chunks beyond repair; how many there were."""
    done = 0
    for path in engine.paths:
        table = (path / "slots").read_bytes()
        for at in range(0, len(table), ENTRY):
            volume, chunk, state = struct.unpack_from("<QII", table, at)
            if state == 1 and volume == VOLUME and chunk in chunks:
                noise(path / "slots", at, bytes(byte ^ 0xA5 for byte in table[at : at + ENTRY]))
                done += 1
    return done


async def filled(engines: Engines) -> list[bytes]:
    """Chunks led by each of the two in turn; what is in them."""
    engines.place(VOLUME, [(ONE, TWO, 0), (TWO, ONE, 0)] * WRITTEN)
    data = [os.urandom(8 * BLOCK) if chunk < WRITTEN else bytes(8 * BLOCK) for chunk in range(2 * WRITTEN)]
    clients = {sds_id: await engines[sds_id].client(VOLUME, OWNER) for sds_id in (ONE, TWO)}
    for chunk in range(WRITTEN):
        await engines.write(clients[engines.volumes[VOLUME][chunk][1]], VOLUME, data[chunk], chunk, 16 * BLOCK)
    return data


async def right(engines: Engines, data: list[bytes], session: int) -> None:
    """Both copies of each chunk have what they should have."""
    for sds_id in (ONE, TWO):
        reader = await engines[sds_id].client(VOLUME, OWNER + sds_id, session)
        for chunk, content in enumerate(data):
            assert await engines.read(reader, VOLUME, chunk, 16 * BLOCK, len(content)) == content
            assert await engines.read(reader, VOLUME, chunk, 0, BLOCK) == bytes(BLOCK)
    for chunk in range(len(data)):
        await engines.equal(VOLUME, chunk, ONE, TWO)


async def sure(engine: RunningEngine) -> None:
    engine.target.maps_whole()
    await poll_until_async(lambda: not engine.target.unsure, what=f"SDS {engine.sds_id} to be sure")


async def checkpointed(engine: RunningEngine) -> None:
    """Each device has had a checkpoint that began after this was called."""
    begun = engine.target.stats()["checkpoints"]

    def ended() -> bool:
        engine.target.checkpoint()
        return bool(engine.target.stats()["checkpoints"] >= begun + 2 * len(engine.paths))

    await poll_until_async(ended, what="checkpoints")


@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("where", [ONE, TWO])
async def test_chunks_whose_slots_are_lost_come_back(tmp_path: Path, where: int, clean: bool) -> None:
    async with running_engines(tmp_path, 2) as engines:
        data = await filled(engines)
        free = engines[where].target.stats()["slots_free"]
        await engines.stop(where, checkpoint=clean)
        if not clean:  # what the journal says would mend them
            for path in engines[where].paths:
                noise(path / "journal", 4096, os.urandom(path.joinpath("journal").stat().st_size // 2 - 4096))
                noise(path / "journal", path.joinpath("journal").stat().st_size // 2 + 4096, os.urandom(4 * RECORD))
        assert lose_entries(engines[where], {0, 1, 2}) == 3
        engines.start(where)
        assert engines[where].target.unsure
        await right(engines, data, 2)
        await sure(engines[where])
        await checkpointed(engines[where])
        assert engines[where].target.stats()["slots_free"] == free
        await right(engines, data, 3)
        await engines.stop(where)
        engines.start(where)
        assert not engines[where].target.unsure
        await right(engines, data, 4)


async def test_writes_meanwhile_reach_a_copy_that_is_whole(tmp_path: Path) -> None:
    async with running_engines(tmp_path, 2) as engines:
        data = await filled(engines)
        await engines.stop(TWO, checkpoint=True)
        lose_entries(engines[TWO], set(range(WRITTEN)))
        engines.start(TWO)
        clients = {sds_id: await engines[sds_id].client(VOLUME, OWNER, 2) for sds_id in (ONE, TWO)}
        for chunk in range(2 * WRITTEN):
            client = clients[engines.volumes[VOLUME][chunk][1]]
            await engines.write(client, VOLUME, b"new" * 100, chunk, 17 * BLOCK + 100)
            if chunk % 3:
                await engines.discard(client, VOLUME, chunk, 20 * BLOCK, BLOCK)
                data[chunk] = data[chunk][: 4 * BLOCK] + bytes(BLOCK) + data[chunk][5 * BLOCK :]
            data[chunk] = data[chunk][: BLOCK + 100] + b"new" * 100 + data[chunk][BLOCK + 400 :]
        await right(engines, data, 3)
        await sure(engines[TWO])
        await right(engines, data, 4)


async def test_what_has_rotted_is_no_better_because_the_other_copy_is_missing(tmp_path: Path) -> None:
    async with running_engines(tmp_path, 2) as engines:
        data = await filled(engines)
        await engines.stop(TWO, checkpoint=True)
        assert lose_entries(engines[TWO], {0}) == 1
        for path in engines[ONE].paths:
            at = (path / "blocks").read_bytes().find(data[0][:BLOCK])
            if at >= 0:
                noise(path / "blocks", at, os.urandom(64))
        engines.start(TWO)
        await sure(engines[TWO])
        for sds_id in (ONE, TWO):
            reader = await engines[sds_id].client(VOLUME, OWNER + sds_id, 2)
            assert await engines.read(reader, VOLUME, 0, 17 * BLOCK, 7 * BLOCK) == data[0][BLOCK:]
            status = (await reader.read(VOLUME, 0, 16 * BLOCK, BLOCK, engines.epoch(VOLUME, 0))).status
            bad = (await engines[sds_id].verify(VOLUME, 0)).bad[2] & 1  # else it would be found to match its tag
            assert status == wire.ST_CHECKSUM or bad


async def test_the_other_one_may_have_restarted_too(tmp_path: Path) -> None:
    async with running_engines(tmp_path, 2) as engines:
        data = await filled(engines)
        for sds_id in (ONE, TWO):
            await engines.stop(sds_id)
            engines[sds_id].power_lost = False
        for path in engines[ONE].paths:
            noise(path / "journal", path.joinpath("journal").stat().st_size // 2, os.urandom(8192))
        lose_entries(engines[ONE], {0, 1, 2, 3})
        for sds_id in (ONE, TWO):
            engines.start(sds_id)
        await right(engines, data, 2)
        await sure(engines[ONE])


async def asked(client: DataClient, chunk: int) -> int:
    """The status once it is not "later"."""

    async def answer() -> list[int]:
        status = (await client.read(VOLUME, chunk, 16 * BLOCK, BLOCK, 1)).status
        return [] if status == wire.ST_NOT_READY else [status]

    return (await poll_until_async(answer, what=f"an answer for chunk {chunk}"))[0]


async def test_without_another_copy_it_is_an_error_and_never_zeros(tmp_path: Path) -> None:
    async with running_engines(tmp_path, 1) as engines:
        engines.place(VOLUME, [(ONE, 0, 0)] * 3)
        client = await engines[ONE].client(VOLUME, OWNER)
        for chunk in range(2):
            await engines.write(client, VOLUME, b"x" * BLOCK, chunk, 16 * BLOCK)
        await engines.stop(ONE, checkpoint=True)
        lose_entries(engines[ONE], {1})
        engines.start(ONE)
        client = await engines[ONE].client(VOLUME, OWNER, 2)
        engines[ONE].target.maps_whole()
        assert await engines.read(client, VOLUME, 0, 16 * BLOCK, BLOCK) == b"x" * BLOCK
        for chunk in (1, 2):  # which of the two was lost cannot be told
            assert await asked(client, chunk) == wire.ST_IO_ERROR
            assert (await client.write(VOLUME, b"y" * BLOCK, chunk)).status == wire.ST_IO_ERROR
        assert (await engines[ONE].hears("chunk_gone"))[0] == (VOLUME, 1)
        assert engines[ONE].target.unsure


async def test_lost_in_both_copies_it_is_an_error(tmp_path: Path) -> None:
    async with running_engines(tmp_path, 2) as engines:
        await filled(engines)
        for sds_id in (ONE, TWO):
            await engines.stop(sds_id, checkpoint=True)
            assert lose_entries(engines[sds_id], {0, 1}) == 2
        for sds_id in (ONE, TWO):
            engines.start(sds_id)
        for sds_id, chunk in ((ONE, 0), (TWO, 1)):
            client = await engines[sds_id].client(VOLUME, OWNER, 2)
            assert await asked(client, chunk) == wire.ST_IO_ERROR
            assert await asked(client, chunk + 2) == wire.ST_OK


@pytest.mark.parametrize("seed", range(8))
async def test_random_rot_of_one_copys_tables(tmp_path: Path, seed: int) -> None:
    """While it is up, and while it is down after a kill or a clean stop; twice, so the next start is judged too."""
    chooser = random.Random(seed)
    print(f"seed {seed}")
    async with running_engines(tmp_path, 2) as engines:
        data = await filled(engines)
        for turn in range(2):
            where = chooser.choice([ONE, TWO])
            engines[where].power_lost = chooser.random() < 0.5
            if chooser.random() < 0.5:
                scribble(engines[where], chooser, ["slots", "journal"])  # while it is up
                client = await engines[ONE].client(VOLUME, OWNER, 10 + turn)
                data[0] = chooser.randbytes(8 * BLOCK)
                await engines.write(client, VOLUME, data[0], 0, 16 * BLOCK)
                if chooser.random() < 0.5:
                    await checkpointed(engines[where])
            await engines.stop(where, checkpoint=chooser.random() < 0.3)
            scribble(engines[where], chooser, ["slots", "journal", "superblock"])
            engines.start(where)
            await right(engines, data, 20 + 2 * turn)
            if engines[where].target.unsure:
                await sure(engines[where])
                await right(engines, data, 21 + 2 * turn)


def scribble(engine: RunningEngine, chooser: random.Random, files: list[str]) -> None:
    """Random bytes at random places, most of them where there is something."""
    for path in engine.paths:
        for name in chooser.sample(files, chooser.choice([1, 1, 2])):
            size = (path / name).stat().st_size
            for _ in range(chooser.choice([1, 2, 8])):
                half = chooser.choice([0, size // 2]) if name == "journal" else 0
                used = {"slots": 8 * ENTRY, "journal": 4096 + 16 * RECORD, "superblock": 160}[name]
                at = half + chooser.randrange(chooser.choice([used, used, size // 2]))
                if name == "journal" and chooser.random() < 0.7:
                    at = half + 4096 + chooser.randrange(16 * RECORD)
                noise(path / name, at, chooser.randbytes(chooser.choice([1, 1, 4, 40]))[: size - at])
