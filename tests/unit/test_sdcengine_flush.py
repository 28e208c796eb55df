"""Goal: a flush reaches every disk that holds unflushed writes, and never claims what a restarted server may have
lost."""

from __future__ import annotations

import errno
import time
from typing import Any

import pytest
from sdcengine_fakes import BLOCK, CHUNK, INODE, VOLUME, Close, Rig, Silent, only, rig, segment

from datapath import wire
from pfvol.constants import EPOCH_ERA


def flushes(r: Rig) -> dict[int, int]:
    return {n: sds.count(wire.OP_FLUSH) for n, sds in r.sds.items()}


def dirty(r: Rig, offset: int = 0) -> None:
    """One acknowledged write, with both connections there before it, as in a running system."""
    for n, sds in r.sds.items():
        if not sds.connections:
            r.connect(n)
    r.write(offset, b"w" * BLOCK)


def power_cycle(r: Rig, sds_id: int) -> None:
    """The SDS's host went down and came back: its durable incarnation is another, its connection new."""
    r.sds[sds_id].durable += 1
    connections = r.sds[sds_id].connections
    r.sds[sds_id].reset()
    r.until(lambda: r.sds[sds_id].connections > connections)


def hold(r: Rig, sds_id: int, *opcodes: int) -> list[dict[str, Any]]:
    """From now on the SDS does not answer the first request of each of these kinds; their headers, as they come."""
    held: list[dict[str, Any]] = []

    def rule(header: dict[str, Any], body: bytes) -> Any:
        if header["opcode"] not in opcodes or any(header["opcode"] == other["opcode"] for other in held):
            return None
        held.append(header)
        return Silent

    r.sds[sds_id].rule = rule
    return held


def test_flush_without_writes_asks_nobody() -> None:
    with rig() as r:
        r.read(0, 10)
        assert r.do("flush")[0] == 0
        assert flushes(r) == {1: 0, 2: 0}


def test_flush_reaches_both_members_once_and_then_there_is_nothing_left() -> None:
    with rig() as r:
        dirty(r)
        r.write(BLOCK, b"x")
        assert r.do("flush")[0] == 0
        assert flushes(r) == {1: 1, 2: 1}
        assert r.do("flush")[0] == 0
        assert flushes(r) == {1: 1, 2: 1}


def test_flush_reaches_only_the_pairs_that_were_written() -> None:
    with rig(sds=4) as r:
        r.map = segment((1, 1, 2), (1, 3, 4))
        dirty(r, CHUNK)
        assert r.do("flush")[0] == 0
        assert flushes(r) == {1: 0, 2: 0, 3: 1, 4: 1}


def test_discard_is_flushed_like_a_write() -> None:
    with rig() as r:
        r.connect(1)
        r.connect(2)
        assert r.do("discard", 0, BLOCK)[0] == 0
        assert r.do("flush")[0] == 0
        assert flushes(r) == {1: 1, 2: 1}


def test_flush_fails_when_both_of_a_pair_lost_their_memory_and_says_so_once() -> None:
    with rig() as r:
        dirty(r)
        power_cycle(r, 1)
        power_cycle(r, 2)
        assert r.do("flush")[0] == errno.EIO
        assert "lost" in r.seen("io_error")[0][3]
        assert r.do("flush")[0] == 0
        dirty(r)
        assert r.do("flush")[0] == 0


def test_flush_succeeds_while_one_of_the_pair_kept_its_memory() -> None:
    for lost in (1, 2):
        with rig() as r:
            dirty(r)
            power_cycle(r, lost)
            assert r.do("flush")[0] == 0, f"SDS {lost} restarted"


def test_flush_judges_each_pair_by_itself() -> None:
    """1 and 3 restart: pairs (1, 2) and (3, 4) keep a copy each, pair (1, 3) has none."""
    with rig(sds=4) as r:
        r.map = segment((1, 1, 2), (1, 3, 4), (1, 1, 3))
        dirty(r, 0)
        dirty(r, CHUNK)
        power_cycle(r, 1)
        power_cycle(r, 3)
        assert r.do("flush")[0] == 0
        dirty(r, 2 * CHUNK)
        power_cycle(r, 1)
        power_cycle(r, 3)
        assert r.do("flush")[0] == errno.EIO


def test_process_restart_without_a_host_restart_loses_nothing() -> None:
    with rig() as r:
        dirty(r)
        r.sds[1].reset()
        r.sds[2].reset()
        r.until(lambda: all(sds.connections == 2 for sds in r.sds.values()))
        assert r.do("flush")[0] == 0


def test_disk_that_refuses_a_flush_does_not_count() -> None:
    with rig() as r:
        dirty(r)
        r.sds[1].rule = only(wire.OP_FLUSH, wire.ST_IO_ERROR)
        assert r.do("flush")[0] == 0
        dirty(r)
        r.sds[2].rule = only(wire.OP_FLUSH, wire.ST_IO_ERROR)
        assert r.do("flush")[0] == errno.EIO


def test_flush_of_a_pair_with_one_member_gone_succeeds_soon_from_the_other() -> None:
    with rig(deadline=20) as r:
        dirty(r)
        r.reconnect = False
        r.sds[2].reset()
        r.until(lambda: r.seen("sds_closed"))
        assert r.do("flush")[0] == 0
        assert flushes(r)[1] == 1


def test_flush_with_both_members_gone_waits_for_one_of_them() -> None:
    with rig(deadline=20) as r:
        dirty(r)
        r.reconnect = False
        r.sds[1].reset()
        r.sds[2].reset()
        r.until(lambda: len(r.seen("sds_closed")) == 2)
        token = r.start("flush")
        r.until(lambda: r.engine.stats()["parked"] == 2)
        r.connect(2)
        assert r.finish(token)[0] == 0


def test_flush_in_flight_when_the_connection_breaks_is_asked_again() -> None:
    with rig() as r:
        dirty(r)
        r.sds[1].rule = only(wire.OP_FLUSH, Close, 1)
        assert r.do("flush")[0] == 0
        assert flushes(r)[1] == 2


def test_flush_that_times_out_leaves_the_writes_to_the_next_one() -> None:
    with rig(deadline=0.3) as r:
        dirty(r)
        for sds in r.sds.values():
            sds.rule = only(wire.OP_FLUSH, Silent, 1)
        assert r.do("flush")[0] == errno.EIO
        assert r.do("flush")[0] == 0
        assert flushes(r) == {1: 2, 2: 2}


def test_write_during_a_flush_is_left_for_the_next_flush() -> None:
    with rig() as r:
        dirty(r)
        held: list[dict[str, Any]] = []

        def hold(header: dict[str, Any], body: bytes) -> Any:
            if header["opcode"] != wire.OP_FLUSH or held:
                return None
            held.append(header)
            return Silent

        r.sds[1].rule = hold
        token = r.start("flush")
        r.until(lambda: held)
        r.write(BLOCK, b"later")
        r.sds[1]._socket.sendall(r.sds[1].reply(held[0]))  # type: ignore[union-attr]
        assert r.finish(token)[0] == 0
        assert r.do("flush")[0] == 0
        assert flushes(r) == {1: 2, 2: 2}


def test_concurrent_flushes_each_cover_the_writes_before_them() -> None:
    """The second began while the first was under way: it must not take the first's word for writes it did not see
    end."""
    with rig() as r:
        dirty(r)
        tokens = []
        for n in range(10):
            tokens.append(r.start("flush"))
            tokens.append(r.start("write", n * BLOCK, data=b"m"))
        assert all(r.finish(token)[0] == 0 for token in tokens)
        assert r.do("flush")[0] == 0
        count = flushes(r)
        assert r.do("flush")[0] == 0
        assert flushes(r) == count, "nothing is dirty any more"


def test_single_copy_chunk_needs_its_one_server() -> None:
    with rig() as r:
        r.map = segment((1, 1, 0))
        dirty(r)
        power_cycle(r, 1)
        assert r.do("flush")[0] == errno.EIO


def test_secondary_never_connected_cannot_vouch() -> None:
    """What it had when the write was sent is not known, so its word alone proves nothing."""
    with rig() as r:
        r.reconnect = False
        r.connect(1)
        r.write(0, b"w")
        r.reconnect = True
        r.connect(2)
        power_cycle(r, 1)
        assert r.do("flush")[0] == errno.EIO


def test_flush_of_a_read_only_and_a_removed_volume() -> None:
    with rig(read_only=True) as r:
        assert r.do("flush")[0] == 0
        r.engine.remove_volume(VOLUME)
        assert r.do("flush")[0] == errno.ENODEV


# -- a write whose flush is expected


def log_writes(r: Rig, count: int) -> None:
    """A database's log: each write is flushed before the next."""
    for n in range(count):
        dirty(r, n * BLOCK)
        assert r.do("flush")[0] == 0


def commits(r: Rig) -> list[bool]:
    """Of each write that the primary was sent: whether it had to be on both disks before its answer."""
    return [bool(h["flags"] & wire.FLAG_COMMIT) for h in r.sds[1].seen if h["opcode"] == wire.OP_WRITE]


def test_write_after_four_flushed_ones_is_committed_at_once_and_its_flush_asks_nobody() -> None:
    with rig() as r:
        log_writes(r, 4)
        assert flushes(r) == {1: 4, 2: 4}
        log_writes(r, 3)
        assert commits(r) == [False] * 4 + [True] * 3
        assert flushes(r) == {1: 4, 2: 4}


def test_committed_write_survives_the_loss_of_both_memories() -> None:
    with rig() as r:
        log_writes(r, 4)
        dirty(r)
        power_cycle(r, 1)
        power_cycle(r, 2)
        assert r.do("flush")[0] == 0


def test_second_write_without_a_flush_between_ends_the_expectation() -> None:
    with rig() as r:
        log_writes(r, 4)
        dirty(r)
        dirty(r, BLOCK)
        assert commits(r)[4:] == [True, False]
        assert r.do("flush")[0] == 0
        assert flushes(r) == {1: 5, 2: 5}, "the second of them is in memory only"
        log_writes(r, 5)
        assert commits(r)[6:] == [False] * 4 + [True], "it has to be earned anew"


def test_flush_without_a_write_before_it_ends_the_expectation() -> None:
    with rig() as r:
        log_writes(r, 4)
        assert r.do("flush")[0] == 0
        dirty(r)
        assert commits(r)[-1] is False


@pytest.mark.parametrize("answer", [wire.ST_BUSY, wire.ST_NOT_READY, wire.ST_STALE_MAP, Close])
def test_write_that_is_sent_again_is_committed_again(answer: Any) -> None:
    """A flush relies on it, whichever of the sendings was the one that was taken."""
    with rig() as r:
        log_writes(r, 4)
        r.sds[1].rule = only(wire.OP_WRITE, answer, 1)
        log_writes(r, 1)
        assert commits(r)[4:] == [True, True]
        assert flushes(r) == {1: 4, 2: 4}


def test_large_writes_and_discards_are_left_to_their_flush() -> None:
    with rig() as r:
        log_writes(r, 4)
        r.write(0, b"b" * (128 * 1024 + BLOCK))
        assert r.do("flush")[0] == 0
        assert r.do("discard", 0, 2 * BLOCK)[0] == 0
        assert r.do("flush")[0] == 0
        assert commits(r) == [False] * 5
        assert flushes(r) == {1: 6, 2: 6}
        r.write(0, b"b" * 128 * 1024)
        assert commits(r)[-1] is True


def test_expectation_is_of_one_volume() -> None:
    with rig() as r:
        r.engine.add_volume(VOLUME + 1, INODE + 1, r.size, read_only=False, capability=r.capability)
        log_writes(r, 4)
        r.engine.submit(0, "write", VOLUME + 1, 0, 0, b"o" * BLOCK)
        assert r.finish(0) == (0, b"")
        dirty(r)
        assert commits(r)[4:] == [False, True]


# -- servers that leave a set, come back, or hang


def told(r: Rig, *entry: int) -> None:
    """The map has changed, and the engine has taken it."""
    r.map = segment((entry[0], entry[1], entry[2]))
    r.engine.set_segment(VOLUME, 0, r.map)


def gone(r: Rig, sds_id: int) -> None:
    """The SDS's process is not there, and does not come back until it is connected."""
    r.reconnect = False
    closed = len(r.seen("sds_closed"))
    r.sds[sds_id].reset()
    r.until(lambda: len(r.seen("sds_closed")) > closed)


def test_flush_of_a_server_that_hangs_ends_when_its_peer_vouches() -> None:
    with rig(deadline=20) as r:
        dirty(r)
        r.sds[1].rule = only(wire.OP_FLUSH, Silent)
        started = time.monotonic()
        assert r.do("flush")[0] == 0
        assert 0.9 <= time.monotonic() - started < 5
        assert r.engine.stats()["sds"][1]["in_flight"] == 1, "its answer is still known when it comes"
        assert not r.seen("sds_closed")


def test_flush_of_the_only_server_that_hangs_is_waited_for() -> None:
    with rig(deadline=1.6) as r:
        r.map = segment((1, 1, 0))
        dirty(r)
        r.sds[1].rule = only(wire.OP_FLUSH, Silent, 1)
        assert r.do("flush")[0] == errno.EIO
        assert r.do("flush")[0] == 0


def test_flush_of_a_server_that_hangs_and_is_out_of_the_set_does_not_wait_a_second() -> None:
    with rig(deadline=20) as r:
        dirty(r)
        told(r, 2, 2, 0)
        r.sds[1].rule = only(wire.OP_FLUSH, Silent)
        started = time.monotonic()
        assert r.do("flush")[0] == 0
        assert time.monotonic() - started < 0.9


def test_server_is_asked_after_all_when_who_vouched_for_it_leaves_before_the_flush_ends() -> None:
    with rig(sds=3) as r:
        r.map = segment((1, 1, 2), (1, 3, 0))
        dirty(r)
        r.write(CHUNK, b"w")
        for n in (1, 3):
            r.sds[n].rule = only(wire.OP_FLUSH, Silent, times=1)
        token = r.start("flush")
        r.until(lambda: flushes(r) == {1: 1, 2: 1, 3: 1})
        asked = time.monotonic()
        r.until(lambda: time.monotonic() - asked > 1.5)  # 2 has vouched for 1 by now; 3 is still waited for
        r.engine.set_segment(VOLUME, 0, segment((2, 1, 0), (1, 3, 0)))
        r.sds[3].reset()  # it is asked again, and answers
        assert r.finish(token)[0] == 0
        assert flushes(r) == {1: 2, 2: 1, 3: 2}


def test_late_answer_to_a_flush_that_was_spared_is_dropped_and_the_connection_stays() -> None:
    with rig(deadline=20) as r:
        dirty(r)
        held = hold(r, 1, wire.OP_FLUSH)
        assert r.do("flush")[0] == 0
        r.sds[1]._socket.sendall(r.sds[1].reply(held[0]))  # type: ignore[union-attr]
        r.until(lambda: r.engine.stats()["sds"][1]["in_flight"] == 0)
        assert not r.seen("sds_closed")


def test_server_that_was_out_of_the_set_does_not_vouch_for_one_that_has_lost_its_memory() -> None:
    """2 was left out, 1 went on alone and lost its memory: what 2 still has will be replaced by what 1 has."""
    for back in (False, True):
        with rig() as r:
            dirty(r)
            told(r, 2, 1, 0)
            if back:
                told(r, 3, 1, 2)
            power_cycle(r, 1)
            assert r.do("flush")[0] == errno.EIO, f"2 came back: {back}"


def test_change_of_the_map_that_was_missed_counts_as_having_been_out() -> None:
    with rig() as r:
        dirty(r)
        told(r, 3, 1, 2)
        power_cycle(r, 1)
        assert r.do("flush")[0] == errno.EIO


@pytest.mark.parametrize(("epoch", "expected"), [(3, 0), (4, errno.EIO)])
def test_primary_may_have_been_out_when_three_changes_were_missed(epoch: int, expected: int) -> None:
    """Out, back as a secondary, and leading again: 2, alone meanwhile, lost its memory."""
    with rig() as r:
        dirty(r)
        told(r, epoch, 1, 2)
        power_cycle(r, 2)
        assert r.do("flush")[0] == expected


def test_server_that_stayed_vouches_though_the_other_lost_its_memory() -> None:
    with rig() as r:
        dirty(r)
        told(r, 2, 2, 0)
        power_cycle(r, 1)
        assert r.do("flush")[0] == 0


def test_server_that_left_the_set_of_another_chunk_vouches_still() -> None:
    """Copies move all the time. Of the chunk that was written, 2 has been a member throughout."""
    with rig(sds=3) as r:
        r.map = segment((1, 1, 2), (1, 1, 2), (1, 2, 3), (1, 1, 2))
        dirty(r)
        r.map = segment((1, 1, 2), (2, 1, 3), (2, 3, 0), (1, 1, 2))
        r.engine.set_segment(VOLUME, 0, r.map)
        r.do("seek_data")  # the map has been taken when this is answered
        power_cycle(r, 1)
        assert r.do("flush")[0] == 0


def test_server_that_left_with_another_partner_does_not_vouch_for_the_first_one() -> None:
    """Written to {1, 2}, moved to {2, 3}, then to 3 alone, which lost its memory."""
    with rig(sds=3) as r:
        dirty(r)
        for entry in ((2, 2, 3), (3, 3, 0)):
            told(r, *entry)
            r.do("seek_data")
        power_cycle(r, 3)
        assert r.do("flush")[0] == errno.EIO


def test_learner_given_or_taken_away_changes_nobodys_word() -> None:
    with rig() as r:
        dirty(r)
        told(r, 2, 1, 2)
        power_cycle(r, 1)
        assert r.do("flush")[0] == 0


def test_write_sent_before_a_server_left_is_not_vouched_for_by_it() -> None:
    """Sent to {1, 2}, acknowledged by 1 when 2 was out already."""
    with rig() as r:
        r.connect(1)
        r.connect(2)
        held = hold(r, 1, wire.OP_WRITE)
        token = r.start("write", 0, data=b"w" * BLOCK)
        r.until(lambda: held)
        told(r, 2, 1, 0)
        r.do("seek_data")  # the map has been taken when this is answered
        r.sds[1]._socket.sendall(r.sds[1].reply(held[0]))  # type: ignore[union-attr]
        assert r.finish(token)[0] == 0
        power_cycle(r, 1)
        assert r.do("flush")[0] == errno.EIO


def test_write_acknowledged_during_a_flush_is_judged_by_the_next_one_that_begins_meanwhile() -> None:
    """As above, but acknowledged while a flush is under way that other writes of the pair have begun."""
    with rig(deadline=20) as r:
        r.connect(1)
        r.connect(2)
        held = hold(r, 1, wire.OP_WRITE, wire.OP_FLUSH)
        token = r.start("write", 0, data=b"w" * BLOCK)
        r.until(lambda: held)
        told(r, 2, 1, 0)
        told(r, 3, 1, 2)
        r.write(BLOCK, b"v" * BLOCK)
        r.sds[2].rule = only(wire.OP_FLUSH, Silent, times=1)
        first = r.start("flush")
        r.until(lambda: flushes(r) == {1: 1, 2: 1})
        r.sds[1]._socket.sendall(r.sds[1].reply(held[0]))  # type: ignore[union-attr]
        assert r.finish(token)[0] == 0
        power_cycle(r, 1)
        assert r.do("flush")[0] == errno.EIO
        r.sds[2].reset()  # the first one is asked again, and answered
        r.finish(first)


def test_processes_that_die_one_after_the_other_cost_no_flush() -> None:
    """Nobody's memory was lost, though each has been out of the set."""
    with rig(deadline=20) as r:
        dirty(r)
        told(r, 2, 1, 0)
        r.sds[2].reset()
        r.until(lambda: r.sds[2].connections == 2)
        r.write(BLOCK, b"alone")
        told(r, 3, 1, 2)
        told(r, 4, 2, 0)
        r.sds[1].reset()
        r.until(lambda: r.sds[1].connections == 2)
        assert r.do("flush")[0] == 0
        assert all(flushes(r).values())


def test_secondary_never_connected_and_processes_that_die_cost_no_flush() -> None:
    """What it had is not known, but nobody is known to have lost anything."""
    with rig(deadline=20) as r:
        r.reconnect = False
        r.connect(1)
        r.write(0, b"w")
        r.reconnect = True
        r.connect(2)
        told(r, 2, 2, 0)
        r.sds[1].reset()
        r.until(lambda: r.sds[1].connections == 2)
        assert r.do("flush")[0] == 0


def test_engine_flushes_by_itself_when_a_secondary_was_not_known() -> None:
    """From then on its word counts, should the primary go for good."""
    with rig(deadline=20) as r:
        r.reconnect = False
        r.connect(1)
        r.write(0, b"w")
        r.connect(2)
        r.until(lambda: flushes(r) == {1: 1, 2: 1})
        r.until(lambda: r.engine.stats()["sds"][1]["in_flight"] == 0)
        r.write(0, b"x")
        gone(r, 1)
        told(r, 2, 2, 0)
        assert r.do("flush")[0] == 0


def test_server_that_joins_is_flushed_too() -> None:
    """It has in its memory what it learned: if it is alone one day, that must be on its disks."""
    with rig() as r:
        r.map = segment((1, 1, 0))
        dirty(r)
        told(r, 2, 1, 2)
        assert r.do("flush")[0] == 0
        assert flushes(r) == {1: 1, 2: 1}


def test_engine_flushes_by_itself_when_the_sets_have_changed() -> None:
    """So that the word of a server that goes later, for good, is not needed any more."""
    with rig(deadline=20) as r:
        r.map = segment((1, 1, 0))
        dirty(r)
        told(r, 2, 1, 2)
        r.until(lambda: flushes(r) == {1: 1, 2: 1})
        r.until(lambda: r.engine.stats()["sds"][1]["in_flight"] == 0)
        assert r.engine.stats()["volumes"][VOLUME]["flush_ops"] == 0
        gone(r, 1)
        told(r, 3, 2, 0)
        assert r.do("flush")[0] == 0
        assert flushes(r) == {1: 1, 2: 1}, "nothing was dirty any more"


def test_loss_that_the_engine_finds_by_itself_is_told_to_the_next_flush() -> None:
    with rig() as r:
        dirty(r)
        power_cycle(r, 1)
        power_cycle(r, 2)
        told(r, 2, 1, 0)
        r.until(lambda: r.sds[1].count(wire.OP_FLUSH))
        r.until(lambda: r.engine.stats()["sds"][1]["in_flight"] == 0)
        assert not r.seen("io_error")
        assert r.do("flush")[0] == errno.EIO
        assert r.do("flush")[0] == 0


@pytest.mark.parametrize(("entry", "there"), [((2, 2, 0), False), ((2, 2, 0), True), ((5, 2, 1), True)])
def test_what_was_written_before_an_older_copy_was_forced_is_told_of_as_lost(
    entry: tuple[int, int, int], there: bool
) -> None:
    """1 had it alone; 2, which had left, was made to serve. 1 may be gone, or come back and say that its disk has all
    of it, and changes of the map may have been missed."""
    with rig(deadline=20) as r:
        r.map = segment((1, 1, 0))
        dirty(r)
        if not there:
            gone(r, 1)
        told(r, EPOCH_ERA + entry[0], *entry[1:])
        started = time.monotonic()
        assert r.do("flush")[0] == errno.EIO
        assert time.monotonic() - started < 5
        assert r.seen("forced") == [("forced", VOLUME, 0)]
        assert r.do("flush")[0] == 0, "it is told once"
        if there:
            dirty(r)
        else:
            r.write(0, b"w" * BLOCK)
        assert r.do("flush")[0] == 0


def test_a_forced_copy_is_no_loss_for_what_was_flushed() -> None:
    with rig() as r:
        r.map = segment((1, 1, 0))
        dirty(r)
        assert r.do("flush")[0] == 0
        told(r, EPOCH_ERA + 2, 2, 0)
        r.until(lambda: r.seen("forced"))
        assert r.do("flush")[0] == 0
