"""Goal: a chunk is FAILED exactly when nobody serves it, as far as the MDM can know."""

from __future__ import annotations

from datetime import timedelta

import pytest

from mdm import health
from mdm.commands import ForceAlone, LeaveOut, SetLearners, SetSdsState
from mdm.membership import Membership
from mdm.model import Health, Holders
from mdm.segments import entry_of
from mdm.views import View
from pfvol.errors import ConflictError
from tests.support.mdm_world import CHUNK, World, small_world

CHUNKS = 60
PAIR = Holders(1, 2)
LONG = timedelta(seconds=health.STUCK_SECONDS)


def serving(world: World, holders: Holders = PAIR, later: timedelta = LONG) -> Health:
    return health.serving_health(holders, health.down(world.state), health.waiting(world.state, world.now + later))


def went_down(world: World, sds_id: int) -> None:
    world.now += timedelta(hours=1)
    world.run(SetSdsState(sds_id=sds_id, state="DOWN"))


def test_a_pair_of_which_only_the_mdm_cannot_reach_one_still_serves() -> None:
    world, _, _ = small_world()
    went_down(world, 2)
    assert serving(world) is Health.DEGRADED
    world.register(1)  # in the same incarnation: it was only its session that ended
    assert serving(world) is Health.DEGRADED


def test_who_has_restarted_since_the_other_one_went_waits_for_it() -> None:
    world, _, _ = small_world()
    went_down(world, 2)
    went_down(world, 1)
    assert serving(world) is Health.FAILED
    world.register(1, incarnation=2)
    assert serving(world) is Health.FAILED
    assert serving(world, Holders(2, 1)) is Health.FAILED
    assert serving(world, Holders(1, 0, 2)) is Health.DEGRADED
    assert serving(world, Holders(1, 3)) is Health.OK
    world.register(1, incarnation=2)
    assert serving(world) is Health.FAILED
    world.register(2, incarnation=2)
    assert serving(world) is Health.OK


def test_the_other_one_is_given_time() -> None:
    world, _, _ = small_world()
    went_down(world, 2)
    world.register(1, incarnation=2)
    assert serving(world, later=timedelta(seconds=health.STUCK_SECONDS - 2)) is Health.DEGRADED


def test_who_restarted_long_before_does_not_wait_but_one_may_be_gone_before_it_is_down() -> None:
    """After a power cut of all, whoever comes back does so before the MDM takes the others for gone."""
    world, _, _ = small_world()
    world.register(1, incarnation=2)
    went_down(world, 2)
    assert serving(world) is Health.DEGRADED
    world.register(2, incarnation=2)
    world.now += timedelta(hours=1)
    world.register(1, incarnation=3)
    world.run(SetSdsState(sds_id=2, state="DOWN"))
    assert serving(world) is Health.FAILED


# -- what is said


def failed(world: World) -> str:
    """Why the volume is FAILED."""
    reasons = View(world.state, Membership()).volume(world.state.volumes[1])["reasons"]
    return str(next(text for text in reasons if "waiting for" in text))


def left_alone(world: World) -> list[int]:
    """SDS 1 goes on without SDS 2: these chunks."""
    world.run(LeaveOut(keeper=1, left=2, as_primary=True, as_secondary=True))
    roles = {chunk: entry_of(world.state.maps[1], chunk).roles for chunk in range(CHUNKS)}
    return [chunk for chunk, found in roles.items() if found.holders.members == (1,)]


def make(sds: int) -> World:
    world, _, pool_id = small_world(sds=sds)
    world.volume(pool_id, size_bytes=CHUNKS * CHUNK)
    return world


def test_who_has_an_older_copy_is_named_and_that_data_is_lost() -> None:
    world = make(2)
    left_alone(world)
    went_down(world, 1)
    assert "waiting for SDS sds1 (if it is gone for good: pfvol sds promote sds2, data is lost)" in failed(world)


def test_who_has_every_acknowledged_write_is_named_and_that_nothing_is_lost() -> None:
    world = make(2)
    went_down(world, 1)
    world.register(2, incarnation=2)
    said = "waiting for SDS sds1 (if it is gone for good: pfvol sds promote sds2, no acknowledged write is lost)"
    assert said in failed(world)


def test_who_could_not_be_promoted_is_not_named() -> None:
    """Goal: what the reason says to do is not answered with "nothing to promote"."""
    world = make(3)
    chunks = left_alone(world)
    for chunk in chunks[1:]:
        world.run(SetLearners(choices={1: [(chunk, entry_of(world.state.maps[1], chunk).epoch, 3)]}))
    went_down(world, 1)
    assert "pfvol sds promote sds2, data is lost)" in failed(world)
    world.run(SetLearners(choices={1: [(chunks[0], entry_of(world.state.maps[1], chunks[0]).epoch, 3)]}))
    assert failed(world).endswith("waiting for SDS sds1")
    world.run(LeaveOut(keeper=3, left=1, as_primary=True, as_secondary=True))
    with pytest.raises(ConflictError, match="nothing to promote"):
        world.run(ForceAlone(sds_id=3, accepted=False))
