"""Health and volume states: what follows from where the copies are and which SDSs serve. Nothing of it is stored."""

from __future__ import annotations

from collections.abc import Iterable, Set

from mdm.model import Health, Holders, SdsState, State, Volume, VolumeState

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


def waits_for(volumes: Iterable[Volume], down: Set[int]) -> frozenset[int]:
    """The SDSs that have the only whole copies of chunks that nobody serves."""
    return frozenset(
        sds_id
        for volume in volumes
        for holders in volume.placement
        if chunk_health(holders, down) is Health.FAILED
        for sds_id in holders.members
    )


def volume_state(volume: Volume, down: Set[int]) -> VolumeState:
    return state_of(volume, volume_health(volume, down))


def state_of(volume: Volume, health: Health) -> VolumeState:
    if health is not Health.OK:
        return VolumeState(health.value)
    return VolumeState.IN_USE if volume.mappings else VolumeState.AVAILABLE


def worst(healths: Iterable[Health]) -> Health:
    found = set(healths)
    return next((health for health in _WORST_FIRST if health in found), Health.OK)


def pool_health(volumes: Iterable[Volume], down: Set[int]) -> Health:
    return worst(volume_health(volume, down) for volume in volumes)
