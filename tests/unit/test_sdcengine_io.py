"""Goal: what is written through the initiator is what is read, for every shape of request, and ranges are judged as a
disk does."""

from __future__ import annotations

import errno
import os
import random
import socket
import struct

import pytest
from sdcengine_fakes import BLOCK, CHUNK, INODE, MIB, VOLUME, Silent, only, rig, segment

from datapath import histogram, wire
from datapath.initiator import BenchResult, Initiator

NATIVE = struct.Struct("=Q")


@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (0, BLOCK),
        (0, 1),
        (511, 1000),
        (BLOCK - 1, 2),
        (CHUNK - 1, 2),
        (CHUNK - 512, 1024),
        (CHUNK - BLOCK, 2 * BLOCK),
        (0, MIB),
        (512, MIB),
        (CHUNK - MIB // 2 - 7, MIB),
        (3 * CHUNK - 1, MIB),
    ],
)
def test_write_then_read_of_any_alignment_returns_the_bytes_and_spares_the_neighbours(offset: int, length: int) -> None:
    data = os.urandom(length)
    with rig() as r:
        r.write(0, b"\xaa" * MIB)
        r.write(offset, data)
        assert r.read(offset, length) == data
        if offset:
            assert r.read(offset - 1, 1) == (b"\xaa" if offset <= MIB else b"\x00")


def test_random_io_agrees_with_a_flat_buffer() -> None:
    """Writes, discards and reads at odd places, several in flight where they do not overlap."""
    seed = random.randrange(1 << 32)
    rng = random.Random(seed)
    with rig(size=12 * MIB) as r:
        mirror = bytearray(12 * MIB)
        for _ in range(120):
            offset = rng.randrange(len(mirror))
            length = min(rng.choice([1, 100, 512, 4096, 5000, 70000, MIB]), len(mirror) - offset)
            if rng.random() < 0.6:
                data = rng.randbytes(length)
                r.write(offset, data)
                mirror[offset : offset + length] = data
            elif rng.random() < 0.4:
                span = min(rng.choice([1, 4096, 10000, 6 * MIB]), len(mirror) - offset)
                assert r.do("discard", offset, span)[0] == 0
                mirror[offset : offset + span] = bytes(span)
            else:
                assert r.read(offset, length) == mirror[offset : offset + length], f"seed {seed}"
        for offset in range(0, len(mirror), MIB):
            assert r.read(offset, MIB) == mirror[offset : offset + MIB], f"seed {seed}"


def test_requests_in_flight_are_answered_each_with_its_own_data() -> None:
    with rig() as r:
        blocks = {n * BLOCK: bytes([n]) * BLOCK for n in range(200)}
        for token in [r.start("write", at, data=data) for at, data in blocks.items()]:
            assert r.finish(token)[0] == 0
        reads = {r.start("read", at, BLOCK): data for at, data in blocks.items()}
        for token, data in reads.items():
            assert r.finish(token) == (0, data)
        assert r.engine.stats()["in_flight"] == 0


def test_request_over_a_chunk_boundary_is_split_and_sent_to_each_chunks_primary() -> None:
    with rig() as r:
        r.map = segment((1, 1, 2), (5, 2, 1))
        r.write(CHUNK - 1000, b"x" * 3000)
        first = next(h for h in r.sds[1].seen if h["opcode"] == wire.OP_WRITE)
        second = next(h for h in r.sds[2].seen if h["opcode"] == wire.OP_WRITE)
        assert (first["chunk_index"], first["offset"], first["length"], first["epoch"]) == (0, CHUNK - 1000, 1000, 1)
        assert (second["chunk_index"], second["offset"], second["length"], second["epoch"]) == (1, 0, 2000, 5)
        assert first["op_id"] != second["op_id"]
        assert (first["node_id"], first["incarnation"]) == (3, 9)


def test_one_map_miss_per_segment_and_io_waits_for_it() -> None:
    with rig() as r:
        r.answer_map = False
        tokens = [r.start("write", n * BLOCK, data=b"z" * BLOCK) for n in range(8)]
        r.until(lambda: r.engine.stats()["parked"] == 8 and r.seen("map_miss"))
        assert r.seen("map_miss") == [("map_miss", VOLUME, 0)]
        r.engine.set_segment(VOLUME, 0, r.map)
        assert all(r.finish(token)[0] == 0 for token in tokens)


@pytest.mark.parametrize(
    ("kind", "offset", "length", "expected"),
    [
        ("read", 8 * MIB, 100, 0),
        ("read", 1 << 62, 100, 0),
        ("write", 8 * MIB, 1, errno.ENOSPC),
        ("write", 8 * MIB + 1, 1, errno.EFBIG),
        ("write", (1 << 64) - 1, 1, errno.EFBIG),
        ("discard", 8 * MIB, 4096, 0),
        ("seek_data", 8 * MIB, 0, errno.ENXIO),
        ("seek_hole", 9 * MIB, 0, errno.ENXIO),
    ],
)
def test_ranges_at_and_past_the_end(kind: str, offset: int, length: int, expected: int) -> None:
    with rig(size=8 * MIB) as r:
        assert r.do(kind, offset, length, b"y" * length if kind == "write" else b"") == (expected, b"")
        assert not any(sds.seen for sds in r.sds.values()), "nothing of it is sent"


def test_read_and_write_across_the_end_are_cut_short() -> None:
    with rig(size=8 * MIB) as r:
        r.write(8 * MIB - 100, b"q" * 300)
        assert r.read(8 * MIB - 100, 300) == b"q" * 100


def test_extend_opens_the_new_range_at_once() -> None:
    with rig(size=8 * MIB) as r:
        assert r.do("write", 8 * MIB, data=b"n")[0] == errno.ENOSPC
        r.engine.set_volume(VOLUME, 5 << 30, read_only=False)
        r.write(8 * MIB, b"n")
        r.write((5 << 30) - 1, b"e")
        assert ("map_miss", VOLUME, 1) in r.events, "the new segment is asked for"


def test_read_only_volume_refuses_what_changes_it() -> None:
    with rig(read_only=True) as r:
        assert r.do("write", 0, data=b"x")[0] == errno.EROFS
        assert r.do("discard", 0, BLOCK)[0] == errno.EROFS
        assert r.read(0, 10) == bytes(10)
        assert r.do("flush")[0] == 0


def test_removed_volume_gives_enodev_to_what_waits_and_what_comes() -> None:
    with rig() as r:
        r.write(0, b"a")
        for sds in r.sds.values():
            sds.rule = only(wire.OP_WRITE, Silent)
        waiting = r.start("write", 0, data=b"b")
        r.until(lambda: r.sds[1].count(wire.OP_WRITE) == 2)
        r.engine.remove_volume(VOLUME)
        assert r.finish(waiting)[0] == errno.ENODEV
        assert r.do("read", 0, 10)[0] == errno.ENODEV
        for sds in r.sds.values():
            sds.rule = None
        r.engine.add_volume(VOLUME, INODE, r.size, read_only=False, capability=b"new")
        r.write(0, b"c")
        assert r.read(0, 1) == b"c"


def test_io_of_a_volume_that_was_never_added_is_enodev() -> None:
    with rig() as r:
        r.engine.submit(99, "read", 1234, 0, 10)
        assert r.finish(99)[0] == errno.ENODEV


def test_discard_sends_whole_blocks_as_discard_and_edges_as_zeros() -> None:
    with rig() as r:
        r.write(CHUNK - MIB, b"d" * MIB)
        r.write(CHUNK, b"d" * MIB)
        for sds in r.sds.values():
            sds.seen.clear()
        assert r.do("discard", CHUNK - 10000, 20000)[0] == 0
        assert r.read(CHUNK - 10001, 1) == b"d"
        assert r.read(CHUNK - 10000, 20000) == bytes(20000)
        assert r.read(CHUNK + 10000, 1) == b"d"
        discards = [h for h in r.sds[1].seen if h["opcode"] == wire.OP_DISCARD]
        assert sorted((h["chunk_index"], h["offset"], h["length"]) for h in discards) == [
            (0, CHUNK - 2 * BLOCK, 2 * BLOCK),
            (1, 0, 2 * BLOCK),
        ]


def test_seek_finds_data_and_holes_across_chunks() -> None:
    with rig(size=40 * MIB) as r:
        r.write(17 * MIB + 5, b"data")
        block = (17 * MIB) // BLOCK * BLOCK

        def seek(kind: str, offset: int) -> int:
            error, data = r.do(kind, offset)
            assert error == 0
            return NATIVE.unpack(data)[0]

        assert seek("seek_data", 0) == block
        assert seek("seek_data", block + 100) == block + 100, "inside data it is where it is"
        assert seek("seek_hole", block + 100) == block + BLOCK
        assert seek("seek_hole", 3) == 3
        assert r.do("seek_data", block + BLOCK)[0] == errno.ENXIO
        for at in range(0, 40 * MIB, MIB):
            r.write(at, b"f" * MIB)
        assert seek("seek_hole", 0) == 40 * MIB, "the end counts as a hole"


def test_counters_and_histograms_count_each_request_once() -> None:
    with rig() as r:
        for _ in range(5):
            r.write(CHUNK - 100, b"w" * 200)
        for _ in range(3):
            r.read(0, BLOCK)
        r.do("flush")
        r.do("discard", 0, BLOCK)
        assert r.do("write", r.size, data=b"x")[0] == errno.ENOSPC
        v = r.engine.stats()["volumes"][VOLUME]
        assert (v["write_ops"], v["write_bytes"], v["read_ops"], v["read_bytes"]) == (5, 1000, 3, 3 * BLOCK)
        assert (v["flush_ops"], v["discard_ops"], v["errors"]) == (1, 1, 1)
        assert sum(v["write_histogram"]) == 5
        assert sum(v["read_histogram"]) == 3
        assert 0 < v["write_ns"] < 10e9
        assert histogram.quantile_ns(v["read_histogram"], 1.0) > 0


def test_busy_reads_use_both_copies_and_writes_only_the_primary() -> None:
    with rig() as r:
        r.write(0, b"p" * BLOCK)
        r.engine.bench(VOLUME, "read", BLOCK, 32, 0.3, BLOCK)
        assert r.finish(0)[0] == 0
        shares = [sds.count(wire.OP_READ) for sds in r.sds.values()]
        assert min(shares) * 10 >= sum(shares), shares
        assert r.sds[2].count(wire.OP_WRITE) == 0


def test_bench_runs_inside_the_engine_and_reports() -> None:
    with rig() as r:
        r.engine.bench(VOLUME, "write", BLOCK, 8, 0.2, 8 * MIB)
        error, data = r.finish(0)
        result = BenchResult(data)
        assert error == 0
        assert result.ops == r.engine.stats()["volumes"][VOLUME]["write_ops"] > 10
        assert result.errors == 0
        assert sum(result.histogram) == result.ops
        r.engine.remove_volume(VOLUME)
        r.engine.bench(VOLUME, "read", BLOCK, 4, 5.0, 8 * MIB)
        assert r.finish(0)[0] == errno.EIO, "a load that only meets errors ends at once"


def test_iops_limit_spaces_requests_and_keeps_their_order() -> None:
    with rig(iops_limit=50) as r:
        tokens = [r.start("write", n * BLOCK, data=b"l" * BLOCK) for n in range(30)]
        for token in tokens:
            assert r.finish(token)[0] == 0
        v = r.engine.stats()["volumes"][VOLUME]
        # A burst of 5, then 50 a second: the last of 30 has waited half a second.
        assert max(v["write_ns"] / 1e9, histogram.quantile_ns(v["write_histogram"], 1.0) / 1e9) >= 0.4
        order = [h["offset"] for h in r.sds[1].seen if h["opcode"] == wire.OP_WRITE]
        assert order == sorted(order)


def test_bandwidth_limit_counts_bytes_and_can_be_lifted() -> None:
    with rig(bandwidth_limit=MIB) as r:
        tokens = [r.start("write", n * MIB, data=b"l" * MIB) for n in range(12)]
        r.until(lambda: r.sds[1].count(wire.OP_WRITE) >= 1)
        assert r.sds[1].count(wire.OP_WRITE) <= 2
        r.engine.set_volume(VOLUME, r.size, read_only=False)
        for token in tokens:
            assert r.finish(token)[0] == 0
        assert max(r.engine.stats()["volumes"][VOLUME]["write_histogram"]) > 0


def test_a_volume_waits_for_its_own_limit_only() -> None:
    """Goal: one volume that has to wait long does not make another, whose limit is reached after it, wait as long."""
    with rig(bandwidth_limit=MIB // 8) as r:
        slow = [r.start("write", n * MIB, data=b"l" * MIB) for n in range(2)]
        r.until(lambda: r.sds[1].count(wire.OP_WRITE) == 1)
        other = VOLUME + 1
        r.engine.add_volume(other, INODE + 1, r.size, read_only=False, capability=r.capability, iops_limit=50)
        tokens = range(100, 110)
        for token in tokens:
            r.engine.submit(token, "write", other, token * BLOCK, data=b"q" * BLOCK)
        r.until(lambda: set(tokens) <= r.done.keys(), 4.0)
        assert slow[1] not in r.done, "8 s behind the first"


def test_stop_answers_what_is_in_flight_with_eio() -> None:
    with rig() as r:
        r.reconnect = False
        token = r.start("write", 0, data=b"s")
        r.until(lambda: r.engine.stats()["parked"] == 1)
        r.engine.stop()
        r.pump()
        assert r.done[token][0] == errno.EIO
        assert ("io_error", VOLUME, errno.EIO, "offset 0: the client was stopped") in r.events


def test_socket_handed_over_after_stop_is_closed() -> None:
    engine = Initiator(1, 1)
    engine.start()
    engine.stop()
    ours, theirs = socket.socketpair()
    with ours:
        engine.add_sds(1, theirs.detach(), 1)
        assert ours.recv(1) == b""


def test_engine_stops_twice_and_unstarted_and_starts_once() -> None:
    engine = Initiator(1, 1)
    engine.stop()
    engine.start()
    with pytest.raises(RuntimeError):
        engine.start()
    engine.stop()
    engine.stop()


def test_arguments_out_of_range_are_refused_before_they_reach_the_engine() -> None:
    engine = Initiator(1, 1)
    with pytest.raises(ValueError, match="segment"):
        engine.set_segment(1, 0, bytes(13))
    with pytest.raises(ValueError, match="bytes in one IO"):
        engine.submit(1, "read", 1, 0, MIB + 1)
    with pytest.raises(ValueError, match="capability"):
        engine.add_volume(1, 257, MIB, read_only=False, capability=bytes(5000))
    with pytest.raises(ValueError, match="SDS number"):
        engine.add_sds(0, -1, 1)
    with pytest.raises(KeyError):
        engine.submit(1, "erase", 1, 0)
    with pytest.raises(ValueError, match="depth"):
        engine.bench(1, "read", 4096, 0, 1.0, MIB)
