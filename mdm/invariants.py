"""What must hold of every state. ``check`` names each violation; none is a state that may be served from.

The store checks what it has loaded, property tests what random commands have made. I7 is DESIGN's: no two copies of a
chunk on one SDS.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from mdm.derived import derive, names_of
from mdm.identity import TABLES
from mdm.model import FaultSet, Pool, Sds, State, Volume
from mdm.segments import count_roles
from pfvol.constants import SEGMENT_CHUNKS, SEGMENT_ENTRY_BYTES

SEGMENT_BYTES = SEGMENT_CHUNKS * SEGMENT_ENTRY_BYTES


def check(state: State) -> list[str]:
    """A sentence per violation; empty when all holds."""
    return [
        *_references(state),
        *_counters(state),
        *(problem for volume in state.volumes.values() for problem in _map(state, volume)),
        *_derived(state),
        *_capacity(state),
    ]


def _references(state: State) -> Iterator[str]:
    items: list[FaultSet | Pool | Sds] = [*state.fault_sets.values(), *state.pools.values(), *state.sds.values()]
    for item in items:
        if item.pd_id not in state.pds:
            yield f"{item.name} is in protection domain {item.pd_id}, which does not exist"
    for sds in state.sds.values():
        fault_set = state.fault_sets.get(sds.fault_set_id) if sds.fault_set_id is not None else None
        if sds.fault_set_id is not None and (fault_set is None or fault_set.pd_id != sds.pd_id):
            yield f"SDS {sds.name} is in fault set {sds.fault_set_id}, which its protection domain does not have"
    nodes = [sds.node for sds in state.sds.values()]
    if len(set(nodes)) < len(nodes):
        yield "a node has two SDSs"
    for volume in state.volumes.values():
        if volume.pool_id not in state.pools:
            yield f"volume {volume.name} is in pool {volume.pool_id}, which does not exist"
        mapped = [mapping.sdc_id for mapping in volume.mappings]
        if len(set(mapped)) < len(mapped) or not state.sdc.keys() >= set(mapped):
            yield f"volume {volume.name} is mapped twice to an SDC, or to one that does not exist"
    for purge in state.purges.values():
        if purge.volume_id in state.volumes or not purge.sds_ids or not state.sds.keys() >= purge.sds_ids:
            yield f"the purge of volume {purge.volume_id} waits for what cannot come"
    for table in TABLES.values():
        names = {key[1:] for key in names_of(state) if key[0] == table}
        if len(names) < len(getattr(state, table)):
            yield f"two of {table} have one name"


def _counters(state: State) -> Iterator[str]:
    for table in TABLES.values():
        highest = max(getattr(state, table), default=0)
        if highest > state.counters.get(table, 0):
            yield f"{table} has number {highest}, which has not been given out"
    mapping_ids = [mapping.mapping_id for volume in state.volumes.values() for mapping in volume.mappings]
    if len(set(mapping_ids)) < len(mapping_ids) or max(mapping_ids, default=0) > state.counters.get("mappings", 0):
        yield "a mapping's number was given out twice or never"


def _map(state: State, volume: Volume) -> Iterator[str]:
    """Every chunk is mapped, by whole segments but the last, to SDSs of the pool's domain, in an epoch."""
    segments = state.maps.get(volume.volume_id, ())
    sizes = [len(segment) for segment in segments]
    if sum(sizes) != volume.chunks * SEGMENT_ENTRY_BYTES or any(size != SEGMENT_BYTES for size in sizes[:-1]):
        yield f"volume {volume.name} has {volume.chunks} chunks, its map {sum(sizes)} bytes in {len(sizes)} segments"
        return
    pool = state.pools.get(volume.pool_id)
    domain = {key for key, sds in state.sds.items() if pool is not None and sds.pd_id == pool.pd_id}
    for segment in set(segments):
        words = struct.unpack(f"<{len(segment) // 4}I", segment)
        if 0 in set(words[0::3]):
            yield f"volume {volume.name} has a chunk without an epoch"
    for roles in count_roles(segments):
        named = [sds_id for sds_id in roles.holders if sds_id]
        if len(set(named)) < len(named):
            yield f"volume {volume.name} has two copies of a chunk on one SDS: {tuple(roles.holders)}"
        if not roles.primary or not domain.issuperset(named):
            yield f"volume {volume.name} has a chunk on SDSs {tuple(roles.holders)}: not all are in its domain"
        if roles.left and roles.left in roles.holders.members:
            yield f"volume {volume.name} has a member that was left out: SDS {roles.left}"


def _derived(state: State) -> Iterator[str]:
    again = derive(state)
    if state.maps.keys() != state.volumes.keys():
        yield "there are maps without volumes, or volumes without maps"
    for table in ("volumes", "sds", "pools", "names"):
        if getattr(state, table) != getattr(again, table):
            yield f"counts in {table} are not what the maps and objects say"


def _capacity(state: State) -> Iterator[str]:
    for pool in state.pools.values():
        if pool.thick_bytes > pool.capacity_bytes:
            yield f"pool {pool.name} has promised {pool.thick_bytes} of {pool.capacity_bytes} bytes"
