"""How fast each SDS may copy: its share of each pool's limit, by what it has to copy of all. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from mdm.model import SdsState, State
from mdm.progress import MB

Rates = dict[int, int]
"""pool_id: bytes a second; 0: nothing."""


def leads_of(state: State) -> dict[tuple[int, int], int]:
    """Chunks per (primary, pool) whose learner is UP: what there is to be copied, and by whom."""
    up = {sds.sds_id for sds in state.sds.values() if sds.state is not SdsState.DOWN}
    found: Counter[tuple[int, int]] = Counter()
    for volume in state.volumes.values():
        for holders, count in volume.placement.items():
            if holders.learner in up and holders.primary in up:
                found[holders.primary, volume.pool_id] += count
    return dict(found)


def rates_of(state: State, leads: Mapping[tuple[int, int], int], sds_id: int) -> Rates:
    """What the SDS may copy now; ``leads`` as from ``leads_of``."""
    rates = {}
    for pool in state.pools_of(state.sds[sds_id].pd_id):
        total = sum(count for (_, pool_id), count in leads.items() if pool_id == pool.pool_id)
        limit = 0 if pool.rebuild_cancelled else pool.rebuild_rate_limit_mbps * MB
        rates[pool.pool_id] = limit * leads.get((sds_id, pool.pool_id), 0) // total if total else 0
    return rates
