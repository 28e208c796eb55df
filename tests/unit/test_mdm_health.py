"""Goal: a chunk is FAILED exactly when nobody serves it, as far as the MDM can know."""

from __future__ import annotations

from datetime import timedelta

from mdm import health
from mdm.commands import SetSdsState
from mdm.model import Health, Holders
from tests.support.mdm_world import World, small_world

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
