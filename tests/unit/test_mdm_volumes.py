"""Volumes: sizes, capacity, mapping, extension, deletion."""

from __future__ import annotations

import time
from typing import Any

import pytest

from mdm.capacity import spare_percent
from mdm.commands import (
    AddSdc,
    CreateVolume,
    DeleteVolume,
    ExtendVolume,
    MapVolume,
    SetSdsState,
    UnmapVolume,
    UpdatePool,
    VolumePurged,
)
from mdm.events import EventType
from mdm.transition import apply
from pfvol.constants import SEGMENT_CHUNKS, SEGMENT_ENTRY_BYTES, VOLUME_SIZE_BYTES_MAX
from pfvol.errors import CapacityError, ConflictError, InvalidError, NotFoundError
from tests.support.mdm_world import CHUNK, GIB, START, World, small_world

MIB = 1024**2
TIB = 1024**4


def sdc(world: World, name: str = "host") -> int:
    return int(world.run(AddSdc(name=name)))


@pytest.mark.parametrize(
    ("asked", "size", "chunks"),
    [(1, 4096, 1), (4096, 4096, 1), (4097, 8192, 1), (CHUNK, CHUNK, 1), (CHUNK + 1, CHUNK + 4096, 2), (GIB, GIB, 256)],
)
def test_sizes_are_rounded_up_to_blocks(asked: int, size: int, chunks: int) -> None:
    world, _, pool_id = small_world()
    volume_id = world.volume(pool_id, size_bytes=asked)
    volume = world.state.volumes[volume_id]
    assert (volume.size_bytes, volume.chunks) == (size, chunks)


@pytest.mark.parametrize("size", [0, -1, VOLUME_SIZE_BYTES_MAX + 1, 1.5, True, None])
def test_sizes_that_no_volume_can_have(size: Any) -> None:
    world, _, pool_id = small_world()
    with pytest.raises(InvalidError, match="a volume"):
        world.volume(pool_id, size_bytes=size)


def test_the_map_is_cut_into_segments_that_agree_with_the_placement() -> None:
    world, _, pool_id = small_world()
    volume_id = world.volume(pool_id, size_bytes=9 * GIB)
    sizes = [len(segment) for segment in world.state.maps[volume_id]]
    assert sizes == [SEGMENT_CHUNKS * SEGMENT_ENTRY_BYTES] * 2 + [256 * SEGMENT_ENTRY_BYTES]
    assert sum(world.state.volumes[volume_id].placement.values()) == 9 * 256
    assert world.copies(volume_id) == {1: 1536, 2: 1536, 3: 1536}


def test_many_small_volumes_spread_over_all_sdss() -> None:
    world, _, pool_id = small_world(sds=4)
    for number in range(40):
        world.volume(pool_id, f"v{number}", size_bytes=CHUNK)
    assert [sds.copies for sds in world.state.sds.values()] == [20] * 4
    assert [sds.primaries for sds in world.state.sds.values()] == [10] * 4


@pytest.mark.parametrize("up", [0, 1])
def test_two_sdss_have_to_be_up(up: int) -> None:
    world, _, pool_id = small_world(sds=3)
    for sds_id in range(up + 1, 4):
        world.run(SetSdsState(sds_id=sds_id, state="DOWN"))
    with pytest.raises(ConflictError, match=f"at least 2 SDSs that are UP, and .* default has {up}"):
        world.volume(pool_id)


def test_nothing_is_placed_on_an_sds_that_is_down() -> None:
    world, _, pool_id = small_world(sds=3)
    world.run(SetSdsState(sds_id=2, state="DOWN"))
    assert world.copies(world.volume(pool_id)).keys() == {1, 3}


def test_scenario_d_two_thick_volumes_fit_and_the_third_is_refused() -> None:
    world, _, pool_id = small_world(sds=2, slots=384, capacity_bytes=2_000_000_000)
    world.volume(pool_id, "v1", 800_000_000, provisioning="thick")
    world.volume(pool_id, "v2", 800_000_000, provisioning="thick")
    assert [sds.thick_slots for sds in world.state.sds.values()] == [382, 382]
    with pytest.raises(CapacityError, match=r"in pool default: needs 762\.94 MiB, 381\.47 MiB free"):
        world.volume(pool_id, "v3", 800_000_000, provisioning="thick")
    assert world.state.pools[pool_id].thick_bytes == 2 * 800_002_048
    assert [volume.name for volume in world.state.volumes.values()] == ["v1", "v2"]


def test_scenario_b_two_thick_volumes_on_four_sdss() -> None:
    world, _, pool_id = small_world(sds=4, slots=512, capacity_bytes=4 * 10**9)
    for name in ("v1", "v2"):
        world.volume(pool_id, name, 1_500_000_000, provisioning="thick")
    assert [sds.thick_slots for sds in world.state.sds.values()] == [358] * 4


def test_thick_is_refused_by_what_the_sdss_can_hold_and_says_what_is_free() -> None:
    world, _, pool_id = small_world(sds=2, slots=100)
    with pytest.raises(CapacityError, match="needs 404 MiB, 400 MiB free in its SDSs") as refusal:
        world.volume(pool_id, size_bytes=101 * CHUNK, provisioning="thick")
    assert refusal.value.details["free_bytes"] == 100 * CHUNK
    world.volume(pool_id, size_bytes=100 * CHUNK, provisioning="thick")
    with pytest.raises(CapacityError, match=" 0 B free in its SDSs"):
        world.volume(pool_id, "more", size_bytes=1, provisioning="thick")


def test_thick_fills_unequal_sdss_to_the_last_slot() -> None:
    world = World()
    pd_id = world.pd()
    pool_id = world.pool(pd_id, spare_percent=0)
    for number, slots in enumerate((50, 30, 20), start=1):
        world.sds(pd_id, f"sds{number}", slots=slots)
    volume_id = world.volume(pool_id, size_bytes=50 * CHUNK, provisioning="thick")
    assert world.copies(volume_id) == {1: 50, 2: 30, 3: 20}


def test_spare_is_kept_free_of_thick_volumes_by_default_from_three_sdss_on() -> None:
    world, pd_id, pool_id = small_world(sds=2, slots=100)
    assert spare_percent(world.state, world.state.pools[pool_id]) == 0
    world.sds(pd_id, "sds3", slots=100)
    assert spare_percent(world.state, world.state.pools[pool_id]) == 10
    with pytest.raises(CapacityError):
        world.volume(pool_id, size_bytes=136 * CHUNK, provisioning="thick")
    world.volume(pool_id, "fits", size_bytes=135 * CHUNK, provisioning="thick")
    world.run(UpdatePool(pool_id=pool_id, spare_percent=0))
    world.volume(pool_id, "rest", size_bytes=15 * CHUNK, provisioning="thick")
    assert [sds.thick_slots for sds in world.state.sds.values()] == [100] * 3


def test_thin_overcommits() -> None:
    world, _, pool_id = small_world(sds=2, slots=10, capacity_bytes=GIB)
    volume_id = world.volume(pool_id, size_bytes=100 * GIB)
    assert world.state.volumes[volume_id].chunks == 25600
    assert world.state.pools[pool_id].thick_bytes == 0


def test_thick_has_to_fit_beside_what_thin_volumes_occupy() -> None:
    world, _, pool_id = small_world(sds=2, slots=100, capacity_bytes=100 * CHUNK)
    create = {"pool_id": pool_id, "name": "thick", "provisioning": "thick"}
    with pytest.raises(CapacityError, match="in its SDSs"):
        world.run(CreateVolume(**create, size_bytes=61 * CHUNK, thin_slots={1: 40, 2: 10}))
    with pytest.raises(CapacityError, match="in the pool's quota"):
        world.run(CreateVolume(**create, size_bytes=61 * CHUNK, pool_thin_bytes=40 * CHUNK))
    world.run(CreateVolume(**create, size_bytes=60 * CHUNK, thin_slots={1: 40, 2: 10}, pool_thin_bytes=40 * CHUNK))


def test_deleting_thick_gives_its_reservation_back() -> None:
    world, _, pool_id = small_world(sds=2, slots=100)
    volume_id = world.volume(pool_id, size_bytes=100 * CHUNK, provisioning="thick")
    world.run(DeleteVolume(volume_id=volume_id))
    assert world.state.pools[pool_id].thick_bytes == 0
    assert [(sds.copies, sds.primaries, sds.thick_slots) for sds in world.state.sds.values()] == [(0, 0, 0)] * 2
    world.volume(pool_id, size_bytes=100 * CHUNK, provisioning="thick")


def test_provisioning_is_thin_or_thick() -> None:
    world, _, pool_id = small_world()
    with pytest.raises(InvalidError, match="thin, thick"):
        world.volume(pool_id, provisioning="fat")


def test_extension_keeps_the_old_map_and_adds_to_it() -> None:
    world, _, pool_id = small_world()
    volume_id = world.volume(pool_id, size_bytes=5 * CHUNK)
    before = b"".join(world.state.maps[volume_id])
    world.run(ExtendVolume(volume_id=volume_id, size_bytes=9 * GIB))
    after = b"".join(world.state.maps[volume_id])
    assert after.startswith(before)
    assert len(after) == 9 * 256 * SEGMENT_ENTRY_BYTES
    assert len(world.state.maps[volume_id][0]) == SEGMENT_CHUNKS * SEGMENT_ENTRY_BYTES
    assert world.events[-1].type is EventType.VOLUME_EXTEND
    assert world.events[-1].details == {"old_size_bytes": 5 * CHUNK, "new_size_bytes": 9 * GIB}


def test_extension_within_the_last_chunk_leaves_the_map_alone() -> None:
    world, _, pool_id = small_world()
    volume_id = world.volume(pool_id, size_bytes=4096, provisioning="thick")
    before = world.state.maps[volume_id]
    world.run(ExtendVolume(volume_id=volume_id, size_bytes=CHUNK))
    assert world.state.maps[volume_id] is before
    assert world.state.pools[pool_id].thick_bytes == CHUNK


@pytest.mark.parametrize("size", [GIB, GIB - 1, GIB - 4095, 1])
def test_a_volume_only_grows(size: int) -> None:
    world, _, pool_id = small_world()
    volume_id = world.volume(pool_id)
    with pytest.raises(InvalidError, match="can only be extended"):
        world.run(ExtendVolume(volume_id=volume_id, size_bytes=size))


def test_a_thick_extension_has_to_fit() -> None:
    world, _, pool_id = small_world(sds=2, slots=100, capacity_bytes=80 * CHUNK)
    volume_id = world.volume(pool_id, size_bytes=50 * CHUNK, provisioning="thick")
    with pytest.raises(CapacityError, match="quota"):
        world.run(ExtendVolume(volume_id=volume_id, size_bytes=81 * CHUNK))
    world.run(ExtendVolume(volume_id=volume_id, size_bytes=80 * CHUNK))
    assert world.state.sds[1].thick_slots == 80


def test_mapping_and_unmapping() -> None:
    world, _, pool_id = small_world()
    volume_id, first, second = world.volume(pool_id), sdc(world, "a"), sdc(world, "b")
    one = world.run(MapVolume(volume_id=volume_id, sdc_id=first, iops_limit=100, bandwidth_limit_mbps=7))
    two = world.run(MapVolume(volume_id=volume_id, sdc_id=second, access_mode="readOnly"))
    mappings = world.state.volumes[volume_id].mappings
    assert [(item.mapping_id, item.sdc_id, item.read_only, item.iops_limit) for item in mappings] == [
        (one, first, False, 100),
        (two, second, True, 0),
    ]
    world.run(UnmapVolume(volume_id=volume_id, sdc_id=first))
    assert world.run(MapVolume(volume_id=volume_id, sdc_id=first)) == two + 1
    assert world.state.volumes_mapped_to(first) == [world.state.volumes[volume_id]]


def test_the_state_follows_the_mappings() -> None:
    world, _, pool_id = small_world()
    volume_id, host = world.volume(pool_id), sdc(world)
    world.events.clear()
    world.run(MapVolume(volume_id=volume_id, sdc_id=host))
    world.run(UnmapVolume(volume_id=volume_id, sdc_id=host))
    assert world.types() == [
        EventType.VOLUME_MAP,
        EventType.VOLUME_STATE_CHANGE,
        EventType.VOLUME_UNMAP,
        EventType.VOLUME_STATE_CHANGE,
    ]
    assert [event.details["new"] for event in world.events if "new" in event.details] == ["IN_USE", "AVAILABLE"]


@pytest.mark.parametrize(
    "fields", [{"access_mode": "rw"}, {"iops_limit": -1}, {"iops_limit": 1.5}, {"bandwidth_limit_mbps": 10**12}]
)
def test_bad_mappings(fields: dict[str, Any]) -> None:
    world, _, pool_id = small_world()
    with pytest.raises(InvalidError):
        world.run(MapVolume(volume_id=world.volume(pool_id), sdc_id=sdc(world), **fields))


def test_mapping_twice_and_unmapping_what_is_not_mapped_are_conflicts() -> None:
    world, _, pool_id = small_world()
    volume_id, host = world.volume(pool_id), sdc(world)
    with pytest.raises(ConflictError, match="is not mapped to host"):
        world.run(UnmapVolume(volume_id=volume_id, sdc_id=host))
    world.run(MapVolume(volume_id=volume_id, sdc_id=host))
    with pytest.raises(ConflictError, match="already mapped to host"):
        world.run(MapVolume(volume_id=volume_id, sdc_id=host, access_mode="readOnly"))


def test_a_degraded_volume_is_mapped_and_a_failed_one_is_not() -> None:
    world, _, pool_id = small_world()
    volume_id, host = world.volume(pool_id), sdc(world)
    world.run(SetSdsState(sds_id=1, state="DOWN"))
    world.run(MapVolume(volume_id=volume_id, sdc_id=host))
    world.run(SetSdsState(sds_id=2, state="DOWN"))
    with pytest.raises(ConflictError, match="is FAILED"):
        world.run(MapVolume(volume_id=volume_id, sdc_id=sdc(world, "late")))


def test_a_mapped_volume_is_not_deleted() -> None:
    world, _, pool_id = small_world()
    volume_id, host = world.volume(pool_id), sdc(world)
    world.run(MapVolume(volume_id=volume_id, sdc_id=host))
    with pytest.raises(ConflictError, match="is mapped to host: unmap it first"):
        world.run(DeleteVolume(volume_id=volume_id))


def test_a_deleted_volume_waits_for_every_sds_to_confirm() -> None:
    world, _, pool_id = small_world()
    volume_id = world.volume(pool_id)
    world.run(DeleteVolume(volume_id=volume_id))
    assert world.state.purges[volume_id].sds_ids == {1, 2, 3}
    with pytest.raises(NotFoundError, match="volume vol1 is deleted"):
        world.run(MapVolume(volume_id=volume_id, sdc_id=sdc(world)))
    for sds_id in (1, 1, 3, 9):
        world.run(VolumePurged(volume_id=volume_id, sds_id=sds_id))
    assert world.state.purges[volume_id].sds_ids == {2}
    world.run(VolumePurged(volume_id=volume_id, sds_id=2))
    assert world.state.purges == {}
    assert world.events[-1].type is EventType.VOLUME_PURGED
    assert world.volume(pool_id) == volume_id + 1


def test_deleting_a_degraded_volume_heals_its_pool() -> None:
    world, _, pool_id = small_world()
    volume_id = world.volume(pool_id)
    world.run(SetSdsState(sds_id=1, state="DOWN"))
    world.run(DeleteVolume(volume_id=volume_id))
    assert (world.events[-1].type, world.events[-1].details["new"]) == (EventType.POOL_HEALTH_CHANGE, "OK")


def test_a_large_volume_shares_its_equal_segments() -> None:
    """1 TiB in 256 segments: created in well under half a second (measured 15 ms) and few of them different."""
    world, _, pool_id = small_world()
    started = time.process_time()
    done = apply(world.state, CreateVolume(pool_id=pool_id, name="large", size_bytes=TIB), START)
    assert time.process_time() - started < 0.5
    segments = done.state.maps[done.result]
    assert len(segments) == 256
    assert len({id(segment) for segment in segments}) < 100


def test_the_state_before_a_command_is_untouched() -> None:
    world, _, pool_id = small_world()
    before = world.state
    volumes, counters, copies = dict(before.volumes), dict(before.counters), before.sds[1].copies
    world.volume(pool_id)
    assert (dict(before.volumes), dict(before.counters), before.sds[1].copies) == (volumes, counters, copies)
