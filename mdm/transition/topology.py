"""Protection domains, fault sets and pools."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mdm import commands
from mdm.events import EventType
from mdm.identity import Kind
from mdm.model import Durability, FaultSet, Policy, Pool, ProtectionDomain
from mdm.transition import nodes, volumes
from mdm.transition.checks import RATE_MAX, choice, text, whole
from mdm.transition.draft import Draft
from pfvol.errors import ConflictError, InvalidError
from pfvol.units import format_size

POOL_CAPACITY_BYTES_MAX = 2**60
REBUILD_DELAY_SECONDS_MAX = 7 * 24 * 3600
SPARE_PERCENT_MAX = 90


def create_pd(draft: Draft, command: commands.CreateProtectionDomain) -> int:
    pd_id = draft.next_id(Kind.PD)
    draft.take_name(Kind.PD, command.name, pd_id)
    description = text("a description", command.description)
    pd = ProtectionDomain(pd_id=pd_id, name=command.name, description=description, created_at=draft.now)
    draft.put("pds", pd_id, pd)
    draft.event(EventType.PD_CREATE, f"protection domain {pd.name} created", pd_id=pd_id)
    return pd_id


def delete_pd(draft: Draft, command: commands.DeleteProtectionDomain) -> None:
    pd: ProtectionDomain = draft.get(Kind.PD, command.pd_id)
    pools, servers = draft.state.pools_of(pd.pd_id), draft.state.sds_of(pd.pd_id)
    fault_sets = [item for item in draft.state.fault_sets.values() if item.pd_id == pd.pd_id]
    if (pools or servers or fault_sets) and not command.cascade:
        raise ConflictError(
            f"protection domain {pd.name} is not empty ({len(pools)} pools, {len(servers)} SDSs, {len(fault_sets)} "
            "fault sets): delete them first, or delete it with everything in it (cascade)"
        )
    for pool in pools:
        for volume in draft.state.volumes_of(pool.pool_id):
            volumes.delete_volume(draft, commands.DeleteVolume(volume_id=volume.volume_id))
        delete_pool(draft, commands.DeletePool(pool_id=pool.pool_id))
    for sds in servers:
        nodes.remove_sds(draft, commands.RemoveSds(sds_id=sds.sds_id))
    for fault_set in fault_sets:
        delete_fault_set(draft, commands.DeleteFaultSet(fault_set_id=fault_set.fault_set_id))
    draft.free_name(Kind.PD, pd.name)
    draft.drop("pds", pd.pd_id)
    draft.event(EventType.PD_DELETE, f"protection domain {pd.name} deleted", pd_id=pd.pd_id)


def create_fault_set(draft: Draft, command: commands.CreateFaultSet) -> int:
    pd: ProtectionDomain = draft.get(Kind.PD, command.pd_id)
    fault_set_id = draft.next_id(Kind.FAULT_SET)
    draft.take_name(Kind.FAULT_SET, command.name, fault_set_id)
    fault_set = FaultSet(fault_set_id=fault_set_id, pd_id=pd.pd_id, name=command.name, created_at=draft.now)
    draft.put("fault_sets", fault_set_id, fault_set)
    draft.event(
        EventType.FAULT_SET_CREATE,
        f"fault set {fault_set.name} created",
        pd_id=pd.pd_id,
        details={"fault_set": fault_set.name},
    )
    return fault_set_id


def delete_fault_set(draft: Draft, command: commands.DeleteFaultSet) -> None:
    fault_set: FaultSet = draft.get(Kind.FAULT_SET, command.fault_set_id)
    members = [sds.name for sds in draft.table("sds").values() if sds.fault_set_id == fault_set.fault_set_id]
    if members:
        raise ConflictError(
            f"fault set {fault_set.name} is used by SDS {', '.join(sorted(members)[:5])}: remove its SDSs first"
        )
    draft.free_name(Kind.FAULT_SET, fault_set.name)
    draft.drop("fault_sets", fault_set.fault_set_id)
    draft.event(
        EventType.FAULT_SET_DELETE,
        f"fault set {fault_set.name} deleted",
        pd_id=fault_set.pd_id,
        details={"fault_set": fault_set.name},
    )


def create_pool(draft: Draft, command: commands.CreatePool) -> int:
    pd: ProtectionDomain = draft.get(Kind.PD, command.pd_id)
    pool_id = draft.next_id(Kind.POOL)
    draft.take_name(Kind.POOL, command.name, pool_id, scope=pd.pd_id)
    pool = Pool(
        pool_id=pool_id,
        pd_id=pd.pd_id,
        name=command.name,
        capacity_bytes=_capacity(command.capacity_bytes),
        policy=_policy(command.policy),
        durability=choice("durability", Durability, command.durability),
        rebuild_rate_limit_mbps=_rebuild_rate(command.rebuild_rate_limit_mbps),
        rebuild_delay_seconds=_rebuild_delay(command.rebuild_delay_seconds),
        spare_percent=None if command.spare_percent is None else _spare(command.spare_percent),
        created_at=draft.now,
    )
    draft.put("pools", pool_id, pool)
    draft.event(EventType.POOL_CREATE, f"pool {pool.name} created", pd_id=pd.pd_id, pool_id=pool_id)
    return pool_id


def update_pool(draft: Draft, command: commands.UpdatePool) -> None:
    pool: Pool = draft.get(Kind.POOL, command.pool_id)
    wanted = _wanted(command)
    if wanted.get("capacity_bytes", pool.capacity_bytes) < pool.thick_bytes:
        raise ConflictError(
            f"pool {pool.name} has {format_size(pool.thick_bytes)} reserved by thick volumes: "
            "its capacity cannot be less"
        )
    new = replace(pool, **wanted)
    if new == pool:
        return
    if new.name != pool.name:
        draft.take_name(Kind.POOL, new.name, pool.pool_id, scope=pool.pd_id)
        draft.free_name(Kind.POOL, pool.name, scope=pool.pd_id)
    draft.put("pools", pool.pool_id, new)
    changed = {key: {"old": getattr(pool, key), "new": value} for key, value in wanted.items()}
    changed = {key: change for key, change in changed.items() if change["old"] != change["new"]}
    draft.event(
        EventType.POOL_UPDATE,
        f"pool {new.name} changed: {', '.join(sorted(changed))}",
        pd_id=pool.pd_id,
        pool_id=pool.pool_id,
        details=changed,
    )


def delete_pool(draft: Draft, command: commands.DeletePool) -> None:
    pool: Pool = draft.get(Kind.POOL, command.pool_id)
    inside = draft.state.volumes_of(pool.pool_id)
    if inside:
        raise ConflictError(f"pool {pool.name} has {len(inside)} volumes: delete them first")
    draft.free_name(Kind.POOL, pool.name, scope=pool.pd_id)
    draft.drop("pools", pool.pool_id)
    draft.event(EventType.POOL_DELETE, f"pool {pool.name} deleted", pd_id=pool.pd_id, pool_id=pool.pool_id)


def _wanted(command: commands.UpdatePool) -> dict[str, Any]:
    """The properties that the command sets, checked."""
    checks = {
        "name": lambda value: value,  # ``take_name`` checks it
        "capacity_bytes": _capacity,
        "policy": _policy,
        "durability": lambda value: choice("durability", Durability, value),
        "rebuild_rate_limit_mbps": _rebuild_rate,
        "rebuild_delay_seconds": _rebuild_delay,
        "spare_percent": _spare,
    }
    given = {key: getattr(command, key) for key in checks}
    return {key: checks[key](value) for key, value in given.items() if value is not None}


def _capacity(value: Any) -> int:
    return whole("a pool's capacity in bytes", value, 1, POOL_CAPACITY_BYTES_MAX)


def _policy(value: Any) -> Policy:
    policy = choice("policy", Policy, value)
    if policy is Policy.EC:
        raise InvalidError("policy ec is not available in this version: use two_copies")
    return policy


def _rebuild_rate(value: Any) -> int:
    return whole("rebuild_rate_limit_mbps", value, 1, RATE_MAX)


def _rebuild_delay(value: Any) -> int:
    return whole("rebuild_delay_seconds", value, 0, REBUILD_DELAY_SECONDS_MAX)


def _spare(value: Any) -> int:
    return whole("spare_percent", value, 0, SPARE_PERCENT_MAX)
