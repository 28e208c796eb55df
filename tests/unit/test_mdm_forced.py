"""An SDS forced to go on alone: which copies may be, what is said before, and who comes back with what."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from mdm.commands import ForceAlone, JoinLearners, LeaveOut, RegisterSds, SetLearners, SetSdsState, Withdraw
from mdm.events import EventType
from mdm.model import Device, Forced, Health
from mdm.segments import Entry, entry_of
from mdm.transition.forced import forced_out
from pfvol.constants import EPOCH_ERA
from pfvol.errors import ConflictError, NotFoundError
from tests.support.mdm_world import CHUNK, World, small_world
from tests.unit.test_mdm_sets import entry, health_of, leave, pair, where

CHUNKS = 60


def make(sds: int = 3, **fields: Any) -> World:
    world, _, pool_id = small_world(sds=sds)
    world.volume(pool_id, size_bytes=CHUNKS * CHUNK, **fields)
    return world


def down(world: World, *numbers: int) -> None:
    for number in numbers:
        world.run(SetSdsState(sds_id=number, state="DOWN"))


def up(world: World, sds_id: int, devices: tuple[Device, ...], incarnation: int) -> None:
    sds = world.state.sds[sds_id]
    assert sds.data_address is not None
    world.run(
        RegisterSds(
            sds_id=sds_id,
            node=sds.node,
            data_address=sds.data_address,
            http_address=None,
            incarnation=incarnation,
            devices=devices,
        )
    )


def entries(world: World, chunks: Iterable[int]) -> list[Entry]:
    return [entry_of(world.state.maps[1], chunk) for chunk in chunks]


def test_an_older_copy_serves_only_when_it_is_forced_to() -> None:
    world = make()
    leave(world, 1, 2)
    alone = where(world, pair(1, 0))
    down(world, 1)
    assert health_of(world) is Health.FAILED
    other = world.volume(1, "other", size_bytes=CHUNKS * CHUNK)
    assert world.run(ForceAlone(sds_id=2, volume_id=other)).chunks == 0
    assert world.run(ForceAlone(sds_id=2, volume_id=1)) == Forced(len(alone), 0)
    assert entry(world, alone[0]) == (2 + EPOCH_ERA, (2, 0, 1, 1))
    told = [event for event in world.events if event.type is EventType.DATA_LOSS_ACCEPTED]
    assert [(event.sds_id, event.details["chunks"]) for event in told] == [(2, len(alone))]
    assert "lost" in told[0].message


def test_a_member_is_forced_to_go_on_without_the_other_that_is_down() -> None:
    """It has come back without agreeing with its pair, which never will. It has all that was acknowledged: no era
    begins."""
    world = make()
    chunk = where(world, pair(1, 2))[0]
    assert world.run(ForceAlone(sds_id=2, volume_id=1)).chunks == 0, "the other one serves"
    down(world, 1)
    both = len(where(world, pair(1, 2)) + where(world, pair(2, 1)))
    world.events.clear()
    assert world.run(ForceAlone(sds_id=2, volume_id=1)) == Forced(both, both)
    assert entry(world, chunk) == (2, (2, 0, 1, 1))
    assert EventType.DATA_LOSS_ACCEPTED not in world.types(), "nothing is lost"
    (told,) = [event for event in world.events if event.type is EventType.CHUNKS_LEFT_OUT]
    assert (told.sds_id, told.details) == (1, {"chunks": both, "alone": "sds2"})
    assert world.run(ForceAlone(sds_id=2, volume_id=1)).chunks == 0


def test_what_is_lost_and_what_is_not_are_told_apart() -> None:
    world = make()
    leave(world, 1, 2)
    older = len(where(world, pair(1, 0)))
    members = len(where(world, pair(2, 3)) + where(world, pair(3, 2)))
    down(world, 1, 3)
    world.events.clear()
    assert world.run(ForceAlone(sds_id=2)) == Forced(older + members, members)
    told = {event.type: event.details["chunks"] for event in world.events if "chunks" in event.details}
    assert told == {EventType.DATA_LOSS_ACCEPTED: older, EventType.CHUNKS_LEFT_OUT: members}


def test_only_those_whom_it_concerns_have_to_be_dead() -> None:
    world = make(sds=4)
    leave(world, 1, 2)
    for chunk in where(world, pair(1, 0)):
        world.run(SetLearners(choices={1: [(chunk, entry(world, chunk).epoch, 3)]}))
    down(world, 1, 4)
    command = ForceAlone(sds_id=3)
    assert where(world, pair(1, 0)), "of these it is to make copies that are not whole"
    assert where(world, lambda roles: {roles.primary, roles.secondary} == {1, 3})
    assert forced_out(world.state, command) == {1, 4}
    for chunk in where(world, lambda roles: {roles.primary, roles.secondary} == {1, 3}):
        peer = world.state.sds[3].incarnation
        world.run(Withdraw(sds_id=1, peer=3, incarnation=peer, chunks=frozenset({(1, chunk)})))
    assert forced_out(world.state, command) == {4}
    with pytest.raises(ConflictError) as refused:
        world.run(replace(command, accepted=False))
    assert "Better start SDS sds4 again" in refused.value.message
    assert forced_out(world.state, replace(command, incomplete=True)) == {1, 4}
    assert forced_out(world.state, replace(command, volume_id=99)) == frozenset()


def test_who_gave_its_copy_back_cannot_be_forced_to_serve_it() -> None:
    world = make()
    chunk = where(world, pair(1, 2))[0]
    world.run(Withdraw(sds_id=1, peer=2, incarnation=world.state.sds[2].incarnation, chunks=frozenset({(1, chunk)})))
    down(world, 2)
    before = entry(world, chunk)
    assert world.run(ForceAlone(sds_id=1, volume_id=1, incomplete=True)).chunks > 0
    assert entry(world, chunk) == before


def test_a_copy_that_was_never_whole_is_taken_only_when_that_is_said() -> None:
    """Goal: nobody is shown zeros who has not asked for them. So also when the one that left gave its copy back,
    because another one was to learn, and is to learn itself again."""
    world = make()
    first, second = where(world, pair(1, 2))[:2]
    leave(world, 1, 2)
    for chunk, learners in ((first, [3]), (second, [3, 2])):
        for learner in learners:
            world.run(SetLearners(choices={1: [(chunk, entry(world, chunk).epoch, learner)]}))
    assert [found.roles for found in entries(world, (first, second))] == [(1, 0, 3, 2), (1, 0, 2, 0)]
    down(world, 1)
    for chunk, sds_id in ((first, 3), (second, 2)):
        command, before = ForceAlone(sds_id=sds_id, volume_id=1), entry(world, chunk)
        world.run(command)
        assert entry(world, chunk) == before
        with pytest.raises(ConflictError, match=r"never had a whole copy.*--incomplete"):
            world.run(replace(command, accepted=False))
        assert world.run(replace(command, incomplete=True)) == Forced(1, 0)
        assert entry(world, chunk).epoch > EPOCH_ERA
        assert entry(world, chunk).roles == (sds_id, 0, 1, 1)


def test_what_would_be_lost_is_said_and_nothing_is_done() -> None:
    world = make()
    leave(world, 1, 2)
    older = len(where(world, pair(1, 0)))
    followed = len(where(world, pair(2, 3))) + len(where(world, pair(3, 2)))
    with pytest.raises(ConflictError, match="nothing to promote"):
        world.run(ForceAlone(sds_id=2, accepted=False))
    down(world, 1, 3)
    before = world.state
    with pytest.raises(ConflictError) as refused:
        world.run(ForceAlone(sds_id=2, accepted=False))
    assert world.state is before
    (volume,) = refused.value.details["volumes"]
    assert (volume["older_chunks"], volume["member_chunks"]) == (older, followed)
    assert volume["newer_at"] == ["sds1", "sds3"]
    for part in (f"{older} chunks of volume {volume['name']} as they were when it left", "--accept-data-loss"):
        assert part in refused.value.message


def test_what_cannot_be_forced() -> None:
    world = make()
    down(world, 1)
    with pytest.raises(ConflictError):
        world.run(ForceAlone(sds_id=1))
    with pytest.raises(NotFoundError):
        world.run(ForceAlone(sds_id=2, volume_id=9))
    down(world, 2)
    strangers = where(world, lambda roles: 3 not in roles.holders)
    before = entries(world, strangers)
    assert world.run(ForceAlone(sds_id=3, volume_id=1)).chunks == CHUNKS - len(strangers)
    assert entries(world, strangers) == before


def test_who_only_learns_may_come_back_with_other_devices() -> None:
    """Goal: after a forced promotion the SDS whose disks are gone joins again; what was said of its copies before
    does not count any more."""
    world = make(sds=2)
    leave(world, 1, 2)
    up(world, 1, world.state.sds[1].devices, 7)
    down(world, 1)
    world.run(ForceAlone(sds_id=2))
    chunk = where(world, pair(2, 0))[0]
    epoch, roles = entry(world, chunk)
    assert roles == (2, 0, 1, 1)
    version = world.state.map_version
    wiped = tuple(
        Device(index=item.index, slots=item.slots, device_id=f"{item.index:032x}")
        for item in world.state.sds[1].devices
    )
    up(world, 1, (), 0)
    assert (entry(world, chunk), world.state.sds[1].incarnation) == ((epoch, roles), 7), "it has not said yet with what"
    up(world, 1, wiped, 1)
    assert entry(world, chunk) == (epoch + 1, (2, 0, 1, 0))
    assert world.state.map_version == version + 1
    assert world.run(JoinLearners(primary=2, learner=1, chunks=((1, chunk, epoch),))).entries == 0
    down(world, 2)
    assert world.run(ForceAlone(sds_id=1)).chunks == 0, "it has nothing"


def test_who_is_a_copy_of_anything_comes_back_with_its_devices() -> None:
    world = make(sds=2)
    world.run(LeaveOut(keeper=1, left=2, as_primary=True, as_secondary=False))
    other = tuple(
        Device(index=item.index, slots=item.slots, device_id=f"{item.index:032x}")
        for item in world.state.sds[2].devices
    )
    with pytest.raises(ConflictError, match="comes without device"):
        up(world, 2, other, 9)
