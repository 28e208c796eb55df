"""Map segments rewritten in bulk do what an entry-by-entry rewrite does."""

from __future__ import annotations

import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdm.commands import LeaveOut
from mdm.model import Holders
from mdm.segments import (
    ENTRY,
    Entry,
    Rewriter,
    Roles,
    count_holders,
    count_roles,
    differences,
    edit,
    entry_of,
    has_roles,
)
from mdm.transition import apply
from pfvol.constants import SEGMENT_CHUNKS
from tests.support.mdm_world import small_world

TIB = 1024**4

roles = st.sampled_from([Roles(1, 2, 0, 0), Roles(2, 1, 3, 0), Roles(1, 0, 2, 2), Roles(3, 2, 0, 0xFFFF)])
entries = st.lists(st.tuples(st.integers(1, 9), roles), min_size=1, max_size=40)


def packed(rows: list[tuple[int, Roles]]) -> bytes:
    return b"".join(ENTRY.pack(epoch, *found) for epoch, found in rows)


def without_2(found: Roles) -> Roles | None:
    """2 goes; where it was not, nothing; of (3, 2) the epoch alone."""
    if found.primary == 3:
        return found
    return Roles(1, 0, 2, 2) if 2 in found.holders.members else None


@settings(max_examples=200)
@given(entries, st.sets(st.integers(0, 45)), st.booleans())
def test_a_bulk_rewrite_is_the_rewrite_of_each_entry(
    rows: list[tuple[int, Roles]], kept: set[int], singly: bool
) -> None:
    expected, counts, changed = [], Counter[Holders](), 0
    for chunk, (epoch, old) in enumerate(rows):
        new = None if chunk in kept else without_2(old)
        expected.append((epoch, old) if new is None else (epoch + 1, new))
        if new is not None:
            changed += 1
            counts[old.holders] -= 1
            counts[new.holders] += 1
    if singly:
        chunks = [chunk for chunk in range(46) if chunk not in kept]
        done = edit([packed(rows)], chunks, lambda _, entry: without_2(entry.roles))
    else:
        done = Rewriter(without_2).rewrite([packed(rows)], kept)
    assert done.entries == changed
    assert done.segments == ({0: packed(expected)} if changed else {})
    assert {key: count for key, count in done.counts.items() if count} == {
        key: count for key, count in counts.items() if count
    }


def test_equal_segments_stay_one_object_and_untouched_ones_are_not_named() -> None:
    same = packed([(1, Roles(1, 2, 0, 0))] * SEGMENT_CHUNKS)
    other = packed([(1, Roles(3, 4, 0, 0))])
    done = Rewriter(lambda found: Roles(1, 0, 2, 2) if found.primary == 1 else None).rewrite([same, same, other])
    assert done.segments.keys() == {0, 1}
    assert done.segments[0] is done.segments[1]
    assert done.entries == 2 * SEGMENT_CHUNKS


def test_a_chunk_named_twice_changes_once_and_one_outside_never() -> None:
    asked: list[int] = []

    def raised(chunk: int, entry: Entry) -> Roles:
        asked.append(chunk)
        return entry.roles

    done = edit([packed([(4, Roles(1, 2, 0, 0))])], [0, 0, 1, 5000], raised)
    assert asked == [0]
    assert entry_of([done.segments[0]], 0) == (5, (1, 2, 0, 0))


def test_counting() -> None:
    segment = packed([(1, Roles(1, 2, 0, 3)), (7, Roles(1, 2, 0, 0)), (1, Roles(2, 0, 1, 1))])
    assert count_roles([segment, segment])[Roles(1, 2, 0, 3)] == 2
    assert count_holders([segment, segment]) == {(1, 2, 0): 4, (2, 0, 1): 2}


def test_looking_for_roles() -> None:
    shifted = Roles(0x201, 0x403, 0x605, 0x807)
    segment = packed([(1, Roles(1, 2, 0, 0)), (7, shifted)])
    assert has_roles([packed([(1, Roles(1, 2, 0, 0))]), segment], shifted)
    assert not has_roles([segment], Roles(2, 1, 0, 0))
    assert not has_roles([segment], Roles(2, 0, 0, 7)), "it is there, but no entry begins so"
    assert not has_roles([], shifted)


def test_differences_are_entries_that_changed_and_not_those_that_were_added() -> None:
    new, changed = packed([(1, Roles(1, 2, 0, 0))]), packed([(2, Roles(1, 0, 2, 2))])
    assert differences({1: (new, new), 2: (new,)}, {1: (new, changed, new), 3: (new,)}) == [(1, 1)]
    assert differences({1: (new,)}, {1: (new + new, new)}) == [], "extended"
    assert differences({1: (new,)}, {1: (new + changed, changed), 2: (changed,)}) == [(1, 0), (1, 1), (2, 0)]
    assert differences({1: (new,)}, {1: (bytes(bytearray(new)),)}) == []


@pytest.mark.parametrize("exceptions", [0, 5000])
def test_one_sds_down_is_fast_for_a_tebibyte(exceptions: int) -> None:
    world, _, pool_id = small_world(sds=3, slots=10**6, capacity_bytes=4 * TIB)
    volume_id = world.volume(pool_id, size_bytes=TIB)
    kept = frozenset((volume_id, chunk * 52) for chunk in range(exceptions))
    started = time.process_time()
    done = apply(
        world.state,
        LeaveOut(keeper=1, left=2, as_primary=True, as_secondary=True, except_chunks=kept),
        world.now,
    )
    assert time.process_time() - started < 1
    assert done.result > 80_000 - exceptions
