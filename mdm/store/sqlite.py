"""The embedded store: one SQLite database, WAL, synchronous=FULL, held exclusively by one process.

Promises: a commit is one transaction and on disk when ``commit`` returns; a process killed at any instant leaves the
database at the last commit, or at the one it was about to answer. A database appears whole or not at all (made under
another name, then renamed). Opening checks version, pages, foreign keys and the state's invariants.
"""

from __future__ import annotations

import os
import sqlite3
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from mdm import model
from mdm.derived import derive
from mdm.events import Event, EventType
from mdm.invariants import check
from mdm.model import Cluster, State
from mdm.store.base import EVENTS_KEPT_MAX
from mdm.store.codec import CodecError, decode, encode
from mdm.transition import Change
from pfvol.constants import SEGMENT_CHUNKS, SEGMENT_ENTRY_BYTES, STATE_VERSION
from pfvol.errors import ConfigError, DeviceError, IntegrityError, VersionError

APPLICATION_ID = 0x5046564D  # "PFVM"
SEGMENT_COMPRESSION_LEVEL = 1
WAL_BYTES_KEPT_MAX = 64 * 1024**2
LOCK_WAIT_SECONDS = 2.0  # a predecessor that was just killed lets go at once; this is for one that is still closing
DATABASE_MODE = 0o600  # it holds the capability key and the API token

_OBJECTS: dict[str, Any] = {
    "pds": model.ProtectionDomain,
    "fault_sets": model.FaultSet,
    "pools": model.Pool,
    "sds": model.Sds,
    "sdc": model.Sdc,
    "volumes": model.Volume,
    "purges": model.Purge,
}
_SIDE_FILES = ("-wal", "-shm", "-journal")


class SqliteStore:
    """See ``Store``. Every method may be called from any thread, one at a time."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._connection = connection

    @classmethod
    def create(cls, path: Path, cluster: Cluster) -> SqliteStore:
        """A new database at ``path`` with nothing but the cluster. Raises ConfigError when remains of one are there."""
        if path.exists() or any(_side(path, suffix).exists() for suffix in _SIDE_FILES):
            raise ConfigError(
                f"{path} is incomplete: bring back what is missing, or move the remains away to start anew"
            )
        draft = path.with_name(path.name + ".new")
        try:
            draft.unlink(missing_ok=True)
            os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, DATABASE_MODE))
            with closing(sqlite3.connect(draft, isolation_level=None)) as connection:
                connection.execute("PRAGMA synchronous = FULL")
                _make(connection, cluster)
            draft.rename(path)
            _sync_directory(path.parent)
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"cannot make the database {path}: {error}") from error
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> SqliteStore:
        """Raises ConfigError (unusable, or in use), VersionError (of another version)."""
        if not path.is_file():
            raise ConfigError(f"there is no database {path}")
        with _unusable(path):
            connection = sqlite3.connect(
                path, timeout=LOCK_WAIT_SECONDS, isolation_level=None, check_same_thread=False, cached_statements=256
            )
            try:
                _check_header(path, connection)
                connection.execute("PRAGMA locking_mode = EXCLUSIVE")
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = FULL")
                connection.execute("PRAGMA foreign_keys = ON")
                connection.execute(f"PRAGMA journal_size_limit = {WAL_BYTES_KEPT_MAX}")
                connection.execute("BEGIN EXCLUSIVE")
                connection.execute("COMMIT")
                _check_pages(path, connection)
            except BaseException:
                connection.close()
                raise
        return cls(path, connection)

    def load(self) -> State:
        with _unusable(self.path):
            state = derive(self._read())
        problems = check(state)
        if problems:
            raise ConfigError(
                f"the database {self.path} contradicts itself ({problems[0]}): put back a copy of it", problems=problems
            )
        return state

    def commit(self, state: State, changes: Sequence[Change], events: Sequence[Event]) -> None:
        connection = self._connection
        try:
            connection.execute("BEGIN IMMEDIATE")
            moved = connection.execute(
                "UPDATE cluster SET sequence = ? WHERE sequence = ?", (state.sequence, state.sequence - 1)
            )
            if moved.rowcount != 1:
                raise IntegrityError("the database is not where this MDM left it: start the MDM again")
            self._write(state.counters, changes, events)
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            self._roll_back()
            raise DeviceError(f"the MDM's database {self.path} cannot be written: {error}") from error
        except BaseException:
            self._roll_back()
            raise

    def events(self, *, since: datetime | None, type: EventType | None, limit: int) -> list[Event]:
        try:
            rows = self._connection.execute(
                "SELECT body FROM events WHERE (?1 IS NULL OR time_us >= ?1) AND (?2 IS NULL OR type = ?2)"
                " ORDER BY event_id DESC LIMIT ?3",
                (None if since is None else _microseconds(since), None if type is None else type.value, limit),
            )
            return [decode(Event, body) for (body,) in rows][::-1]
        except (sqlite3.Error, CodecError) as error:
            raise DeviceError(f"the events in {self.path} cannot be read: {error}") from error

    def close(self) -> None:
        self._connection.close()

    def _read(self) -> State:
        connection = self._connection
        row = connection.execute(
            "SELECT sequence, cluster_id, salt, capability_key, api_token, created_at FROM cluster"
        ).fetchone()
        if row is None:
            raise CodecError("it has no cluster")
        sequence, cluster_id, salt, key, token, created_at = row
        cluster = Cluster(
            cluster_id=cluster_id,
            salt=salt,
            capability_key=key,
            api_token=token,
            created_at=datetime.fromisoformat(created_at),
        )
        tables: dict[str, Any] = {
            table: {number: decode(cls, body) for number, body in connection.execute(f"SELECT id, body FROM {table}")}
            for table, cls in _OBJECTS.items()
        }
        counters = dict(connection.execute("SELECT name, value FROM counters"))
        return replace(State(cluster=cluster, sequence=sequence, counters=counters), maps=self._read_maps(), **tables)

    def _read_maps(self) -> dict[int, tuple[bytes, ...]]:
        """Equal segments become one object, as they were when they were made."""
        seen: dict[bytes, bytes] = {}
        maps: dict[int, list[bytes]] = {}
        for volume_id, number, entries in self._connection.execute(
            "SELECT volume_id, segment, entries FROM segments ORDER BY volume_id, segment"
        ):
            segments = maps.setdefault(volume_id, [])
            if number != len(segments):
                raise CodecError(f"segment {len(segments)} of volume {volume_id} is missing")
            if entries not in seen:
                seen[entries] = _inflated(entries)
            segments.append(seen[entries])
        return {volume_id: tuple(segments) for volume_id, segments in maps.items()}

    def _write(self, counters: Mapping[str, int], changes: Sequence[Change], events: Sequence[Event]) -> None:
        connection = self._connection
        connection.executemany(
            "INSERT INTO counters (name, value) VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value",
            counters.items(),
        )
        connection.executemany(
            "INSERT INTO segments (volume_id, segment, entries) VALUES (?, ?, ?)"
            " ON CONFLICT (volume_id, segment) DO UPDATE SET entries = excluded.entries",
            _segment_rows(changes),
        )
        for change in changes:
            if isinstance(change.key, tuple):
                continue
            if change.row is None:
                connection.execute(f"DELETE FROM {change.table} WHERE id = ?", (change.key,))
            else:
                connection.execute(
                    f"INSERT INTO {change.table} (id, body) VALUES (?, ?)"
                    " ON CONFLICT (id) DO UPDATE SET body = excluded.body",
                    (change.key, encode(change.row)),
                )
        if events:
            connection.executemany(
                "INSERT INTO events (event_id, time_us, type, body) VALUES (?, ?, ?, ?)",
                ((item.event_id, _microseconds(item.time), item.type.value, encode(item)) for item in events),
            )
            connection.execute("DELETE FROM events WHERE event_id <= ?", (events[-1].event_id - EVENTS_KEPT_MAX,))

    def _roll_back(self) -> None:
        # SQLite has already rolled back by itself after some errors (a full disk).
        with suppress(sqlite3.Error):
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")


@contextmanager
def _unusable(path: Path) -> Iterator[None]:
    """What SQLite or a row says about a file that cannot be used, as a ConfigError that says what to do."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY:
            raise ConfigError(f"the database {path} is in use by another process: stop that MDM first") from error
        raise ConfigError(f"the database {path} cannot be used: {error}") from error
    except (sqlite3.DatabaseError, CodecError) as error:
        raise ConfigError(f"the database {path} is damaged ({error}): put back a copy of it") from error


def _make(connection: sqlite3.Connection, cluster: Cluster) -> None:
    schema = files("mdm.store").joinpath("schema.sql").read_text(encoding="utf-8")
    connection.executescript(f"BEGIN; PRAGMA application_id = {APPLICATION_ID}; {schema}")
    connection.execute(
        "INSERT INTO cluster (one, sequence, cluster_id, salt, capability_key, api_token, created_at)"
        " VALUES (1, 0, ?, ?, ?, ?, ?)",
        (
            cluster.cluster_id,
            cluster.salt,
            cluster.capability_key,
            cluster.api_token,
            cluster.created_at.isoformat(),
        ),
    )
    connection.execute(f"PRAGMA user_version = {STATE_VERSION}")
    connection.execute("COMMIT")


def _check_header(path: Path, connection: sqlite3.Connection) -> None:
    application_id = connection.execute("PRAGMA application_id").fetchone()[0]
    if application_id != APPLICATION_ID:
        raise ConfigError(
            f"{path} is not the database of an MDM: point the data dir elsewhere, or put back a copy of it"
        )
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version != STATE_VERSION:
        raise VersionError(
            f"the database {path} has version {version}, this pfvol reads {STATE_VERSION}: use the pfvol that wrote it",
            found=version,
            supported=STATE_VERSION,
        )


def _check_pages(path: Path, connection: sqlite3.Connection) -> None:
    found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if found != "ok":
        raise ConfigError(f"the database {path} is damaged ({found}): put back a copy of it")
    if connection.execute("PRAGMA foreign_key_check").fetchone() is not None:
        raise ConfigError(f"the database {path} has map segments without a volume: put back a copy of it")


def _segment_rows(changes: Sequence[Change]) -> Iterator[tuple[int, int, bytes]]:
    """A map repeats a few SDSs over and over: compressed it is some hundred bytes instead of 12 KiB."""
    deflated: dict[bytes, bytes] = {}
    for change in changes:
        if isinstance(change.key, tuple):
            if change.row not in deflated:
                deflated[change.row] = zlib.compress(change.row, SEGMENT_COMPRESSION_LEVEL)
            yield (*change.key, deflated[change.row])


def _inflated(data: bytes) -> bytes:
    inflater = zlib.decompressobj()
    try:
        entries = inflater.decompress(data, SEGMENT_CHUNKS * SEGMENT_ENTRY_BYTES)
    except zlib.error as error:
        raise CodecError(f"a map segment does not decompress: {error}") from error
    if not inflater.eof:
        raise CodecError("a map segment is too long or cut short")
    return entries


def _microseconds(time: datetime) -> int:
    return round(time.astimezone(UTC).timestamp() * 1_000_000)


def _side(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
