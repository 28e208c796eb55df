"""The SQLite store: what is committed comes back, and what cannot be used is refused with a reason."""

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from mdm.commands import CreatePool, DeleteVolume, ExtendVolume, MapVolume, RegisterSdc
from mdm.events import Event, EventType
from mdm.model import State
from mdm.store import sqlite
from mdm.store.codec import CodecError, decode, encode
from mdm.store.sqlite import SqliteStore
from mdm.transition import apply
from pfvol.errors import ConfigError, DeviceError, IntegrityError, VersionError
from tests.support.mdm_world import CHUNK, GIB, START, World, new_cluster


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "mdm.db"


@pytest.fixture
def store(path: Path) -> Iterator[SqliteStore]:
    with closing(SqliteStore.create(path, new_cluster())) as made:
        yield made


@pytest.fixture
def world(store: SqliteStore) -> World:
    made = World(store)
    pd_id = made.pd()
    made.pool(pd_id)
    rack = made.fault_set(pd_id, "rack")
    for number in (1, 2, 3):
        made.sds(pd_id, f"sds{number}", fault_set_id=rack if number == 1 else None)
    made.volume(1, "vol1", 5 * GIB)
    made.volume(1, "vol2", 7 * CHUNK, provisioning="thick")
    made.run(MapVolume(volume_id=1, sdc_id=made.run(RegisterSdc(name="host")).sdc_id, access_mode="readOnly"))
    made.run(ExtendVolume(volume_id=1, size_bytes=6 * GIB))
    made.volume(1, "gone", GIB)
    made.run(DeleteVolume(volume_id=3))
    return made


def world_store(world: World) -> SqliteStore:
    assert isinstance(world.store, SqliteStore)
    return world.store


def deflated(data: bytes) -> str:
    """As a literal of SQL."""
    return f"x'{zlib.compress(data).hex()}'"


def reopen(path: Path) -> State:
    with closing(SqliteStore.open(path)) as again:
        return again.load()


def test_a_new_store_has_the_cluster_and_nothing_else(store: SqliteStore) -> None:
    assert store.load() == State(cluster=new_cluster())


def test_everything_comes_back(world: World, path: Path) -> None:
    world_store(world).close()
    assert reopen(path) == world.state


def test_segments_of_a_deleted_volume_are_gone(world: World, path: Path) -> None:
    world_store(world).close()
    with closing(sqlite3.connect(path)) as raw:
        assert raw.execute("SELECT DISTINCT volume_id FROM segments").fetchall() == [(1,), (2,)]


def test_equal_segments_are_one_object_again_after_loading(world: World, path: Path) -> None:
    world.volume(1, "large", 1024**4)
    world_store(world).close()
    segments = reopen(path).maps[4]
    assert len(segments) == 256
    assert len({id(segment) for segment in segments}) == len(set(segments)) < 100


def test_events_are_kept_and_found(world: World) -> None:
    everything = world_store(world).events(since=None, type=None, limit=1000)
    assert everything == world.events
    assert world_store(world).events(since=None, type=None, limit=3) == world.events[-3:]
    created = world_store(world).events(since=None, type=EventType.VOLUME_CREATE, limit=1000)
    assert [event.volume_id for event in created] == [1, 2, 3]
    middle = world.events[5].time
    assert world_store(world).events(since=middle, type=None, limit=1000)[0].time == middle


def test_only_so_many_events_are_kept(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "EVENTS_KEPT_MAX", 4)
    world.pd("another")
    assert world_store(world).events(since=None, type=None, limit=1000) == world.events[-4:]


def test_a_commit_on_another_state_than_the_stored_one_is_refused(world: World) -> None:
    stale = replace(world.state, sequence=world.state.sequence - 1)
    done = apply(stale, CreatePool(pd_id=1, name="late", capacity_bytes=GIB), START)
    with pytest.raises(IntegrityError, match="start the MDM again"):
        world_store(world).commit(done.state, done.changes, ())
    assert world_store(world).load() == world.state


def test_a_commit_that_fails_leaves_nothing(world: World) -> None:
    """An event number that is taken breaks the transaction after the objects have been written."""
    done = apply(world.state, CreatePool(pd_id=1, name="late", capacity_bytes=GIB), START)
    with pytest.raises(DeviceError, match="cannot be written"):
        world_store(world).commit(done.state, done.changes, world.events[-1:])
    assert world_store(world).load() == world.state
    world_store(world).commit(done.state, done.changes, done.events)
    assert world_store(world).load() == done.state


def test_one_process_at_a_time(store: SqliteStore, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "LOCK_WAIT_SECONDS", 0.05)
    with pytest.raises(ConfigError, match="in use by another process"):
        SqliteStore.open(path)


def test_the_file_is_its_owners_only(store: SqliteStore, path: Path) -> None:
    assert path.stat().st_mode & 0o777 == 0o600


def test_another_version_is_refused(world: World, path: Path) -> None:
    world_store(world).close()
    with closing(sqlite3.connect(path)) as raw:
        raw.execute("PRAGMA user_version = 77")
    with pytest.raises(VersionError, match="has version 77"):
        SqliteStore.open(path)


def test_a_file_that_is_something_else_is_refused(path: Path) -> None:
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(ConfigError, match="is damaged"):
        SqliteStore.open(path)
    path.unlink()
    with closing(sqlite3.connect(path)) as raw:
        raw.execute("CREATE TABLE something (x)")
    with pytest.raises(ConfigError, match="is not the database of an MDM"):
        SqliteStore.open(path)
    path.write_bytes(b"")
    with pytest.raises(ConfigError, match="is not the database of an MDM"):
        SqliteStore.open(path)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("DROP TABLE pools", "no such table"),
        ("DELETE FROM cluster", "has no cluster"),
        ("DELETE FROM segments WHERE segment = 0", "segment 0 of volume 1 is missing"),
        ("DELETE FROM segments WHERE volume_id = 2", "volume vol2 has 7 chunks"),
        ("DELETE FROM volumes", "map segments without a volume"),
        ("DELETE FROM sds WHERE id = 2", "waits for what cannot come"),
        ("DELETE FROM pds", "which does not exist"),
        ("DELETE FROM counters", "which has not been given out"),
        ("UPDATE volumes SET body = '{}'", "not a Volume"),
        ("UPDATE pools SET body = replace(body, '\"flush\"', '\"never\"')", "not a Pool"),
        ("UPDATE sds SET body = '[' WHERE id = 1", "not a Sds"),
        (f"UPDATE segments SET entries = {deflated(bytes(84))} WHERE volume_id = 2", "a chunk without an epoch"),
        (f"UPDATE segments SET entries = {deflated(bytes(12289))} WHERE volume_id = 2", "too long or cut short"),
        ("UPDATE segments SET entries = substr(entries, 1, 9)", "too long or cut short"),
        ("UPDATE segments SET entries = zeroblob(20)", "does not decompress"),
        ("UPDATE sds SET body = replace(body, 'sds2', 'sds1')", "two of sds have one name|a node has two SDSs"),
    ],
)
def test_damage_is_found_and_named(world: World, path: Path, damage: str, reason: str) -> None:
    world_store(world).close()
    with closing(sqlite3.connect(path, isolation_level=None)) as raw:
        raw.execute(damage)
    with pytest.raises(ConfigError, match=reason) as refusal:
        reopen(path)
    assert "\n" not in refusal.value.message


def test_flipped_bytes_in_a_page_are_found(world: World, path: Path) -> None:
    world_store(world).close()
    data = bytearray(path.read_bytes())
    page = int.from_bytes(data[16:18], "big")
    for start in range(page, len(data), page):
        data[start : start + 8] = b"\xff" * 8
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"damaged|cannot be used"):
        reopen(path)


def test_remains_without_their_database_are_not_overwritten(path: Path) -> None:
    path.with_name("mdm.db-wal").write_bytes(b"remains")
    with pytest.raises(ConfigError, match="is incomplete"):
        SqliteStore.create(path, new_cluster())


def test_an_interrupted_creation_is_started_anew(path: Path) -> None:
    path.with_name("mdm.db.new").write_bytes(b"half")
    with closing(SqliteStore.create(path, new_cluster())) as made:
        assert made.load().sequence == 0


def test_a_directory_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot make the database"):
        SqliteStore.create(tmp_path / "missing" / "mdm.db", new_cluster())


def test_rows_of_events_come_back() -> None:
    event = Event(
        event_id=1, time=START, type=EventType.POOL_UPDATE, message="m", details={"a": {"old": 1, "new": None}}
    )
    assert decode(Event, encode(event)) == event
    with pytest.raises(CodecError, match="not a Event"):
        decode(Event, encode(event).replace("message", "text"))
