"""Health and volume states: what follows from where the copies are and which SDSs serve. Nothing of it is stored."""

from __future__ import annotations

from collections.abc import Iterable, Set
from datetime import datetime, timedelta

from mdm.model import Health, Holders, SdsState, State, Volume, VolumeState
from pfvol.constants import SDS_DOWN_AFTER_SECONDS

STUCK_SECONDS = 10.0
SILENT_SECONDS_MAX = 2 * SDS_DOWN_AFTER_SECONDS  # that an SDS may have been gone before it is DOWN

_WORST_FIRST = (Health.FAILED, Health.DEGRADED)


def down(state: State) -> frozenset[int]:
    """The SDSs that answer no IO."""
    return frozenset(sds.sds_id for sds in state.sds.values() if sds.state is SdsState.DOWN)


def volume_health(volume: Volume, down: Set[int]) -> Health:
    """FAILED when no member of a chunk's set serves, DEGRADED when only one does. A learner does not count."""
    return worst(chunk_health(holders, down) for holders in volume.placement)


def chunk_health(holders: Holders, down: Set[int]) -> Health:
    serving = sum(sds_id not in down for sds_id in holders.members)
    return (Health.FAILED, Health.DEGRADED, Health.OK)[serving]


def waiting(state: State, now: datetime) -> frozenset[tuple[int, int]]:
    """Pairs of SDSs of which the first has no use of what it shares with the second: that one has been DOWN for so long
    that whoever could go on without it does, and the first has restarted since it was last heard of, so it may not have
    it left out. (Who has not restarted leaves out whoever does not answer; whom it does not leave out only we miss.)"""
    silent = timedelta(seconds=SILENT_SECONDS_MAX)
    return frozenset(
        (sds.sds_id, gone.sds_id)
        for gone in state.sds.values()
        if gone.down_since is not None and now - gone.down_since >= timedelta(seconds=STUCK_SECONDS)
        for sds in state.sds_of(gone.pd_id)
        if sds.state is not SdsState.DOWN
        and (restarted_at := state.restarted_at(sds.sds_id)) is not None
        and restarted_at >= gone.down_since - silent
    )


def serving_health(holders: Holders, down: Set[int], waiting: Set[tuple[int, int]]) -> Health:
    """``chunk_health``, but a member that still waits for the other one does not serve."""
    found = chunk_health(holders, down)
    waits = holders[:2] in waiting or holders[1::-1] in waiting
    return Health.FAILED if waits and found is Health.DEGRADED else found


def volume_state(volume: Volume, health: Health) -> VolumeState:
    """``health``: the volume's."""
    if health is not Health.OK:
        return VolumeState(health.value)
    return VolumeState.IN_USE if volume.mappings else VolumeState.AVAILABLE


def worst(healths: Iterable[Health]) -> Health:
    found = set(healths)
    return next((health for health in _WORST_FIRST if health in found), Health.OK)


def pool_health(volumes: Iterable[Volume], down: Set[int]) -> Health:
    return worst(volume_health(volume, down) for volume in volumes)
