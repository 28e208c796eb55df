"""Goal: bytes that rot in one copy are never served, and are rewritten from the other; in both, they are an error."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from datapath import tags, wire
from tests.support.dataclient import DataClient
from tests.support.engines import Engines, RunningEngine, running_engines
from tests.support.waiting import poll_until_async

VOLUME, OWNER = 5, 7
BLOCK, MIB = 4096, 1 << 20
CHUNK = 4 * MIB
ONE, TWO = 1, 2
BAD = 5  # the block that rots, unless a test says more


async def filled(engines: Engines, client: DataClient, size: int = MIB) -> bytes:
    engines.place(VOLUME, [(ONE, TWO, 0)])
    data = os.urandom(size)
    await engines.write(client, VOLUME, data)
    return data


def place_of(engine: RunningEngine, data: bytes, block: int) -> tuple[Path, int]:
    """Where the block's bytes are: the device's directory, the offset in its block file."""
    for path in engine.paths:
        at = (path / "blocks").read_bytes().find(data[block * BLOCK : (block + 1) * BLOCK])
        if at >= 0:
            return path, at
    raise AssertionError(f"block {block} is nowhere")


def flip(path: Path, at: int, mask: int = 0x40) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ mask]))


def rot(engine: RunningEngine, data: bytes, block: int = BAD, within: int = 1000) -> None:
    path, at = place_of(engine, data, block)
    flip(path / "blocks", at + within)


def rot_tag(engine: RunningEngine, data: bytes, block: int = BAD, byte: int = 0, mask: int = 0x40) -> None:
    path, at = place_of(engine, data, block)
    flip(path / "tags", at // BLOCK * 16 + byte, mask)


async def reports(client: DataClient, block: int = BAD) -> None:
    """What an SDC does with an answer that does not match its check values."""
    reply = await client.request(
        wire.OP_READ, volume_id=VOLUME, offset=block * BLOCK, length=BLOCK, epoch=1, flags=wire.FLAG_RESYNC
    )
    assert reply.status in (wire.ST_OK, wire.ST_CHECKSUM)


async def good(engines: Engines, sds_id: int) -> None:
    """Waits until every block of that copy matches its tag."""

    async def whole() -> bool:
        return not any((await engines[sds_id].verify(VOLUME, 0)).bad)

    await poll_until_async(whole, what=f"a good copy at SDS {sds_id}")


@pytest.mark.parametrize("where", [ONE, TWO])
async def test_a_block_that_a_reader_finds_bad_is_rewritten(tmp_path: Path, where: int) -> None:
    async with running_engines(tmp_path, 2) as engines:
        client = await engines[ONE].client(VOLUME, OWNER)
        reader = await engines[where].client(VOLUME, OWNER + 1)
        data = await filled(engines, client)
        rot(engines[where], data)
        await reports(reader)
        await good(engines, where)
        await engines.equal(VOLUME, 0, ONE, TWO)
        assert await engines.read(reader, VOLUME, 0, 0, MIB) == data
        assert (await engines[ONE].hears("repaired"))[0] == (VOLUME, 0, BAD, 1, 0)
        assert engines[ONE].target.stats()["blocks_repaired"] == 1


# A tag's check value, epoch, number, and its flags: a hole, unknown.
@pytest.mark.parametrize(("byte", "mask"), [(0, 1), (4, 1), (8, 1), (15, 0x80), (15, 0x40), (15, 0xC0)])
@pytest.mark.parametrize("where", [ONE, TWO])
async def test_a_tag_that_rots_is_rewritten_and_never_serves_zeros(
    tmp_path: Path, where: int, byte: int, mask: int
) -> None:
    async with running_engines(tmp_path, 2) as engines:
        client = await engines[ONE].client(VOLUME, OWNER)
        reader = await engines[where].client(VOLUME, OWNER + 1)
        data = await filled(engines, client)
        rot_tag(engines[where], data, byte=byte, mask=mask)
        reply = await reader.read(VOLUME, offset=BAD * BLOCK)
        assert not reply.header["flags"] & wire.FLAG_ZEROS
        await reports(reader)
        await good(engines, where)
        await engines.equal(VOLUME, 0, ONE, TWO)
        assert await engines.read(reader, VOLUME, 0, 0, MIB) == data


async def test_each_copy_gives_the_other_what_it_lacks(tmp_path: Path) -> None:
    async with running_engines(tmp_path, 2) as engines:
        client = await engines[ONE].client(VOLUME, OWNER)
        data = await filled(engines, client)
        chosen = random.Random(3).sample(range(256), 40)
        for index, block in enumerate(chosen):
            rot(engines[ONE if index % 2 else TWO], data, block, index * 100)
        for block in chosen:
            await reports(client, block)
        await good(engines, ONE)
        await good(engines, TWO)
        await engines.equal(VOLUME, 0, ONE, TWO)
        assert await engines.read(client, VOLUME, 0, 0, MIB) == data
        stats = engines[ONE].target.stats()
        assert (stats["blocks_repaired"], stats["blocks_unrepairable"]) == (40, 0)


async def test_a_part_of_a_bad_block_is_written_after_the_repair(tmp_path: Path) -> None:
    async with running_engines(tmp_path, 2) as engines:
        client = await engines[ONE].client(VOLUME, OWNER)
        data = await filled(engines, client)
        rot(engines[ONE], data)
        await engines.write(client, VOLUME, b"new", 0, BAD * BLOCK + 100)
        at = BAD * BLOCK + 100
        assert await engines.read(client, VOLUME, 0, 0, MIB) == data[:at] + b"new" + data[at + 3 :]
        await engines.equal(VOLUME, 0, ONE, TWO)


async def test_a_block_that_is_bad_in_both_copies_is_an_error_until_it_is_written(tmp_path: Path) -> None:
    async with running_engines(tmp_path, 2) as engines:
        client = await engines[ONE].client(VOLUME, OWNER)
        data = await filled(engines, client)
        for sds_id in (ONE, TWO):
            rot(engines[sds_id], data, within=sds_id)
        await reports(client)
        assert (await engines[ONE].hears("repaired"))[0] == (VOLUME, 0, BAD, 0, 1)
        for sds_id in (ONE, TWO):  # served as it is, and no SDC takes it
            bad = (await engines[sds_id].verify(VOLUME, 0)).bad
            assert bad[BAD // 8] == 1 << BAD % 8
        reply = await client.write(VOLUME, b"part", offset=BAD * BLOCK)
        assert reply.status == wire.ST_CHECKSUM
        await engines.write(client, VOLUME, data[:BLOCK], 0, BAD * BLOCK)
        await engines.equal(VOLUME, 0, ONE, TWO)
        assert await engines.read(client, VOLUME, 0, BAD * BLOCK, BLOCK) == data[:BLOCK]


@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("where", [ONE, TWO])
async def test_what_rots_while_an_sds_is_away_is_found(tmp_path: Path, where: int, clean: bool) -> None:
    """After a clean stop when it is read, else by the comparison. Writes go on before and after."""
    async with running_engines(tmp_path, 2) as engines:
        client = await engines[ONE].client(VOLUME, OWNER)
        data = await filled(engines, client)
        await engines.stop(where, checkpoint=clean)
        rot(engines[where], data)
        rot_tag(engines[where], data, BAD + 2)
        engines.start(where)
        client = await engines[ONE].client(VOLUME, OWNER, 2)
        reader = await engines[where].client(VOLUME, OWNER + 1)
        await engines.read(reader, VOLUME, 0, 0, BLOCK)
        await reports(reader)
        await reports(reader, BAD + 2)
        await good(engines, where)
        await engines.equal(VOLUME, 0, ONE, TWO)
        assert await engines.read(client, VOLUME, 0, 0, MIB) == data


async def both_killed(engines: Engines, data: bytes, sort: str) -> DataClient:
    for sds_id in (ONE, TWO):
        engines[sds_id].power_lost = False
        await engines.stop(sds_id)
        if sort == "tags":
            rot_tag(engines[sds_id], data, byte=8)
        else:
            rot(engines[sds_id], data, within=sds_id)
    for sds_id in (ONE, TWO):
        engines.start(sds_id)
    client = await engines[ONE].client(VOLUME, OWNER, 2)
    await engines.read(client, VOLUME, 0, 0, BLOCK)
    return client


async def test_a_write_without_its_tag_is_kept_when_both_were_killed(tmp_path: Path) -> None:
    async with running_engines(tmp_path, 2) as engines:
        data = await filled(engines, await engines[ONE].client(VOLUME, OWNER))
        client = await both_killed(engines, data, "tags")
        assert await engines.read(client, VOLUME, 0, 0, MIB) == data
        await engines.equal(VOLUME, 0, ONE, TWO)


async def test_what_rots_in_both_while_both_are_away_is_not_taken_for_a_write(tmp_path: Path) -> None:
    async with running_engines(tmp_path, 2) as engines:
        data = await filled(engines, await engines[ONE].client(VOLUME, OWNER))
        client = await both_killed(engines, data, "bytes")
        assert (await client.read(VOLUME, offset=BAD * BLOCK)).status == wire.ST_CHECKSUM
        assert engines[ONE].target.stats()["blocks_unrepairable"] >= 1
        await engines.write(client, VOLUME, data[BAD * BLOCK : (BAD + 1) * BLOCK], 0, BAD * BLOCK)
        assert await engines.read(client, VOLUME, 0, 0, MIB) == data
        await engines.equal(VOLUME, 0, ONE, TWO)


async def test_repairs_do_not_hold_up_nor_overtake_writes(tmp_path: Path) -> None:
    async with running_engines(tmp_path, 2) as engines:
        client = await engines[ONE].client(VOLUME, OWNER)
        data = bytearray(await filled(engines, client))
        chooser = random.Random(5)
        for _round in range(60):
            block = chooser.randrange(256)
            new = chooser.randbytes(BLOCK)
            rot(engines[chooser.choice([ONE, TWO])], bytes(data), block)
            await client.send(  # asked first, answered behind the repair; the write is behind both
                client.header(
                    wire.OP_READ, volume_id=VOLUME, offset=block * BLOCK, length=BLOCK, epoch=1, flags=wire.FLAG_RESYNC
                )
            )
            await client.send(
                client.header(
                    wire.OP_WRITE, volume_id=VOLUME, offset=block * BLOCK, length=BLOCK, epoch=1, body_length=BLOCK + 4
                )
                + client.body(VOLUME, 0, block * BLOCK, new)
            )
            answers = {(reply := await client.receive()).header["opcode"] & 127: reply for _ in range(2)}
            assert {reply.status for reply in answers.values()} == {wire.ST_OK}
            data[block * BLOCK : (block + 1) * BLOCK] = new
        await engines.equal(VOLUME, 0, ONE, TWO)
        assert await engines.read(client, VOLUME, 0, 0, MIB) == bytes(data)


async def test_a_repair_whose_other_copy_is_lost_ends(tmp_path: Path) -> None:
    async with running_engines(tmp_path, 2) as engines:
        client = await engines[ONE].client(VOLUME, OWNER)
        data = await filled(engines, client)
        for _round in range(20):
            rot(engines[ONE], data)
            await client.send(
                client.header(
                    wire.OP_READ, volume_id=VOLUME, offset=BAD * BLOCK, length=BLOCK, epoch=1, flags=wire.FLAG_RESYNC
                )
            )
            engines.cut(ONE, TWO)
            await client.receive()
            engines.connect(ONE, TWO)
            await engines.read(client, VOLUME, 0, 0, BLOCK)
            await reports(client)
            await good(engines, ONE)
        assert await engines.read(client, VOLUME, 0, 0, MIB) == data
        assert engines[ONE].target.stats()["queue_depth"] == 0


async def test_the_scrubber_finds_and_repairs_what_nobody_reads(tmp_path: Path) -> None:
    async with running_engines(tmp_path, 2) as engines:
        client = await engines[ONE].client(VOLUME, OWNER)
        data = await filled(engines, client)
        rot(engines[ONE], data, 3)
        rot(engines[TWO], data, 200)
        rot_tag(engines[TWO], data, 100)
        for sds_id in (ONE, TWO):
            rot(engines[sds_id], data, 77)
        engines[ONE].target.set_scrub_rate(200 * MIB)
        assert (await engines[ONE].hears("scrubbed"))[0] == (1, CHUNK, 4)
        stats = engines[ONE].target.stats()
        assert (stats["blocks_repaired"], stats["blocks_unrepairable"], stats["scrub_errors"]) == (3, 1, 4)
        await engines.write(client, VOLUME, data[:BLOCK], 0, 77 * BLOCK)
        await engines.equal(VOLUME, 0, ONE, TWO)


async def test_the_scrubber_evens_out_copies_that_differ(tmp_path: Path) -> None:
    """A write that one of them has lost: both match their tags, the newer one stays."""
    async with running_engines(tmp_path, 2) as engines:
        client = await engines[ONE].client(VOLUME, OWNER)
        data = await filled(engines, client)
        path, at = place_of(engines[TWO], data, BAD)
        tag_at = at // BLOCK * 16
        with (path / "tags").open("r+b") as file:
            file.seek(tag_at)
            check, epoch, seq = tags.unpack(file.read(16))
            file.seek(tag_at)
            file.write(tags.pack(check, epoch, seq - 1))
        engines[ONE].target.set_scrub_rate(200 * MIB)
        await engines[ONE].hears("scrubbed")
        await engines.equal(VOLUME, 0, ONE, TWO)
        assert await engines.read(client, VOLUME, 0, 0, MIB) == data


async def test_the_scrubber_keeps_to_its_rate(tmp_path: Path) -> None:
    async with running_engines(tmp_path, 2) as engines:
        client = await engines[ONE].client(VOLUME, OWNER)
        await filled(engines, client)
        engines[ONE].target.set_scrub_rate(1)  # the bucket's first step, and then none for days
        await poll_until_async(lambda: engines[ONE].target.stats()["scrub_bytes"], what="a step of the scrubber")
        await engines.read(client, VOLUME, 0, 0, MIB)
        assert engines[ONE].target.stats()["scrub_bytes"] == 64 * BLOCK
        engines[ONE].target.set_scrub_rate(0)
        engines[ONE].target.set_scrub_rate(200 * MIB)
        await engines[ONE].hears("scrubbed")
