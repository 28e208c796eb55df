"""Members left out, learners joined, an SDS forced to go on alone: the transitions, entry by entry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from mdm import health
from mdm.commands import DeleteVolume, JoinLearners, LeaveOut, SetLearners, SetSdsState, Withdraw
from mdm.events import EventType
from mdm.model import Health, Joined
from mdm.segments import Entry, Roles, entry_of
from pfvol.errors import ConflictError, InvalidError, NotFoundError
from tests.support.mdm_world import CHUNK, World, small_world

CHUNKS = 60


def make(sds: int = 3, **fields: Any) -> World:
    world, _, pool_id = small_world(sds=sds)
    world.volume(pool_id, size_bytes=CHUNKS * CHUNK, **fields)
    return world


def entry(world: World, chunk: int, volume_id: int = 1) -> Entry:
    return entry_of(world.state.maps[volume_id], chunk)


def where(world: World, fits: Callable[[Roles], bool]) -> list[int]:
    return [chunk for chunk in range(CHUNKS) if fits(entry(world, chunk).roles)]


def pair(primary: int, secondary: int) -> Callable[[Roles], bool]:
    return lambda roles: (roles.primary, roles.secondary) == (primary, secondary)


def leave(world: World, keeper: int, left: int, **fields: Any) -> int:
    command = LeaveOut(keeper=keeper, left=left, **({"as_primary": True, "as_secondary": True} | fields))
    return int(world.run(command))


def learn(world: World, chunk: int, sds_id: int) -> int:
    return int(world.run(SetLearners(choices={1: [(chunk, entry(world, chunk).epoch, sds_id)]})))


def join(world: World, chunk: int, **fields: Any) -> Joined:
    epoch, roles = entry(world, chunk)
    command = JoinLearners(primary=roles.primary, learner=roles.learner, chunks=((1, chunk, epoch),))
    joined: Joined = world.run(replace(command, **fields))
    return joined


def health_of(world: World) -> Health:
    return health.volume_health(world.state.volumes[1], health.down(world.state))


# -- leaving out


def test_who_leads_goes_on_alone_and_who_does_not_takes_over() -> None:
    world = make()
    led, followed, others = where(world, pair(1, 2)), where(world, pair(2, 1)), where(world, lambda r: 3 in r)
    assert leave(world, 1, 2) == len(led) + len(followed)
    assert {entry(world, chunk) for chunk in led + followed} == {(2, (1, 0, 2, 2))}
    assert {entry(world, chunk).epoch for chunk in others} == {1}
    assert world.state.map_version == 2
    assert health_of(world) is Health.DEGRADED
    assert world.types().count(EventType.CHUNKS_LEFT_OUT) == 1
    assert EventType.VOLUME_STATE_CHANGE in world.types()
    assert leave(world, 2, 1) == 0, "who was left out itself can change nothing"
    assert world.state.map_version == 2


@pytest.mark.parametrize(("as_primary", "as_secondary"), [(True, False), (False, True), (False, False)])
def test_only_in_the_part_that_is_asked_for(as_primary: bool, as_secondary: bool) -> None:
    world = make()
    led, followed = where(world, pair(1, 2)), where(world, pair(2, 1))
    changed = led * as_primary + followed * as_secondary
    assert leave(world, 1, 2, as_primary=as_primary, as_secondary=as_secondary) == len(changed)
    assert where(world, lambda roles: roles.left == 2) == sorted(changed)


def test_chunks_that_are_excepted_or_not_named_stay_as_they_are() -> None:
    world = make()
    led = where(world, pair(1, 2))
    assert leave(world, 1, 2, except_chunks=frozenset((1, chunk) for chunk in led)) == len(where(world, pair(1, 0)))
    assert where(world, pair(1, 2)) == led
    named = frozenset({(1, led[0]), (1, led[1]), (1, CHUNKS + 7), (9, 0)})
    assert leave(world, 1, 2, chunks=named, except_chunks=frozenset({(1, led[1])})) == 1
    assert where(world, pair(1, 2)) == led[1:]


def test_a_learner_that_was_lost_keeps_its_place_in_a_new_epoch() -> None:
    """What was said to be whole under the old epoch is not joined any more."""
    world = make()
    chunk = where(world, pair(1, 2))[0]
    leave(world, 1, 2)
    before = entry(world, chunk)
    assert leave(world, 1, 2) == 0, "not named"
    assert leave(world, 1, 2, chunks=frozenset({(1, chunk)})) == 1
    assert entry(world, chunk) == (before.epoch + 1, before.roles)
    command = JoinLearners(primary=1, learner=2, chunks=((1, chunk, before.epoch),))
    assert world.run(command) == (0, ())


def test_who_leaves_becomes_the_learner_instead_of_another_one_unless_it_was_to_go() -> None:
    world = make()
    first, second = where(world, pair(1, 2))[:2]
    learn(world, first, 3)
    leave(world, 1, 2, chunks=frozenset({(1, first)}))
    assert entry(world, first).roles == (1, 0, 2, 2)
    learn(world, second, 3)
    servers = {**world.state.sds, 2: replace(world.state.sds[2], removing=True)}
    world.state = replace(world.state, sds=servers)
    leave(world, 1, 2, chunks=frozenset({(1, second)}))
    assert entry(world, second).roles == (1, 0, 3, 2)


def test_nobody_leaves_itself_out_nor_somebody_unknown() -> None:
    world = make()
    with pytest.raises(InvalidError):
        leave(world, 1, 1)
    with pytest.raises(NotFoundError):
        leave(world, 1, 9)


def test_a_thick_volumes_learner_takes_a_slot() -> None:
    world = make(provisioning="thick")
    chunk = where(world, pair(1, 2))[0]
    before = world.state.sds[3].thick_slots
    learn(world, chunk, 3)
    assert world.state.sds[3].thick_slots == before + 1
    learn(world, chunk, 0)
    assert world.state.sds[3].thick_slots == before


# -- learners


def test_a_learner_joins_a_chunk_that_has_one_copy() -> None:
    world = make()
    chunk = where(world, pair(1, 2))[0]
    leave(world, 1, 2)
    assert join(world, chunk) == (1, ())
    assert entry(world, chunk) == (3, (1, 2, 0, 0))
    assert world.types().count(EventType.CHUNKS_JOINED) == 1


def test_another_learner_that_joins_does_not_hide_who_was_left_out() -> None:
    """Whoever serves still has to wait for the end of that one's lease."""
    world = make()
    chunk = where(world, pair(1, 2))[0]
    leave(world, 1, 2)
    assert learn(world, chunk, 3) == 1
    assert entry(world, chunk).roles == (1, 0, 3, 2)
    join(world, chunk)
    assert entry(world, chunk).roles == (1, 3, 0, 2)


def test_health_is_ok_again_when_all_have_joined() -> None:
    world = make()
    leave(world, 1, 2)
    for chunk in where(world, lambda roles: not roles.secondary):
        join(world, chunk)
    assert health_of(world) is Health.OK


@pytest.mark.parametrize("field", ["primary", "learner", "epoch"])
def test_an_entry_that_is_another_now_is_passed_over(field: str) -> None:
    world = make()
    chunk = where(world, pair(1, 2))[0]
    leave(world, 1, 2)
    wrong = {"primary": 3, "learner": 3} if field != "epoch" else {}
    fields: dict[str, Any] = {field: wrong[field]} if wrong else {"chunks": ((1, chunk, 1),)}
    before = world.state
    assert join(world, chunk, **fields) == (0, ())
    assert world.state is before


def test_a_learner_replaces_the_secondary_or_the_primary() -> None:
    world = make()
    fuller_first, chunk = where(world, pair(1, 2))[:2]
    for gone, expected in ((2, (1, 3, 0, 2)), (1, (2, 3, 0, 1))):
        number = fuller_first if gone == 2 else chunk
        servers = {key: replace(sds, removing=key == gone) for key, sds in world.state.sds.items()}
        world.state = replace(world.state, sds=servers)
        learn(world, number, 3)
        stays = 3 - gone
        assert join(world, number) == (1, ((1, number, stays, gone),))
        assert entry(world, number) == (3, (*expected,))


def test_who_goes_is_down_or_shares_the_fault_set_or_is_fuller() -> None:
    def goes(prepare: Callable[[World], None]) -> int:
        world = make()
        chunk = where(world, pair(1, 2))[0]
        prepare(world)
        learn(world, chunk, 3)
        return join(world, chunk).moved[0][3]

    def alter(sds_id: int, **fields: Any) -> Callable[[World], None]:
        def prepare(world: World) -> None:
            world.fault_set(1, "rack")
            third = replace(world.state.sds[3], fault_set_id=1)
            changed = replace(world.state.sds[sds_id], **fields)
            world.state = replace(world.state, sds={**world.state.sds, 3: third, sds_id: changed})

        return prepare

    assert goes(lambda world: world.run(SetSdsState(sds_id=1, state="DOWN"))) == 1
    assert goes(alter(1, fault_set_id=1)) == 1
    assert goes(alter(2, fault_set_id=1)) == 2
    few = small_world()[0].state.sds[1].devices[:1]
    assert goes(alter(1, devices=few)) == 1
    assert goes(alter(2, devices=few)) == 2


def test_learners_are_set_and_taken_back() -> None:
    world = make()
    chunk, other = where(world, pair(1, 2))[:2]
    epoch = entry(world, chunk).epoch
    choices = [(chunk, epoch, 3), (other, epoch + 1, 3), (CHUNKS + 5, 1, 3)]
    assert world.run(SetLearners(choices={1: choices, 9: [(0, 1, 3)]})) == 1
    assert entry(world, chunk) == (epoch + 1, (1, 2, 3, 0))
    assert learn(world, chunk, 3) == 0, "it is already"
    assert learn(world, chunk, 0) == 1
    assert entry(world, chunk) == (epoch + 2, (1, 2, 0, 0))
    assert health_of(world) is Health.OK


def test_a_member_is_never_its_own_learner_nor_an_sds_of_another_domain() -> None:
    world = make()
    elsewhere = world.sds(world.pd("other"), "far")
    chunk = where(world, pair(1, 2))[0]
    for sds_id in (1, 2, elsewhere, 77):
        assert learn(world, chunk, sds_id) == 0


# -- withdrawn


def withdraw(world: World, sds_id: int, peer: int, chunks: list[int], incarnation: int | None = None) -> int:
    known = world.state.sds[peer].incarnation if incarnation is None else incarnation
    named = frozenset((1, chunk) for chunk in chunks)
    return int(world.run(Withdraw(sds_id=sds_id, peer=peer, incarnation=known, chunks=named)))


def test_who_cannot_keep_its_copies_leaves_them_to_the_other_member() -> None:
    world = make()
    led, followed, strange = where(world, pair(1, 2)), where(world, pair(2, 1)), where(world, lambda r: 1 not in r)
    learn(world, led[0], 3)
    assert withdraw(world, 1, 2, [led[0], led[1], followed[0], strange[0], CHUNKS + 1]) == 3
    assert entry(world, led[0]).roles == (2, 0, 3, 1), "who was learning learns on"
    assert [entry(world, chunk) for chunk in (led[1], followed[0])] == [(2, (2, 0, 0, 1))] * 2
    assert entry(world, led[2]).roles == (1, 2, 0, 0)
    assert health_of(world) is Health.DEGRADED
    assert world.types().count(EventType.CHUNKS_LEFT_OUT) == 1
    assert withdraw(world, 1, 2, [led[1]]) == 0, "it has left already"
    assert withdraw(world, 2, 1, [led[1], followed[0]]) == 0, "who is alone stays"


def test_a_learner_that_cannot_keep_its_copies_is_none_any_more() -> None:
    world = make()
    chunk = where(world, pair(1, 2))[0]
    leave(world, 1, 2)
    assert withdraw(world, 2, 1, [chunk]) == 1
    assert entry(world, chunk).roles == (1, 0, 0, 2)


def test_nobody_hands_its_copies_to_one_that_has_restarted() -> None:
    world = make()
    led = where(world, pair(1, 2))
    with pytest.raises(ConflictError):
        withdraw(world, 1, 2, led, incarnation=world.state.sds[2].incarnation + 1)
    assert where(world, pair(1, 2)) == led


def test_a_deleted_volume_is_purged_from_who_had_it_once() -> None:
    """An SDS that was away while its copies were made elsewhere still has blocks of it."""
    world = make(sds=2)
    world.sds(1, "later")
    world.sds(1, "never", up=False)
    leave(world, 1, 2)
    for chunk in range(CHUNKS):
        learn(world, chunk, 3)
    assert not world.state.volumes[1].uses(2)
    world.run(DeleteVolume(volume_id=1))
    assert world.state.purges[1].sds_ids == {1, 2, 3}
