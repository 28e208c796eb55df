"""Goal: a disk that fails below one copy makes no IO fail and nobody wait for ever; nothing that was answered is lost.

Real engines; a disk fails in the way that their own file descriptors stop to work. The test plays the MDM.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from datapath import wire
from tests.support.dataclient import DataClient
from tests.support.engines import Engines, running_engines
from tests.support.waiting import poll_until_async

VOLUME, OWNER = 5, 7
MIB = 1 << 20
ONE, TWO, THIRD = 1, 2, 3
READ_ONLY = os.O_RDONLY  # writes fail, with EBADF
WRITE_ONLY = os.O_WRONLY


def spoil(engines: Engines, sds_id: int, *, name: str = "blocks", flags: int = READ_ONLY) -> None:
    """The disk below all devices of this engine: of this file only what ``flags`` allow works any more."""
    for path in engines[sds_id].paths:
        replace(path / name, path / name, flags)


def lose_writes(engines: Engines, sds_id: int, device: int = 0) -> None:
    """What was written to this device does not reach its disk: the next sync fails."""
    replace(engines[sds_id].paths[device] / "blocks", Path("/dev/null"), os.O_RDWR)


def fill_up(engines: Engines, sds_id: int) -> None:
    """The host's file system has no room: what is written goes to /dev/full instead."""
    for path in engines[sds_id].paths:
        replace(path / "blocks", Path("/dev/full"), os.O_RDWR)


def replace(path: Path, by: Path, flags: int) -> None:
    fd = os.open(by, flags | os.O_CLOEXEC)
    for link in descriptors():
        if os.readlink(link) == str(path.resolve()) and int(link.name) != fd:
            os.dup2(fd, int(link.name), inheritable=False)
    os.close(fd)


def descriptors() -> Iterator[Path]:
    for link in list(Path("/proc/self/fd").iterdir()):
        if link.is_symlink():
            yield link


async def lost(engines: Engines, sds_id: int, *chunks: int) -> None:
    """Waits until the engine has said that it cannot keep these, and carries out what it asks for."""
    incarnation = {key: engine.incarnation for key, engine in engines.engines.items()}

    def told() -> bool:
        said = {row[:2]: row[2:] for (rows,) in engines[sds_id].told("lost") for row in rows}
        for place, (peer, known) in said.items():
            assert known == incarnation[peer]
            assert place[1] in chunks
        return all((VOLUME, chunk) in said for chunk in chunks)

    await poll_until_async(told, what=f"SDS {sds_id} gives chunks up")
    for chunk in chunks:
        _, primary, secondary, learner, _ = engines.volumes[VOLUME][chunk]
        other = secondary if primary == sds_id else primary
        if learner == sds_id:
            engines.change(VOLUME, chunk, primary, secondary)
        else:
            engines.change(VOLUME, chunk, other, 0, learner, left=sds_id)


async def begin(engines: Engines, *entries: tuple[int, int, int]) -> tuple[DataClient, bytes]:
    """Places these chunks and writes to the first of them; a client of SDS 1, and what it wrote."""
    engines.place(VOLUME, [*entries])
    client = await engines[ONE].client(VOLUME, OWNER)
    data = os.urandom(MIB)
    await engines.write(client, VOLUME, data)
    return client, data


async def status_of_write(engines: Engines, client: DataClient, data: bytes, chunk: int = 0) -> int:
    return (await client.write(VOLUME, data, chunk, 0, engines.epoch(VOLUME, chunk))).status


@pytest.mark.parametrize("name", ["blocks", "tags"])
@pytest.mark.parametrize("size", [4096, MIB // 4], ids=["small", "large"])
async def test_a_primary_whose_disk_fails_hands_its_chunks_over(tmp_path: Path, name: str, size: int) -> None:
    async with running_engines(tmp_path, 2, devices=1) as engines:
        client, old = await begin(engines, (ONE, TWO, 0), (ONE, TWO, 0))
        other = await engines[TWO].client(VOLUME, OWNER)
        new = os.urandom(size)
        spoil(engines, ONE, name=name)
        assert await status_of_write(engines, client, new) == wire.ST_NOT_READY
        assert (await client.read(VOLUME, 0, 0, 4096, engines.epoch(VOLUME, 0))).status == wire.ST_NOT_READY
        assert [event[0] for event in await engines[ONE].hears("device_failed")] == [0]
        await lost(engines, ONE, 0)
        assert await engines.read(other, VOLUME, 0, size, MIB - size) == old[size:]
        assert await engines.read(other, VOLUME, 0, 0, size) in (old[:size], new)
        await engines.write(other, VOLUME, new)
        assert await engines.read(other, VOLUME, 0, 0, size) == new
        assert await status_of_write(engines, client, new) == wire.ST_NOT_MEMBER


async def test_a_chunk_that_was_never_written_is_handed_over_when_it_is_touched(tmp_path: Path) -> None:
    async with running_engines(tmp_path, 2, devices=1) as engines:
        engines.place(VOLUME, [(ONE, TWO, 0), (ONE, TWO, 0), (TWO, ONE, 0)])
        client, other = await engines[ONE].client(VOLUME, OWNER), await engines[TWO].client(VOLUME, OWNER)
        await engines.write(client, VOLUME, os.urandom(4096))
        spoil(engines, ONE)
        assert await status_of_write(engines, client, bytes(4096)) == wire.ST_NOT_READY
        await lost(engines, ONE, 0)
        for chunk, asked in ((1, client), (2, other)):
            assert await status_of_write(engines, asked, b"x" * 4096, chunk) == wire.ST_NOT_READY
            await poll_until_async(
                lambda chunk=chunk: any(  # type: ignore[misc]
                    row[1] == chunk for (rows,) in engines[ONE].told("lost") for row in rows
                ),
                what="the chunk is given up",
            )
            engines.change(VOLUME, chunk, TWO, 0, left=ONE)
            await engines.write(other, VOLUME, b"x" * 4096, chunk)


async def test_a_secondary_whose_disk_fails_goes_out_and_the_waiting_write_is_answered(tmp_path: Path) -> None:
    async with running_engines(tmp_path, 2, devices=1) as engines:
        client, _ = await begin(engines, (ONE, TWO, 0))
        spoil(engines, TWO)
        data = os.urandom(4096)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engines.write, client, VOLUME, data)
            await lost(engines, TWO, 0)
        assert await engines.read(client, VOLUME, 0, 0, 4096) == data


async def test_only_the_chunks_of_the_failed_disk_are_given_up_and_come_back_on_another(tmp_path: Path) -> None:
    async with running_engines(tmp_path, 2) as engines:
        engines.place(VOLUME, [(ONE, TWO, 0)] * 4)
        client, other = await engines[ONE].client(VOLUME, OWNER), await engines[TWO].client(VOLUME, OWNER)
        data = [os.urandom(MIB) for _ in range(4)]
        for chunk in range(4):
            await engines.write(client, VOLUME, data[chunk], chunk)
        lose_writes(engines, ONE)
        await engines.flush(client, VOLUME, wire.ST_NOT_READY)
        await engines[ONE].hears("lost")
        ((rows,), *_) = engines[ONE].told("lost")
        gone = sorted(row[1] for row in rows)
        assert 0 < len(gone) < 4, "the chunks are spread over both disks"
        await lost(engines, ONE, *gone)
        await engines.flush(client, VOLUME, wire.ST_OK)
        for chunk in set(range(4)) - set(gone):
            assert await engines.read(client, VOLUME, chunk, 0, MIB) == data[chunk]
        await poll_until_async(
            lambda: engines[ONE].target.stats()["volumes"][VOLUME][0] == 4 - len(gone), what="their slots are forgotten"
        )
        engines.set_rate(1 << 40)
        for chunk in gone:
            engines.change(VOLUME, chunk, TWO, 0, ONE)
        await poll_until_async(
            lambda: {row[1] for _, rows, _ in engines[TWO].told("learned") for row in rows} >= set(gone), what="learned"
        )
        for chunk in gone:
            engines.change(VOLUME, chunk, TWO, ONE)
            await engines.write(other, VOLUME, data[chunk][:4096], chunk, MIB)
            await engines.equal(VOLUME, chunk, ONE, TWO)
        # Its first disk is there again, with what it had: the newer copy is the one that counts.
        await engines.stop(ONE)
        engines.start(ONE)
        for chunk in gone:
            assert await engines.read(other, VOLUME, chunk, MIB, 4096) == data[chunk][:4096]
            await engines.equal(VOLUME, chunk, ONE, TWO)


async def test_who_is_alone_says_so(tmp_path: Path) -> None:
    async with running_engines(tmp_path, 1, devices=1) as engines:
        engines.place(VOLUME, [(ONE, 0, 0)])
        client = await engines[ONE].client(VOLUME, OWNER)
        await engines.write(client, VOLUME, os.urandom(4096))
        spoil(engines, ONE)
        assert await status_of_write(engines, client, bytes(4096)) == wire.ST_IO_ERROR
        assert (await client.read(VOLUME, 0, 0, 4096, 1)).status == wire.ST_IO_ERROR
        await engines.flush(client, VOLUME, wire.ST_IO_ERROR)
        assert engines[ONE].told("lost") == []


async def test_a_chunk_is_not_handed_over_to_a_copy_that_may_lack_something(tmp_path: Path) -> None:
    """The other member was killed and is back; what it has was not compared before our disk failed."""
    async with running_engines(tmp_path, 2, devices=1) as engines:
        client, _ = await begin(engines, (ONE, TWO, 0), (ONE, TWO, 0))
        await engines.stop(TWO)
        lose_writes(engines, ONE)
        engines[ONE].target.checkpoint()
        await engines[ONE].hears("device_failed")
        engines.start(TWO)

        async def told() -> set[int]:
            assert await status_of_write(engines, client, bytes(4096), 1) == wire.ST_NOT_READY
            return {row[1] for (rows,) in engines[ONE].told("lost") for row in rows}

        assert await poll_until_async(told, what="the other chunk, which was never written, is given up") == {1}
        assert await status_of_write(engines, client, bytes(4096)) == wire.ST_NOT_READY


async def test_a_block_that_cannot_be_read_costs_the_copy_and_not_the_read(tmp_path: Path) -> None:
    async with running_engines(tmp_path, 2, devices=1) as engines:
        client, data = await begin(engines, (ONE, TWO, 0))
        other = await engines[TWO].client(VOLUME, OWNER)
        spoil(engines, ONE, flags=WRITE_ONLY)
        assert (await client.read(VOLUME, 0, 0, 4096, 1)).status == wire.ST_NOT_READY
        await lost(engines, ONE, 0)
        assert await engines.read(other, VOLUME, 0, 0, MIB) == data
        assert engines[ONE].told("device_failed") == []
        await poll_until_async(lambda: engines[ONE].target.stats()["slots_used"] == 0, what="its slot is given back")


async def test_a_secondary_without_room_is_left_out_when_that_lasts(tmp_path: Path) -> None:
    async with running_engines(tmp_path, 2, devices=1) as engines:
        client, _ = await begin(engines, (ONE, TWO, 0))
        fill_up(engines, TWO)
        data = os.urandom(4096)
        assert await status_of_write(engines, client, data) == wire.ST_NOT_READY
        assert await engines[ONE].hears("copy_refused") == [(TWO, [(VOLUME, 0)])]
        engines.change(VOLUME, 0, ONE, 0, TWO, left=TWO)
        await engines.write(client, VOLUME, data)
        assert await engines.read(client, VOLUME, 0, 0, 4096) == data


async def test_a_primary_without_room_goes_out_when_that_lasts(tmp_path: Path) -> None:
    async with running_engines(tmp_path, 2, devices=1) as engines:
        client, old = await begin(engines, (ONE, TWO, 0))
        other = await engines[TWO].client(VOLUME, OWNER)
        data = os.urandom(4096)
        fill_up(engines, ONE)
        assert await status_of_write(engines, client, data) == wire.ST_NOT_READY
        await lost(engines, ONE, 0)
        await engines.write(other, VOLUME, data)
        assert await engines.read(other, VOLUME, 0, 0, MIB) == data + old[4096:]


async def test_no_room_on_both_sides_is_an_answer(tmp_path: Path) -> None:
    async with running_engines(tmp_path, 2, devices=1) as engines:
        client, _ = await begin(engines, (ONE, TWO, 0))
        fill_up(engines, ONE)
        fill_up(engines, TWO)
        assert await status_of_write(engines, client, os.urandom(4096)) == wire.ST_NO_SPACE


async def test_a_learner_that_may_have_joined_is_kept_when_the_disk_of_who_taught_it_fails(tmp_path: Path) -> None:
    """The MDM has been told that it is whole, and may have died before it said that it is a member now."""
    async with running_engines(tmp_path, 2, devices=1) as engines:
        client, data = await begin(engines, (ONE, 0, TWO))
        other = await engines[TWO].client(VOLUME, OWNER)
        await engines[ONE].hears("learned")
        spoil(engines, ONE)
        assert await status_of_write(engines, client, data[:4096]) != wire.ST_OK
        await engines[ONE].hears("device_failed")
        assert not engines[ONE].told("learner_lost")
        engines.change(VOLUME, 0, ONE, TWO)
        await lost(engines, ONE, 0)
        assert await engines.read(other, VOLUME, 0, 0, MIB) == data


async def test_a_learner_whose_disk_fails_learns_no_more(tmp_path: Path) -> None:
    async with running_engines(tmp_path, 2, devices=1) as engines:
        engines.set_rate(MIB)
        client, _ = await begin(engines, (ONE, 0, TWO))
        spoil(engines, TWO)
        await engines.write(client, VOLUME, os.urandom(4096))
        await lost(engines, TWO, 0)
        await engines.write(client, VOLUME, os.urandom(4096))
        assert engines[ONE].told("learned") == []
