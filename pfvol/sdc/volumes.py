"""The volumes of one SDC as the MDM told them, what changed between two tellings, and the files that show them.

Promises: what the MDM says is checked before it is believed (``Volume.from_wire``); ``diff`` is pure; a volume that was
away gets a file of another generation.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self

from pfvol.constants import INODE_VOLUME_BASE, VOLUME_SIZE_BYTES_MAX
from pfvol.errors import ProtocolError

CAPABILITY_PERMISSION_BYTES = 24  # version, mode, SDC, volume, mapping; the expiry follows (pfvol/capability.py)


@dataclasses.dataclass(frozen=True, slots=True)
class PoolSpace:
    """Net capacity of the pool a volume is in."""

    total_bytes: int
    free_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class Volume:
    """A mapped volume. ``capability`` is what an SDS wants to see; its change alone is no change of the volume."""

    volume_id: int
    name: str
    size_bytes: int
    read_only: bool
    thick: bool
    iops_limit: int
    bandwidth_limit_mbps: float
    created_at_ns: int
    pool: PoolSpace
    used_blocks_bytes: int
    capability: bytes = dataclasses.field(repr=False)

    @property
    def inode(self) -> int:
        return INODE_VOLUME_BASE + self.volume_id

    @property
    def permission(self) -> bytes:
        """What the capability allows, without its expiry: another one must be shown to the SDSs at once."""
        return self.capability[:CAPABILITY_PERMISSION_BYTES]

    @property
    def bandwidth_limit_bytes(self) -> int:
        return int(self.bandwidth_limit_mbps * 1_000_000)

    @classmethod
    def from_wire(cls, body: Mapping[str, Any]) -> Self:
        """Raises ProtocolError where the MDM's answer cannot be a volume."""
        try:
            pool = body["pool"]
            volume = cls(
                volume_id=int(body["volume_id"]),
                name=str(body["name"]),
                size_bytes=int(body["size_bytes"]),
                read_only=bool(body["read_only"]),
                thick=bool(body["thick"]),
                iops_limit=int(body["iops_limit"] or 0),
                bandwidth_limit_mbps=float(body["bandwidth_limit_mbps"] or 0),
                created_at_ns=int(float(body["created_at"]) * 1e9),
                pool=PoolSpace(int(pool["total_bytes"]), int(pool["free_bytes"])),
                used_blocks_bytes=int(body["used_blocks_bytes"]),
                capability=bytes(body["capability"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(f"the MDM described a volume in a way that cannot be read: {error!r}") from error
        if not 0 < volume.volume_id < 2**32 or not 0 < volume.size_bytes <= VOLUME_SIZE_BYTES_MAX:
            raise ProtocolError(f"the MDM described volume {volume.name!r} with an impossible id or size")
        if not volume.name or "/" in volume.name or volume.name in (".", ".."):
            raise ProtocolError(f"the MDM described a volume with a name that is no file name: {volume.name!r}")
        return volume


@dataclasses.dataclass(frozen=True, slots=True)
class Changes:
    """What to do to get from one set of volumes to another; a volume is in one list at most."""

    added: tuple[Volume, ...] = ()
    removed: tuple[Volume, ...] = ()
    changed: tuple[tuple[Volume, Volume], ...] = ()
    """(old, new): access mode, limits, name or size differ."""


def diff(old: Mapping[int, Volume], new: Mapping[int, Volume]) -> Changes:
    """Changes from ``old`` to ``new``, by volume id. Usage and capabilities do not count as changes."""
    return Changes(
        added=tuple(v for i, v in new.items() if i not in old),
        removed=tuple(v for i, v in old.items() if i not in new),
        changed=tuple((old[i], v) for i, v in new.items() if i in old and _identity(old[i]) != _identity(v)),
    )


def _identity(volume: Volume) -> tuple[Any, ...]:
    return (
        volume.name,
        volume.size_bytes,
        volume.read_only,
        volume.thick,
        volume.iops_limit,
        volume.bandwidth_limit_mbps,
    )


def volumes_from_wire(bodies: Iterable[Mapping[str, Any]]) -> dict[int, Volume]:
    """All volumes of an answer by id."""
    volumes = [Volume.from_wire(body) for body in bodies]
    return {volume.volume_id: volume for volume in volumes}


@dataclasses.dataclass(slots=True)
class FileState:
    """What this mount keeps of a volume's file beyond the volume, for as long as the volume is mapped."""

    generation: int
    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    atime_ns: int = dataclasses.field(default_factory=time.time_ns)
    mtime_ns: int | None = None


class VolumeTable:
    """The volumes in force and their files, by id and by name. Read by the file operations, written by the session."""

    def __init__(self) -> None:
        self._volumes: dict[int, Volume] = {}
        self._by_name: dict[bytes, int] = {}
        self._files: dict[int, FileState] = {}
        self._generation = 0
        self.changed_at_ns = time.time_ns()

    def __iter__(self) -> Iterator[Volume]:
        return iter(self._volumes.values())

    def __len__(self) -> int:
        return len(self._volumes)

    @property
    def by_id(self) -> Mapping[int, Volume]:
        return self._volumes

    def by_inode(self, inode: int) -> Volume | None:
        return self._volumes.get(inode - INODE_VOLUME_BASE)

    def by_name(self, name: bytes) -> Volume | None:
        volume_id = self._by_name.get(name)
        return None if volume_id is None else self._volumes[volume_id]

    def file(self, volume: Volume) -> FileState:
        return self._files[volume.volume_id]

    def replace(self, volumes: Mapping[int, Volume]) -> None:
        """Puts a new set in force. A volume that comes (back) gets a generation of its own, so that the kernel takes
        its file for a new one and serves nothing it cached when the volume was mapped before."""
        if volumes.keys() != self._volumes.keys():
            self.changed_at_ns = time.time_ns()
        for volume_id in self._volumes.keys() - volumes.keys():
            del self._files[volume_id]
        for volume_id in volumes.keys() - self._volumes.keys():
            self._generation += 1
            self._files[volume_id] = FileState(self._generation)
        self._volumes = dict(volumes)
        self._by_name = {volume.name.encode(): volume_id for volume_id, volume in volumes.items()}
