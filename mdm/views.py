"""What the outside sees: ``State`` and ``Membership`` as the contract's objects, plain dicts ready for JSON.

Pure reads: a ``View`` is made for one request, looks at one immutable state, and caches nothing beyond itself. Health
is never stored: it follows from which SDSs serve and where the chunks' copies are, so it cannot disagree with them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mdm import capacity, health
from mdm.events import Event
from mdm.identity import Kind, external_id, resolve
from mdm.model import FaultSet, Health, Pool, ProtectionDomain, Sdc, Sds, SdsState, State, Volume
from mdm.progress import RebuildState, Status
from mdm.segments import Roles, entry_of, has_roles
from mdm.verify import Difference, VerifyReport
from pfvol import __version__
from pfvol.config import Address, format_address
from pfvol.constants import BLOCK_SIZE_BYTES, CHUNK_SIZE_BYTES

if TYPE_CHECKING:
    from mdm.membership import Membership

Object = dict[str, Any]

GB = 1_000_000_000


@dataclass(frozen=True)
class Chunks:
    """How many chunks there are, have one copy that serves, have none."""

    total: int
    degraded: int
    failed: int

    @property
    def health(self) -> Health:
        if self.failed:
            return Health.FAILED
        return Health.DEGRADED if self.degraded else Health.OK


def with_gb(row: Object) -> Object:
    """``row`` with an ``…_gb`` float (decimal) beside each ``…_bytes``."""
    return row | {f"{key[:-6]}_gb": value / GB for key, value in row.items() if key.endswith("_bytes")}


class View:
    """One state and what is known of the running nodes, as objects."""

    def __init__(self, state: State, membership: Membership) -> None:
        self.state = state
        self.membership = membership

    # -- references

    def find(self, kind: Kind, reference: str, *, pd_id: int | None = None) -> int:
        """The int id of what a user calls ``reference``; raises ``NotFoundError``."""
        return resolve(self.state, kind, reference, pd_id=pd_id)

    def id_of(self, kind: Kind, number: int) -> str:
        return external_id(self.state, kind, number)

    def _named(self, kind: Kind, number: int, name: str) -> Object:
        return {"id": self.id_of(kind, number), "name": name}

    # -- what follows from where copies are

    @cached_property
    def down(self) -> frozenset[int]:
        """SDSs that answer no IO."""
        return health.down(self.state)

    @cached_property
    def waiting(self) -> frozenset[tuple[int, int]]:
        """Pairs of SDSs of which the first waits for the second."""
        return health.waiting(self.state, datetime.now(UTC))

    @cached_property
    def used_bytes(self) -> Mapping[int, int]:
        """Net bytes written per volume, as the SDSs last reported: each block counts where its primary copy is."""
        used: dict[int, int] = {}
        for stats in self.membership.sds_stats.values():
            for volume_id, (_, _, _, primary_blocks) in stats.get("volumes", {}).items():
                used[volume_id] = used.get(volume_id, 0) + primary_blocks * BLOCK_SIZE_BYTES
        return used

    def used_by(self, volume: Volume) -> int:
        """A thick volume uses its whole size from the start."""
        return volume.size_bytes if volume.thick else min(self.used_bytes.get(volume.volume_id, 0), volume.size_bytes)

    def chunks_of(self, volumes: Iterable[Volume]) -> Chunks:
        total = degraded = failed = 0
        for volume in volumes:
            for holders, count in volume.placement.items():
                of_chunks = health.serving_health(holders, self.down, self.waiting)
                total += count
                degraded += count if of_chunks is Health.DEGRADED else 0
                failed += count if of_chunks is Health.FAILED else 0
        return Chunks(total, degraded, failed)

    # -- objects

    def pd(self, pd: ProtectionDomain) -> Object:
        pools, sds = self.state.pools_of(pd.pd_id), self.state.sds_of(pd.pd_id)
        fault_sets = [item for item in self.state.fault_sets.values() if item.pd_id == pd.pd_id]
        return with_gb(
            self._named(Kind.PD, pd.pd_id, pd.name)
            | {
                "description": pd.description,
                "pool_count": len(pools),
                "fault_set_count": len(fault_sets),
                "sds_count": len(sds),
                "total_capacity_bytes": sum(pool.capacity_bytes for pool in pools),
                "created_at": pd.created_at,
                "pools": [
                    self._named(Kind.POOL, pool.pool_id, pool.name) | {"health": self._pool_chunks(pool).health}
                    for pool in pools
                ],
                "fault_sets": [self._named(Kind.FAULT_SET, item.fault_set_id, item.name) for item in fault_sets],
                "sds": [self._sds_summary(item) for item in sds],
            }
        )

    def fault_set(self, fault_set: FaultSet) -> Object:
        members = [sds for sds in self.state.sds.values() if sds.fault_set_id == fault_set.fault_set_id]
        return self._named(Kind.FAULT_SET, fault_set.fault_set_id, fault_set.name) | {
            **self._pd_of(fault_set.pd_id),
            "sds_count": len(members),
            "sds": [self._sds_summary(sds) for sds in members],
            "created_at": fault_set.created_at,
        }

    def pool(self, pool: Pool) -> Object:
        volumes = self.state.volumes_of(pool.pool_id)
        used_bytes = sum(self.used_by(volume) for volume in volumes)
        return with_gb(
            self._named(Kind.POOL, pool.pool_id, pool.name)
            | {
                **self._pd_of(pool.pd_id),
                "policy": pool.policy,
                "durability": pool.durability,
                "total_capacity_bytes": pool.capacity_bytes,
                "used_capacity_bytes": used_bytes,
                "reserved_capacity_bytes": pool.thick_bytes,
                "free_capacity_bytes": max(0, pool.capacity_bytes - used_bytes),
                "provisioned_capacity_bytes": sum(volume.size_bytes for volume in volumes),
                "rebuild_rate_limit_mbps": pool.rebuild_rate_limit_mbps,
                "rebuild_delay_seconds": pool.rebuild_delay_seconds,
                "spare_percent": capacity.spare_percent(self.state, pool),
                "sds_count": len(self.state.sds_of(pool.pd_id)),
                "created_at": pool.created_at,
            }
            | self._pool_condition(pool)
        )

    def pool_health(self, pool: Pool) -> Object:
        sds = self.state.sds_of(pool.pd_id)
        down = sum(item.sds_id in self.down for item in sds)
        return self._named(Kind.POOL, pool.pool_id, pool.name) | {
            "reasons": list(self.pool_reasons(pool)),
            "sds_up": len(sds) - down,
            "sds_down": down,
            **self._pool_condition(pool),
        }

    def pool_reasons(self, pool: Pool) -> Iterator[str]:
        """Why a pool is not OK, a sentence each."""
        for reason in self._reasons(self.state.volumes_of(pool.pool_id)):
            yield f"pool {pool.name}: {reason}"
        rebuild = self._rebuild_of(pool)
        if rebuild.state in (RebuildState.STALLED, RebuildState.CANCELLED) and rebuild.degraded_chunks:
            yield f"pool {pool.name}: its rebuild is {rebuild.state}: {rebuild.reason}"

    def rebuild(self, pool: Pool) -> Object:
        status = self._rebuild_of(pool)
        return with_gb(
            {
                "pool_id": self.id_of(Kind.POOL, pool.pool_id),
                "pool_name": pool.name,
                "state": status.state,
                "reason": status.reason,
                "progress_percent": status.percent,
                "bytes_rebuilt": status.bytes_rebuilt,
                "total_bytes": status.total_bytes,
                "rate_mbps": status.rate_mbps,
                "rebuild_rate_limit_mbps": pool.rebuild_rate_limit_mbps,
                "estimated_time_remaining_seconds": status.eta_seconds,
                "degraded_chunks": self._pool_chunks(pool).degraded,
            }
        )

    def _reasons(self, volumes: Collection[Volume]) -> Iterator[str]:
        chunks = self.chunks_of(volumes)
        if chunks.failed:
            yield f"{chunks.failed} chunks have no copy that serves: {self._way_out(volumes)}"
        if chunks.degraded:
            yield f"{chunks.degraded} chunks have one copy that serves"

    def _way_out(self, volumes: Iterable[Volume]) -> str:
        """For chunks that nobody serves."""
        wanted: set[int] = set()
        members: set[int] = set()
        older: set[int] = set()
        for volume in volumes:
            for holders in volume.placement:
                if health.serving_health(holders, self.down, self.waiting) is not Health.FAILED:
                    continue
                here, learner = set(holders.members) - self.down, holders.learner
                wanted |= set(holders.members) & self.down
                members |= here
                is_here = not here and learner and learner not in self.down | older
                if is_here and has_roles(self.state.maps[volume.volume_id], Roles(*holders, left=learner)):
                    older.add(learner)
        ways = [
            f"pfvol sds promote {' or '.join(self._sds_names(those))}, {what}"
            for those, what in ((members - older, "no acknowledged write is lost"), (older, "data is lost"))
            if those
        ]
        said = f"waiting for SDS {', '.join(self._sds_names(wanted))}"
        return said + (f" (if it is gone for good: {'; '.join(ways)})" if ways else "")

    def _sds_names(self, numbers: Iterable[int]) -> list[str]:
        return sorted(self.state.sds[sds_id].name for sds_id in numbers)

    def sds(self, sds: Sds) -> Object:
        runtime = self.membership.sds.get(sds.sds_id)
        stats = self.membership.sds_stats.get(sds.sds_id, {})
        failed = [] if runtime is None else runtime.failed_devices
        fault_set = None if sds.fault_set_id is None else self.state.fault_sets[sds.fault_set_id]
        return with_gb(
            self._named(Kind.SDS, sds.sds_id, sds.name)
            | {
                **self._pd_of(sds.pd_id),
                "fault_set_id": None if fault_set is None else self.id_of(Kind.FAULT_SET, fault_set.fault_set_id),
                "fault_set_name": None if fault_set is None else fault_set.name,
                "state": sds.state,
                "serving": runtime is not None and runtime.serving,
                "connected": runtime is not None,
                "removing": sds.removing,
                "node": sds.node,
                "ip": sds.ip,
                "data_address": address(sds.data_address),
                "http_address": address(sds.http_address),
                "total_capacity_bytes": sds.capacity_bytes,
                "used_capacity_bytes": stats.get("slots_used", 0) * CHUNK_SIZE_BYTES,
                "device_count": len(sds.devices),
                "failed_devices": [{"index": index, "message": message} for index, message in failed],
                "faults": self._faults(sds),
                "chunk_count": sds.copies,
                "primary_chunk_count": sds.primaries,
                "incarnation": sds.incarnation,
                "created_at": sds.created_at,
            }
        )

    def sdc(self, sdc: Sdc) -> Object:
        mapped = [(volume, volume.mapping(sdc.sdc_id)) for volume in self.state.volumes_mapped_to(sdc.sdc_id)]
        return self._named(Kind.SDC, sdc.sdc_id, sdc.name) | {
            "ip": sdc.ip,
            "connected": sdc.sdc_id in self.membership.sdc,
            "incarnation": sdc.incarnation,
            "mapping_count": len(mapped),
            "mappings": [
                with_gb(
                    {
                        "volume_id": self.id_of(Kind.VOLUME, volume.volume_id),
                        "volume_name": volume.name,
                        "size_bytes": volume.size_bytes,
                        "access_mode": mapping.access_mode,
                        "iops_limit": mapping.iops_limit,
                        "bandwidth_limit_mbps": mapping.bandwidth_limit_mbps,
                    }
                )
                for volume, mapping in mapped
                if mapping is not None
            ],
            "created_at": sdc.created_at,
        }

    def volume(self, volume: Volume) -> Object:
        chunks = self.chunks_of([volume])
        return with_gb(
            self._named(Kind.VOLUME, volume.volume_id, volume.name)
            | {
                "pool_id": self.id_of(Kind.POOL, volume.pool_id),
                "pool_name": self.state.pools[volume.pool_id].name,
                "provisioning": volume.provisioning,
                "size_bytes": volume.size_bytes,
                "used_capacity_bytes": self.used_by(volume),
                "state": health.volume_state(volume, chunks.health),
                "health": chunks.health,
                "reasons": list(self._reasons([volume])),
                "chunk_count": chunks.total,
                "degraded_chunk_count": chunks.degraded,
                "failed_chunk_count": chunks.failed,
                "mapping_count": len(volume.mappings),
                "mappings": [
                    {
                        "sdc_id": self.id_of(Kind.SDC, mapping.sdc_id),
                        "sdc_name": self.state.sdc[mapping.sdc_id].name,
                        "access_mode": mapping.access_mode,
                        "iops_limit": mapping.iops_limit,
                        "bandwidth_limit_mbps": mapping.bandwidth_limit_mbps,
                        "created_at": mapping.created_at,
                    }
                    for mapping in volume.mappings
                ],
                "created_at": volume.created_at,
            }
        )

    def chunks(self, volume: Volume, first: int, count: int) -> Iterator[Object]:
        """The map entries ``first`` .. ``first + count - 1``, as far as the volume reaches."""
        for index in range(first, min(first + count, volume.chunks)):
            epoch, roles = entry_of(self.state.maps[volume.volume_id], index)
            copies = [
                (roles.primary, "primary", False),
                (roles.secondary, "secondary", False),
                (roles.learner, "secondary", True),
            ]
            replicas = [self._replica(sds_id, role, rebuilding) for sds_id, role, rebuilding in copies if sds_id]
            yield {
                "index": index,
                "epoch": epoch,
                "is_degraded": sum(replica["is_available"] for replica in replicas) < 2,
                "replicas": replicas,
            }

    def verify_report(self, volume_id: int, name: str, report: VerifyReport) -> Object:
        """``name``: the volume's, which may be gone from the state by now."""
        return {
            "volume_id": self.id_of(Kind.VOLUME, volume_id),
            "name": name,
            "chunks_checked": report.chunks,
            "blocks_checked": report.blocks,
            "problem_count": report.count,
            "problems": [self._difference(item) for item in report.differences],
        }

    def event(self, event: Event) -> Object:
        row: Object = {"id": event.event_id, "time": event.time, "type": event.type, "message": event.message}
        for key, kind in (
            ("pd", Kind.PD),
            ("pool", Kind.POOL),
            ("volume", Kind.VOLUME),
            ("sds", Kind.SDS),
            ("sdc", Kind.SDC),
        ):
            number = getattr(event, f"{key}_id")
            row[f"{key}_id"] = None if number is None else self.id_of(kind, number)
        return row | {"details": dict(event.details)}

    def system(self) -> Object:
        state = self.state
        pools = [self.pool(pool) for pool in state.pools.values()]
        down = [sds for sds in state.sds.values() if sds.state is SdsState.DOWN]
        limping = [sds for sds in state.sds.values() if sds.state is SdsState.DEGRADED]
        healths = [Health(pool["health"]) for pool in pools] + [Health.DEGRADED for _ in (*down, *limping)]
        reasons = [reason for pool in state.pools.values() for reason in self.pool_reasons(pool)]
        reasons += [f"SDS {sds.name} is {sds.state}{self._on_purpose(sds)}" for sds in (*down, *limping)]
        return with_gb(
            {
                "cluster_id": state.cluster.cluster_id.hex(),
                "version": __version__,
                "health": health.worst(healths),
                "reasons": reasons,
                "pd_count": len(state.pds),
                "pool_count": len(pools),
                "pools_degraded": sum(pool["health"] is Health.DEGRADED for pool in pools),
                "pools_failed": sum(pool["health"] is Health.FAILED for pool in pools),
                "sds_count": len(state.sds),
                "sds_up": len(state.sds) - len(down),
                "sds_down": len(down),
                "sdc_count": len(state.sdc),
                "sdc_connected": len(self.membership.sdc),
                "volume_count": len(state.volumes),
                **{f"{key}_bytes": sum(pool[f"{key}_bytes"] for pool in pools) for key in _SYSTEM_SUMS},
            }
        )

    # -- parts

    def _pd_of(self, pd_id: int) -> Object:
        return {"pd_id": self.id_of(Kind.PD, pd_id), "pd_name": self.state.pds[pd_id].name}

    def _on_purpose(self, sds: Sds) -> str:
        faults = self.membership.faults_of(sds.sds_id)
        if faults.failed:
            return f", on purpose: `pfvol sds recover {sds.name}` ends that"
        return f", with faults on purpose: {', '.join(faults.rules)}" if faults.rules else ""

    def _faults(self, sds: Sds) -> Object:
        faults = self.membership.faults_of(sds.sds_id)
        return {
            "failed": faults.failed,
            "until": faults.until,
            "rules": list(faults.rules),
            "errors_injected": faults.errors_injected,
            "delays_injected": faults.delays_injected,
            "blocks_corrupted": faults.blocks_corrupted,
        }

    def _sds_summary(self, sds: Sds) -> Object:
        return self._named(Kind.SDS, sds.sds_id, sds.name) | {"state": sds.state}

    def _pool_chunks(self, pool: Pool) -> Chunks:
        return self.chunks_of(self.state.volumes_of(pool.pool_id))

    def _rebuild_of(self, pool: Pool) -> Status:
        found = self.membership.rebuilds.get(pool.pool_id, Status())
        if pool.rebuild_cancelled:  # The rebuilder may not have seen it yet.
            found = replace(found, state=RebuildState.CANCELLED, rate_mbps=0.0, eta_seconds=None)
        elif found.state is RebuildState.CANCELLED:
            found = replace(found, state=RebuildState.IN_PROGRESS, reason=None)
        return found

    def _pool_condition(self, pool: Pool) -> Object:
        chunks, rebuild = self._pool_chunks(pool), self._rebuild_of(pool)
        return {
            "health": chunks.health,
            "rebuild_state": rebuild.state,
            "rebuild_progress_percent": rebuild.percent,
            "volume_count": len(self.state.volumes_of(pool.pool_id)),
            "chunk_count": chunks.total,
            "degraded_chunk_count": chunks.degraded,
            "failed_chunk_count": chunks.failed,
        }

    def _difference(self, item: Difference) -> Object:
        sds = None if item.sds_id is None else self.state.sds.get(item.sds_id)
        return {
            "chunk": item.chunk,
            "block": item.block,
            "problem": item.problem,
            "sds_id": None if item.sds_id is None else self.id_of(Kind.SDS, item.sds_id),
            "sds_name": None if sds is None else sds.name,
            "detail": item.detail,
        }

    def _replica(self, sds_id: int, role: str, rebuilding: bool) -> Object:
        return {
            "sds_id": self.id_of(Kind.SDS, sds_id),
            "sds_name": self.state.sds[sds_id].name,
            "role": role,
            "is_available": sds_id not in self.down and not rebuilding,
            "is_rebuilding": rebuilding,
        }


_SYSTEM_SUMS = ("total_capacity", "used_capacity", "free_capacity")


def address(pair: Address | None) -> str | None:
    return None if pair is None else format_address(pair)
