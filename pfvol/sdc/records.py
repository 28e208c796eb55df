"""Which mounts of a data directory there are: one small file each, for ``umount``, ``status`` and whoever mounts next.

Owns ``<data dir>/mounts``: ``NAME.json`` (who serves the mount), ``NAME.log`` (the daemon's log), ``embedded`` (a mount
started the cluster of this data dir, and the last one to go stops it) and ``lock``. A record is believed only while the
process it names lives, so that a killed daemon leaves nothing that needs cleaning.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from pfvol import childprocess

NAME_LENGTH_MAX = 200
EMBEDDED_MARK = "embedded"


@dataclasses.dataclass(frozen=True, slots=True)
class MountRecord:
    """A mount and its daemon."""

    mountpoint: str
    sdc: str
    pid: int
    start_ticks: int

    @property
    def process(self) -> childprocess.Identity | None:
        """The daemon if it is alive."""
        return childprocess.find(self.pid, self.start_ticks, self.mountpoint)


def directory(data_dir: Path) -> Path:
    return data_dir / "mounts"


def file_of(data_dir: Path, mountpoint: str, suffix: str) -> Path:
    """``/mnt/a`` is kept in ``%2Fmnt%2Fa.json``; a path too long for a file name under its hash."""
    name = quote(mountpoint, safe="")
    if len(name) > NAME_LENGTH_MAX:
        name = hashlib.sha256(mountpoint.encode()).hexdigest()
    return directory(data_dir) / f"{name}.{suffix}"


def prepare(data_dir: Path) -> None:
    directory(data_dir).mkdir(mode=0o700, parents=True, exist_ok=True)


def write(data_dir: Path, mountpoint: str, sdc: str) -> None:
    """Records this process as the daemon of a mount."""
    identity = childprocess.identify(os.getpid())
    assert identity is not None
    record = MountRecord(mountpoint, sdc, identity.pid, identity.start_ticks)
    path = file_of(data_dir, mountpoint, "json")
    draft = path.with_suffix(".new")
    draft.write_text(json.dumps(dataclasses.asdict(record)) + "\n")
    draft.replace(path)


def remove(data_dir: Path, mountpoint: str) -> None:
    """Takes this process's record away, and not one that a newer daemon has put there."""
    path = file_of(data_dir, mountpoint, "json")
    record = _load(path)
    if record is not None and record.pid == os.getpid():
        path.unlink(missing_ok=True)


def find(data_dir: Path, mountpoint: str) -> MountRecord | None:
    record = _load(file_of(data_dir, mountpoint, "json"))
    return record if record is not None and record.process else None


def live(data_dir: Path) -> list[MountRecord]:
    """The mounts whose daemons live."""
    found = [_load(path) for path in sorted(directory(data_dir).glob("*.json"))]
    return [record for record in found if record is not None and record.process]


def _load(path: Path) -> MountRecord | None:
    try:
        body = json.loads(path.read_text())
        return MountRecord(str(body["mountpoint"]), str(body["sdc"]), int(body["pid"]), int(body["start_ticks"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def locked(data_dir: Path) -> Iterator[None]:
    """One at a time decides whether the embedded cluster is started, is to be stopped, or a name of an SDC is free."""
    prepare(data_dir)
    descriptor = os.open(directory(data_dir) / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def embedded_mark(data_dir: Path) -> Path:
    return directory(data_dir) / EMBEDDED_MARK


def stop_embedded_cluster(data_dir: Path) -> bool:
    """Stops the cluster if a mount started it and no mount is left; True if it did."""
    from pfvol import localcluster  # Imported here: the REST client takes memory, and the daemon needs it only to end.

    if not embedded_mark(data_dir).exists():
        return False
    with locked(data_dir):
        if not embedded_mark(data_dir).exists() or live(data_dir):
            return False
        localcluster.down(data_dir)
        embedded_mark(data_dir).unlink(missing_ok=True)
        return True
