"""SDSs and SDCs: admitted, registered, up and down, removed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from mdm import commands
from mdm.events import EventType
from mdm.identity import Kind, check_name
from mdm.model import RESTARTED, Device, FaultSet, Holders, ProtectionDomain, Sdc, SdcSession, Sds, SdsState
from mdm.placement import fits
from mdm.segments import Rewriter, Roles
from mdm.transition.checks import choice, host, host_or_address, text, whole
from mdm.transition.draft import Draft
from pfvol.constants import CHUNK_SIZE_BYTES, DEVICES_PER_SDS_DEFAULT, VOLUME_SIZE_BYTES_MAX
from pfvol.errors import CapacityError, ConflictError, InvalidError

COPIES = 2
DEVICES_PER_SDS_MAX = 256
PORT_MAX = 65535
INCARNATION_MAX = 2**63 - 1


def add_sds(draft: Draft, command: commands.AddSds) -> int:
    pd: ProtectionDomain = draft.get(Kind.PD, command.pd_id)
    _check_fault_set(draft, pd, command.fault_set_id)
    sds_id = draft.next_id(Kind.SDS)
    draft.take_name(Kind.SDS, command.name, sds_id)
    node = command.node if command.node is not None else command.name
    check_name(node, Kind.SDS)
    taken = next((sds.name for sds in draft.table("sds").values() if sds.node == node), None)
    if taken is not None:
        raise ConflictError(f"node {node} already runs SDS {taken}: a node has one SDS")
    sds = Sds(
        sds_id=sds_id,
        pd_id=pd.pd_id,
        name=command.name,
        fault_set_id=command.fault_set_id,
        node=node,
        ip=None if command.ip is None else host_or_address("an SDS's ip", command.ip),
        state=SdsState.DOWN,
        devices=_planned_devices(command),
        created_at=draft.now,
        down_since=draft.now,
    )
    draft.put("sds", sds_id, sds)
    draft.event(EventType.SDS_ADD, f"SDS {sds.name} added on node {node}", pd_id=pd.pd_id, sds_id=sds_id)
    return sds_id


def remove_sds(draft: Draft, command: commands.RemoveSds) -> bool:
    sds: Sds = draft.get(Kind.SDS, command.sds_id)
    if sds.copies:
        _begin_removal(draft, sds, command.thin_slots)
        return False
    for volume_id, purge in list(draft.table("purges").items()):
        if sds.sds_id in purge.sds_ids:
            confirm_purge(draft, volume_id, sds.sds_id)
    draft.free_name(Kind.SDS, sds.name)
    draft.drop("sds", sds.sds_id)
    draft.event(EventType.SDS_REMOVE, f"SDS {sds.name} removed", pd_id=sds.pd_id, sds_id=sds.sds_id)
    return True


def keep_sds(draft: Draft, command: commands.KeepSds) -> None:
    sds: Sds = draft.get(Kind.SDS, command.sds_id)
    if not sds.removing:
        return
    draft.put("sds", sds.sds_id, replace(sds, removing=False))
    draft.event(
        EventType.SDS_REMOVE_CANCEL, f"SDS {sds.name} is not removed any more", pd_id=sds.pd_id, sds_id=sds.sds_id
    )


def _begin_removal(draft: Draft, sds: Sds, thin_slots: Mapping[int, int]) -> None:
    """The copies are to move elsewhere. Refused when it is certain that they cannot."""
    if sds.removing:
        return
    state = draft.state
    domain = state.sds_of(sds.pd_id)
    others = [other for other in domain if other.sds_id != sds.sds_id and not other.removing and other.slots]
    if len(others) < COPIES:
        raise ConflictError(
            f"SDS {sds.name} holds {sds.copies} chunk copies, and two copies need {COPIES} other SDSs: protection "
            f"domain {state.pds[sds.pd_id].name} has {len(others)}; add one, or delete the volumes that use this one",
            others=len(others),
        )
    volumes = [volume for pool in state.pools_of(sds.pd_id) for volume in state.volumes_of(pool.pool_id)]
    alone = sum(
        count for volume in volumes for holders, count in volume.placement.items() if holders.members == (sds.sds_id,)
    )
    if sds.state is SdsState.DOWN and alone:
        raise ConflictError(
            f"SDS {sds.name} is DOWN and has the only copy of {alone} chunks: start it before it is removed",
            chunks=alone,
        )
    chunks = sum(volume.chunks for volume in volumes if volume.thick)
    thin = sum(thin_slots.get(other.sds_id, 0) for other in domain)
    room = [max(0, other.slots - thin_slots.get(other.sds_id, 0)) for other in others]
    total = sum(other.slots for other in others)
    if not fits(chunks, room) or COPIES * chunks + thin > total:
        raise CapacityError(
            f"SDS {sds.name} cannot be emptied: the other SDSs of its protection domain have {total} slots, and "
            f"{COPIES * chunks + thin} copies are written or promised; add an SDS, or delete a volume",
            slots=total,
            needed=COPIES * chunks + thin,
        )
    draft.put("sds", sds.sds_id, replace(sds, removing=True))
    draft.event(
        EventType.SDS_REMOVE_START,
        f"SDS {sds.name} is being removed: {sds.copies} chunk copies move elsewhere first",
        pd_id=sds.pd_id,
        sds_id=sds.sds_id,
        details={"copies": sds.copies},
    )


def register_sds(draft: Draft, command: commands.RegisterSds) -> None:
    """While the SDS counts as a copy of anything, all the devices that it had must be there, and no older: on others,
    chunks that were written would read as zeros. As a learner it may come with nothing."""
    sds: Sds = draft.get(Kind.SDS, command.sds_id)
    if command.node != sds.node:
        raise ConflictError(f"SDS {sds.name} belongs to node {sds.node}, not to {command.node}")
    whole("an incarnation", command.incarnation, 0, INCARNATION_MAX)
    member = any(sds.sds_id in holders.members for holders in _placements(draft))
    # Without devices it serves nothing, and its incarnation, which is theirs, is not known.
    older = bool(command.devices and sds.copies) and command.incarnation < sds.incarnation
    if member and older:
        raise ConflictError(
            f"SDS {sds.name} was last seen in incarnation {sds.incarnation} and now comes with {command.incarnation}: "
            "its devices are an old copy; bring back the current ones"
        )
    devices = _registered_devices(sds, command.devices) if command.devices else sds.devices
    here = {device.device_id for device in devices}
    missing = [device for device in sds.devices if device.device_id is not None and device.device_id not in here]
    if member and missing:
        raise ConflictError(
            f"SDS {sds.name} holds {sds.copies} chunk copies but comes without device {missing[0].index} "
            f"({missing[0].device_id}): bring its devices back as they were",
            missing=[device.device_id for device in missing],
        )
    if older or (command.devices and sds.copies and missing):
        _begin_anew(draft, sds)
    new = replace(
        sds,
        data_address=_address(command.data_address),
        http_address=None if command.http_address is None else _address(command.http_address),
        incarnation=command.incarnation if command.devices else max(command.incarnation, sds.incarnation),
        devices=devices,
    )
    if new != sds:
        draft.put("sds", sds.sds_id, new)
    if command.devices:
        if 0 < sds.incarnation != command.incarnation:
            draft.set_counter(RESTARTED % sds.sds_id, int(draft.now.timestamp() * 1000))
        _set_state(draft, new, SdsState.UP)


def _placements(draft: Draft) -> Iterable[Holders]:
    return (holders for volume in draft.table("volumes").values() for holders in volume.placement)


def _begin_anew(draft: Draft, sds: Sds) -> None:
    """It is only a learner, and comes without what it had: an older copy is not there any more, and what was said of
    its progress does not count."""

    def change(roles: Roles) -> Roles | None:
        if roles.learner != sds.sds_id:
            return None
        return roles._replace(left=0 if roles.left == sds.sds_id else roles.left)

    rewriter = Rewriter(change)
    changed = 0
    for volume in list(draft.table("volumes").values()):
        if volume.uses(sds.sds_id):
            done = rewriter.rewrite(draft.table("maps")[volume.volume_id])
            draft.change_map(volume, done)
            changed += done.entries
    if changed:
        draft.next_number("map", 2**63 - 1)


def set_sds_state(draft: Draft, command: commands.SetSdsState) -> None:
    sds: Sds = draft.get(Kind.SDS, command.sds_id)
    state = choice("an SDS's state", SdsState, command.state)
    if state is not SdsState.DOWN and sds.data_address is None:
        raise ConflictError(f"SDS {sds.name} has never registered: start node {sds.node}")
    _set_state(draft, sds, state)


def add_sdc(draft: Draft, command: commands.AddSdc) -> int:
    sdc_id = draft.next_id(Kind.SDC)
    draft.take_name(Kind.SDC, command.name, sdc_id)
    ip = None if command.ip is None else host("an SDC's ip", command.ip)
    draft.put("sdc", sdc_id, Sdc(sdc_id=sdc_id, name=command.name, ip=ip, created_at=draft.now))
    draft.event(EventType.SDC_ADD, f"SDC {command.name} added", sdc_id=sdc_id)
    return sdc_id


def remove_sdc(draft: Draft, command: commands.RemoveSdc) -> None:
    sdc: Sdc = draft.get(Kind.SDC, command.sdc_id)
    mapped = [volume.name for volume in draft.state.volumes_mapped_to(sdc.sdc_id)]
    if mapped:
        raise ConflictError(f"SDC {sdc.name} has volumes mapped ({', '.join(sorted(mapped)[:5])}): unmap them first")
    draft.free_name(Kind.SDC, sdc.name)
    draft.drop("sdc", sdc.sdc_id)
    draft.event(EventType.SDC_REMOVE, f"SDC {sdc.name} removed", sdc_id=sdc.sdc_id)


def register_sdc(draft: Draft, command: commands.RegisterSdc) -> SdcSession:
    sdc_id = draft.table("names").get(("sdc", 0, command.name))
    if sdc_id is None:
        sdc_id = add_sdc(draft, commands.AddSdc(name=command.name, ip=command.ip))
    sdc: Sdc = draft.get(Kind.SDC, sdc_id)
    new = replace(sdc, incarnation=sdc.incarnation + 1, ip=command.ip if command.ip is not None else sdc.ip)
    draft.put("sdc", sdc_id, new)
    return SdcSession(sdc_id, new.incarnation)


def confirm_purge(draft: Draft, volume_id: int, sds_id: int) -> None:
    """One SDS less to wait for; the purge ends with the last."""
    purge = draft.table("purges").get(volume_id)
    if purge is None or sds_id not in purge.sds_ids:
        return
    left = purge.sds_ids - {sds_id}
    if left:
        draft.put("purges", volume_id, replace(purge, sds_ids=left))
        return
    draft.drop("purges", volume_id)
    draft.event(
        EventType.VOLUME_PURGED,
        f"the space of deleted volume {purge.name} is free again",
        pool_id=purge.pool_id,
        volume_id=volume_id,
    )


def _set_state(draft: Draft, sds: Sds, state: SdsState) -> None:
    if sds.state is state:
        return
    down_since = draft.now if state is SdsState.DOWN else None
    draft.put("sds", sds.sds_id, replace(sds, state=state, down_since=down_since))
    draft.event(
        EventType.SDS_STATE_CHANGE,
        f"SDS {sds.name} went from {sds.state} to {state}",
        pd_id=sds.pd_id,
        sds_id=sds.sds_id,
        details={"old": sds.state.value, "new": state.value},
    )
    touched = (volume for volume in draft.table("volumes").values() if volume.uses(sds.sds_id))
    draft.tell_health(touched)


def tell_repairs(draft: Draft, command: commands.TellRepairs) -> None:
    sds: Sds = draft.get(Kind.SDS, command.sds_id)
    lost = command.unrepairable
    said = f"{command.repaired} blocks that did not match their checksums were rewritten from the other copy"
    if lost:
        said = f"{lost} blocks do not match their checksums in any copy: they cannot be read until they are written"
    kinds = (EventType.BLOCKS_REPAIRED, EventType.BLOCKS_UNREPAIRABLE)
    if command.tables:
        kinds = (EventType.SLOTS_REPAIRED, EventType.SLOTS_LOST)
        said = f"{command.repaired} entries of its slot tables had rotted and were mended"
        if lost:
            said = (
                f"{lost} devices had lost track of what was in their slots: it is compared with the other copies,"
                " and what has none cannot be read"
            )
    draft.event(
        kinds[lost > 0],
        f"SDS {sds.name}: {said}",
        pd_id=sds.pd_id,
        sds_id=sds.sds_id,
        details={"repaired": command.repaired, "unrepairable": lost},
    )


_FAULT_EVENTS = {
    "failed": EventType.SDS_FAILED,
    "recovered": EventType.SDS_RECOVERED,
    "injected": EventType.SDS_FAULTS_INJECTED,
}


def tell_faults(draft: Draft, command: commands.TellFaults) -> None:
    sds: Sds = draft.get(Kind.SDS, command.sds_id)
    draft.event(
        _FAULT_EVENTS[command.what],
        f"SDS {sds.name} {command.message}",
        pd_id=sds.pd_id,
        sds_id=sds.sds_id,
        details=command.details,
    )


def _check_fault_set(draft: Draft, pd: ProtectionDomain, fault_set_id: int | None) -> None:
    if fault_set_id is None:
        return
    fault_set: FaultSet = draft.get(Kind.FAULT_SET, fault_set_id)
    if fault_set.pd_id != pd.pd_id:
        raise InvalidError(f"fault set {fault_set.name} is in another protection domain than {pd.name}")


def _planned_devices(command: commands.AddSds) -> tuple[Device, ...]:
    """The capacity in whole slots, spread evenly over the devices."""
    capacity = whole("an SDS's capacity in bytes", command.capacity_bytes, CHUNK_SIZE_BYTES, VOLUME_SIZE_BYTES_MAX)
    slots = capacity // CHUNK_SIZE_BYTES
    paths: Sequence[str | None] = command.devices or [None] * min(DEVICES_PER_SDS_DEFAULT, slots)
    if len(paths) > min(DEVICES_PER_SDS_MAX, slots):
        raise InvalidError(f"{len(paths)} devices are too many for {slots} chunks (at most {DEVICES_PER_SDS_MAX})")
    given = [path for path in paths if path is not None]
    if len(set(given)) < len(given):
        raise InvalidError("a device is named twice")
    for path in given:
        if not text("a device's path", path).startswith("/"):
            raise InvalidError(f"a device's path must be absolute, not {path!r}")
    each, odd = divmod(slots, len(paths))
    return tuple(
        Device(index=index, slots=each + (1 if index < odd else 0), path=path) for index, path in enumerate(paths)
    )


def _registered_devices(sds: Sds, found: tuple[Device, ...]) -> tuple[Device, ...]:
    """The devices as they are."""
    if len({device.index for device in found}) < len(found) or len(found) > DEVICES_PER_SDS_MAX:
        raise InvalidError(f"SDS {sds.name} registers {len(found)} devices, not all with their own index")
    for device in found:
        whole("a device's index", device.index, 0, DEVICES_PER_SDS_MAX - 1)
        whole("a device's slots", device.slots, 1, VOLUME_SIZE_BYTES_MAX // CHUNK_SIZE_BYTES)
    paths = {device.index: device.path for device in sds.devices}
    return tuple(
        replace(device, path=device.path if device.path is not None else paths.get(device.index))
        for device in sorted(found, key=lambda device: device.index)
    )


def _address(address: Sequence[object]) -> tuple[str, int]:
    if len(address) != 2 or not isinstance(address[0], str) or not address[0]:
        raise InvalidError(f"an address is a host and a port, not {address!r}")
    return text("a host", address[0]), whole("a port", address[1], 1, PORT_MAX)
