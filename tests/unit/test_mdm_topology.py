"""Protection domains, fault sets, pools, SDSs and SDCs: the rules of their lives."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mdm.commands import (
    AddSdc,
    AddSds,
    CancelRebuild,
    CreatePool,
    CreateProtectionDomain,
    CreateVolume,
    DeleteFaultSet,
    DeletePool,
    DeleteProtectionDomain,
    DeleteVolume,
    KeepSds,
    MapVolume,
    RegisterSdc,
    RemoveSdc,
    RemoveSds,
    SetSdsState,
    StartRebuild,
    TellRebuild,
    TellRepairs,
    UnmapVolume,
    UpdatePool,
    VolumePurged,
)
from mdm.events import EventType
from mdm.model import Device, SdcSession, SdsState
from pfvol.errors import CapacityError, ConflictError, InvalidError, NotFoundError
from tests.support.mdm_world import CHUNK, GIB, World, registration, small_world


def test_names_are_unique_per_kind_and_pools_per_domain() -> None:
    world, pd_id, _ = small_world()
    for command in (
        CreateProtectionDomain(name="default"),
        CreatePool(pd_id=pd_id, name="default", capacity_bytes=GIB),
        AddSds(pd_id=pd_id, name="sds1", capacity_bytes=GIB, node="elsewhere"),
    ):
        with pytest.raises(ConflictError, match="is taken by another"):
            world.run(command)
    world.pool(world.pd("other"), "default")
    world.fault_set(pd_id, "default")


def test_a_refused_command_leaves_no_trace() -> None:
    world, pd_id, _ = small_world()
    before = world.state
    with pytest.raises(ConflictError):
        world.run(CreatePool(pd_id=pd_id, name="default", capacity_bytes=GIB))
    assert world.state is before


def test_numbers_are_never_given_twice() -> None:
    world = World()
    first = world.pd("a")
    world.run(DeleteProtectionDomain(pd_id=first))
    assert world.pd("a") == first + 1


def test_a_domain_with_contents_is_deleted_only_by_cascade() -> None:
    world, pd_id, pool_id = small_world()
    world.fault_set(pd_id, "rack")
    volume_id = world.volume(pool_id)
    with pytest.raises(ConflictError, match="1 pools, 3 SDSs, 1 fault sets"):
        world.run(DeleteProtectionDomain(pd_id=pd_id))
    session = world.run(RegisterSdc(name="host"))
    world.run(MapVolume(volume_id=volume_id, sdc_id=session.sdc_id))
    with pytest.raises(ConflictError, match="mapped to host"):
        world.run(DeleteProtectionDomain(pd_id=pd_id, cascade=True))
    world.run(UnmapVolume(volume_id=volume_id, sdc_id=session.sdc_id))
    world.run(DeleteProtectionDomain(pd_id=pd_id, cascade=True))
    state = world.state
    assert not any((state.pds, state.fault_sets, state.pools, state.sds, state.volumes, state.maps, state.purges))
    assert list(state.names) == [("sdc", 0, "host")]


def test_a_fault_set_in_use_stays() -> None:
    world = World()
    pd_id = world.pd()
    fault_set_id = world.fault_set(pd_id, "rack")
    sds_id = world.sds(pd_id, "sds1", fault_set_id=fault_set_id)
    with pytest.raises(ConflictError, match="used by SDS sds1"):
        world.run(DeleteFaultSet(fault_set_id=fault_set_id))
    world.run(RemoveSds(sds_id=sds_id))
    world.run(DeleteFaultSet(fault_set_id=fault_set_id))
    assert EventType.FAULT_SET_DELETE in world.types()


def test_a_fault_set_of_another_domain_is_refused() -> None:
    world = World()
    foreign = world.fault_set(world.pd("other"), "rack")
    with pytest.raises(InvalidError, match="another protection domain"):
        world.sds(world.pd("mine"), "sds1", fault_set_id=foreign)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("capacity_bytes", 0),
        ("capacity_bytes", -1),
        ("capacity_bytes", 2**70),
        ("capacity_bytes", True),
        ("policy", "three_copies"),
        ("durability", "maybe"),
        ("rebuild_rate_limit_mbps", 0),
        ("rebuild_delay_seconds", -1),
        ("spare_percent", 91),
    ],
)
def test_bad_pool_properties(field: str, value: Any) -> None:
    world, pd_id, pool_id = small_world()
    with pytest.raises(InvalidError):
        world.pool(pd_id, "new", **{field: value})
    with pytest.raises(InvalidError):
        world.run(UpdatePool(pool_id=pool_id, **{field: value}))


def test_erasure_coding_is_not_available() -> None:
    world = World()
    with pytest.raises(InvalidError, match="ec is not available in this version"):
        world.pool(world.pd(), policy="ec")


def test_updating_a_pool_changes_what_is_given_and_tells_it() -> None:
    world, pd_id, pool_id = small_world()
    world.run(UpdatePool(pool_id=pool_id, name="fast", durability="commit", rebuild_delay_seconds=0))
    pool = world.state.pools[pool_id]
    assert (pool.name, pool.durability, pool.rebuild_delay_seconds, pool.rebuild_rate_limit_mbps) == (
        "fast",
        "commit",
        0,
        100,
    )
    assert world.events[-1].type is EventType.POOL_UPDATE
    assert world.events[-1].details["name"] == {"old": "default", "new": "fast"}
    world.pool(pd_id, "default")
    with pytest.raises(ConflictError, match="default is taken by another pool"):
        world.run(UpdatePool(pool_id=pool_id, name="default"))


def test_an_update_that_changes_nothing_is_no_change() -> None:
    world, _, pool_id = small_world()
    before = world.state
    world.run(UpdatePool(pool_id=pool_id, name="default", policy="two_copies"))
    assert world.state is before


def test_a_pool_does_not_shrink_below_its_thick_volumes() -> None:
    world, _, pool_id = small_world()
    world.volume(pool_id, size_bytes=GIB, provisioning="thick")
    with pytest.raises(ConflictError, match="reserved by thick volumes"):
        world.run(UpdatePool(pool_id=pool_id, capacity_bytes=GIB - 1))
    world.run(UpdatePool(pool_id=pool_id, capacity_bytes=GIB))


def test_a_pool_with_volumes_stays() -> None:
    world, _, pool_id = small_world()
    volume_id = world.volume(pool_id)
    with pytest.raises(ConflictError, match="has 1 volumes"):
        world.run(DeletePool(pool_id=pool_id))
    world.run(DeleteVolume(volume_id=volume_id))
    world.run(DeletePool(pool_id=pool_id))
    assert pool_id not in world.state.pools


def test_an_sds_capacity_is_cut_into_slots_over_its_devices() -> None:
    world = World()
    pd_id = world.pd()
    sds_id = world.run(AddSds(pd_id=pd_id, name="a", capacity_bytes=1536 * 1024**2))
    sds = world.state.sds[sds_id]
    assert [device.slots for device in sds.devices] == [77, 77, 77, 77, 76]
    assert sds.state is SdsState.DOWN
    tiny_id = world.run(AddSds(pd_id=pd_id, name="b", capacity_bytes=2 * CHUNK + 5))
    assert [device.slots for device in world.state.sds[tiny_id].devices] == [1, 1]
    named_id = world.run(AddSds(pd_id=pd_id, name="c", capacity_bytes=8 * CHUNK, devices=("/dev/a", "/dev/b")))
    named = world.state.sds[named_id].devices
    assert [(device.path, device.slots) for device in named] == [("/dev/a", 4), ("/dev/b", 4)]


@pytest.mark.parametrize(
    "fields",
    [
        {"capacity_bytes": CHUNK - 1},
        {"capacity_bytes": GIB, "devices": ("relative",)},
        {"capacity_bytes": GIB, "devices": ("/a", "/a")},
        {"capacity_bytes": CHUNK, "devices": ("/a", "/b")},
        {"capacity_bytes": GIB, "node": "not a node"},
        *({"capacity_bytes": GIB, "ip": ip} for ip in ("", "not a host", "10.0.0.256", "10.0.0.1:x", "a..b", "[::1]")),
    ],
)
def test_bad_sds(fields: dict[str, Any]) -> None:
    world = World()
    with pytest.raises(InvalidError):
        world.run(AddSds(pd_id=world.pd(), name="a", **fields))


@pytest.mark.parametrize("ip", ["10.0.0.1", "10.0.0.1:8020", "::1", "[::1]:8020", "host", "a-1.example.org", "1a.b:1"])
def test_where_an_sds_is_expected(ip: str) -> None:
    world = World()
    sds_id = world.run(AddSds(pd_id=world.pd(), name="a", capacity_bytes=GIB, ip=ip))
    assert world.state.sds[sds_id].ip == ip


def test_an_sdc_is_at_a_host_and_not_at_a_port() -> None:
    world = World()
    with pytest.raises(InvalidError, match="IP address or a host name"):
        world.run(AddSdc(name="a", ip="10.0.0.1:8020"))


def test_a_node_has_one_sds() -> None:
    world, pd_id, _ = small_world()
    with pytest.raises(ConflictError, match="node sds1 already runs SDS sds1"):
        world.run(AddSds(pd_id=pd_id, name="another", capacity_bytes=GIB, node="sds1"))


def test_registration_brings_an_sds_up_with_the_devices_it_has() -> None:
    world = World()
    pd_id = world.pd()
    sds_id = world.sds(pd_id, "a", slots=10, up=False)
    world.register(sds_id, incarnation=7, http_address=("127.0.0.1", 9000))
    sds = world.state.sds[sds_id]
    assert (sds.state, sds.incarnation, sds.data_address) == (SdsState.UP, 7, ("127.0.0.1", 8020 + sds_id))
    assert all(device.device_id for device in sds.devices)
    assert world.types().count(EventType.SDS_STATE_CHANGE) == 1
    before = world.state
    world.register(sds_id, incarnation=7, http_address=("127.0.0.1", 9000))
    assert world.state is before


def test_registration_without_devices_is_not_yet_service() -> None:
    world = World()
    sds_id = world.sds(world.pd(), "a", slots=10, up=False)
    world.register(sds_id, devices=())
    assert world.state.sds[sds_id].state is SdsState.DOWN
    assert world.state.sds[sds_id].slots == 10


def test_an_sds_with_copies_must_bring_its_devices_and_not_an_old_copy_of_them() -> None:
    """On a wiped device written chunks would read as zeros."""
    world, _, pool_id = small_world()
    good = registration(world.state, 1)
    other = tuple(replace(device, device_id=f"{device.index:032x}") for device in good.devices)
    world.register(1, incarnation=9, devices=other)
    world.register(1, incarnation=5)
    world.volume(pool_id)
    with pytest.raises(ConflictError, match="comes without device 2"):
        world.register(1, incarnation=6, devices=good.devices[:2] + good.devices[3:])
    with pytest.raises(ConflictError, match="an old copy"):
        world.register(1, incarnation=4)
    with pytest.raises(ConflictError, match="belongs to node sds1"):
        world.register(1, incarnation=6, node="sds9")
    world.register(1, incarnation=6)


@pytest.mark.parametrize(
    "fields",
    [
        {"data_address": ("", 1)},
        {"data_address": ("h", 0)},
        {"data_address": ("h", 65536)},
        {"http_address": ("h", -1)},
        {"incarnation": -1},
        {"devices": (Device(index=0, slots=0),)},
        {"devices": (Device(index=0, slots=1), Device(index=0, slots=1))},
    ],
)
def test_bad_registrations(fields: dict[str, Any]) -> None:
    world, _, _ = small_world()
    with pytest.raises(InvalidError):
        world.register(1, **fields)


def test_an_sds_that_never_registered_cannot_be_up() -> None:
    world = World()
    sds_id = world.sds(world.pd(), "a", up=False)
    with pytest.raises(ConflictError, match="never registered"):
        world.run(SetSdsState(sds_id=sds_id, state="UP"))
    with pytest.raises(InvalidError, match="UP, DOWN, DEGRADED"):
        world.run(SetSdsState(sds_id=sds_id, state="SIDEWAYS"))


def test_states_of_an_sds_tell_those_of_volumes_and_pools() -> None:
    world, _, pool_id = small_world()
    volume_id = world.volume(pool_id)
    world.events.clear()
    world.run(SetSdsState(sds_id=1, state="DOWN"))
    told = [(event.type, event.details["old"], event.details["new"]) for event in world.events]
    assert told == [
        (EventType.SDS_STATE_CHANGE, "UP", "DOWN"),
        (EventType.VOLUME_STATE_CHANGE, "AVAILABLE", "DEGRADED"),
        (EventType.POOL_HEALTH_CHANGE, "OK", "DEGRADED"),
    ]
    assert world.events[1].volume_id == volume_id
    world.events.clear()
    world.run(SetSdsState(sds_id=2, state="DOWN"))
    assert [event.details["new"] for event in world.events] == ["DOWN", "FAILED", "FAILED"]
    world.events.clear()
    world.run(SetSdsState(sds_id=2, state="UP"))
    world.run(SetSdsState(sds_id=1, state="UP"))
    assert [event.details["new"] for event in world.events] == ["UP", "DEGRADED", "DEGRADED", "UP", "AVAILABLE", "OK"]


def test_an_sds_with_copies_is_emptied_before_it_goes() -> None:
    """Goal: it is marked and stays until nothing is on it; a removal can be taken back."""
    world, _, pool_id = small_world()
    volume_id = world.volume(pool_id)
    assert world.run(RemoveSds(sds_id=1)) is False
    assert world.state.sds[1].removing
    sequence = world.state.sequence
    assert world.run(RemoveSds(sds_id=1)) is False
    assert world.state.sequence == sequence, "asked again it is the same removal"
    world.run(KeepSds(sds_id=1))
    assert not world.state.sds[1].removing
    world.run(RemoveSds(sds_id=1))
    world.run(DeleteVolume(volume_id=volume_id))
    assert world.run(RemoveSds(sds_id=1)) is True
    assert world.state.purges[volume_id].sds_ids == {2, 3}
    with pytest.raises(NotFoundError):
        world.run(RemoveSds(sds_id=1))
    types = [EventType.SDS_REMOVE_START, EventType.SDS_REMOVE_CANCEL, EventType.SDS_REMOVE_START, EventType.SDS_REMOVE]
    assert [kind for kind in world.types() if kind.startswith("SDS_REMOVE")] == types


def test_an_sds_that_cannot_be_emptied_stays() -> None:
    """Goal: refused at once where it is certain that its copies have no place."""
    pair, _, pool_id = small_world(sds=2)
    pair.volume(pool_id)
    with pytest.raises(ConflictError, match="two copies need 2 other SDSs"):
        pair.run(RemoveSds(sds_id=1))
    full, _, pool_id = small_world(slots=100)
    full.run(UpdatePool(pool_id=pool_id, spare_percent=0))
    full.volume(pool_id, size_bytes=101 * CHUNK, provisioning="thick")
    with pytest.raises(CapacityError, match="200 slots, and 202 copies"):
        full.run(RemoveSds(sds_id=1))
    thin, _, pool_id = small_world(slots=100)
    thin.volume(pool_id, size_bytes=101 * CHUNK)
    with pytest.raises(CapacityError, match="200 slots, and 201 copies"):
        thin.run(RemoveSds(sds_id=1, thin_slots={1: 67, 2: 67, 3: 67}))
    assert thin.run(RemoveSds(sds_id=1, thin_slots={1: 66, 2: 67, 3: 67})) is False


def test_new_chunks_are_not_placed_on_an_sds_that_is_to_go() -> None:
    world, _, pool_id = small_world(sds=4)
    world.volume(pool_id)
    world.run(RemoveSds(sds_id=1))
    volume_id = world.volume(pool_id, name="vol2")
    assert world.copies(volume_id).keys() == {2, 3, 4}


def test_since_when_an_sds_is_down_is_kept() -> None:
    """Goal: after a restart of the MDM a rebuild's delay goes on and does not begin again."""
    world, _, _ = small_world()
    assert world.state.sds[1].down_since is None
    world.run(SetSdsState(sds_id=1, state="DOWN"))
    since = world.now
    world.run(SetSdsState(sds_id=2, state="DOWN"))
    assert world.state.sds[1].down_since == since
    world.run(SetSdsState(sds_id=1, state="UP"))
    assert world.state.sds[1].down_since is None


def test_a_rebuild_is_cancelled_until_it_is_started() -> None:
    world, _, pool_id = small_world()
    world.run(CancelRebuild(pool_id=pool_id))
    world.run(CancelRebuild(pool_id=pool_id))
    assert world.state.pools[pool_id].rebuild_cancelled
    assert world.types().count(EventType.REBUILD_CANCELLED) == 1
    world.run(StartRebuild(pool_id=pool_id))
    pool = world.state.pools[pool_id]
    assert (pool.rebuild_cancelled, pool.rebuild_started_at) == (False, world.now)
    world.run(TellRebuild(pool_id=pool_id, type="REBUILD_STALLED", message="full", details={"chunks": 3}))
    assert (world.events[-1].message, world.events[-1].details) == ("pool default: full", {"chunks": 3})


def test_bad_blocks_of_an_sds_are_an_event() -> None:
    world, _, _ = small_world()
    world.run(TellRepairs(sds_id=1, repaired=3, unrepairable=0))
    assert (world.events[-1].type, world.events[-1].sds_id) == (EventType.BLOCKS_REPAIRED, 1)
    world.run(TellRepairs(sds_id=1, repaired=3, unrepairable=2))
    assert world.events[-1].type is EventType.BLOCKS_UNREPAIRABLE
    assert world.events[-1].details == {"repaired": 3, "unrepairable": 2}
    world.run(TellRepairs(sds_id=1, repaired=3, unrepairable=0, tables=True))
    assert world.events[-1].type is EventType.SLOTS_REPAIRED
    world.run(TellRepairs(sds_id=1, repaired=3, unrepairable=1, tables=True))
    assert world.events[-1].type is EventType.SLOTS_LOST


def test_the_last_sds_of_a_purge_may_also_end_it_by_going_away() -> None:
    world, _, pool_id = small_world()
    volume_id = world.volume(pool_id)
    world.run(DeleteVolume(volume_id=volume_id))
    for sds_id in (2, 3):
        world.run(VolumePurged(volume_id=volume_id, sds_id=sds_id))
    world.run(RemoveSds(sds_id=1))
    assert world.state.purges == {}


def test_each_session_of_an_sdc_has_a_higher_incarnation() -> None:
    world = World()
    assert world.run(RegisterSdc(name="host")) == SdcSession(1, 1)
    assert world.run(RegisterSdc(name="host")) == SdcSession(1, 2)
    assert world.run(AddSdc(name="other")) == 2
    assert world.run(RegisterSdc(name="other", ip="10.0.0.1")) == SdcSession(2, 1)
    assert world.state.sdc[2].ip == "10.0.0.1"
    assert world.types() == [EventType.SDC_ADD, EventType.SDC_ADD]


def test_an_sdc_with_mappings_is_not_removed() -> None:
    world, _, pool_id = small_world()
    volume_id = world.volume(pool_id)
    session = world.run(RegisterSdc(name="host"))
    world.run(MapVolume(volume_id=volume_id, sdc_id=session.sdc_id))
    with pytest.raises(ConflictError, match="volumes mapped \\(vol1\\)"):
        world.run(RemoveSdc(sdc_id=session.sdc_id))
    world.run(UnmapVolume(volume_id=volume_id, sdc_id=session.sdc_id))
    world.run(RemoveSdc(sdc_id=session.sdc_id))
    assert world.run(RegisterSdc(name="host")) == SdcSession(2, 1)


@pytest.mark.parametrize(
    "command",
    [
        DeleteProtectionDomain(pd_id=9),
        DeleteFaultSet(fault_set_id=9),
        DeletePool(pool_id=9),
        UpdatePool(pool_id=9),
        RemoveSds(sds_id=9),
        RemoveSdc(sdc_id=9),
        SetSdsState(sds_id=9, state="UP"),
        CreateVolume(pool_id=9, name="v", size_bytes=1),
        DeleteVolume(volume_id=9),
        MapVolume(volume_id=9, sdc_id=9),
        UnmapVolume(volume_id=9, sdc_id=9),
    ],
)
def test_what_is_not_there_is_not_found(command: Any) -> None:
    with pytest.raises(NotFoundError):
        World().run(command)


def test_every_event_has_its_time_its_number_and_its_references() -> None:
    world, pd_id, pool_id = small_world()
    volume_id = world.volume(pool_id)
    assert [event.event_id for event in world.events] == list(range(1, len(world.events) + 1))
    created = world.events[-1]
    assert (created.type, created.time) == (EventType.VOLUME_CREATE, world.now)
    assert (created.pd_id, created.pool_id, created.volume_id, created.sds_id) == (pd_id, pool_id, volume_id, None)
