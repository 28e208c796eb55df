"""Whatever commands come in whatever order, the state keeps its invariants, and placement finds what exists."""

from __future__ import annotations

import struct
from collections import Counter
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from mdm import invariants
from mdm.commands import (
    AddSdc,
    AddSds,
    CancelRebuild,
    CreateFaultSet,
    CreatePool,
    CreateProtectionDomain,
    CreateVolume,
    DeleteFaultSet,
    DeletePool,
    DeleteProtectionDomain,
    DeleteVolume,
    ExtendVolume,
    ForceAlone,
    JoinLearners,
    KeepSds,
    LeaveOut,
    MapVolume,
    RegisterSdc,
    RemoveSdc,
    RemoveSds,
    SetLearners,
    SetSdsState,
    StartRebuild,
    UnmapVolume,
    UpdatePool,
    VolumePurged,
    Withdraw,
)
from mdm.health import down
from mdm.model import State
from mdm.placement import Candidate, fits, place
from mdm.rebuild import domain_of, plan
from mdm.segments import ENTRY, differences, entry_of
from mdm.store.codec import decode, encode
from mdm.transition import apply
from pfvol.constants import SEGMENT_ENTRY_FORMAT
from pfvol.errors import Error
from tests.support.mdm_world import CHUNK, START, new_cluster, registration

names = st.sampled_from(["a", "b", "c", "d", ".bad"])
numbers = st.integers(1, 5)
chunks = st.integers(1, 60)
some_chunks = st.sets(st.tuples(numbers, st.integers(0, 70)), max_size=12)
provisioning = st.sampled_from(["thin", "thick"])
_TABLES = ("pds", "fault_sets", "pools", "sds", "sdc", "volumes", "purges")


class Commands(RuleBasedStateMachine):
    """Random commands on few names and numbers, so that they meet. A second copy of the rows is kept from the changes
    alone, as the store keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.state = State(cluster=new_cluster())
        self.rows: dict[tuple[str, Any], str | bytes] = {}
        self.last_event = 0

    @initialize()
    def furnish(self) -> None:
        self.run(CreateProtectionDomain(name="a"))
        self.run(CreateFaultSet(pd_id=1, name="a"))
        self.run(CreatePool(pd_id=1, name="a", capacity_bytes=100 * CHUNK))
        for number, name in enumerate("abc", start=1):
            self.run(AddSds(pd_id=1, name=name, capacity_bytes=(50 + 20 * number) * CHUNK, fault_set_id=None))
            self.run(registration(self.state, number))
        self.run(AddSdc(name="a"))

    def run(self, command: Any) -> None:
        before = self.state
        try:
            done = apply(before, command, START)
        except Error:
            return
        self.check_step(before, done.state)
        self.state = done.state
        for event in done.events:
            assert event.event_id == self.last_event + 1
            self.last_event = event.event_id
        for table, key, row in done.changes:
            if row is not None:
                self.rows[table, key] = row if isinstance(row, bytes) else encode(row)
                continue
            del self.rows[table, key]
            if table == "volumes":
                for gone in [other for other in self.rows if other[0] == "maps" and other[1][0] == key]:
                    del self.rows[gone]

    @staticmethod
    def check_step(before: State, after: State) -> None:
        """An epoch only grows, by one, exactly when its entry changes; then the map's version grows too. No copy comes
        into a set that was not a member or a learner."""
        changed = 0
        for volume_id, index in differences(before.maps, after.maps):
            old = ENTRY.iter_unpack(before.maps[volume_id][index])
            new = ENTRY.iter_unpack(after.maps[volume_id][index])
            for (epoch, *was), (epoch_now, *now) in zip(old, new, strict=False):
                assert epoch_now == epoch + 1 or (epoch_now, now) == (epoch, was)
                assert set(now[:2]) - {0} <= {*was}
                changed += epoch_now != epoch
        assert after.map_version == before.map_version + (changed > 0)

    @rule(name=names)
    def create_pd(self, name: str) -> None:
        self.run(CreateProtectionDomain(name=name))

    @rule(number=numbers, cascade=st.booleans())
    def delete_pd(self, number: int, cascade: bool) -> None:
        self.run(DeleteProtectionDomain(pd_id=number, cascade=cascade))

    @rule(number=numbers, name=names)
    def create_fault_set(self, number: int, name: str) -> None:
        self.run(CreateFaultSet(pd_id=number, name=name))

    @rule(number=numbers)
    def delete_fault_set(self, number: int) -> None:
        self.run(DeleteFaultSet(fault_set_id=number))

    @rule(number=numbers, name=names, size=chunks, spare=st.none() | st.integers(0, 90))
    def create_pool(self, number: int, name: str, size: int, spare: int | None) -> None:
        self.run(CreatePool(pd_id=number, name=name, capacity_bytes=size * CHUNK, spare_percent=spare))

    @rule(number=numbers, size=chunks, name=st.none() | names)
    def update_pool(self, number: int, size: int, name: str | None) -> None:
        self.run(UpdatePool(pool_id=number, capacity_bytes=size * CHUNK, name=name))

    @rule(number=numbers)
    def delete_pool(self, number: int) -> None:
        self.run(DeletePool(pool_id=number))

    @rule(number=numbers, name=names, size=chunks, fault_set=st.none() | numbers)
    def add_sds(self, number: int, name: str, size: int, fault_set: int | None) -> None:
        self.run(AddSds(pd_id=number, name=name, capacity_bytes=size * CHUNK, fault_set_id=fault_set))

    @rule(number=numbers, incarnation=st.integers(1, 3))
    def register_sds(self, number: int, incarnation: int) -> None:
        if number in self.state.sds:
            self.run(registration(self.state, number, incarnation=incarnation))

    @rule(number=numbers, state=st.sampled_from(["UP", "DOWN", "DEGRADED"]))
    def set_sds_state(self, number: int, state: str) -> None:
        self.run(SetSdsState(sds_id=number, state=state))

    @rule(number=numbers)
    def remove_sds(self, number: int) -> None:
        self.run(RemoveSds(sds_id=number))

    @rule(number=numbers)
    def keep_sds(self, number: int) -> None:
        self.run(KeepSds(sds_id=number))

    @rule(number=numbers, start=st.booleans())
    def start_or_cancel_rebuild(self, number: int, start: bool) -> None:
        self.run(StartRebuild(pool_id=number) if start else CancelRebuild(pool_id=number))

    @rule(number=numbers, waits=st.booleans())
    def rebuild(self, number: int, waits: bool) -> None:
        """Whatever the state is, the plan is one that can be carried out, and promises no slot twice."""
        before = self.state
        away: frozenset[int] = frozenset() if waits else down(before)
        domain = domain_of(before, number, {}, away={pool.pool_id: away for pool in before.pools_of(number)})
        choices = plan(domain, before.maps).choices
        self.run(SetLearners(choices=choices))
        for volume_id, rows in choices.items():
            segments = self.state.maps[volume_id]
            for chunk, _, sds_id in rows:
                assert entry_of(segments, chunk).roles.learner == sds_id, "no choice was refused"
        for sds in self.state.sds.values():
            assert sds.thick_slots <= max(before.sds[sds.sds_id].thick_slots, sds.slots)

    @rule(name=names, register=st.booleans())
    def add_sdc(self, name: str, register: bool) -> None:
        self.run(RegisterSdc(name=name) if register else AddSdc(name=name))

    @rule(number=numbers)
    def remove_sdc(self, number: int) -> None:
        self.run(RemoveSdc(sdc_id=number))

    @rule(number=numbers, name=names, size=chunks, kind=provisioning)
    def create_volume(self, number: int, name: str, size: int, kind: str) -> None:
        self.run(CreateVolume(pool_id=number, name=name, size_bytes=size * CHUNK - 5, provisioning=kind))

    @rule(number=numbers, size=st.integers(1, 3000))
    def extend_volume(self, number: int, size: int) -> None:
        self.run(ExtendVolume(volume_id=number, size_bytes=size * CHUNK))

    @rule(number=numbers)
    def delete_volume(self, number: int) -> None:
        self.run(DeleteVolume(volume_id=number))

    @rule(number=numbers, sdc=numbers, mode=st.sampled_from(["readWrite", "readOnly", "?"]))
    def map_volume(self, number: int, sdc: int, mode: str) -> None:
        self.run(MapVolume(volume_id=number, sdc_id=sdc, access_mode=mode))

    @rule(number=numbers, sdc=numbers)
    def unmap_volume(self, number: int, sdc: int) -> None:
        self.run(UnmapVolume(volume_id=number, sdc_id=sdc))

    @rule(number=numbers, sds=numbers)
    def volume_purged(self, number: int, sds: int) -> None:
        self.run(VolumePurged(volume_id=number, sds_id=sds))

    @rule(keeper=numbers, left=numbers, sides=st.sampled_from([(True, False), (False, True), (True, True)]))
    def leave_out(self, keeper: int, left: int, sides: tuple[bool, bool]) -> None:
        self.run(LeaveOut(keeper=keeper, left=left, as_primary=sides[0], as_secondary=sides[1]))

    @rule(keeper=numbers, left=numbers, chunks=some_chunks, named=st.booleans())
    def leave_out_of_some(self, keeper: int, left: int, chunks: set[tuple[int, int]], named: bool) -> None:
        given: dict[str, Any] = {"chunks" if named else "except_chunks": frozenset(chunks)}
        self.run(LeaveOut(keeper=keeper, left=left, as_primary=True, as_secondary=True, **given))

    @rule(sds=numbers, peer=numbers, chunks=some_chunks, stale=st.booleans())
    def withdraw(self, sds: int, peer: int, chunks: set[tuple[int, int]], stale: bool) -> None:
        server = self.state.sds.get(peer)
        incarnation = (0 if server is None else server.incarnation) + stale
        self.run(Withdraw(sds_id=sds, peer=peer, incarnation=incarnation, chunks=frozenset(chunks)))

    @rule(chunks=some_chunks, sds=st.integers(0, 5), stale=st.booleans())
    def set_learners(self, chunks: set[tuple[int, int]], sds: int, stale: bool) -> None:
        choices: dict[int, list[tuple[int, int, int]]] = {}
        for volume_id, chunk in chunks:
            choices.setdefault(volume_id, []).append((chunk, self.epoch(volume_id, chunk) + stale, sds))
        self.run(SetLearners(choices=choices))

    @rule(primary=numbers, learner=numbers)
    def join_learners(self, primary: int, learner: int) -> None:
        whole = tuple(
            (volume_id, chunk, self.epoch(volume_id, chunk))
            for volume_id, volume in self.state.volumes.items()
            for chunk in range(volume.chunks)
        )
        self.run(JoinLearners(primary=primary, learner=learner, chunks=whole))

    @rule(sds=numbers, volume=st.none() | numbers)
    def force_alone(self, sds: int, volume: int | None) -> None:
        self.run(ForceAlone(sds_id=sds, volume_id=volume))

    def epoch(self, volume_id: int, chunk: int) -> int:
        volume = self.state.volumes.get(volume_id)
        if volume is None or chunk >= volume.chunks:
            return 1
        return entry_of(self.state.maps[volume_id], chunk).epoch

    @invariant()
    def holds(self) -> None:
        assert invariants.check(self.state) == []

    @invariant()
    def changes_tell_everything(self) -> None:
        """What the changes said is what the state says: a store that follows them misses nothing."""
        expected: dict[tuple[str, Any], str | bytes] = {}
        for table in _TABLES:
            expected.update({(table, key): encode(row) for key, row in getattr(self.state, table).items()})
        for volume_id, segments in self.state.maps.items():
            expected.update({("maps", (volume_id, index)): row for index, row in enumerate(segments)})
        assert self.rows == expected

    @invariant()
    def rows_come_back(self) -> None:
        for sds in self.state.sds.values():
            assert encode(decode(type(sds), encode(sds))) == encode(sds)


Commands.TestCase.settings = settings(max_examples=50, stateful_step_count=60)
TestCommands = Commands.TestCase


@st.composite
def clusters(draw: st.DrawFn) -> tuple[int, list[Candidate]]:
    wanted = draw(st.integers(1, 1500))
    candidates = [
        Candidate(
            sds_id=number,
            fault_set_id=draw(st.none() | st.integers(1, 4)),
            weight=draw(st.integers(1, 1000)),
            limit=draw(st.integers(0, wanted * 2)),
            load=draw(st.floats(0, 2)),
            primary_excess=draw(st.integers(-9, 9)),
        )
        for number in range(1, draw(st.integers(1, 9)) + 1)
    ]
    return wanted, candidates


@settings(max_examples=300)
@given(clusters(), st.integers(0, 5000), st.integers(0, 2**40))
def test_a_placement_is_found_exactly_when_there_is_one(
    cluster: tuple[int, list[Candidate]], first_chunk: int, seed: int
) -> None:
    wanted, candidates = cluster
    found = place(wanted, candidates, first_chunk=first_chunk, seed=seed)
    assert (found is not None) == fits(wanted, [candidate.limit for candidate in candidates])
    if found is None:
        return
    copies: Counter[int] = Counter()
    shared = 0
    sets = {c.sds_id: ("set", c.fault_set_id) if c.fault_set_id else ("sds", c.sds_id) for c in candidates}
    entries = list(struct.iter_unpack(SEGMENT_ENTRY_FORMAT, b"".join(found.pieces)))
    assert len(entries) == wanted
    for _, primary, secondary, _, _ in entries:
        assert primary != secondary
        copies.update((primary, secondary))
        shared += sets[primary] == sets[secondary]
    assert all(copies[candidate.sds_id] <= candidate.limit for candidate in candidates)
    assert shared == _fewest_shared(wanted, candidates, sets)


def _fewest_shared(wanted: int, candidates: list[Candidate], sets: dict[int, tuple[str, int]]) -> int:
    """Chunks that must have both copies in one fault set: what the fault sets cannot hold with one copy per chunk."""
    room: Counter[tuple[str, int]] = Counter()
    for candidate in candidates:
        room[sets[candidate.sds_id]] += min(candidate.limit, wanted)
    return max(0, 2 * wanted - sum(min(size, wanted) for size in room.values()))
