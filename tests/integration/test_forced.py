"""Goal: a copy that an operator forces to serve is served as it is, and becomes everybody's copy, whatever they have.

The map is the test's: A (the older copy) has left, B had it alone. What the MDM allows is in test_mdm_forced.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from datapath import wire
from tests.integration.test_bit_rot import rot
from tests.support.dataclient import DataClient
from tests.support.engines import Engines, running_engines
from tests.support.waiting import poll_until_async

VOLUME, OWNER = 5, 7
BLOCK, MIB = 4096, 1 << 20
CHUNK = 4 * MIB
A, B = 1, 2


async def content(engines: Engines, client: DataClient, chunk: int = 0) -> bytes:
    parts = [await engines.read(client, VOLUME, chunk, offset, MIB) for offset in range(0, CHUNK, MIB)]
    return b"".join(parts)


async def left_behind(engines: Engines, *, checkpoint: bool = True) -> tuple[DataClient, list[bytes]]:
    """A stops and goes out; the client is B's, which has four chunks alone. What A has of them."""
    engines.place(VOLUME, [(B, A, 0)] * 4)
    client = await engines[B].client(VOLUME, OWNER)
    older = [os.urandom(CHUNK), os.urandom(CHUNK), bytes(CHUNK), os.urandom(MIB) + bytes(CHUNK - MIB)]
    for chunk in (0, 1, 3):
        await engines.write(client, VOLUME, older[chunk].rstrip(b"\0"), chunk)
    await engines.stop(A, checkpoint=checkpoint)
    engines.change_all(VOLUME, dict.fromkeys(range(4), (B, 0, A)), left=A)
    return client, older


def force(engines: Engines) -> None:
    engines.change_all(VOLUME, dict.fromkeys(range(4), (A, 0, B)), left=B)


async def learned(engines: Engines) -> None:
    def told() -> bool:
        said = [chunk for _, found in engines[A].told("learned") for chunk in found]
        return {chunk[1] for chunk in said if chunk[2] == engines.epoch(*chunk[:2])} == set(range(4))

    await poll_until_async(told, what="four chunks learned")


async def refused(client: DataClient, engines: Engines) -> None:
    reply = await client.read(VOLUME, 0, 0, BLOCK, engines.epoch(VOLUME, 0))
    assert reply.status in (wire.ST_STALE_MAP, wire.ST_NOT_MEMBER)


@pytest.mark.parametrize("killed", [False, True])
async def test_who_has_newer_data_gets_the_forced_copy(tmp_path: Path, killed: bool) -> None:
    async with running_engines(tmp_path, 2) as engines:
        client, expected = await left_behind(engines, checkpoint=not killed)
        await engines.write(client, VOLUME, os.urandom(2 * MIB), 0, MIB)
        await engines.discard(client, VOLUME, 1, 0, CHUNK)
        await engines.write(client, VOLUME, os.urandom(MIB), 2)
        await engines.write(client, VOLUME, os.urandom(MIB), 3, 3 * MIB)
        await engines.stop(B, checkpoint=not killed)
        engines.start(A)
        client = await engines[A].client(VOLUME, OWNER)
        await refused(client, engines)
        force(engines)
        assert [await content(engines, client, chunk) for chunk in range(4)] == expected
        new = os.urandom(MIB)
        await engines.write(client, VOLUME, new, 0, MIB + MIB // 2)
        expected[0] = expected[0][: MIB + MIB // 2] + new + expected[0][2 * MIB + MIB // 2 :]
        engines.start(B)
        await learned(engines)
        engines.change_all(VOLUME, dict.fromkeys(range(4), (A, B, 0)))
        for chunk in range(4):
            await engines.equal(VOLUME, chunk, A, B)
        for sds_id in (A, B):
            client = await engines[sds_id].client(VOLUME, OWNER + 1)
            assert [await content(engines, client, chunk) for chunk in range(4)] == expected


async def test_a_copy_that_was_learning_is_served_block_by_block(tmp_path: Path) -> None:
    """What it has is older or newer, each block whole under its own tag; then it is made B's copy too."""
    async with running_engines(tmp_path, 2) as engines:
        client, older = await left_behind(engines)
        newer = [os.urandom(CHUNK) for _ in range(4)]
        for chunk in range(4):
            await engines.write(client, VOLUME, newer[chunk], chunk)
        engines.set_rate(4_000_000)
        engines.start(A)

        def some() -> bool:
            return int(engines[B].target.stats()["resync_bytes"]) > MIB

        await poll_until_async(some, what="a part of it copied")
        engines.cut(A, B)
        await engines.stop(B, checkpoint=True)
        engines.set_rate(1_000_000_000)
        force(engines)
        client = await engines[A].client(VOLUME, OWNER)
        found = [await content(engines, client, chunk) for chunk in range(4)]
        sorts = set()
        for chunk in range(4):
            for at in range(0, CHUNK, BLOCK):
                block = found[chunk][at : at + BLOCK]
                assert block in (older[chunk][at : at + BLOCK], newer[chunk][at : at + BLOCK])
                sorts.add(block == newer[chunk][at : at + BLOCK])
        assert sorts == {True, False}, "the test is to catch it in the midst"
        engines.start(B)
        await learned(engines)
        for chunk in range(4):
            await engines.equal(VOLUME, chunk, A, B)
        engines.change_all(VOLUME, dict.fromkeys(range(4), (A, B, 0)))
        client = await engines[B].client(VOLUME, OWNER)
        assert [await content(engines, client, chunk) for chunk in range(4)] == found


@pytest.mark.parametrize("again", [False, True])
async def test_a_write_without_its_tag_is_kept_and_what_has_rotted_is_an_error(tmp_path: Path, again: bool) -> None:
    """The chunk that was being written when A was killed is taken as a lone member takes its own after a restart, also
    when A has started twice meanwhile. In the other one nothing was under way: what does not match has rotted."""
    async with running_engines(tmp_path, 2) as engines:
        engines.place(VOLUME, [(B, A, 0)] * 4)
        client = await engines[B].client(VOLUME, OWNER)
        clean, dirty = os.urandom(MIB), os.urandom(MIB)
        await engines.write(client, VOLUME, clean, 0)
        await engines.stop(A, checkpoint=True)
        engines.start(A)
        await engines.write(client, VOLUME, dirty, 1)
        await engines.stop(A)
        rot(engines[A], clean)
        rot(engines[A], dirty)
        engines.change_all(VOLUME, dict.fromkeys(range(4), (B, 0, A)), left=A)
        await engines.stop(B)
        engines.start(A)
        if again:
            await engines.stop(A, checkpoint=True)
            engines.start(A)
        force(engines)
        client = await engines[A].client(VOLUME, OWNER)
        torn = await engines.read(client, VOLUME, 1, 0, MIB)
        assert [at for at in range(MIB) if torn[at] != dirty[at]] == [5 * BLOCK + 1000]
        assert await engines.read(client, VOLUME, 0, 6 * BLOCK, MIB - 6 * BLOCK) == clean[6 * BLOCK :]
        assert (await engines[A].verify(VOLUME, 0)).bad[0] == 1 << 5
        reply = await client.read(VOLUME, 0, 5 * BLOCK, BLOCK, engines.epoch(VOLUME, 0))
        assert reply.status == wire.ST_CHECKSUM or reply.payload != clean[5 * BLOCK : 6 * BLOCK]
