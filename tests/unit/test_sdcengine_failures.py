"""Goal: each status, each loss of a connection and each hostile answer has its one right consequence, and none is a
crash."""

from __future__ import annotations

import errno
import os
import signal
import struct
import sys
import threading
import time
from typing import Any

import pytest
from sdcengine_fakes import BLOCK, CHUNK, INODE, MIB, VOLUME, Close, Rig, Silent, checks, only, rig, segment

from datapath import wire
from tests.support.processes import running
from tests.support.waiting import poll_until


def once(r: Rig, opcode: int, answer: Any, *sds: int, times: int = 1) -> None:
    for n in sds or tuple(r.sds):
        r.sds[n].rule = only(opcode, answer, times)


# -- statuses


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (wire.ST_NO_SPACE, errno.ENOSPC),
        (wire.ST_IO_ERROR, errno.EIO),
        (wire.ST_READ_ONLY, errno.EROFS),
        (wire.ST_NO_VOLUME, errno.ENODEV),
        (wire.ST_OLD_SESSION, errno.EIO),
        (wire.ST_BAD_REQUEST, errno.EIO),
        (wire.ST_CHECKSUM, errno.EIO),
    ],
)
def test_status_that_ends_a_write(status: int, expected: int) -> None:
    with rig() as r:
        once(r, wire.OP_WRITE, status, 1)
        assert r.do("write", 0, data=b"x" * BLOCK) == (expected, b"")
        assert r.sds[1].count(wire.OP_WRITE) == 1
        told = [e[2] for e in r.seen("io_error")]
        assert told == ([expected] if expected in (errno.EIO, errno.ENOSPC) else [])
        r.write(0, b"y" * BLOCK)


@pytest.mark.parametrize(
    "status", [wire.ST_NOT_READY, wire.ST_BUSY, wire.ST_SHUTTING_DOWN, wire.ST_PAYLOAD, wire.ST_RANGE]
)
def test_status_that_has_a_write_sent_again_under_the_same_operation_id(status: int) -> None:
    with rig() as r:
        once(r, wire.OP_WRITE, status, 1, times=3)
        r.write(0, b"x" * BLOCK)
        sent = [h for h in r.sds[1].seen if h["opcode"] == wire.OP_WRITE]
        assert len(sent) == 4
        assert len({(h["op_id"], h["seq"]) for h in sent}) == 1
        assert len({h["request_id"] for h in sent}) == 1
        assert r.engine.stats()["resent"] == 3


def test_payload_that_arrives_damaged_each_time_ends_the_write() -> None:
    with rig() as r:
        once(r, wire.OP_WRITE, wire.ST_PAYLOAD, 1, times=1000)
        assert r.do("write", 0, data=b"x")[0] == errno.EIO


def test_write_waits_for_an_extend_that_a_server_has_not_heard_of() -> None:
    """It may be cut off from the MDM for longer than a few tries take."""
    with rig() as r:
        once(r, wire.OP_WRITE, wire.ST_RANGE, 1, times=25)
        r.write(0, b"x" * BLOCK)
        assert r.sds[1].count(wire.OP_WRITE) == 26


def test_read_beyond_what_one_server_knows_of_comes_from_the_other() -> None:
    with rig() as r:
        r.write(0, b"x" * BLOCK)
        for number in r.sds:
            once(r, wire.OP_READ, wire.ST_RANGE, number)
        assert r.read(0, BLOCK) == b"x" * BLOCK


def test_part_that_backs_off_goes_to_the_new_primary_at_once() -> None:
    with rig() as r:
        r.write(0, b"a")
        once(r, wire.OP_WRITE, wire.ST_NOT_READY, 1, times=1000)
        token = r.start("write", 0, data=b"b")
        r.until(lambda: r.sds[1].count(wire.OP_WRITE) >= 7)  # from here on it waits 100 ms each time
        refused = r.sds[1].count(wire.OP_WRITE)
        r.engine.set_segment(VOLUME, 0, segment((2, 2, 0)))
        assert r.finish(token)[0] == 0
        assert r.sds[1].count(wire.OP_WRITE) <= refused + 1
        assert r.sds[2].count(wire.OP_WRITE) == 1


@pytest.mark.parametrize("status", [wire.ST_STALE_MAP, wire.ST_NOT_MEMBER])
def test_stale_map_is_fetched_and_the_write_goes_to_the_new_primary(status: int) -> None:
    with rig() as r:
        r.write(0, b"a")
        once(r, wire.OP_WRITE, status, 1, times=1000)
        r.map = segment((2, 2, 0))
        r.write(0, b"b" * BLOCK)
        assert r.seen("stale_map") == [("stale_map", VOLUME, 0)]
        assert [h["epoch"] for h in r.sds[2].seen if h["opcode"] == wire.OP_WRITE] == [2]
        assert r.read(0, BLOCK) == b"b" * BLOCK


def test_stale_map_answered_with_the_same_map_is_tried_again_slowly_and_asked_again() -> None:
    """The SDS may be the one that is behind: then the same epoch is right a little later."""
    with rig() as r:
        once(r, wire.OP_WRITE, wire.ST_STALE_MAP, 1, times=3)
        r.write(0, b"b")
        assert len(r.seen("stale_map")) == 3
        assert r.sds[1].count(wire.OP_WRITE) == 4


def test_chunk_without_a_primary_waits_for_one() -> None:
    with rig() as r:
        r.map = segment((3, 0, 0))
        token = r.start("write", 0, data=b"w")
        r.until(lambda: len(r.seen("stale_map")) >= 2)
        r.map = segment((4, 2, 0))
        assert r.finish(token)[0] == 0


@pytest.mark.parametrize("status", [wire.ST_CHECKSUM, wire.ST_IO_ERROR, wire.ST_NOT_READY, wire.ST_BUSY])
@pytest.mark.parametrize("refuser", [1, 2])
def test_read_that_one_copy_refuses_comes_from_the_other(status: int, refuser: int) -> None:
    with rig() as r:
        r.write(0, b"r" * BLOCK)
        once(r, wire.OP_READ, status, refuser, times=1000)
        for _ in range(70):
            assert r.read(0, BLOCK) == b"r" * BLOCK
        bad = [e for e in r.seen("checksum_error") if e == ("checksum_error", VOLUME, 0, refuser)]
        assert len(bad) == (r.sds[refuser].count(wire.OP_READ) if status == wire.ST_CHECKSUM else 0)


@pytest.mark.parametrize(("status", "events"), [(wire.ST_CHECKSUM, 8), (wire.ST_IO_ERROR, 0)])
def test_read_that_both_copies_refuse_is_eio(status: int, events: int) -> None:
    """A block that does not match its tag is tried a few times more: it may be repaired meanwhile."""
    with rig() as r:
        once(r, wire.OP_READ, status, times=1000)
        assert r.do("read", 0, BLOCK) == (errno.EIO, b"")
        assert len(r.seen("checksum_error")) == events
        assert r.seen("io_error")[0][:3] == ("io_error", VOLUME, errno.EIO)


def test_read_that_both_copies_put_off_is_tried_until_one_serves() -> None:
    with rig() as r:
        r.write(0, b"k")
        once(r, wire.OP_READ, wire.ST_NOT_READY, times=4)
        assert r.read(0, 1) == b"k"


def test_read_whose_bytes_do_not_match_their_check_values_is_read_from_the_other_copy() -> None:
    with rig() as r:
        data = os.urandom(2 * BLOCK)
        r.write(0, data)
        assert r.read(0, BLOCK) == data[:BLOCK]
        liar = r.sds[1]

        def flip(header: dict[str, Any], body: bytes) -> bytes | None:
            if header["opcode"] != wire.OP_READ:
                return None
            answer = bytearray(liar.answer(header, body))
            answer[-1] ^= 1
            return bytes(answer)

        liar.rule = flip
        for _ in range(70):
            assert r.read(0, 2 * BLOCK) == data
        assert r.seen("checksum_error")
        assert r.engine.stats()["volumes"][VOLUME]["checksum_errors"] == len(r.seen("checksum_error"))
        r.sds[2].rule = lambda header, body: wire.ST_IO_ERROR if header["opcode"] == wire.OP_READ else None
        assert r.do("read", 0, BLOCK)[0] == errno.EIO


def test_block_stored_at_another_place_does_not_verify() -> None:
    """Misdirected: right bytes and check values, of the wrong block."""
    with rig(sds=1) as r:
        r.write(0, b"0" * BLOCK)
        r.write(BLOCK, b"0" * BLOCK)
        sds = r.sds[1]

        def misdirect(header: dict[str, Any], body: bytes) -> bytes | None:
            if header["opcode"] != wire.OP_READ:
                return None
            payload = b"0" * BLOCK
            return sds.reply(header, checks(header | {"offset": BLOCK}, payload) + payload)

        sds.rule = misdirect
        assert r.do("read", 0, BLOCK)[0] == errno.EIO


# -- capabilities


def test_capability_is_presented_before_the_first_io_on_each_connection_and_only_once() -> None:
    with rig() as r:
        tokens = [r.start("write", n * BLOCK, data=b"c" * BLOCK) for n in range(10)]
        assert all(r.finish(token)[0] == 0 for token in tokens)
        seen = [h["opcode"] for h in r.sds[1].seen]
        assert seen[0] == wire.OP_CAPABILITY
        assert seen.count(wire.OP_CAPABILITY) == 1
        r.sds[1].reset()
        r.until(lambda: r.sds[1].connections == 2)
        r.write(0, b"d")
        assert r.sds[1].count(wire.OP_CAPABILITY) == 2


def test_refused_capability_parks_io_until_a_new_one_is_accepted() -> None:
    with rig() as r:
        r.answer_capability = False
        r.sds[1].rule = lambda header, body: (
            wire.ST_NOT_AUTHORIZED if header["opcode"] == wire.OP_CAPABILITY and body != b"better" else None
        )
        token = r.start("write", 0, data=b"c")
        r.until(lambda: r.seen("capability_refused"))
        assert r.seen("capability_refused") == [("capability_refused", VOLUME, 1, wire.ST_NOT_AUTHORIZED)]
        assert r.sds[1].count(wire.OP_WRITE) == 0
        r.engine.set_capability(VOLUME, b"better")
        assert r.finish(token)[0] == 0


def test_io_that_is_not_authorized_waits_for_a_new_capability() -> None:
    with rig() as r:
        r.write(0, b"a")
        once(r, wire.OP_WRITE, wire.ST_NOT_AUTHORIZED, 1, times=2)
        tokens = [r.start("write", 0, data=b"b"), r.start("write", BLOCK, data=b"b")]
        assert all(r.finish(token)[0] == 0 for token in tokens)
        assert 1 <= len(r.seen("capability_refused")) <= 2


def test_capability_that_the_sds_cannot_judge_yet_is_presented_again() -> None:
    with rig() as r:
        once(r, wire.OP_CAPABILITY, wire.ST_NOT_READY, 1, times=3)
        r.write(0, b"a")
        assert r.sds[1].count(wire.OP_CAPABILITY) == 4
        assert not r.seen("capability_refused")


def test_renewed_capability_is_presented_while_io_goes_on() -> None:
    with rig() as r:
        r.write(0, b"a")
        r.engine.set_capability(VOLUME, b"renewed")
        r.until(lambda: r.sds[1].count(wire.OP_CAPABILITY) == 2)
        r.write(0, b"b")
        assert not r.seen("capability_refused")


# -- connections


def test_write_in_flight_when_the_connection_breaks_is_sent_again_with_its_operation_id() -> None:
    with rig() as r:
        data = os.urandom(MIB)
        once(r, wire.OP_WRITE, Close, 1)
        r.write(0, data)
        sent = [h for h in r.sds[1].seen if h["opcode"] == wire.OP_WRITE]
        assert len(sent) == 2
        assert sent[0]["op_id"] == sent[1]["op_id"]
        assert [e[:2] for e in r.seen("sds_closed")] == [("sds_closed", 1)]
        assert r.read(0, MIB) == data


def test_many_writes_survive_repeated_resets() -> None:
    with rig() as r:
        data = {n: os.urandom(3 * BLOCK) for n in range(60)}
        tokens = [r.start("write", n * 3 * BLOCK, data=block) for n, block in data.items()]
        for _ in range(5):
            r.until(lambda: r.sds[1].connections)
            before = r.sds[1].connections
            r.sds[1].reset()
            r.until(lambda before=before: r.sds[1].connections > before)
        for token in tokens:
            assert r.finish(token)[0] == 0
        for n, block in data.items():
            assert r.read(n * 3 * BLOCK, 3 * BLOCK) == block


def test_read_in_flight_when_the_connection_breaks_goes_to_the_other_copy_at_once() -> None:
    with rig() as r:
        r.write(0, b"o" * BLOCK)
        r.read(0, BLOCK)
        r.until(lambda: all(s["connected"] for s in r.engine.stats()["sds"].values()))
        r.reconnect = False
        once(r, wire.OP_READ, Close, 1)
        for _ in range(140):
            assert r.read(0, BLOCK) == b"o" * BLOCK
        assert len(r.seen("sds_closed")) == 1, "the broken one was tried and lost"


def test_sds_needed_is_told_once_and_io_waits_for_the_connection() -> None:
    with rig(sds=1) as r:
        r.reconnect = False
        tokens = [r.start("write", n * BLOCK, data=b"n") for n in range(5)]
        r.until(lambda: r.engine.stats()["parked"] == 5 and r.seen("sds_needed"))
        assert r.seen("sds_needed") == [("sds_needed", 1)]
        r.connect(1)
        assert all(r.finish(token)[0] == 0 for token in tokens)


def test_new_map_moves_what_is_in_flight_at_a_frozen_primary_to_the_new_one() -> None:
    with rig() as r:
        r.write(0, b"1" * BLOCK)
        once(r, wire.OP_WRITE, Silent, 1, times=1000)
        token = r.start("write", 0, data=b"2" * BLOCK)
        r.until(lambda: r.sds[1].count(wire.OP_WRITE) == 2)
        r.engine.set_segment(VOLUME, 0, segment((2, 2, 0)))
        assert r.finish(token)[0] == 0
        (moved,) = [h for h in r.sds[2].seen if h["opcode"] == wire.OP_WRITE]
        assert moved["op_id"] == r.sds[1].seen[-1]["op_id"]
        assert moved["seq"] == r.sds[1].seen[-1]["seq"]
        assert moved["epoch"] == 2
        assert r.engine.stats()["in_flight"] == 0


def test_no_two_unfinished_operations_have_one_place() -> None:
    """An SDS remembers one operation for each, until the next one has it."""
    with rig() as r:
        for number in range(5):
            r.write(number * BLOCK, b"1" * BLOCK)
        finished = r.sds[1].count(wire.OP_WRITE)
        for sds in (1, 2):
            once(r, wire.OP_WRITE, Silent, sds, times=1000)

        def sent(sds: int) -> list[dict[str, int]]:
            return [h for h in r.sds[sds].seen if h["opcode"] == wire.OP_WRITE]

        for number in range(20):
            r.start("write", number * BLOCK, data=b"2" * BLOCK)
        r.until(lambda: len(sent(1)) == finished + 20)
        r.engine.set_segment(VOLUME, 0, segment((2, 2, 0)))
        for number in range(20, 40):
            r.start("write", number * BLOCK, data=b"2" * BLOCK)
        r.until(lambda: len(sent(2)) == 40)
        places = {(h["op_id"], h["seq"]) for h in sent(1)[finished:] + sent(2)}
        assert len(places) == len({op_id for op_id, _ in places}) == len({place for _, place in places}) == 40
        assert all(place > 0 and op_id >> 42 == sent(1)[0]["incarnation"] for op_id, place in places)


def test_late_answer_of_the_old_primary_is_dropped_and_the_connection_stays() -> None:
    with rig() as r:
        r.write(0, b"1")
        gate = threading.Event()

        def late(header: dict[str, Any], body: bytes) -> Any:
            if header["opcode"] == wire.OP_WRITE:
                gate.wait(10)
            return None

        r.sds[1].rule = late
        token = r.start("write", 0, data=b"2")
        r.until(lambda: r.sds[1].count(wire.OP_WRITE) == 2)
        r.map = segment((2, 2, 1))
        r.engine.set_segment(VOLUME, 0, r.map)
        assert r.finish(token)[0] == 0
        gate.set()
        r.until(lambda: r.engine.stats()["sds"][1]["in_flight"] == 0)
        assert not r.seen("sds_closed")


def test_connection_that_replaces_one_is_used_and_none_is_asked_for() -> None:
    with rig() as r:
        r.write(0, b"1")
        r.until(lambda: all(s["connected"] for s in r.engine.stats()["sds"].values()))
        asked = len(r.seen("sds_needed"))
        once(r, wire.OP_WRITE, Silent, 1)
        token = r.start("write", 0, data=b"2")
        r.until(lambda: r.sds[1].count(wire.OP_WRITE) == 2)
        r.connect(1)
        assert r.finish(token)[0] == 0
        assert len(r.seen("sds_needed")) == asked
        assert not r.seen("sds_closed")
        assert r.sds[1].connections == 2


def test_removed_sds_is_closed_without_an_event_and_wanted_again_by_io() -> None:
    with rig(sds=1) as r:
        r.write(0, b"1")
        r.engine.remove_sds(1)
        r.until(lambda: not r.engine.stats()["sds"][1]["connected"])
        assert not r.seen("sds_closed")
        r.write(0, b"2")
        assert len(r.seen("sds_needed")) == 2


# -- deadlines


def test_request_without_an_answer_ends_at_its_deadline_with_eio() -> None:
    with rig(deadline=0.3) as r:
        once(r, wire.OP_WRITE, Silent, 1, times=1000)
        started = time.monotonic()
        token = r.start("write", CHUNK - 10, data=b"s" * 20)
        assert r.finish(token)[0] == errno.EIO
        assert 0.25 <= time.monotonic() - started < 5
        assert r.seen("io_error")[0][2:] == (errno.EIO, f"offset {CHUNK - 10}: no answer within the deadline")
        stats = r.engine.stats()
        assert (stats["in_flight"], stats["parked"]) == (0, 0)


def test_request_that_waits_for_map_or_connection_ends_at_its_deadline() -> None:
    with rig(deadline=0.2) as r:
        r.answer_map = False
        assert r.do("read", 0, 10)[0] == errno.EIO
        r.reconnect = False
        r.engine.set_segment(VOLUME, 0, r.map)
        assert r.do("write", 0, data=b"x")[0] == errno.EIO
        assert r.engine.stats()["parked"] == 0


def test_read_that_a_frozen_copy_does_not_answer_comes_from_the_other() -> None:
    with rig() as r:
        r.write(0, b"h" * BLOCK)
        r.read(0, BLOCK)
        r.until(lambda: all(s["connected"] for s in r.engine.stats()["sds"].values()))
        asked = r.sds[1].count(wire.OP_READ)
        r.sds[1].rule = only(wire.OP_READ, Silent)
        for _ in range(140):
            assert r.read(0, BLOCK) == b"h" * BLOCK
        assert r.sds[1].count(wire.OP_READ) == asked + 1, "one read found out, none waited after it"
        assert not r.seen("sds_closed")


FROZEN = """
import os, signal, sys, threading
from sdcengine_fakes import rig
from datapath import wire
with rig(deadline=2.5) as r:
    r.write(0, b"1")
    thawed = threading.Event()
    def late(header, body):
        if header["opcode"] == wire.OP_WRITE:
            thawed.wait(20)
    r.sds[1].rule = late
    token = r.start("write", 0, data=b"2")
    r.until(lambda: r.sds[1].count(wire.OP_WRITE) == 2)
    os.kill(os.getpid(), signal.SIGSTOP)
    thawed.set()
    sys.exit(r.finish(token)[0])
"""


def test_time_in_which_the_process_was_frozen_counts_for_no_deadline() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with running([sys.executable, "-c", FROZEN], env=environment) as child:
        os.waitpid(child.pid, os.WUNTRACED)
        frozen_at = time.monotonic()
        poll_until(lambda: time.monotonic() > frozen_at + 3.0)
        child.send_signal(signal.SIGCONT)
        assert child.wait(20) == 0


# -- hostile answers


def flipped(byte: int) -> Any:
    def rule(header: dict[str, Any], body: bytes) -> bytes | None:
        if header["opcode"] != wire.OP_READ:
            return None
        payload = bytes(header["length"])
        values = checks(header, payload)
        frame = bytearray(
            wire.pack_header(
                wire.OP_READ | wire.OP_REPLY,
                request_id=header["request_id"],
                volume_id=header["volume_id"],
                chunk_index=header["chunk_index"],
                offset=header["offset"],
                length=header["length"],
                body_length=len(values) + len(payload),
            )
            + values
            + payload
        )
        frame[byte] ^= 0x41
        return bytes(frame)

    return rule


@pytest.mark.parametrize("byte", range(80))
def test_answer_with_any_header_byte_flipped_closes_the_connection(byte: int) -> None:
    with rig(sds=1) as r:
        rule = flipped(byte)
        left = [1]

        def first(header: dict[str, Any], body: bytes) -> Any:
            answer = rule(header, body) if left[0] else None
            left[0] -= answer is not None
            return answer

        r.sds[1].rule = first
        assert r.read(0, BLOCK) == bytes(BLOCK)
        ((_, _, reason),) = r.seen("sds_closed")
        assert reason


@pytest.mark.parametrize(
    "changes",
    [
        {"request_id": 1 << 40},
        {"request_id": 0xFFFFFFFFFFFFFFFF},
        {"volume_id": 99},
        {"chunk_index": 5},
        {"offset": BLOCK},
        {"length": 2 * BLOCK, "body_length": 0, "flags": wire.FLAG_ZEROS},
        {"opcode": wire.OP_WRITE | wire.OP_REPLY, "body_length": 0, "length": 0},
        {"opcode": wire.OP_READ, "body_length": 0},
        {"opcode": wire.OP_HELLO, "length": 0, "body_length": 0},
        {"status": 16, "body_length": 0},
        {"status": wire.ST_BUSY},
        {"length": 0, "body_length": 0},
        {"body_length": BLOCK},
        {"flags": 1 << 20, "body_length": 0},
    ],
)
def test_well_sealed_answer_that_does_not_fit_closes_the_connection(changes: dict[str, int]) -> None:
    with rig(sds=1) as r:
        left = [1]

        def lie(header: dict[str, Any], body: bytes) -> bytes | None:
            if header["opcode"] != wire.OP_READ or not left[0]:
                return None
            left[0] = 0
            payload = bytes(BLOCK)
            frame = r.sds[1].reply(header, checks(header, payload) + payload, **changes)
            return frame[: 80 + changes.get("body_length", len(frame))]

        r.sds[1].rule = lie
        assert r.read(0, BLOCK) == bytes(BLOCK)
        assert len(r.seen("sds_closed")) == 1


def test_same_answer_twice_closes_the_connection_and_loses_nothing() -> None:
    with rig(sds=1) as r:
        r.write(0, b"t" * BLOCK)
        left = [1]

        def twice(header: dict[str, Any], body: bytes) -> bytes | None:
            if header["opcode"] != wire.OP_READ or not left[0]:
                return None
            left[0] = 0
            return r.sds[1].answer(header, body) * 2

        r.sds[1].rule = twice
        assert r.read(0, BLOCK) == b"t" * BLOCK
        r.until(lambda: r.seen("sds_closed"))
        assert r.seen("sds_closed") == [("sds_closed", 1, "answer to a request that was not sent")]
        assert r.read(0, BLOCK) == b"t" * BLOCK


def test_noise_on_a_connection_closes_it_and_nothing_else() -> None:
    with rig() as r:
        r.write(0, b"n" * BLOCK)
        for n in range(20):
            noise = os.urandom(1 + n * 97)
            r.sds[1].rule = only(wire.OP_WRITE, noise + bytes(80), 1)
            r.write(BLOCK, struct.pack("<I", n) * 1024)
        assert r.read(BLOCK, 4) == struct.pack("<I", 19)
        assert len(r.seen("sds_closed")) == 20


def test_volume_mapped_again_forgets_the_old_map_and_capability() -> None:
    with rig() as r:
        r.write(0, b"1")
        r.engine.remove_volume(VOLUME)
        r.map = segment((7, 2, 1))
        r.engine.add_volume(VOLUME, INODE, r.size, read_only=False, capability=b"again")
        r.write(0, b"2")
        assert [h["epoch"] for h in r.sds[2].seen if h["opcode"] == wire.OP_WRITE] == [7]
        assert len(r.seen("map_miss")) == 2
