"""Volumes: created, extended, mapped, unmapped, deleted, purged."""

from __future__ import annotations

from dataclasses import replace

from mdm import capacity, commands
from mdm.events import EventType
from mdm.health import down, volume_health
from mdm.identity import Kind
from mdm.model import AccessMode, Health, Pool, Provisioning, Purge, Sdc, Volume, VolumeMapping
from mdm.transition.checks import RATE_MAX, choice, whole
from mdm.transition.draft import Draft
from mdm.transition.nodes import confirm_purge
from pfvol.constants import SEGMENT_CHUNKS, SEGMENT_ENTRY_BYTES
from pfvol.errors import ConflictError, InvalidError

SEGMENT_BYTES = SEGMENT_CHUNKS * SEGMENT_ENTRY_BYTES
MAPPINGS_PER_VOLUME_MAX = 1024


def create_volume(draft: Draft, command: commands.CreateVolume) -> int:
    pool: Pool = draft.get(Kind.POOL, command.pool_id)
    volume_id = draft.next_id(Kind.VOLUME)
    draft.take_name(Kind.VOLUME, command.name, volume_id)
    volume = Volume(
        volume_id=volume_id,
        pool_id=pool.pool_id,
        name=command.name,
        size_bytes=0,
        provisioning=choice("provisioning", Provisioning, command.provisioning),
        created_at=draft.now,
    )
    draft.put("maps", volume_id, (), durable=False)
    size_bytes = capacity.volume_size(command.size_bytes)
    _grow(draft, volume, size_bytes, command)
    draft.event(
        EventType.VOLUME_CREATE,
        f"volume {volume.name} created ({volume.provisioning}, {size_bytes} bytes)",
        pd_id=pool.pd_id,
        pool_id=pool.pool_id,
        volume_id=volume_id,
        details={"size_bytes": size_bytes, "provisioning": volume.provisioning.value},
    )
    return volume_id


def extend_volume(draft: Draft, command: commands.ExtendVolume) -> None:
    volume: Volume = draft.get(Kind.VOLUME, command.volume_id)
    size_bytes = capacity.volume_size(command.size_bytes)
    if size_bytes <= volume.size_bytes:
        raise InvalidError(
            f"volume {volume.name} has {volume.size_bytes} bytes already: it can only be extended, not to {size_bytes}"
        )
    _grow(draft, volume, size_bytes, command)
    draft.event(
        EventType.VOLUME_EXTEND,
        f"volume {volume.name} extended from {volume.size_bytes} to {size_bytes} bytes",
        pool_id=volume.pool_id,
        volume_id=volume.volume_id,
        details={"old_size_bytes": volume.size_bytes, "new_size_bytes": size_bytes},
    )


def delete_volume(draft: Draft, command: commands.DeleteVolume) -> None:
    volume: Volume = draft.get(Kind.VOLUME, command.volume_id)
    if volume.mappings:
        names = sorted(draft.table("sdc")[mapping.sdc_id].name for mapping in volume.mappings)
        raise ConflictError(f"volume {volume.name} is mapped to {', '.join(names[:5])}: unmap it first")
    # Also those that have no part in its map any more: while they were away, their copies were made elsewhere.
    domain = draft.table("pools")[volume.pool_id].pd_id
    holders = frozenset(
        sds.sds_id for sds in draft.table("sds").values() if sds.pd_id == domain and sds.data_address is not None
    )
    draft.count_copies(volume, volume.placement.items(), -1)
    _reserve(draft, volume, -volume.size_bytes)
    draft.free_name(Kind.VOLUME, volume.name)
    draft.drop("volumes", volume.volume_id)
    draft.drop_map(volume.volume_id)
    purge = Purge(volume_id=volume.volume_id, name=volume.name, pool_id=volume.pool_id, sds_ids=holders)
    draft.put("purges", volume.volume_id, purge)
    draft.event(
        EventType.VOLUME_DELETE,
        f"volume {volume.name} deleted",
        pool_id=volume.pool_id,
        volume_id=volume.volume_id,
    )
    draft.tell_health([volume])


def map_volume(draft: Draft, command: commands.MapVolume) -> int:
    volume: Volume = draft.get(Kind.VOLUME, command.volume_id)
    sdc: Sdc = draft.get(Kind.SDC, command.sdc_id)
    if volume.mapping(sdc.sdc_id) is not None:
        raise ConflictError(
            f"volume {volume.name} is already mapped to {sdc.name}: unmap it first to change the mapping"
        )
    if volume_health(volume, down(draft.state)) is Health.FAILED:
        raise ConflictError(
            f"volume {volume.name} is FAILED (no copy of some chunks serves): start its SDSs before mapping it"
        )
    if len(volume.mappings) >= MAPPINGS_PER_VOLUME_MAX:
        raise ConflictError(f"volume {volume.name} has {MAPPINGS_PER_VOLUME_MAX} mappings, which is the limit")
    mapping = VolumeMapping(
        mapping_id=draft.next_number("mappings", 2**63 - 1),
        sdc_id=sdc.sdc_id,
        access_mode=choice("access mode", AccessMode, command.access_mode),
        iops_limit=whole("iops_limit", command.iops_limit, 0, RATE_MAX),
        bandwidth_limit_mbps=whole("bandwidth_limit_mbps", command.bandwidth_limit_mbps, 0, RATE_MAX),
        created_at=draft.now,
    )
    draft.put("volumes", volume.volume_id, replace(volume, mappings=(*volume.mappings, mapping)))
    draft.event(
        EventType.VOLUME_MAP,
        f"volume {volume.name} mapped to {sdc.name} ({mapping.access_mode})",
        pool_id=volume.pool_id,
        volume_id=volume.volume_id,
        sdc_id=sdc.sdc_id,
        details={"access_mode": mapping.access_mode.value},
    )
    draft.tell_state(volume)
    return mapping.mapping_id


def unmap_volume(draft: Draft, command: commands.UnmapVolume) -> None:
    volume: Volume = draft.get(Kind.VOLUME, command.volume_id)
    sdc: Sdc = draft.get(Kind.SDC, command.sdc_id)
    if volume.mapping(sdc.sdc_id) is None:
        raise ConflictError(f"volume {volume.name} is not mapped to {sdc.name}")
    left = tuple(mapping for mapping in volume.mappings if mapping.sdc_id != sdc.sdc_id)
    draft.put("volumes", volume.volume_id, replace(volume, mappings=left))
    draft.event(
        EventType.VOLUME_UNMAP,
        f"volume {volume.name} unmapped from {sdc.name}",
        pool_id=volume.pool_id,
        volume_id=volume.volume_id,
        sdc_id=sdc.sdc_id,
    )
    draft.tell_state(volume)


def volume_purged(draft: Draft, command: commands.VolumePurged) -> None:
    confirm_purge(draft, command.volume_id, command.sds_id)


def _grow(
    draft: Draft, volume: Volume, size_bytes: int, command: commands.CreateVolume | commands.ExtendVolume
) -> None:
    """Gives the volume its new size: quota, chunks, map and counts."""
    pool: Pool = draft.get(Kind.POOL, volume.pool_id)
    if volume.thick:
        capacity.check_quota(pool, size_bytes - volume.size_bytes, command.pool_thin_bytes)
    new = replace(volume, size_bytes=size_bytes)
    added = new.chunks - volume.chunks
    if added:
        placed = capacity.place_chunks(
            draft.state,
            pool,
            added,
            first_chunk=volume.chunks,
            thick=volume.thick,
            thin_slots=command.thin_slots,
            seed=volume.volume_id << 32 | volume.chunks,
        )
        _append(draft, volume, placed.pieces)
        placement = dict(volume.placement)
        for holders, count in placed.holders.items():
            placement[holders] = placement.get(holders, 0) + count
        new = replace(new, placement=placement)
        draft.count_copies(volume, placed.holders.items(), 1)
    _reserve(draft, volume, size_bytes - volume.size_bytes)
    draft.put("volumes", volume.volume_id, new)


def _append(draft: Draft, volume: Volume, pieces: list[bytes]) -> None:
    """Adds pieces of a map, none of which crosses a segment's end, first to a last segment that is not full.

    A piece that is a whole segment stays the object it is: a large volume has few different ones.
    """
    segments = list(draft.table("maps")[volume.volume_id])
    partial = segments.pop() if segments and len(segments[-1]) < SEGMENT_BYTES else b""
    first_changed = len(segments)
    for piece in pieces:
        partial = partial + piece if partial else piece
        if len(partial) == SEGMENT_BYTES:
            segments.append(partial)
            partial = b""
    if partial:
        segments.append(partial)
    draft.put_map(volume.volume_id, tuple(segments), first_changed=first_changed)


def _reserve(draft: Draft, volume: Volume, more_bytes: int) -> None:
    if volume.thick:
        pool: Pool = draft.get(Kind.POOL, volume.pool_id)
        new = replace(pool, thick_bytes=pool.thick_bytes + more_bytes)
        draft.put("pools", pool.pool_id, new, durable=False)
