"""Goal: an SDS takes from another SDS what the map says that it may send, and nothing else."""

from __future__ import annotations

import itertools
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio

from datapath import wire
from datapath.checksum import range_checks
from pfvol import handshake
from pfvol.errors import UnauthorizedError
from tests.support.dataclient import ClosedError, DataClient, Reply
from tests.support.sdspair import Pair, running_pair
from tests.support.waiting import poll_until_async

VOLUME = 5
THIRD = 3
# Chunks of VOLUME by who may send them to SDS 1: (epoch, primary, secondary).
FROM_THIRD, OWN, ELSEWHERE, FROM_TWO, UNPLACED = range(5)
CHUNKS = [(4, THIRD, 1), (4, 1, THIRD), (4, THIRD, 2), (4, 2, 1), (4, 0, 0)]
DATA = b"replica!" * 512


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Pair]:
    """Two SDSs and a third that the MDM lists, played by the test."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))  # bound, never listening: nobody answers there
        address = list(reserved.getsockname())
        async with running_pair(tmp_path) as pair:
            third = {"sds_id": THIRD, "data_address": address, "incarnation": 6, "up": True}
            pair.one.server.set_peers([pair.one.peer(), pair.two.peer(), third])
            pair.mdm.add_volume(VOLUME, len(CHUNKS))
            pair.mdm.volumes[VOLUME].chunks = CHUNKS
            yield pair


async def peer(pair: Pair, sds_id: int = THIRD, incarnation: int = 6, **changes: Any) -> DataClient:
    return await pair.one.client(sds_id, incarnation, role=wire.ROLE_SDS, **changes)


async def replicate(client: DataClient, chunk: int, *, epoch: int = 4, seq: int = 1, volume: int = VOLUME) -> Reply:
    place = {"volume_id": volume, "chunk_index": chunk, "length": len(DATA), "epoch": epoch, "seq": seq}
    return await client.request(wire.OP_REPLICATE, client.body(volume, chunk, 0, DATA), **place)


async def replicate_when_map_is_known(client: DataClient, chunk: int, **fields: int) -> Reply:
    async def known() -> Reply | None:
        reply = await replicate(client, chunk, **fields)
        return None if reply.status == wire.ST_NOT_READY else reply

    reply = await poll_until_async(known, what="a map at the SDS")
    assert reply is not None
    return reply


async def held(pair: Pair, chunk: int) -> bool:
    ((present, _, _),) = await pair.one.server.verify(VOLUME, chunk, 1)
    return bool(present)


async def test_a_copy_comes_from_its_primary_once_the_map_is_known(pair: Pair) -> None:
    async with await peer(pair) as third:
        assert (await replicate(third, FROM_THIRD)).status == wire.ST_NOT_READY
        assert (await replicate_when_map_is_known(third, FROM_THIRD)).status == wire.ST_OK
    assert await held(pair, FROM_THIRD)


@pytest.mark.parametrize("chunk", [OWN, ELSEWHERE, FROM_TWO, UNPLACED])
async def test_a_copy_that_the_map_does_not_place_here_from_there_is_refused(pair: Pair, chunk: int) -> None:
    async with await peer(pair) as third:
        assert (await replicate_when_map_is_known(third, chunk)).status == wire.ST_NOT_MEMBER
        place = {"volume_id": VOLUME, "chunk_index": chunk}
        discard = await third.request(wire.OP_REPLICATE_DISCARD, b"", **place, length=4096, epoch=4, seq=2)
        checks = struct.pack("<I", *range_checks(VOLUME, chunk, 0, DATA))
        push = await third.request(wire.OP_PUSH, checks + bytes(16) + DATA, **place, length=4096, epoch=4)
        pull = await third.request(wire.OP_PULL, b"", **place, length=4096, epoch=4)
        tags = await third.request(wire.OP_TAGS, b"", **place)
        agreed = await third.request(wire.OP_PING, b"", **place, flags=wire.FLAG_RESYNC | wire.FLAG_ABSENT, op_id=0)
        for reply in (discard, push, pull, tags, agreed):
            assert reply.status == wire.ST_NOT_MEMBER
            assert reply.body == b""
    assert not await held(pair, chunk)


async def test_a_copy_of_any_epoch_is_taken_from_the_primary_of_the_map(pair: Pair) -> None:
    """Its connection keeps its order, and as long as it leads it has dropped nothing."""
    async with await peer(pair) as third:
        assert (await replicate_when_map_is_known(third, FROM_THIRD, epoch=3)).status == wire.ST_OK
        assert await held(pair, FROM_THIRD)
        # The primary is ahead: our map is the old one, and is fetched. From then on it is another's.
        pair.mdm.volumes[VOLUME].chunks = [(5, 2, 1), *CHUNKS[1:]]
        seqs = itertools.count(2)

        async def refused() -> bool:
            reply = await replicate(third, FROM_THIRD, epoch=5, seq=next(seqs))
            assert reply.status in (wire.ST_OK, wire.ST_NOT_MEMBER)
            return reply.status == wire.ST_NOT_MEMBER

        await poll_until_async(refused, what="the newer map")


async def test_a_copy_for_a_volume_that_is_gone_takes_no_slot(pair: Pair) -> None:
    async with await peer(pair) as third:
        assert (await replicate_when_map_is_known(third, FROM_THIRD)).status == wire.ST_OK
        del pair.mdm.volumes[VOLUME]
        await pair.one.server.deleted(VOLUME)
        assert (await replicate_when_map_is_known(third, FROM_THIRD, seq=2)).status == wire.ST_NO_VOLUME
        # Nor does one that the MDM has never heard of, and the question for its map ends.
        assert (await replicate_when_map_is_known(third, 0, volume=99)).status == wire.ST_NO_VOLUME
    assert not await held(pair, FROM_THIRD)


async def test_a_damaged_copy_is_refused_and_may_be_sent_again(pair: Pair) -> None:
    async with await peer(pair) as third:
        await replicate_when_map_is_known(third, OWN)
        place = {"volume_id": VOLUME, "chunk_index": FROM_THIRD, "length": 4096, "epoch": 4, "seq": 1}
        damaged = await third.request(wire.OP_REPLICATE, bytes(4) + DATA, **place)
        assert damaged.status == wire.ST_PAYLOAD
        assert not await held(pair, FROM_THIRD)
        assert (await replicate(third, FROM_THIRD)).status == wire.ST_OK


async def test_an_older_copy_never_replaces_a_newer(pair: Pair) -> None:
    async with await peer(pair) as third:
        assert (await replicate_when_map_is_known(third, FROM_THIRD, seq=9)).status == wire.ST_OK
        before = await pair.one.server.verify(VOLUME, FROM_THIRD, 1)
        assert (await replicate(third, FROM_THIRD, seq=8)).status == wire.ST_OK
        assert await pair.one.server.verify(VOLUME, FROM_THIRD, 1) == before


@pytest.mark.parametrize(
    "opcode", [wire.OP_READ, wire.OP_WRITE, wire.OP_DISCARD, wire.OP_FLUSH, wire.OP_SEEK, wire.OP_CAPABILITY]
)
async def test_an_sds_cannot_speak_as_an_sdc(pair: Pair, opcode: int) -> None:
    body = {wire.OP_WRITE: bytes(4) + DATA, wire.OP_CAPABILITY: bytes(64)}.get(opcode, b"")
    length = 4096 if opcode in (wire.OP_READ, wire.OP_WRITE, wire.OP_DISCARD) else 0
    async with await peer(pair) as third:
        header = third.header(opcode, volume_id=VOLUME, length=length, body_length=len(body), epoch=4)
        await third.send(header + body)
        assert await third.is_closed()


@pytest.mark.parametrize("opcode", [wire.OP_REPLICATE, wire.OP_PING, wire.OP_TAGS, wire.OP_DIRTY])
async def test_answers_that_nobody_asked_for_end_the_connection(pair: Pair, opcode: int) -> None:
    async with await peer(pair) as third:
        await third.send(third.header(opcode | wire.OP_REPLY, volume_id=VOLUME, status=wire.ST_IO_ERROR))
        assert await third.is_closed()


async def test_only_who_is_listed_and_knows_the_secret_is_a_peer(pair: Pair) -> None:
    with pytest.raises(UnauthorizedError):
        await peer(pair, 9)
    with pytest.raises(UnauthorizedError):
        await peer(pair, 1)  # the SDS's own number
    with pytest.raises(UnauthorizedError):
        await peer(pair, secret=bytes(32))
    with pytest.raises(handshake.OldSessionError):
        await peer(pair, incarnation=5)
    stream = await trio.open_tcp_stream("127.0.0.1", pair.one.port)
    async with DataClient(stream, THIRD, 6) as stranger:
        await stranger.send(stranger.header(wire.OP_PING))
        assert await stranger.is_closed()


async def test_a_newer_session_of_a_peer_ends_the_older(pair: Pair) -> None:
    async with await peer(pair) as old, await peer(pair, incarnation=7) as new:
        assert (await replicate_when_map_is_known(new, FROM_THIRD)).status == wire.ST_OK
        with pytest.raises(ClosedError):
            await replicate(old, FROM_THIRD, seq=2)
