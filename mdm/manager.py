"""The one owner of the cluster's state: commands come in one at a time, are applied, made durable, and only then seen.

``Manager`` assumes that nobody else writes its database (the store holds it exclusively). It promises that whatever
``execute`` answered is on disk, that ``state`` is always such a state, and that a command that fails, be it refused or
not written, leaves ``state`` as it was. Work that blocks (the pure core on a large volume, SQLite) runs in a worker
thread; the lock keeps the order. Atomic because no await stands between: taking over the new state and publishing its
events.
"""

from __future__ import annotations

import secrets
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import trio

from mdm.commands import Command
from mdm.events import Event, EventType
from mdm.identity import NOUNS, Kind
from mdm.model import Cluster, State
from mdm.store.base import EVENTS_KEPT_MAX, Store
from mdm.store.sqlite import SqliteStore
from mdm.transition import Transition, apply
from pfvol.constants import SEGMENT_CHUNKS, SEGMENT_ENTRY_BYTES
from pfvol.errors import ConfigError, InvalidError, NotFoundError, UnreachableError

SUBSCRIPTION_EVENTS_MAX = 1024
DATA_DIR_MODE = 0o700
CAPABILITY_KEY_BYTES = 32
API_TOKEN_BYTES = 32
CLUSTER_ID_BYTES = 16
SALT_BYTES = 3

Clock = Callable[[], datetime]


def utc_now() -> datetime:
    return datetime.now(UTC)


class Outcome(NamedTuple):
    """What a command made: the state right after it, its events, and what it answers (see ``mdm.commands``)."""

    state: State
    events: tuple[Event, ...]
    result: Any


class Subscription:
    """An async iterator over the events from now on. Ends when the manager closes, or by ``close``.

    A reader that falls ``SUBSCRIPTION_EVENTS_MAX`` behind loses what comes next until it has caught up; it then gets
    one ``EVENTS_MISSED`` event that says how many, and may ask ``Manager.events`` for them.
    """

    def __init__(self, now: Clock) -> None:
        self._now = now
        self._queue: deque[Event] = deque()
        self._missed: tuple[int, int] | None = None  # the first and the last event lost
        self._closed = False
        self._waiting = trio.lowlevel.ParkingLot()

    def close(self) -> None:
        self._closed = True
        self._waiting.unpark_all()

    def __enter__(self) -> Subscription:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def __aiter__(self) -> Subscription:
        return self

    async def __anext__(self) -> Event:
        await trio.lowlevel.checkpoint()
        while not (self._queue or self._missed or self._closed):
            await self._waiting.park()
        if self._queue:
            return self._queue.popleft()
        if self._missed:
            (first, last), self._missed = self._missed, None
            return Event(
                event_id=last,
                time=self._now(),
                type=EventType.EVENTS_MISSED,
                message=f"{last - first + 1} events were not read in time",
                details={"count": last - first + 1, "first": first, "last": last},
            )
        raise StopAsyncIteration

    def publish(self, events: Iterable[Event]) -> None:
        """Never waits."""
        for event in events:
            if self._missed:
                self._missed = (self._missed[0], event.event_id)
            elif len(self._queue) >= SUBSCRIPTION_EVENTS_MAX:
                self._missed = (event.event_id, event.event_id)
            else:
                self._queue.append(event)
        self._waiting.unpark_all()


class Manager:
    """See the module. Made by ``Manager.open``."""

    def __init__(self, store: Store, state: State, now: Clock) -> None:
        self._store = store
        self._state = state
        self._now = now
        self._lock = trio.Lock()
        self._threads = trio.CapacityLimiter(1)
        self._subscriptions: weakref.WeakSet[Subscription] = weakref.WeakSet()
        self._closed = False

    @classmethod
    @asynccontextmanager
    async def open(
        cls, path: Path | str, *, cluster_id: bytes | None = None, now: Clock = utc_now
    ) -> AsyncIterator[Manager]:
        """The manager of the database at ``path``, which is made when there is none.

        ``cluster_id`` (16 bytes): what the cluster is or, when it is made, shall be. Raises ConfigError for a database
        that cannot be used or belongs to another cluster, VersionError for one of another version.
        """
        store, state = await trio.to_thread.run_sync(_open_store, Path(path), cluster_id, now())
        manager = cls(store, state, now)
        try:
            yield manager
        finally:
            with trio.CancelScope(shield=True):
                await manager._close()

    @property
    def state(self) -> State:
        """The last state that is durable."""
        return self._state

    async def execute(self, command: Command) -> Outcome:
        """Carries out ``command``. Raises what ``apply`` raises, DeviceError or IntegrityError when it cannot be kept.

        A caller that is cancelled while the command is being written gets no answer; the command may have happened.
        """
        async with self._lock:
            if self._closed:
                raise UnreachableError("the MDM is stopping")
            # The lock keeps every other command out; the thread finishes even when this task is cancelled.
            done = await trio.to_thread.run_sync(
                _run, self._store, self._state, command, self._now(), limiter=self._threads
            )
            self._state = done.state
            if done.events:
                for subscription in tuple(self._subscriptions):
                    subscription.publish(done.events)
        return Outcome(done.state, done.events, done.result)

    def segment(self, volume_id: int, index: int) -> bytes:
        """The map entries of the ``SEGMENT_CHUNKS`` chunks from ``index * SEGMENT_CHUNKS`` on.

        It always has the full length: zeros after the volume's last chunk. Raises NotFoundError for a volume or
        segment that is not there.
        """
        segments = self._state.maps.get(volume_id)
        if segments is None:
            raise NotFoundError(f"no {NOUNS[Kind.VOLUME]} number {volume_id}")
        if not 0 <= index < len(segments):
            raise NotFoundError(f"volume number {volume_id} has {len(segments)} segments, not one numbered {index}")
        return segments[index].ljust(SEGMENT_CHUNKS * SEGMENT_ENTRY_BYTES, b"\0")

    def subscribe(self) -> Subscription:
        subscription = Subscription(self._now)
        if self._closed:
            subscription.close()
        self._subscriptions.add(subscription)
        return subscription

    async def events(
        self, since: datetime | None = None, type: EventType | str | None = None, limit: int = 1000
    ) -> list[Event]:
        """The last ``limit`` events from ``since`` on (aware), of one type or all, oldest first."""
        if type is not None and type not in EventType.__members__:
            raise InvalidError(f"no event type {type!r}: there are {', '.join(EventType.__members__)}")
        kind = None if type is None else EventType(type)
        count = max(0, min(limit, EVENTS_KEPT_MAX))
        return await trio.to_thread.run_sync(
            partial(self._store.events, since=since, type=kind, limit=count), limiter=self._threads
        )

    async def _close(self) -> None:
        async with self._lock:
            self._closed = True
            for subscription in tuple(self._subscriptions):
                subscription.close()
            await trio.to_thread.run_sync(self._store.close, limiter=self._threads)


def _run(store: Store, state: State, command: Command, now: datetime) -> Transition:
    """In a worker thread: the next state, once it is durable."""
    done = apply(state, command, now)
    if done.state is not state:
        store.commit(done.state, done.changes, done.events)
    return done


def _open_store(path: Path, cluster_id: bytes | None, now: datetime) -> tuple[SqliteStore, State]:
    if path.exists():
        store = SqliteStore.open(path)
    else:
        _make_directory(path.parent)
        store = SqliteStore.create(path, _new_cluster(cluster_id, now))
    try:
        state = store.load()
        if cluster_id is not None and state.cluster.cluster_id != cluster_id:
            raise ConfigError(
                f"the database {path} belongs to cluster {state.cluster.cluster_id.hex()}, not to {cluster_id.hex()}: "
                "use another data dir"
            )
    except BaseException:
        store.close()
        raise
    return store, state


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(mode=DATA_DIR_MODE, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make the data dir {path}: {error}") from error


def _new_cluster(cluster_id: bytes | None, now: datetime) -> Cluster:
    if cluster_id is not None and len(cluster_id) != CLUSTER_ID_BYTES:
        raise ConfigError(f"a cluster id has {CLUSTER_ID_BYTES} bytes, not {len(cluster_id)}")
    return Cluster(
        cluster_id=cluster_id or secrets.token_bytes(CLUSTER_ID_BYTES),
        salt=secrets.token_bytes(SALT_BYTES),
        capability_key=secrets.token_bytes(CAPABILITY_KEY_BYTES),
        api_token=secrets.token_urlsafe(API_TOKEN_BYTES),
        created_at=now,
    )
