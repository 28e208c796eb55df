"""Goal: an SDS complains of a peer that is of no use, and of no peer that merely has much to do."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from datapath import wire
from tests.support.dataclient import DataClient, Reply
from tests.support.engines import Engines, running_engines

VOLUME = 7
BLOCK = bytes(4096)
PLAYED = 2


@asynccontextmanager
async def played_peer(engines: Engines) -> AsyncIterator[DataClient]:
    """SDS 2, of which SDS 1 has just heard that there is nothing to compare, and which lets it serve."""
    ours, theirs = socket.socketpair()
    engines[1].target.add_peer(theirs.detach(), PLAYED, 1, outgoing=True)
    peer = DataClient(trio.SocketStream(trio.socket.from_stdlib_socket(ours)), PLAYED, 1)
    async with peer:
        asked: set[int] = set()
        while asked < {wire.OP_DIRTY, wire.OP_PING}:
            frame = await peer.receive()
            asked.add(frame.header["opcode"])
            await answer(peer, frame)
        yield peer


async def answer(peer: DataClient, frame: Reply) -> None:
    told = frame.header | {"opcode": frame.header["opcode"] | wire.OP_REPLY, "body_length": 0, "flags": 0, "status": 0}
    known = ("request_id", "op_id", "volume_id", "chunk_index", "offset", "length", "epoch", "seq", "status")
    await peer.send(wire.pack_header(told["opcode"], incarnation=1, **{name: told[name] for name in known}))


async def test_who_answers_writes_is_not_silent(tmp_path: Path) -> None:
    """Its answers to pings come late when much was sent before them: it is not left out for that."""
    async with running_engines(tmp_path, 1) as engines:
        engines.place(VOLUME, [(1, PLAYED, 0)])
        client = await engines[1].client(VOLUME, 1)
        async with played_peer(engines) as peer, trio.open_nursery() as nursery:
            waiting: list[Reply] = []

            async def write() -> None:
                await engines.write(client, VOLUME, BLOCK * 8)

            nursery.start_soon(write)
            # The first write is answered at once, pings are too until it has come: the pair serves.
            while True:
                frame = await peer.receive()
                await answer(peer, frame)
                if frame.header["opcode"] == wire.OP_REPLICATE:
                    break
            for at in range(5):
                place = {"volume_id": VOLUME, "offset": (at + 1) * 4096, "length": 4096, "epoch": 1}
                body = client.body(VOLUME, 0, (at + 1) * 4096, BLOCK)
                await client.send(client.header(wire.OP_WRITE, body_length=len(body), **place) + body)
            # From here on a write is answered for each ping that comes, every 0.3 s, and no ping.
            answered = 0
            while answered < 5:
                frame = await peer.receive()
                if frame.header["opcode"] == wire.OP_REPLICATE:
                    waiting.append(frame)
                elif waiting:
                    await answer(peer, waiting.pop(0))
                    answered += 1
            assert engines[1].told("peer_silent") == []
            # Nothing more to answer, and pings that are not.
            assert (await engines[1].hears("peer_silent"))[0] == (PLAYED,)


async def test_who_keeps_an_old_map_is_told_of(tmp_path: Path) -> None:
    """An SDS that the MDM does not reach gets no leases once the map has changed: its peers ask for its chunks."""
    async with running_engines(tmp_path, 2) as engines:
        engines.place(VOLUME, [(2, 1, 0)])
        client = await engines[2].client(VOLUME, 1)
        await engines.write(client, VOLUME, BLOCK)
        engines[1].target.set_map_version(engines.version + 1)
        assert (await engines[1].hears("peer_silent"))[0] == (2,)
