"""Goal: a chunk serves again only when the other copy has confirmed every block, however often it refuses first."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from datapath import tags, wire
from pfvol import handshake
from tests.support.dataclient import DataClient, Reply
from tests.support.sdspair import CLUSTER, SECRET, PlayedMdm, RunningSds, running_pair, running_sds
from tests.support.waiting import poll_until_async

VOLUME, OWNER, SECONDARY = 5, 7, 2
FRESH = 2  # a chunk that was never written
DATA = b"primary!" * 512


class PlayedSecondary:
    """SDS 2, by hand: takes the connection on which SDS 1 replicates, and answers as the test says."""

    def __init__(self, link: DataClient) -> None:
        self.link = link

    async def next(self, opcode: int) -> Reply:
        """The next request, which has to be an ``opcode``. Whoever asks for a lease in between gets it."""
        while True:
            request = await self.link.receive()
            if request.header["opcode"] != wire.OP_PING or not request.header["op_id"]:
                assert request.header["opcode"] == opcode
                return request
            await self.answer(request)

    async def answer(self, request: Reply, status: int = wire.ST_OK, body: bytes = b"", flags: int = 0) -> None:
        kept = {
            key: request.header[key] for key in ("request_id", "volume_id", "chunk_index", "offset", "length", "op_id")
        }
        opcode = request.header["opcode"] | wire.OP_REPLY
        await self.link.send(wire.pack_header(opcode, **kept, status=status, flags=flags, body_length=len(body)) + body)

    async def agree_on_nothing(self) -> None:
        """Neither side has anything that may differ: the pair is ready."""
        await self.answer(await self.next(wire.OP_DIRTY))
        await self.answer(await self.next(wire.OP_PING))


@asynccontextmanager
async def accepted(listener: trio.SocketListener) -> AsyncIterator[PlayedSecondary]:
    stream = await listener.accept()
    identity = {"secret": SECRET, "cluster_id": CLUSTER, "sds_id": SECONDARY, "incarnation": 1}
    fd, peer = await handshake.accept(stream, **identity, durable_incarnation=1, admit=lambda _: wire.ST_OK)  # type: ignore[arg-type]
    sock = trio.socket.fromfd(fd, trio.socket.AF_INET, trio.socket.SOCK_STREAM)
    trio.socket.socket(fileno=fd).close()
    async with DataClient(trio.SocketStream(sock), peer.node_id, peer.incarnation) as link:
        yield PlayedSecondary(link)


@pytest.fixture
async def listener() -> AsyncIterator[trio.SocketListener]:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        yield listener


@pytest.fixture
async def world(
    tmp_path: Path, listener: trio.SocketListener
) -> AsyncIterator[tuple[RunningSds, PlayedSecondary, DataClient]]:
    """SDS 1, primary of the volume's chunks 0 and 2, of which its played secondary holds the first too; a client that
    may write."""
    mdm = PlayedMdm()
    mdm.add_volume(VOLUME, 3)
    async with running_sds(tmp_path, 1, mdm) as one:
        port = listener.socket.getsockname()[1]
        second = {"sds_id": SECONDARY, "data_address": ["127.0.0.1", port], "incarnation": 1, "up": True}
        one.server.set_peers([one.peer(), second])
        async with accepted(listener) as secondary, await one.client(OWNER) as client:
            await secondary.agree_on_nothing()
            assert (await client.capability(VOLUME, mdm.map(VOLUME, OWNER))).status == wire.ST_OK
            await first_write(client, secondary)
            yield one, secondary, client


async def send_write(client: DataClient, data: bytes = DATA, chunk: int = 0, **fields: int) -> None:
    body = client.body(VOLUME, chunk, 0, data)
    place = {"volume_id": VOLUME, "chunk_index": chunk, "length": len(data), "epoch": 1}
    header = client.header(wire.OP_WRITE, body_length=len(body), **place, **fields)
    await client.send(header + body)


async def refused_write(client: DataClient, secondary: PlayedSecondary, status: int) -> None:
    """It is applied here, not there: the copies may differ from now on."""
    await send_write(client)
    await secondary.answer(await secondary.next(wire.OP_REPLICATE), status)
    assert (await client.receive()).status == status


async def first_write(client: DataClient, secondary: PlayedSecondary) -> None:
    """The client tries until the SDS has the map; the secondary takes the write."""
    written = trio.Event()

    async def write() -> None:
        assert (await client.write_until_taken(VOLUME, DATA)).status == wire.ST_OK
        written.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write)
        await secondary.answer(await secondary.next(wire.OP_REPLICATE))
    assert written.is_set()


def never_written() -> bytes:
    return b"".join(tags.never(VOLUME, 0, block) for block in range(1024))


@pytest.mark.parametrize("status", [wire.ST_NO_SPACE, wire.ST_IO_ERROR, wire.ST_BUSY, wire.ST_NOT_READY])
async def test_a_refused_block_keeps_the_chunk_out_of_service_until_it_is_taken(
    world: tuple[RunningSds, PlayedSecondary, DataClient], status: int
) -> None:
    _, secondary, client = world
    await refused_write(client, secondary, wire.ST_BUSY)
    for _ in range(2):
        await secondary.answer(await secondary.next(wire.OP_TAGS), body=never_written())
        await secondary.answer(await secondary.next(wire.OP_PUSH), status)
        assert (await client.read(VOLUME)).status == wire.ST_NOT_READY
    await secondary.answer(await secondary.next(wire.OP_TAGS), body=never_written())
    pushed = await secondary.next(wire.OP_PUSH)
    assert pushed.body[20:] == DATA
    assert pushed.body[:4] == struct.pack("<I", tags_check(pushed.body[4:20]))
    assert (await client.read(VOLUME)).status == wire.ST_NOT_READY
    await secondary.answer(pushed)
    agreed = await secondary.next(wire.OP_PING)
    assert (agreed.header["volume_id"], agreed.header["flags"]) == (VOLUME, wire.FLAG_RESYNC | wire.FLAG_ABSENT)
    assert (await client.read(VOLUME)).payload == DATA


def tags_check(tag: bytes) -> int:
    return int(tags.unpack(tag)[0])


async def test_tags_that_cannot_be_had_keep_the_chunk_out_of_service(
    world: tuple[RunningSds, PlayedSecondary, DataClient],
) -> None:
    _, secondary, client = world
    await refused_write(client, secondary, wire.ST_NOT_READY)
    for _ in range(2):
        await secondary.answer(await secondary.next(wire.OP_TAGS), wire.ST_NOT_READY)
        assert (await client.read(VOLUME)).status == wire.ST_NOT_READY
    await secondary.answer(await secondary.next(wire.OP_TAGS), body=never_written())
    await secondary.answer(await secondary.next(wire.OP_PUSH))
    await secondary.next(wire.OP_PING)
    assert (await client.read(VOLUME)).payload == DATA


async def test_a_newer_block_that_cannot_be_pulled_keeps_the_chunk_out_of_service(
    world: tuple[RunningSds, PlayedSecondary, DataClient],
) -> None:
    _, secondary, client = world
    await refused_write(client, secondary, wire.ST_BUSY)
    newer = b"secondary" * 455 + b"!"
    check = struct.unpack("<I", client.body(VOLUME, 0, 0, newer)[:4])[0]
    theirs = tags.pack(check, 1, 2**61) + never_written()[16:]
    await secondary.answer(await secondary.next(wire.OP_TAGS), body=theirs)
    await secondary.answer(await secondary.next(wire.OP_PULL), wire.ST_IO_ERROR)
    assert (await client.read(VOLUME)).status == wire.ST_NOT_READY
    await secondary.answer(await secondary.next(wire.OP_TAGS), body=theirs)
    body = struct.pack("<I", check) + theirs[:16] + newer
    await secondary.answer(await secondary.next(wire.OP_PULL), body=body)
    await secondary.next(wire.OP_PING)
    assert (await client.read(VOLUME)).payload == newer


@pytest.mark.parametrize("size", [4096, 131072], ids=["applied here", "sent to the other copy first"])
async def test_a_write_that_waits_for_a_lost_copy_does_not_keep_its_volume(
    world: tuple[RunningSds, PlayedSecondary, DataClient], size: int
) -> None:
    """Nobody will confirm it any more: a deleted volume's chunks do not agree again."""
    one, secondary, client = world
    free = one.target.stats()["slots_free"]
    await send_write(client, bytes(size))
    await secondary.next(wire.OP_REPLICATE)
    await trio.aclose_forcefully(secondary.link.stream)
    await one.server.deleted(VOLUME)
    await poll_until_async(lambda: VOLUME in one.server.take_purged(), what="a purge of the volume")
    assert one.target.stats()["slots_free"] == free + 1
    assert (await client.receive()).status in (wire.ST_NO_VOLUME, wire.ST_NOT_READY)


@pytest.mark.parametrize("got_it", [True, False], ids=["and has it", "and has nothing"])
async def test_a_first_write_stays_only_if_the_copy_that_was_lost_has_it(
    world: tuple[RunningSds, PlayedSecondary, DataClient], listener: trio.SocketListener, got_it: bool
) -> None:
    """It may have shown it. If it has nothing it may have no room, and the chunk must not wait for that."""
    one, secondary, client = world
    free = one.target.stats()["slots_free"]
    operation = {"chunk": FRESH, "op_id": 1 << 32, "seq": 1}
    await send_write(client, **operation)
    sent = await secondary.next(wire.OP_REPLICATE)
    await trio.aclose_forcefully(secondary.link.stream)
    async with accepted(listener) as secondary:
        await secondary.answer(await secondary.next(wire.OP_DIRTY))
        await secondary.answer(await secondary.next(wire.OP_PING))
        asked = await secondary.next(wire.OP_TAGS)
        assert (await client.read(VOLUME, FRESH)).status == wire.ST_NOT_READY
        if got_it:
            check = struct.unpack("<I", sent.body[:4])[0]
            theirs = [tags.never(VOLUME, FRESH, block) for block in range(1, 1024)]
            written = tags.pack(check, sent.header["epoch"], sent.header["seq"])
            await secondary.answer(asked, body=b"".join([written, *theirs]))
        else:
            await secondary.answer(asked, flags=wire.FLAG_ABSENT)
        agreed = await secondary.next(wire.OP_PING)
        assert (agreed.header["chunk_index"], agreed.header["flags"]) == (FRESH, wire.FLAG_RESYNC | wire.FLAG_ABSENT)
        answered = await client.receive()
        assert answered.status == (wire.ST_OK if got_it else wire.ST_NOT_READY)
        assert (await client.read(VOLUME, FRESH)).payload == (DATA if got_it else bytes(len(DATA)))
        assert one.target.stats()["slots_free"] == free - got_it
        # Sent again it is the same operation, and known only if it was carried out.
        await send_write(client, **operation)
        if not got_it:
            await secondary.answer(await secondary.next(wire.OP_REPLICATE), wire.ST_NO_SPACE)
        assert (await client.receive()).status == (wire.ST_OK if got_it else wire.ST_NO_SPACE)


@pytest.mark.parametrize("flags", [0, wire.FLAG_COMMIT], ids=["flushed later", "committed"])
async def test_a_write_to_disk_is_asked_of_the_other_copy_too(
    world: tuple[RunningSds, PlayedSecondary, DataClient], flags: int
) -> None:
    _, secondary, client = world
    await send_write(client, flags=flags)
    asked = await secondary.next(wire.OP_REPLICATE)
    assert asked.header["flags"] & wire.FLAG_COMMIT == flags
    await secondary.answer(asked)
    assert (await client.receive()).status == wire.ST_OK


async def test_the_largest_unaligned_write_reaches_both_copies(tmp_path: Path) -> None:
    """It covers one block more than the largest aligned one, and copies are written in whole blocks."""
    data = bytes(range(251)) * (wire.IO_SIZE_MAX // 251 + 1)
    data = data[: wire.IO_SIZE_MAX]
    mdm = PlayedMdm()
    mdm.add_volume(VOLUME)
    async with (
        running_pair(tmp_path, mdm) as pair,
        await pair.mapped_client(VOLUME, OWNER) as client,
        await pair.two.client(OWNER) as other,
    ):
        assert (await client.write_until_taken(VOLUME, data, offset=1000)).status == wire.ST_OK
        assert (await other.capability(VOLUME, mdm.map(VOLUME, OWNER))).status == wire.ST_OK
        for copy in (client, other):
            whole = await copy.read(VOLUME, 0, 0, wire.IO_SIZE_MAX + 4096)
            assert whole.status == wire.ST_OK
            assert whole.payload[1000 : 1000 + len(data)] == data
