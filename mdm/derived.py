"""What the state knows twice, computed from what it knows once: names, placements, counts and sums.

Transitions keep these up to date as they go; the store does not keep them and calls ``derive`` when it loads; the
invariants compare both.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from mdm.model import State
from mdm.segments import count_holders


def names_of(state: State) -> dict[tuple[str, int, str], int]:
    names: dict[tuple[str, int, str], int] = {}
    names.update({("pds", 0, pd.name): key for key, pd in state.pds.items()})
    names.update({("fault_sets", 0, item.name): key for key, item in state.fault_sets.items()})
    names.update({("pools", pool.pd_id, pool.name): key for key, pool in state.pools.items()})
    names.update({("sds", 0, sds.name): key for key, sds in state.sds.items()})
    names.update({("sdc", 0, sdc.name): key for key, sdc in state.sdc.items()})
    names.update({("volumes", 0, volume.name): key for key, volume in state.volumes.items()})
    return names


def derive(state: State) -> State:
    """``state`` with every derived value computed anew from objects and maps."""
    copies: Counter[int] = Counter()
    primaries: Counter[int] = Counter()
    thick_slots: Counter[int] = Counter()
    thick_bytes: Counter[int] = Counter()
    volumes = {}
    for volume_id, volume in state.volumes.items():
        placement = count_holders(state.maps.get(volume_id, ()))
        volumes[volume_id] = replace(volume, placement=placement)
        for holders, count in placement.items():
            primaries[holders.primary] += count
            for sds_id in holders.all:
                copies[sds_id] += count
                thick_slots[sds_id] += count if volume.thick else 0
        thick_bytes[volume.pool_id] += volume.size_bytes if volume.thick else 0
    return replace(
        state,
        volumes=volumes,
        names=names_of(state),
        pools={key: replace(pool, thick_bytes=thick_bytes[key]) for key, pool in state.pools.items()},
        sds={
            key: replace(sds, copies=copies[key], primaries=primaries[key], thick_slots=thick_slots[key])
            for key, sds in state.sds.items()
        },
    )
