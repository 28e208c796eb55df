"""The next state while a command makes it: tables copied on their first write, and a list of what became different.

A ``Draft`` lives for one command. It never touches the state that it starts from, so a command that fails halfway
leaves nothing behind. Its changes tell the store what to write without comparing states (the counters are few and
always written).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from datetime import datetime
from typing import Any, NamedTuple

from mdm.events import Event, EventType
from mdm.health import down, pool_health, volume_health, volume_state
from mdm.identity import NOUNS, TABLES, Kind, check_name
from mdm.model import NUMBER_MAX, SDS_ID_MAX, Holders, State, Volume, VolumeState
from mdm.segments import Rewritten
from pfvol.errors import CapacityError, ConflictError, NotFoundError


class Change(NamedTuple):
    """A row to write (``row``: the object) or to remove (None). In ``maps`` the key is (volume, segment)."""

    table: str
    key: int | tuple[int, int]
    row: Any


class Draft:
    def __init__(self, state: State, now: datetime) -> None:
        self.now = now
        self.events: list[Event] = []
        self._before = state
        self._tables: dict[str, Any] = {}
        self._changes: dict[tuple[str, int | tuple[int, int]], Any] = {}

    # -- reading

    def table(self, name: str) -> Any:
        return self._tables[name] if name in self._tables else getattr(self._before, name)

    def get(self, kind: Kind, number: int) -> Any:
        """The object, or NotFoundError."""
        found = self.table(TABLES[kind]).get(number)
        if found is not None:
            return found
        if kind is Kind.VOLUME and number in self.table("purges"):
            raise NotFoundError(f"volume {self.table('purges')[number].name} is deleted")
        raise NotFoundError(f"no {NOUNS[kind]} number {number}")

    @property
    def state(self) -> State:
        """The state as drafted so far, to compute with."""
        return replace(self._before, **self._tables)

    # -- writing

    def put(self, table: str, key: int, row: Any, *, durable: bool = True) -> None:
        """``durable`` False: only what is derived from other rows has changed."""
        self._writable(table)[key] = row
        if durable:
            self._changes[table, key] = row

    def drop(self, table: str, key: int) -> None:
        del self._writable(table)[key]
        if key in getattr(self._before, table):
            self._changes[table, key] = None
        else:  # made by this very command: the store never had it
            self._changes.pop((table, key), None)

    def put_map(self, volume_id: int, segments: tuple[bytes, ...], *, first_changed: int) -> None:
        self._writable("maps")[volume_id] = segments
        for index in range(first_changed, len(segments)):
            self._changes["maps", (volume_id, index)] = segments[index]

    def change_map(self, volume: Volume, done: Rewritten) -> None:
        """Takes over rewritten segments of the map, and what they change in the counts."""
        segments = list(self.table("maps")[volume.volume_id])
        for index, entries in done.segments.items():
            segments[index] = entries
            self._changes["maps", (volume.volume_id, index)] = entries
        self._writable("maps")[volume.volume_id] = tuple(segments)
        placement = dict(volume.placement)
        for holders, count in done.counts.items():
            placement[holders] = placement.get(holders, 0) + count
            if not placement[holders]:
                del placement[holders]
        self.put("volumes", volume.volume_id, replace(volume, placement=placement), durable=False)
        self.count_copies(volume, done.counts.items(), 1)

    def drop_map(self, volume_id: int) -> None:
        """The rows go with the volume's (see schema.sql)."""
        del self._writable("maps")[volume_id]

    def next_number(self, counter: str, limit: int = NUMBER_MAX) -> int:
        number = int(self.table("counters").get(counter, 0)) + 1
        if number > limit:
            raise CapacityError(f"all {limit} numbers of {counter} have been given out")
        self._writable("counters")[counter] = number
        return number

    def set_counter(self, counter: str, value: int) -> None:
        self._writable("counters")[counter] = value

    def next_id(self, kind: Kind) -> int:
        return self.next_number(TABLES[kind], SDS_ID_MAX if kind is Kind.SDS else NUMBER_MAX)

    def take_name(self, kind: Kind, name: str, number: int, *, scope: int = 0) -> None:
        check_name(name, kind)
        key = (TABLES[kind], scope, name)
        if key in self.table("names"):
            raise ConflictError(f"the name {name} is taken by another {NOUNS[kind]}: choose another name")
        self._writable("names")[key] = number

    def free_name(self, kind: Kind, name: str, *, scope: int = 0) -> None:
        del self._writable("names")[TABLES[kind], scope, name]

    def event(self, type_: EventType, message: str, **fields: Any) -> None:
        number = self.next_number("events", 2**63 - 1)
        self.events.append(Event(event_id=number, time=self.now, type=type_, message=message, **fields))

    def count_copies(self, volume: Volume, chunks: Iterable[tuple[Holders, int]], sign: int) -> None:
        """Adds (or takes off) chunks and who has them to what those SDSs count."""
        copies: dict[int, int] = {}
        primaries: dict[int, int] = {}
        for holders, count in chunks:
            for sds_id in holders.all:
                copies[sds_id] = copies.get(sds_id, 0) + count
            primaries[holders.primary] = primaries.get(holders.primary, 0) + count
        for sds_id, count in copies.items():
            sds = self.table("sds")[sds_id]
            self.put(
                "sds",
                sds_id,
                replace(
                    sds,
                    copies=sds.copies + sign * count,
                    primaries=sds.primaries + sign * primaries.get(sds_id, 0),
                    thick_slots=sds.thick_slots + (sign * count if volume.thick else 0),
                ),
                durable=False,
            )

    # -- the end

    def tell_state(self, old: Volume) -> None:
        """An event if the state of the volume that was ``old`` is no longer the same."""
        new = self.table("volumes")[old.volume_id]
        was, is_ = volume_health(old, down(self._before)), volume_health(new, down(self.state))
        self._tell_volume(old, volume_state(old, was), volume_state(new, is_))

    def tell_health(self, volumes: Iterable[Volume]) -> None:
        """Events for those of ``volumes`` (as they were) whose state, and their pools whose health, changed."""
        before, state = self._before, self.state
        down_before, down_now = down(before), down(state)
        pool_ids = set()
        for old in volumes:
            new = state.volumes.get(old.volume_id)
            if new is None:
                pool_ids.add(old.pool_id)
                continue
            was, is_ = volume_health(old, down_before), volume_health(new, down_now)
            if was is not is_:  # A pool may have a thousand others: they are only looked at when one has changed.
                pool_ids.add(old.pool_id)
                self._tell_volume(old, volume_state(old, was), volume_state(new, is_))
        for pool_id in sorted(pool_ids):
            pool = state.pools[pool_id]
            was = pool_health(before.volumes_of(pool_id), down_before)
            is_ = pool_health(state.volumes_of(pool_id), down_now)
            if was is not is_:
                self.event(
                    EventType.POOL_HEALTH_CHANGE,
                    f"pool {pool.name} went from {was} to {is_}",
                    pd_id=pool.pd_id,
                    pool_id=pool_id,
                    details={"old": was.value, "new": is_.value},
                )

    def _tell_volume(self, volume: Volume, was: VolumeState, is_: VolumeState) -> None:
        if was is not is_:
            self.event(
                EventType.VOLUME_STATE_CHANGE,
                f"volume {volume.name} went from {was} to {is_}",
                pool_id=volume.pool_id,
                volume_id=volume.volume_id,
                details={"old": was.value, "new": is_.value},
            )

    def finish(self) -> tuple[State, tuple[Change, ...]]:
        """The next state; the same one when nothing changed that has to be kept."""
        if not self._changes and not self.events and "counters" not in self._tables:
            return self._before, ()
        state = replace(self._before, sequence=self._before.sequence + 1, **self._tables)
        return state, tuple(Change(table, key, row) for (table, key), row in self._changes.items())

    def _writable(self, table: str) -> dict[Any, Any]:
        if table not in self._tables:
            self._tables[table] = dict(getattr(self._before, table))
        found: dict[Any, Any] = self._tables[table]
        return found
