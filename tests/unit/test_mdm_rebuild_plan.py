"""The rebuild plan: a place is found whenever there is one, never beside the other copy, and evenly."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from mdm.matching import deal, match
from mdm.model import Holders
from mdm.placement import Candidate, place
from mdm.rebuild import BATCH_CHUNKS, BATCH_SLOTS, ENTRY, Domain, Plan, Server, VolumeUse, plan, survey
from pfvol.constants import SEGMENT_CHUNKS, SEGMENT_ENTRY_BYTES

POOL, VOLUME = 1, 1
TIB_CHUNKS = 262_144


class Cluster:
    """SDSs and one volume, whose chunks are [primary, secondary, learner], carried from plan to plan."""

    def __init__(
        self,
        chunks: list[list[int]],
        slots: Mapping[int, int],
        *,
        fault_sets: Mapping[int, int] | None = None,
        full: float = 1.0,
    ) -> None:
        self.chunks = chunks
        self.slots = dict(slots)
        self.fault_sets = fault_sets or {}
        self.down: set[int] = set()
        self.away: set[int] = set()
        self.removing: set[int] = set()
        self.paused: set[int] = set()
        self.full = full
        self.evening = False

    @classmethod
    def placed(cls, chunks: int, slots: Mapping[int, int], **fields: float) -> Cluster:
        found = place(
            chunks,
            [Candidate(sds_id=key, fault_set_id=None, weight=size, limit=size) for key, size in slots.items()],
            first_chunk=0,
            seed=1,
        )
        assert found is not None
        entries = ENTRY.iter_unpack(b"".join(found.pieces))
        return cls([[primary, secondary, 0] for _, primary, secondary, _, _ in entries], slots, **fields)

    def lose(self, sds_id: int, *, away: bool = True) -> None:
        """The SDS goes DOWN and is left out of all sets."""
        self.down.add(sds_id)
        if away:
            self.away.add(sds_id)
        for chunk in self.chunks:
            if sds_id in chunk[:2] and chunk[1]:
                chunk[:] = [chunk[0] if chunk[1] == sds_id else chunk[1], 0, sds_id]

    def copies(self) -> Counter[int]:
        return Counter(sds_id for chunk in self.chunks for sds_id in chunk if sds_id)

    def domain(self) -> Domain:
        copies = self.copies()
        servers = {
            key: Server(
                sds_id=key,
                fault_set_id=self.fault_sets.get(key),
                slots=size,
                room=max(0, size - round(copies[key] * self.full)),
                copies=copies[key],
                up=key not in self.down,
                removing=key in self.removing,
            )
            for key, size in self.slots.items()
        }
        entries = Counter(Holders(*chunk) for chunk in self.chunks)
        return Domain(
            servers=servers,
            volumes=[VolumeUse(volume_id=VOLUME, pool_id=POOL, full=self.full, entries=entries)],
            away={POOL: frozenset(self.away)},
            paused=frozenset(self.paused),
            evening=self.evening,
        )

    def plan(self) -> Plan:
        packed = b"".join(ENTRY.pack(7, *chunk, 0) for chunk in self.chunks)
        step = SEGMENT_CHUNKS * SEGMENT_ENTRY_BYTES
        found = plan(self.domain(), {VOLUME: [packed[at : at + step] for at in range(0, len(packed), step)]})
        self.evening = found.evening
        return found

    def assign(self, found: Plan) -> int:
        """As ``SetLearners`` does; the chunks that got one."""
        before = self.copies()
        for chunk, epoch, learner in found.choices.get(VOLUME, []):
            assert epoch == 7
            assert learner not in self.chunks[chunk], "not where a copy is, nor where a learner is already"
            assert learner == 0 or (learner not in self.down and learner not in self.removing)
            self.chunks[chunk][2] = learner
        after = self.copies()
        for key in self.slots:
            assert after[key] <= max(before[key], self.slots[key]) or self.full < 1, f"SDS {key} is promised too much"
        return len(found.choices.get(VOLUME, []))

    def join(self) -> None:
        """As ``JoinLearners`` does, for every learner that is UP."""
        domain = self.domain()
        for chunk in self.chunks:
            primary, secondary, learner = chunk
            if not learner or learner in self.down or primary in self.down:
                continue
            if not secondary:
                chunk[:] = [primary, learner, 0]
            else:
                goes = domain.leaver(Holders(*chunk))
                chunk[:] = [secondary if goes == primary else primary, learner, 0]

    def settle(self, rounds: int = 2000) -> Plan:
        """Plans, assigns and joins until nothing is left to do."""
        for _ in range(rounds):
            found = self.plan()
            if not self.assign(found):
                return found
            self.join()
        raise AssertionError("it does not come to an end")

    def whole(self) -> bool:
        return all(
            chunk[1] and not {*chunk[:2]} & (self.down | self.removing) and chunk[0] != chunk[1]
            for chunk in self.chunks
        )


# -- matching


@given(
    demands=st.dictionaries(st.integers(1, 4), st.integers(0, 3), max_size=4),
    room=st.dictionaries(st.integers(1, 5), st.integers(0, 3), max_size=5),
    sets=st.lists(st.integers(0, 2), min_size=6, max_size=6),
)
@settings(max_examples=300)
def test_matching_places_all_that_can_be_and_avoids_what_it_can(
    demands: dict[int, int], room: dict[int, int], sets: list[int]
) -> None:
    """Goal: as many copies as any assignment has, with as few in one fault set; brute force over single copies."""

    def penalty(demand: int, target: int) -> int | None:
        return None if demand == target else int(sets[demand] == sets[target])

    found = match(demands, room, penalty)
    for demand, count in demands.items():
        assert sum(placed for (key, _), placed in found.items() if key == demand) <= count
    for target, slots in room.items():
        assert sum(placed for (_, key), placed in found.items() if key == target) <= slots
    assert all(penalty(*pair) is not None and count > 0 for pair, count in found.items())
    best = {(0, 0, tuple(sorted(room.items())))}
    for demand, count in demands.items():
        for _ in range(count):
            nexts = set(best)
            for placed, price, left in best:
                slots = dict(left)
                for target in slots:
                    cost = penalty(demand, target)
                    if cost is not None and slots[target]:
                        rest = tuple(sorted((slots | {target: slots[target] - 1}).items()))
                        nexts.add((placed + 1, price + cost, rest))
            best = nexts
    most = max(placed for placed, _, _ in best)
    least = min(price for placed, price, _ in best if placed == most)
    total = sum(found.values())
    assert (total, sum(count * (penalty(*pair) or 0) for pair, count in found.items())) == (most, least)


@given(count=st.integers(0, 100), weights=st.lists(st.integers(0, 50), min_size=1).filter(any))
def test_parts_add_up_and_keep_their_bounds(count: int, weights: list[int]) -> None:
    """Goal: dealing loses nothing, and never gives more than there is room for."""
    parts = deal(count, weights)
    assert sum(parts) == count
    if count <= sum(weights):
        assert all(part <= weight for part, weight in zip(parts, weights, strict=True))


# -- lost copies


def test_scenario_b_has_two_copies_again_with_no_slot_left() -> None:
    """Goal: 4 SDSs of 2 GiB, two thick volumes of 1.5 GiB: the three that remain are filled to the last slot."""
    cluster = Cluster.placed(768, dict.fromkeys((1, 2, 3, 4), 512))
    cluster.lose(2)
    cluster.settle()
    assert cluster.whole()
    assert cluster.copies() == {1: 512, 3: 512, 4: 512}


@given(
    slots=st.lists(st.integers(0, 6), min_size=3, max_size=5),
    pairs=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=8),
    lost=st.integers(1, 5),
)
@settings(max_examples=400)
def test_a_solution_is_found_exactly_when_there_is_one(
    slots: list[int], pairs: list[tuple[int, int]], lost: int
) -> None:
    """Goal: whatever lies where, all chunks have two copies in the end if and only if their SDSs can hold them."""
    count = len(slots)
    chunks = [[one, other, 0] for one, other in pairs if one != other and max(one, other) <= count]
    if not chunks or lost > count:
        return
    used = Counter(sds_id for chunk in chunks for sds_id in chunk if sds_id)
    cluster = Cluster(chunks, {key: max(size, used[key]) for key, size in enumerate(slots, 1)})
    cluster.lose(lost)
    end = cluster.settle()
    left = [size for key, size in cluster.slots.items() if key != lost]
    n = len(chunks)
    assert cluster.whole() is (sum(min(size, n) for size in left) >= 2 * n)
    work = end.work[POOL]
    assert (work.unplaced > 0, work.reason is not None) == (not cluster.whole(),) * 2


def test_other_fault_sets_whenever_room_allows() -> None:
    """Goal: no two copies in one fault set while there is a choice; with none, the copy is made all the same."""
    sets = {1: 1, 2: 1, 3: 2, 4: 2, 5: 3, 6: 3}
    chunks = [[one, other, 0] for one, other in product((1, 2), (3, 4)) for _ in range(25)]
    cluster = Cluster(chunks, dict.fromkeys(sets, 200), fault_sets=sets)
    cluster.lose(3)
    cluster.settle()
    assert cluster.whole()
    assert all(sets[one] != sets[other] for one, other, _ in cluster.chunks)
    crowded = Cluster([[1, 3, 0] for _ in range(50)], dict.fromkeys((1, 2, 3), 100), fault_sets=sets)
    crowded.lose(3)
    crowded.settle()
    assert crowded.whole()


def test_an_sds_is_waited_for_and_a_returning_one_stays_the_learner() -> None:
    """Goal: within the delay nobody else gets the copies; an SDS that is back is what learns."""
    cluster = Cluster.placed(100, dict.fromkeys((1, 2, 3), 200))
    cluster.lose(2, away=False)
    found = cluster.plan()
    assert (found.choices, found.work[POOL].waiting > 50, found.work[POOL].copying) == ({}, True, 0)
    cluster.down.clear()
    found = cluster.plan()
    assert (found.choices, found.work[POOL].waiting, found.work[POOL].copying > 50) == ({}, 0, True)


def test_only_free_slots_beside_the_other_copy_says_so() -> None:
    """Goal: STALLED has a reason that says what is missing."""
    cluster = Cluster([[1, 2, 0] for _ in range(4)], {1: 8, 2: 4, 3: 2})
    cluster.lose(2)
    work = cluster.settle().work[POOL]
    assert work.unplaced == 2
    assert work.reason == "the only free slots are on the SDS that has the other copy"
    alone = Cluster([[1, 2, 0]], {1: 8, 2: 4})
    alone.lose(2)
    assert alone.settle().work[POOL].reason == "there is no other SDS that is UP"


def test_a_copy_makes_room_where_slots_are_left_only_beside_the_other_one() -> None:
    """Goal: chunks on SDS 1 need a place, only SDS 1 has room: a copy of another chunk moves there first."""
    cluster = Cluster([[1, 4, 0], [1, 4, 0], [2, 3, 0], [2, 3, 0]], {1: 4, 2: 2, 3: 2, 4: 2})
    cluster.lose(4)
    cluster.settle()
    assert cluster.whole()


def test_what_nobody_serves_or_was_not_left_out_yet_is_left_alone() -> None:
    """Goal: no learner for a chunk without a copy that serves, nor for a pair that has not been parted."""
    cluster = Cluster([[1, 0, 2], [3, 4, 0]], dict.fromkeys((1, 2, 3, 4), 9))
    cluster.down = cluster.away = {1, 4}
    found = cluster.plan()
    assert (found.choices, found.work[POOL].lost, found.work[POOL].waiting) == ({}, 1, 1)


def test_a_cancelled_pool_is_left_alone() -> None:
    cluster = Cluster.placed(100, dict.fromkeys((1, 2, 3), 200))
    cluster.lose(2)
    cluster.paused = {POOL}
    found = cluster.plan()
    assert (found.choices, found.work[POOL].wanted > 50) == ({}, True)


# -- SDSs that go and come


def test_a_removed_sds_is_emptied() -> None:
    """Goal: all its copies are elsewhere in the end, also of chunks whose other copy is to go too."""
    cluster = Cluster.placed(300, dict.fromkeys((1, 2, 3, 4, 5), 200))
    cluster.removing = {1, 2}
    cluster.settle()
    assert cluster.whole()


def test_single_copies_come_before_those_that_only_move() -> None:
    """Goal: one place is left; the chunk with one copy gets it."""
    cluster = Cluster([[1, 2, 0], [1, 4, 0]], {1: 2, 2: 1, 3: 1, 4: 1})
    cluster.lose(4)
    cluster.removing = {2}
    assert cluster.plan().choices == {VOLUME: [(1, 7, 3)]}


def test_a_new_sds_gets_its_share_and_then_it_is_quiet() -> None:
    """Goal: shares by capacity are even within two chunks, and nothing moves any more."""
    cluster = Cluster.placed(3000, dict.fromkeys((1, 2, 3), 4000))
    cluster.slots[4] = 2000
    cluster.settle()
    copies = cluster.copies()
    assert cluster.whole()
    for key, size in cluster.slots.items():
        assert abs(copies[key] - 6000 * size / 14000) <= 3, copies
    assert cluster.plan().choices == {}


def test_evenness_never_puts_two_copies_in_one_fault_set() -> None:
    sets = {1: 1, 2: 1, 3: 2, 4: 2}
    cluster = Cluster([[1, 3, 0] for _ in range(300)], dict.fromkeys((1, 2, 3), 400), fault_sets=sets)
    cluster.slots[4] = 400
    cluster.settle()
    assert all(sets[one] != sets[other] for one, other, _ in cluster.chunks)
    assert max(cluster.copies().values()) <= 152


def test_a_learner_that_is_gone_is_taken_back_from_a_chunk_that_has_two_copies() -> None:
    cluster = Cluster([[1, 2, 3]], dict.fromkeys((1, 2, 3), 9))
    cluster.down = {3}
    assert cluster.plan().choices == {VOLUME: [(0, 7, 0)]}


# -- batches


def test_an_sds_gets_a_batch_at_a_time_spread_over_all() -> None:
    """Goal: a failure strands few; all SDSs work at once."""
    cluster = Cluster.placed(10_000, dict.fromkeys(range(1, 9), 10_000))
    cluster.lose(1)
    cluster.assign(cluster.plan())
    learners = Counter(chunk[2] for chunk in cluster.chunks if chunk[2] not in (0, 1))
    assert learners == dict.fromkeys(range(2, 9), BATCH_SLOTS)
    assert cluster.plan().choices == {}, "the batch is full until some have joined"


def test_chunks_that_were_never_written_go_in_larger_batches() -> None:
    """Goal: a large thin volume is whole again in a few steps, although its SDSs could never hold it."""
    cluster = Cluster.placed(30_000, dict.fromkeys((1, 2, 3), 60_000), full=0.001)
    cluster.slots = dict.fromkeys((1, 2, 3), 100)
    cluster.lose(1)
    assert cluster.assign(cluster.plan()) == 2 * BATCH_CHUNKS
    cluster.join()
    cluster.settle(rounds=4)
    assert cluster.whole()


def test_a_tebibyte_is_planned_in_time() -> None:
    """Goal: planning a batch of 1 TiB that has lost an SDS of 30 takes little time, each time."""
    cluster = Cluster.placed(TIB_CHUNKS, dict.fromkeys(range(1, 31), 40_000))
    cluster.lose(7)
    domain = cluster.domain()
    packed = b"".join(ENTRY.pack(7, *chunk, 0) for chunk in cluster.chunks)
    step = SEGMENT_CHUNKS * SEGMENT_ENTRY_BYTES
    maps = {VOLUME: [packed[at : at + step] for at in range(0, len(packed), step)]}
    before = time.thread_time()
    found = plan(domain, maps)
    took = time.thread_time() - before
    assert len(found.choices[VOLUME]) == 29 * BATCH_SLOTS
    assert took < 1.0, f"{took:.2f} s"


def test_the_survey_counts_every_chunk_once() -> None:
    cluster = Cluster([[1, 2, 0], [1, 0, 3], [1, 0, 2], [4, 0, 0]], dict.fromkeys((1, 2, 3, 4), 9))
    cluster.down = {3, 4}
    work = survey(cluster.domain())[POOL]
    assert (work.chunks, work.degraded, work.copying, work.waiting, work.lost) == (4, 2, 1, 1, 1)
    away = survey(replace(cluster.domain(), away={POOL: frozenset({3})}))[POOL]
    assert (away.wanted, away.waiting, away.degraded) == (1, 0, 2)
