"""The cluster's whole durable state as immutable values: one ``State`` and the objects in it.

Nothing here is ever changed in place: a new ``State`` shares every object and every table that a command did not touch,
so holding an old one is safe and cheap. Tables are plain dicts typed as read-only mappings. Chunks are no objects: a
volume's map is a tuple of packed segments (``SEGMENT_ENTRY_FORMAT`` per chunk), and what has to be counted about it is
kept as ``Volume.placement``, chunks per ``Holders``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import NamedTuple

from pfvol.constants import CHUNK_SIZE_BYTES

SDS_ID_MAX = 0xFFFF  # map entries hold SDS numbers in 16 bits
NUMBER_MAX = 0xFFFFFFFF  # external ids hold numbers in 32 bits
MOVED, SETTLED = "moved", "settled"  # counters: the last map version with a move, the last one whose moves are settled
RESTARTED = "restarted sds %d"  # counter: when this SDS last came in another incarnation, Unix milliseconds


class Provisioning(StrEnum):
    THIN = "thin"
    THICK = "thick"


class AccessMode(StrEnum):
    READ_WRITE = "readWrite"
    READ_ONLY = "readOnly"


class Policy(StrEnum):
    TWO_COPIES = "two_copies"
    EC = "ec"


class Durability(StrEnum):
    FLUSH = "flush"
    COMMIT = "commit"


class SdsState(StrEnum):
    UP = "UP"
    DOWN = "DOWN"
    DEGRADED = "DEGRADED"


class Health(StrEnum):
    OK = "OK"
    DEGRADED = "DEGRADED"
    FAILED = "FAILED"


class VolumeState(StrEnum):
    CREATING = "CREATING"
    AVAILABLE = "AVAILABLE"
    IN_USE = "IN_USE"
    DEGRADED = "DEGRADED"
    FAILED = "FAILED"
    DELETING = "DELETING"


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What is made once, when the cluster is. ``salt`` is 3 bytes that external ids carry."""

    cluster_id: bytes
    salt: bytes
    capability_key: bytes = field(repr=False)
    api_token: str = field(repr=False)
    created_at: datetime


@dataclass(frozen=True, kw_only=True)
class ProtectionDomain:
    pd_id: int
    name: str
    description: str
    created_at: datetime


@dataclass(frozen=True, kw_only=True)
class FaultSet:
    fault_set_id: int
    pd_id: int
    name: str
    created_at: datetime


@dataclass(frozen=True, kw_only=True)
class Pool:
    """``capacity_bytes`` is net. ``thick_bytes`` is the sum of its thick volumes' sizes; spare None: automatic.

    ``rebuild_started_at``: when an operator last asked for the rebuild: SDSs DOWN by then are not waited for."""

    pool_id: int
    pd_id: int
    name: str
    capacity_bytes: int
    policy: Policy
    durability: Durability
    rebuild_rate_limit_mbps: int
    rebuild_delay_seconds: int
    spare_percent: int | None
    created_at: datetime
    rebuild_cancelled: bool = False
    rebuild_started_at: datetime | None = None
    thick_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Device:
    """One device of an SDS. ``path`` None: in the SDS's data dir. ``device_id`` (hex) None: not made yet."""

    index: int
    slots: int
    path: str | None = None
    device_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class Sds:
    """``copies`` counts the chunks that have a member or a learner here, ``thick_slots`` those of thick volumes among
    them, ``primaries`` those that it leads. ``removing``: what it has is to go elsewhere. ``down_since``: when it last
    went DOWN, while it is."""

    sds_id: int
    pd_id: int
    name: str
    fault_set_id: int | None
    node: str
    ip: str | None
    state: SdsState
    devices: tuple[Device, ...]
    created_at: datetime
    data_address: tuple[str, int] | None = None
    http_address: tuple[str, int] | None = None
    incarnation: int = 0
    removing: bool = False
    down_since: datetime | None = None
    copies: int = 0
    primaries: int = 0
    thick_slots: int = 0

    @property
    def slots(self) -> int:
        return sum(device.slots for device in self.devices)

    @property
    def capacity_bytes(self) -> int:
        return self.slots * CHUNK_SIZE_BYTES


@dataclass(frozen=True, kw_only=True)
class Sdc:
    """``incarnation`` counts its sessions and is higher at each one."""

    sdc_id: int
    name: str
    ip: str | None
    created_at: datetime
    incarnation: int = 0


@dataclass(frozen=True, kw_only=True)
class VolumeMapping:
    """A volume made visible to an SDC. ``mapping_id`` is never given twice; limits of 0 are none."""

    mapping_id: int
    sdc_id: int
    access_mode: AccessMode
    iops_limit: int
    bandwidth_limit_mbps: int
    created_at: datetime

    @property
    def read_only(self) -> bool:
        return self.access_mode is AccessMode.READ_ONLY


class Holders(NamedTuple):
    """The SDSs that have a chunk, 0: none. The in-sync set is primary and secondary; the learner does not count."""

    primary: int
    secondary: int
    learner: int = 0

    @property
    def members(self) -> tuple[int, ...]:
        return (self.primary, self.secondary) if self.secondary else (self.primary,)

    @property
    def all(self) -> tuple[int, ...]:
        return (*self.members, self.learner) if self.learner else self.members


@dataclass(frozen=True, kw_only=True)
class Volume:
    """``placement`` counts its chunks per ``Holders``; it always agrees with the map."""

    volume_id: int
    pool_id: int
    name: str
    size_bytes: int
    provisioning: Provisioning
    created_at: datetime
    mappings: tuple[VolumeMapping, ...] = ()
    placement: Mapping[Holders, int] = field(default_factory=dict, repr=False)

    @property
    def thick(self) -> bool:
        return self.provisioning is Provisioning.THICK

    @property
    def chunks(self) -> int:
        return -(-self.size_bytes // CHUNK_SIZE_BYTES)

    def uses(self, sds_id: int) -> bool:
        """Whether a copy of a chunk is, or is being made, on this SDS."""
        return any(sds_id in holders for holders in self.placement)

    def is_copied(self, sds_id: int) -> bool:
        """Whether a chunk is to be copied from or to this SDS."""
        return any(holders.learner and sds_id in holders for holders in self.placement)

    def mapping(self, sdc_id: int) -> VolumeMapping | None:
        return next((mapping for mapping in self.mappings if mapping.sdc_id == sdc_id), None)


@dataclass(frozen=True, kw_only=True)
class Purge:
    """A deleted volume whose blocks these SDSs have not yet confirmed to be gone."""

    volume_id: int
    name: str
    pool_id: int
    sds_ids: frozenset[int]


class SdcSession(NamedTuple):
    """What ``RegisterSdc`` answers."""

    sdc_id: int
    incarnation: int


class Joined(NamedTuple):
    """What ``JoinLearners`` answers. ``moved``: (volume, chunk, who stays, who was replaced), where a member had to
    go."""

    entries: int
    moved: tuple[tuple[int, int, int, int], ...]


class Forced(NamedTuple):
    """What ``ForceAlone`` answers: how many chunks one SDS serves alone now, and of how many of these it has every
    acknowledged write."""

    chunks: int
    member_chunks: int


@dataclass(frozen=True, kw_only=True)
class State:
    """Everything the MDM must not forget.

    ``names`` finds an id by (table, scope, name): the scope is the pd for pools, else 0. ``counters`` holds the last
    number given out per table (and for mappings, events and versions of the map), and ``MOVED``, ``SETTLED`` and
    ``RESTARTED``. ``sequence`` counts commands.
    """

    cluster: Cluster
    sequence: int = 0
    counters: Mapping[str, int] = field(default_factory=dict)
    pds: Mapping[int, ProtectionDomain] = field(default_factory=dict)
    fault_sets: Mapping[int, FaultSet] = field(default_factory=dict)
    pools: Mapping[int, Pool] = field(default_factory=dict)
    sds: Mapping[int, Sds] = field(default_factory=dict)
    sdc: Mapping[int, Sdc] = field(default_factory=dict)
    volumes: Mapping[int, Volume] = field(default_factory=dict)
    purges: Mapping[int, Purge] = field(default_factory=dict)
    maps: Mapping[int, tuple[bytes, ...]] = field(default_factory=dict, repr=False)
    names: Mapping[tuple[str, int, str], int] = field(default_factory=dict, repr=False)

    @property
    def map_version(self) -> int:
        """Raised by each command that changes entries of chunks that were there before. At first 1."""
        return self.counters.get("map", 0) + 1

    @property
    def moved_version(self) -> int:
        """The last map version in which a learner came in the place of a member, if that may still be unknown to both
        who served before (``mdm.pushes``: unsettled); else 0."""
        moved = self.counters.get(MOVED, 0)
        return moved if moved > self.counters.get(SETTLED, 0) else 0

    def restarted_at(self, sds_id: int) -> datetime | None:
        """When the SDS last registered in another incarnation than before, if it ever did."""
        at_ms = self.counters.get(RESTARTED % sds_id)
        return None if at_ms is None else datetime.fromtimestamp(at_ms / 1000, UTC)

    def pools_of(self, pd_id: int) -> list[Pool]:
        return [pool for pool in self.pools.values() if pool.pd_id == pd_id]

    def sds_of(self, pd_id: int) -> list[Sds]:
        return [sds for sds in self.sds.values() if sds.pd_id == pd_id]

    def volumes_of(self, pool_id: int) -> list[Volume]:
        return [volume for volume in self.volumes.values() if volume.pool_id == pool_id]

    def volumes_mapped_to(self, sdc_id: int) -> list[Volume]:
        return [volume for volume in self.volumes.values() if volume.mapping(sdc_id) is not None]
