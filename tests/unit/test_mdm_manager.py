"""The manager: one command at a time, durable before it is seen, events for whoever listens, kill -9 at any instant."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import trio

from mdm import invariants
from mdm import manager as manager_module
from mdm.commands import AddSds, CreatePool, CreateProtectionDomain, CreateVolume, DeleteVolume
from mdm.events import EventType
from mdm.manager import Manager
from mdm.store.sqlite import SqliteStore
from pfvol.constants import SEGMENT_CHUNKS, SEGMENT_ENTRY_BYTES
from pfvol.errors import ConfigError, ConflictError, DeviceError, InvalidError, NotFoundError, UnreachableError
from tests.support.mdm_world import GIB, registration
from tests.support.processes import running

KILLS = 12


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "mdm.db"


async def furnish(manager: Manager) -> int:
    """A domain, a pool and three SDSs; the pool's id."""
    pd_id = (await manager.execute(CreateProtectionDomain(name="default"))).result
    pool = CreatePool(pd_id=pd_id, name="default", capacity_bytes=100 * GIB)
    pool_id = int((await manager.execute(pool)).result)
    for number in (1, 2, 3):
        outcome = await manager.execute(AddSds(pd_id=pd_id, name=f"sds{number}", capacity_bytes=5 * GIB))
        await manager.execute(registration(outcome.state, outcome.result))
    return pool_id


async def test_a_cluster_is_made_once_and_then_kept(path: Path) -> None:
    async with Manager.open(path) as manager:
        cluster = manager.state.cluster
        await manager.execute(CreateProtectionDomain(name="default"))
        state = manager.state
    assert (len(cluster.cluster_id), len(cluster.salt), len(cluster.capability_key)) == (16, 3, 32)
    assert len(cluster.api_token) >= 32
    async with Manager.open(path, cluster_id=cluster.cluster_id) as manager:
        assert manager.state == state
    with pytest.raises(ConfigError, match="belongs to cluster"):
        async with Manager.open(path, cluster_id=bytes(16)):
            pass


async def test_a_given_cluster_id_is_taken(path: Path) -> None:
    async with Manager.open(path, cluster_id=b"c" * 16) as manager:
        assert manager.state.cluster.cluster_id == b"c" * 16
    with pytest.raises(ConfigError, match="16 bytes"):
        async with Manager.open(path.with_name("other.db"), cluster_id=b"short"):
            pass


async def test_outcome_and_state(path: Path) -> None:
    async with Manager.open(path) as manager:
        outcome = await manager.execute(CreateProtectionDomain(name="default"))
        assert outcome.result == 1
        assert outcome.state is manager.state
        assert [event.type for event in outcome.events] == [EventType.PD_CREATE]
        with pytest.raises(ConflictError):
            await manager.execute(CreateProtectionDomain(name="default"))
        assert manager.state is outcome.state


async def test_concurrent_commands_take_turns(path: Path) -> None:
    async with Manager.open(path) as manager:
        results: list[int] = []

        async def create(name: str) -> None:
            results.append((await manager.execute(CreateProtectionDomain(name=name))).result)

        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(create, f"pd{number}")
        assert sorted(results) == list(range(1, 21))
        assert manager.state.sequence == 20


async def test_a_failing_store_changes_nothing_and_says_so(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk refuses the commit: nobody sees the command, and the next one works."""
    async with Manager.open(path) as manager:
        before = manager.state
        seen = manager.subscribe()

        def broken(*_: object) -> None:
            raise DeviceError("the MDM's database cannot be written: disk full")

        with monkeypatch.context() as patch:
            patch.setattr(SqliteStore, "commit", broken)
            with pytest.raises(DeviceError):
                await manager.execute(CreateProtectionDomain(name="lost"))
        assert manager.state is before
        await manager.execute(CreateProtectionDomain(name="kept"))
        assert (await anext(seen)).message == "protection domain kept created"


async def test_a_real_full_database_is_a_device_error(path: Path) -> None:
    async with Manager.open(path) as manager:
        pool_id = await furnish(manager)
        store = manager._store
        assert isinstance(store, SqliteStore)
        pages = store._connection.execute("PRAGMA page_count").fetchone()[0]
        store._connection.execute(f"PRAGMA max_page_count = {pages + 2}")
        before = manager.state
        with pytest.raises(DeviceError, match="full"):
            await manager.execute(CreateVolume(pool_id=pool_id, name="large", size_bytes=1024**4))
        assert manager.state is before
        store._connection.execute("PRAGMA max_page_count = 1000000")
        await manager.execute(CreateVolume(pool_id=pool_id, name="large", size_bytes=1024**4))
        assert invariants.check(manager.state) == []


async def test_a_cancelled_caller_does_not_tear_a_command(path: Path) -> None:
    async with Manager.open(path) as manager:
        pool_id = await furnish(manager)
        for number in range(10):
            with trio.move_on_after(0.002 * number):
                await manager.execute(CreateVolume(pool_id=pool_id, name=f"v{number}", size_bytes=64 * GIB))
        await manager.execute(CreateProtectionDomain(name="after"))
        state = manager.state
    async with Manager.open(path) as manager:
        assert manager.state == state


async def test_segments(path: Path) -> None:
    async with Manager.open(path) as manager:
        pool_id = await furnish(manager)
        await manager.execute(CreateVolume(pool_id=pool_id, name="v", size_bytes=5 * GIB))
        full = SEGMENT_CHUNKS * SEGMENT_ENTRY_BYTES
        assert manager.segment(1, 0) == manager.state.maps[1][0]
        last = manager.segment(1, 1)
        assert len(last) == full
        assert last[256 * SEGMENT_ENTRY_BYTES :] == bytes(full - 256 * SEGMENT_ENTRY_BYTES)
        assert last[: 256 * SEGMENT_ENTRY_BYTES] == manager.state.maps[1][1]
        for volume_id, index in ((1, 2), (1, -1), (9, 0)):
            with pytest.raises(NotFoundError):
                manager.segment(volume_id, index)


async def test_one_tebibyte_is_answered_fast(path: Path) -> None:
    """Applied and on disk; measured 25 ms, the acceptance is 1 s for the whole command."""
    async with Manager.open(path) as manager:
        pool_id = await furnish(manager)
        started = trio.current_time()
        await manager.execute(CreateVolume(pool_id=pool_id, name="large", size_bytes=1024**4))
        assert trio.current_time() - started < 0.5


async def test_subscribers_get_what_happens_from_now_on_and_end_with_the_manager(path: Path) -> None:
    got: list[str] = []
    async with trio.open_nursery() as nursery, Manager.open(path) as manager:
        await manager.execute(CreateProtectionDomain(name="before"))
        seen = manager.subscribe()

        async def listen() -> None:
            async for event in seen:
                got.append(event.message)

        nursery.start_soon(listen)
        await manager.execute(CreateProtectionDomain(name="after"))
    assert got == ["protection domain after created"]


async def test_a_slow_subscriber_is_told_what_it_missed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager_module, "SUBSCRIPTION_EVENTS_MAX", 2)
    async with Manager.open(path) as manager:
        with manager.subscribe() as slow:
            for number in range(5):
                await manager.execute(CreateProtectionDomain(name=f"pd{number}"))
            assert [(await anext(slow)).event_id for _ in range(2)] == [1, 2]
            marker = await anext(slow)
            assert (marker.type, marker.event_id) == (EventType.EVENTS_MISSED, 5)
            assert marker.details == {"count": 3, "first": 3, "last": 5}
            await manager.execute(CreateProtectionDomain(name="next"))
            assert (await anext(slow)).event_id == 6
        with pytest.raises(StopAsyncIteration):
            await anext(slow)


async def test_history(path: Path) -> None:
    async with Manager.open(path) as manager:
        pool_id = await furnish(manager)
        await manager.execute(CreateVolume(pool_id=pool_id, name="v", size_bytes=GIB))
        await manager.execute(DeleteVolume(volume_id=1))
        assert [event.type for event in await manager.events(limit=2)] == [
            EventType.VOLUME_CREATE,
            EventType.VOLUME_DELETE,
        ]
        assert len(await manager.events(type="SDS_ADD")) == 3
        since = (await manager.events())[-1].time
        assert [event.type for event in await manager.events(since=since)] == [EventType.VOLUME_DELETE]
        with pytest.raises(InvalidError, match="no event type"):
            await manager.events(type="NOTHING")


async def test_a_closed_manager_refuses(path: Path) -> None:
    async with Manager.open(path) as manager:
        pass
    with pytest.raises(UnreachableError, match="stopping"):
        await manager.execute(CreateProtectionDomain(name="late"))
    with pytest.raises(StopAsyncIteration):
        await anext(manager.subscribe())


CHILD = textwrap.dedent(
    """
    import sys, trio
    from mdm.commands import CreateVolume, DeleteVolume
    from mdm.manager import Manager

    async def main():
        async with Manager.open(sys.argv[1]) as manager:
            number = 0
            while True:
                number += 1
                create = CreateVolume(pool_id=1, name=f"{sys.argv[2]}-{number}", size_bytes=2**34)
                made = (await manager.execute(create)).result
                print("made", made, flush=True)
                if number % 3 == 0:
                    await manager.execute(DeleteVolume(volume_id=made))
                    print("deleted", made, flush=True)

    trio.run(main)
    """
)


async def test_killing_the_process_at_any_instant_loses_nothing_that_was_answered(path: Path) -> None:
    """A child creates and deletes volumes and says what was answered; it is killed after ever more of them."""
    async with Manager.open(path) as manager:
        await furnish(manager)
    made: set[int] = set()
    deleted: set[int] = set()
    for kill in range(KILLS):
        for word, number in await trio.to_thread.run_sync(_run_and_kill, path, kill):
            (made if word == "made" else deleted).add(number)
        async with Manager.open(path) as manager:
            present = set(manager.state.volumes)
            assert made - deleted - present <= _last(made), "an answered volume is gone"
            assert not present & deleted, "a deleted volume is back"
            assert len(present - made) <= kill + 1, "more came back than can have been under way"
            made |= present
            deleted |= made - present
    assert len(made) > KILLS


def _last(made: set[int]) -> set[int]:
    """The newest volume may have been deleted without the answer having been seen."""
    return {max(made)} if made else set()


def _run_and_kill(path: Path, kill: int) -> list[tuple[str, int]]:
    argv = [sys.executable, "-c", CHILD, str(path), f"r{kill}"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    answers = []
    with running(argv, stdout=subprocess.PIPE, text=True, env=environment) as child:
        assert child.stdout is not None
        for _ in range(1 + kill * 2):
            line = child.stdout.readline()
            assert line, "the child ended by itself"
            answers.append(line)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGKILL)
        answers += child.stdout.readlines()
    found = (line.split() for line in answers if line.endswith("\n"))
    return [(word, int(number)) for word, number in found]
