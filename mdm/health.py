"""Health and volume states: what follows from where the copies are and which SDSs serve. Nothing of it is stored."""

from __future__ import annotations

from collections.abc import Iterable, Set

from mdm.model import Health, SdsState, State, Volume, VolumeState

_WORST_FIRST = (Health.FAILED, Health.DEGRADED)


def down(state: State) -> frozenset[int]:
    """The SDSs that answer no IO."""
    return frozenset(sds.sds_id for sds in state.sds.values() if sds.state is SdsState.DOWN)


def volume_health(volume: Volume, down: Set[int]) -> Health:
    """FAILED when a chunk has no copy that serves, DEGRADED when one has only one."""
    if not down:
        return Health.OK
    degraded = False
    for primary, secondary in volume.placement:
        if primary in down or secondary in down:
            if primary in down and secondary in down:
                return Health.FAILED
            degraded = True
    return Health.DEGRADED if degraded else Health.OK


def volume_state(volume: Volume, down: Set[int]) -> VolumeState:
    health = volume_health(volume, down)
    if health is not Health.OK:
        return VolumeState(health.value)
    return VolumeState.IN_USE if volume.mappings else VolumeState.AVAILABLE


def worst(healths: Iterable[Health]) -> Health:
    found = set(healths)
    return next((health for health in _WORST_FIRST if health in found), Health.OK)


def pool_health(volumes: Iterable[Volume], down: Set[int]) -> Health:
    return worst(volume_health(volume, down) for volume in volumes)
