"""Goal: the SDS itself decides who may read and write, whatever a client's code does."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from datapath import wire
from pfvol import handshake
from pfvol.capability import Capability, sign
from pfvol.errors import UnauthorizedError
from tests.support.dataclient import ClosedError, DataClient, Reply
from tests.support.sdspair import KEY, Pair, running_pair
from tests.support.waiting import poll_until_async

VOLUME = 5
OTHER_VOLUME = 6
OWNER = 7
STRANGER = 8
SECRET_BYTES = b"owner's!" * 512


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Pair]:
    """Two SDSs, a volume whose first block the owner has written, and another volume."""
    async with running_pair(tmp_path) as pair:
        for volume in (VOLUME, OTHER_VOLUME):
            pair.mdm.add_volume(volume)
        async with await pair.mapped_client(VOLUME, OWNER) as owner:
            assert (await owner.write_until_taken(VOLUME, SECRET_BYTES)).status == wire.ST_OK
        yield pair


async def every_io(client: DataClient, volume: int = VOLUME) -> dict[str, Reply]:
    return {
        "read": await client.read(volume),
        "write": await client.write(volume, bytes(4096)),
        "commit": await client.write(volume, bytes(4096), flags=wire.FLAG_COMMIT),
        "resync": await client.write(volume, bytes(4096), flags=wire.FLAG_RESYNC),
        "unaligned": await client.write(volume, b"xyz", offset=5),
        "discard": await client.request(wire.OP_DISCARD, volume_id=volume, length=4096, epoch=1),
        "flush": await client.request(wire.OP_FLUSH, volume_id=volume),
        "seek": await client.request(wire.OP_SEEK, volume_id=volume, epoch=1),
    }


async def stored(pair: Pair) -> bytes:
    async with await pair.mapped_client(VOLUME, OWNER, incarnation=99, read_only=True) as owner:
        return (await owner.read(VOLUME)).payload


async def test_an_sdc_without_a_mapping_can_do_nothing(pair: Pair) -> None:
    async with await pair.client(STRANGER) as stranger:
        for what, reply in (await every_io(stranger)).items():
            assert reply.status == wire.ST_NOT_AUTHORIZED, what
            assert reply.body == b"", what
    assert await stored(pair) == SECRET_BYTES


async def test_a_mapping_of_one_volume_is_no_right_to_another(pair: Pair) -> None:
    async with await pair.mapped_client(OTHER_VOLUME, STRANGER) as stranger:
        assert {reply.status for reply in (await every_io(stranger)).values()} == {wire.ST_NOT_AUTHORIZED}
    assert await stored(pair) == SECRET_BYTES


async def test_a_right_shown_on_one_connection_is_none_on_another(pair: Pair) -> None:
    async with await pair.mapped_client(VOLUME, OWNER, 2), await pair.client(OWNER, 2) as second:
        assert (await second.read(VOLUME)).status == wire.ST_NOT_AUTHORIZED


async def test_a_read_only_mapping_reads_and_cannot_write_whatever_it_sends(pair: Pair) -> None:
    async with await pair.mapped_client(VOLUME, STRANGER, read_only=True) as reader:
        replies = await every_io(reader)
        assert replies["read"].status == wire.ST_OK
        assert replies["read"].payload == SECRET_BYTES
        for what in ("write", "commit", "resync", "unaligned", "discard"):
            assert replies[what].status == wire.ST_READ_ONLY, what
        assert replies["seek"].status == wire.ST_OK
        lies = await reader.write(VOLUME, bytes(4096), node_id=OWNER, op_id=1, seq=2**61, incarnation=2**60)
        assert lies.status == wire.ST_READ_ONLY
    assert await stored(pair) == SECRET_BYTES


async def test_a_read_only_mapping_is_not_lifted_by_a_capability_that_says_read_write(pair: Pair) -> None:
    pair.mdm.map(VOLUME, STRANGER, read_only=True)
    mapping = max(pair.mdm.volumes[VOLUME].mappings)
    async with await pair.client(STRANGER) as reader:
        generous = pair.mdm.capability(VOLUME, STRANGER, mapping, read_only=False)
        assert (await reader.capability(VOLUME, generous)).status == wire.ST_OK
        assert (await reader.write(VOLUME, bytes(4096))).status == wire.ST_READ_ONLY


async def test_capabilities_that_do_not_hold_are_refused(pair: Pair) -> None:
    good = pair.mdm.map(VOLUME, STRANGER, read_only=True)
    mapping = max(pair.mdm.volumes[VOLUME].mappings)
    owners = min(pair.mdm.volumes[VOLUME].mappings)
    forged = {
        "more rights": good[:1] + b"\2" + good[2:],
        "another volume": good[:8] + VOLUME.to_bytes(8, "little") + good[16:-1] + b"\0",
        "another key": sign(bytes(32), Capability(STRANGER, VOLUME, mapping, False, 2**40)),
        "expired": pair.mdm.capability(VOLUME, STRANGER, mapping, seconds=-1),
        "another SDC's": pair.mdm.capability(VOLUME, OWNER, owners),
        "own name on another's mapping": pair.mdm.capability(VOLUME, STRANGER, owners),
        "no such mapping": pair.mdm.capability(VOLUME, STRANGER, 10**6),
        "of the other volume": pair.mdm.map(OTHER_VOLUME, STRANGER),
        "empty": b"",
        "long": bytes(wire.CONTROL_BODY_MAX),
        "noise": os.urandom(64),
    }
    async with await pair.client(STRANGER) as stranger:
        for what, token in forged.items():
            assert (await stranger.capability(VOLUME, token)).status == wire.ST_NOT_AUTHORIZED, what
            assert (await stranger.read(VOLUME)).status == wire.ST_NOT_AUTHORIZED, what
        assert (await stranger.capability(VOLUME, good)).status == wire.ST_OK


async def test_a_volume_that_does_not_exist_is_said_so(pair: Pair) -> None:
    token = sign(KEY, Capability(STRANGER, 1234, 1, False, 2**40))
    async with await pair.client(STRANGER) as stranger:
        assert (await stranger.capability(1234, token)).status == wire.ST_NO_VOLUME
        assert (await stranger.read(1234)).status in (wire.ST_NO_VOLUME, wire.ST_NOT_AUTHORIZED)


async def test_unknown_mappings_make_the_sds_ask_the_mdm_only_now_and_then(pair: Pair) -> None:
    async with await pair.mapped_client(VOLUME, STRANGER) as stranger:
        asked = pair.mdm.asked.count("map.volume")
        tokens = [pair.mdm.capability(VOLUME, STRANGER, mapping) for mapping in range(1000, 1200)]
        statuses = [(await stranger.capability(VOLUME, token)).status for token in (*tokens, tokens[0])]
        assert (statuses[0], statuses[-1]) == (wire.ST_NOT_AUTHORIZED, wire.ST_NOT_AUTHORIZED)
        assert set(statuses) <= {wire.ST_NOT_AUTHORIZED, wire.ST_NOT_READY}
        assert pair.mdm.asked.count("map.volume") <= asked + 3


async def test_a_grant_ends_with_its_capability(pair: Pair) -> None:
    async with await pair.mapped_client(VOLUME, STRANGER, seconds=2) as stranger:
        assert (await stranger.read(VOLUME)).status == wire.ST_OK

        async def refused() -> bool:
            return (await stranger.read(VOLUME)).status == wire.ST_NOT_AUTHORIZED

        await poll_until_async(refused, timeout_seconds=5)
        assert (await stranger.write(VOLUME, bytes(4096))).status == wire.ST_NOT_AUTHORIZED
    assert await stored(pair) == SECRET_BYTES


async def test_an_unmapped_sdc_is_out_at_once_and_its_capability_worth_nothing(pair: Pair) -> None:
    async with await pair.mapped_client(VOLUME, STRANGER) as stranger:
        token = pair.mdm.capability(VOLUME, STRANGER, max(pair.mdm.volumes[VOLUME].mappings))
        assert (await stranger.read(VOLUME)).status == wire.ST_OK
        pair.mdm.volumes[VOLUME].mappings.popitem()
        await pair.one.server.revoked(VOLUME, STRANGER)
        assert {reply.status for reply in (await every_io(stranger)).values()} == {wire.ST_NOT_AUTHORIZED}
        assert (await stranger.capability(VOLUME, token)).status == wire.ST_NOT_AUTHORIZED
        again = pair.mdm.map(VOLUME, STRANGER)

        async def accepted() -> bool:
            return (await stranger.capability(VOLUME, again)).status == wire.ST_OK

        await poll_until_async(accepted, timeout_seconds=5)


async def tags(pair: Pair) -> bytes:
    ((present, tags, _),) = await pair.one.server.verify(VOLUME, 0, 1)
    assert present
    return bytes(tags)


async def test_nothing_of_an_unmapped_sdc_lands_after_the_unmapping_was_answered(pair: Pair) -> None:
    async with await pair.mapped_client(VOLUME, STRANGER) as stranger:
        body = stranger.body(VOLUME, 0, 0, b"late" * 1024)
        place = {"volume_id": VOLUME, "length": 4096, "epoch": 1, "body_length": len(body)}
        sent, answered = 0, False

        async def write_on() -> None:
            """Of one block, without waiting for answers: most of what is sent waits for the write before it."""
            nonlocal sent
            while not answered:
                await stranger.send(stranger.header(wire.OP_WRITE, **place) + body)
                sent += 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write_on)
            statuses = [(await stranger.receive()).status for _ in range(20)]
            pair.mdm.volumes[VOLUME].mappings.popitem()
            await pair.one.server.revoked(VOLUME, STRANGER)
            at_the_answer = await tags(pair)
            answered = True
        statuses += [(await stranger.receive()).status for _ in range(sent - len(statuses))]
        assert set(statuses) <= {wire.ST_OK, wire.ST_NOT_AUTHORIZED}
        assert (await stranger.write(VOLUME, b"last" * 1024)).status == wire.ST_NOT_AUTHORIZED
        assert await tags(pair) == at_the_answer


async def test_a_connection_that_floods_capabilities_is_told_to_wait_and_the_others_are_served(pair: Pair) -> None:
    async with (
        await pair.mapped_client(VOLUME, OWNER, 2) as owner,
        await pair.mapped_client(VOLUME, STRANGER) as stranger,
    ):
        token = pair.mdm.capability(VOLUME, STRANGER, max(pair.mdm.volumes[VOLUME].mappings))
        frame = stranger.header(wire.OP_CAPABILITY, volume_id=VOLUME, body_length=len(token)) + token
        await stranger.send(frame * 5000)
        assert (await owner.read(VOLUME)).payload == SECRET_BYTES
        statuses = [(await stranger.receive()).status for _ in range(5000)]
        assert set(statuses) == {wire.ST_OK, wire.ST_BUSY}
        assert (await stranger.read(VOLUME)).status == wire.ST_OK


async def test_who_does_not_know_the_secret_gets_no_byte(pair: Pair) -> None:
    with pytest.raises(UnauthorizedError):
        await pair.one.client(OWNER, secret=bytes(32))
    stream = await trio.open_tcp_stream("127.0.0.1", pair.one.port)
    async with DataClient(stream, OWNER, 1) as client:
        await client.send(client.header(wire.OP_READ, volume_id=VOLUME, length=4096, epoch=1))
        assert await client.is_closed()


@pytest.mark.parametrize(
    "opcode",
    [
        wire.OP_REPLICATE,
        wire.OP_REPLICATE_DISCARD,
        wire.OP_DIRTY,
        wire.OP_TAGS,
        wire.OP_PULL,
        wire.OP_PUSH,
        wire.OP_PING,
        wire.OP_HELLO,
        wire.OP_PROOF,
    ],
)
async def test_an_sdc_cannot_speak_as_an_sds(pair: Pair, opcode: int) -> None:
    body = {wire.OP_REPLICATE: bytes(4 + 4096), wire.OP_PUSH: bytes(20 + 4096)}.get(opcode, b"")
    has_range = opcode in (wire.OP_REPLICATE, wire.OP_PUSH, wire.OP_PULL, wire.OP_REPLICATE_DISCARD)
    async with await pair.mapped_client(VOLUME, STRANGER, read_only=True) as client:
        header = client.header(
            opcode, volume_id=VOLUME, length=4096 * has_range, body_length=len(body), epoch=1, seq=2**60
        )
        try:
            await client.send(header + body)
            reply = await client.receive()
            assert reply.status != wire.ST_OK
            assert reply.body == b""
        except ClosedError:
            pass
    assert await stored(pair) == SECRET_BYTES


def wrong_frames() -> dict[str, bytes]:
    """A WRITE and a READ with each field wrong in turn, and what is no frame at all."""
    place = {"volume_id": VOLUME, "length": 4096, "epoch": 1, "request_id": 9, "op_id": 9}
    read = bytearray(wire.pack_header(wire.OP_READ, **place))
    body = bytes(4 + 4096)

    def write(**fields: int) -> bytes:
        return wire.pack_header(wire.OP_WRITE, **{**place, "body_length": len(body), **fields}) + body

    def read_with(**fields: int) -> bytes:
        return wire.pack_header(wire.OP_READ, **{**place, **fields})

    def patched(offset: int, value: int) -> bytes:
        header = bytearray(read)
        header[offset] ^= value
        return bytes(header)

    return {
        "magic": patched(0, 1),
        "version": patched(4, 3),
        "crc": patched(12, 1),
        "a flipped bit": patched(40, 1),
        "unknown opcode": wire.pack_header(99),
        "answer from a client": wire.pack_header(wire.OP_READ | wire.OP_REPLY, **place),
        "answer to nothing": wire.pack_header(wire.OP_WRITE | wire.OP_REPLY, request_id=1),
        "status": read_with(status=1),
        "unknown flags": read_with(flags=1 << 20),
        "offset past the chunk": read_with(offset=4 * 1024 * 1024),
        "offset and length past the chunk": read_with(offset=4 * 1024 * 1024 - 4096, length=8192),
        "length past everything": read_with(length=2**32 - 4096),
        "offset near 2**32": read_with(offset=2**32 - 4096),
        "no length": read_with(length=0),
        "unaligned read": read_with(offset=1),
        "read with a body": read_with(body_length=16) + bytes(16),
        "write of no bytes": write(length=0),
        "write of too much": write(length=2 * 1024 * 1024),
        "write with a short body": write(body_length=8),
        "write with a huge body": write(body_length=2**32 - 1),
        "unaligned discard": wire.pack_header(wire.OP_DISCARD, volume_id=VOLUME, offset=1, length=4096),
        "capability over the limit": wire.pack_header(wire.OP_CAPABILITY, body_length=wire.CONTROL_BODY_MAX + 1),
        "zeros": bytes(200),
        "ones": b"\xff" * 200,
        "http": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 4,
    }


@pytest.mark.parametrize("wrong", wrong_frames().values(), ids=wrong_frames().keys())
async def test_a_wrong_frame_ends_its_own_connection_and_nothing_else(pair: Pair, wrong: bytes) -> None:
    async with (
        await pair.mapped_client(VOLUME, OWNER, 2) as owner,
        await pair.mapped_client(VOLUME, STRANGER) as client,
    ):
        await client.send(wrong)
        assert await client.is_closed()
        assert (await owner.read(VOLUME)).payload == SECRET_BYTES
        async with await pair.mapped_client(VOLUME, STRANGER) as again:
            assert (await again.read(VOLUME)).status == wire.ST_OK


async def test_requests_that_are_well_formed_but_out_of_place_are_answered(pair: Pair) -> None:
    async with await pair.mapped_client(VOLUME, OWNER, 2) as owner:
        assert (await owner.read(VOLUME, chunk=4)).status == wire.ST_RANGE
        assert (await owner.read(VOLUME, chunk=2**32 - 1)).status == wire.ST_RANGE
        assert (await owner.write(VOLUME, bytes(4096), chunk=4)).status == wire.ST_RANGE
        assert (await owner.read(VOLUME, epoch=0)).status == wire.ST_STALE_MAP
        assert (await owner.write(VOLUME, bytes(4096), epoch=0)).status == wire.ST_STALE_MAP
        # Newer than the SDS's own map: it is the SDS that has to look, and the client need not.
        assert (await owner.read(VOLUME, epoch=77)).status == wire.ST_NOT_READY
        assert (await owner.write(VOLUME, bytes(4096), epoch=77)).status == wire.ST_NOT_READY
        assert (await owner.write(VOLUME, bytes(4096), chunk=1)).status == wire.ST_NOT_MEMBER
        damaged = await owner.request(wire.OP_WRITE, bytes(4) + b"x" * 4096, volume_id=VOLUME, length=4096, epoch=1)
        assert damaged.status == wire.ST_PAYLOAD
    assert await stored(pair) == SECRET_BYTES


async def test_a_newer_session_ends_the_older_before_it_is_served(pair: Pair) -> None:
    async with await pair.mapped_client(VOLUME, OWNER, 5) as old:
        assert (await old.read(VOLUME)).status == wire.ST_OK
        async with await pair.mapped_client(VOLUME, OWNER, 6) as new:
            # Sent into the old socket after the new session was admitted, and before anybody has looked at the answer.
            try:
                late = await old.write(VOLUME, bytes(4096))
                assert late.status == wire.ST_OLD_SESSION
            except ClosedError:
                pass
            assert (await new.read(VOLUME)).payload == SECRET_BYTES
        with pytest.raises(handshake.OldSessionError):
            await pair.client(OWNER, 5)


async def test_another_sdcs_sessions_are_its_own(pair: Pair) -> None:
    async with await pair.mapped_client(VOLUME, STRANGER, 1) as stranger, await pair.mapped_client(VOLUME, OWNER, 50):
        assert (await stranger.read(VOLUME)).status == wire.ST_OK


async def test_slots_and_engines_are_left_as_they_were_by_a_storm_of_bad_connections(pair: Pair) -> None:
    frames = list(wrong_frames().values())
    async with await pair.mapped_client(VOLUME, OWNER, 2) as owner:
        before = pair.one.target.stats()
        for round_number in range(60):
            async with await pair.one.client(STRANGER) as client:
                with_noise = frames[round_number % len(frames)] + os.urandom(64)
                await client.send(with_noise)
        assert (await owner.read(VOLUME)).payload == SECRET_BYTES
        after = pair.one.target.stats()
    assert after["slots_used"] == before["slots_used"]
    assert after["bad_frames"] > before["bad_frames"]
