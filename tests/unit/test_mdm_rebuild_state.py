"""The rebuild over the MDM's own state: what counts as room, and the same choices as the transitions make."""

from __future__ import annotations

from datetime import timedelta

import pytest

from mdm.commands import JoinLearners, LeaveOut, RemoveSds, SetLearners, SetSdsState, SettleMoves
from mdm.model import Holders, State
from mdm.rates import leads_of, rates_of
from mdm.rebuild import ENTRY, Domain, domain_of, plan
from tests.support.mdm_world import CHUNK, World, small_world

Reports = dict[int, dict[int, tuple[int, int, int, int]]]


def domain(world: World, reports: Reports | None = None, **fields: object) -> Domain:
    return domain_of(world.state, 1, reports or {}, **({"away": {}} | fields))  # type: ignore[arg-type]


def chunks_of(state: State, volume_id: int) -> list[tuple[int, int, Holders]]:
    entries = ENTRY.iter_unpack(b"".join(state.maps[volume_id]))
    return [(chunk, row[0], Holders(*row[1:4])) for chunk, row in enumerate(entries)]


def test_thick_copies_and_learners_take_room() -> None:
    world, _, pool_id = small_world(slots=100)
    volume_id = world.volume(pool_id, size_bytes=60 * CHUNK, provisioning="thick")
    assert {key: server.room for key, server in domain(world).servers.items()} == {1: 60, 2: 60, 3: 60}
    chunk, epoch, holders = chunks_of(world.state, volume_id)[0]
    third = ({1, 2, 3} - set(holders.members)).pop()
    world.run(SetLearners(choices={volume_id: [(chunk, epoch, third)]}))
    assert domain(world).servers[third].room == 59


def test_thin_chunks_take_room_as_reported() -> None:
    """Goal: what was written counts, as the SDSs that lead it say; more where an SDS itself says so."""
    world, _, pool_id = small_world(slots=100)
    volume_id = world.volume(pool_id, size_bytes=300 * CHUNK)
    assert domain(world).servers[1].room == 100
    found = domain(world, {key: {volume_id: (20, 0, 10, 0)} for key in (1, 2, 3)})
    assert found.volumes[0].full == pytest.approx(0.1)
    assert {key: server.room for key, server in found.servers.items()} == {1: 80, 2: 80, 3: 80}
    skewed = domain(world, {1: {volume_id: (90, 0, 30, 0)}})
    assert (skewed.servers[1].room, skewed.servers[2].room) == (10, 80)


def test_a_failed_device_takes_nothing() -> None:
    world, _, _ = small_world(slots=100)
    assert domain(world, failed={1: frozenset({0, 1})}).servers[1].room == 60


def test_the_plan_moves_the_copies_that_joining_then_takes_away() -> None:
    """Goal: plan and transition agree on who goes, for SDSs that are removed, in fault sets, or fuller."""
    world = World()
    pd_id = world.pd()
    pool_id = world.pool(pd_id)
    sets = [world.fault_set(pd_id, name) for name in ("a", "b")]
    for number in range(1, 5):
        world.sds(pd_id, f"s{number}", slots=100 * number, fault_set_id=sets[number % 2])
    volume_id = world.volume(pool_id, size_bytes=80 * CHUNK)
    world.run(RemoveSds(sds_id=3))
    for learner in (1, 2, 4):
        for chunk, epoch, holders in chunks_of(world.state, volume_id):
            if learner in holders:
                continue
            world.run(SetLearners(choices={volume_id: [(chunk, epoch, learner)]}))
            _, epoch, before = chunks_of(world.state, volume_id)[chunk]
            expected = domain(world).leaver(before)
            world.run(JoinLearners(primary=before.primary, learner=learner, chunks=((volume_id, chunk, epoch),)))
            world.run(SettleMoves(version=world.state.map_version))
            after = chunks_of(world.state, volume_id)[chunk][2]
            assert set(after.members) == {*before.members, learner} - {expected}


def test_a_lost_sds_is_rebuilt_through_the_transitions() -> None:
    """Goal: scenario B through the real commands: left out, learners set, joined; every state keeps the invariants."""
    world, pd_id, pool_id = small_world(sds=4, slots=128)
    volume_id = world.volume(pool_id, size_bytes=192 * CHUNK, provisioning="thick", thin_slots={})
    world.run(SetSdsState(sds_id=2, state="DOWN"))
    for keeper in (1, 3, 4):
        world.run(LeaveOut(keeper=keeper, left=2, as_primary=True, as_secondary=True))
    assert world.state.sds[2].down_since == world.now - timedelta(seconds=3)
    found = plan(domain(world, away={pool_id: frozenset({2})}), world.state.maps)
    world.run(SetLearners(choices=found.choices))
    leads = leads_of(world.state)
    assert sum(leads.values()) == 96
    limit = world.state.pools[pool_id].rebuild_rate_limit_mbps * 1_000_000
    assert limit - 3 <= sum(rates_of(world.state, leads, sds_id)[pool_id] for sds_id in (1, 3, 4)) <= limit
    for chunk, epoch, holders in chunks_of(world.state, volume_id):
        if holders.learner:
            joined = ((volume_id, chunk, epoch),)
            world.run(JoinLearners(primary=holders.primary, learner=holders.learner, chunks=joined))
    assert world.copies(volume_id) == {1: 128, 3: 128, 4: 128}
    assert world.state.sds[2].copies == 0
    assert world.run(RemoveSds(sds_id=2)) is True
    assert pd_id in world.state.pds
