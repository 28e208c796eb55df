"""The map as the engine has it: which segments it was told of, and the version that all of them have reached.

Owns every ``set_segment`` and ``set_map_version``. Assumes that the MDM makes a change durable before it pushes it,
pushes changes in order and one at a time on a session, and answers a question with what is durable then; and that the
engine takes a segment entry by entry, only where the epoch is newer, so that it does not matter in which order an
answer and a push arrive. Promises: the engine's version is never newer than any segment that it was told of or will be
told of.

Three things keep that promise. A push that arrives while its segment is asked for goes to the engine too: the answer
on its way may be older. A push of what the engine does not know is left out: it will be asked for later, after the
push. What was pushed while there was no session is lost: from the end of a session until each known segment has been
fetched again, by a question put after the next registration, the version stays where it is. (A version that did not
move meanwhile says that nothing was lost.)
"""

from __future__ import annotations

import math
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import trio

from pfvol.constants import SEGMENT_CHUNKS, SEGMENT_ENTRY_BYTES, SEGMENT_ENTRY_FORMAT
from pfvol.errors import Error, NotFoundError, ProtocolError, TimedOutError, UnreachableError
from pfvol.log import get_logger
from pfvol.sds.volumes import RETRY_SECONDS

PREFETCH_SEGMENTS_MAX: Final = 64  # 256 GiB: a larger volume's map comes as its chunks are asked for
MAP_REFRESH_SECONDS: Final = 0.2  # between two questions for a segment that the engine has
FETCHES_MAX: Final = 8  # at a time, of those that are fetched again: the MDM has others to answer too
SEGMENT_MAP_BYTES: Final = SEGMENT_CHUNKS * SEGMENT_ENTRY_BYTES
NONE: Final = 0  # the MDM has not told of any version
_ENTRY: Final = struct.Struct(SEGMENT_ENTRY_FORMAT)

Key = tuple[int, int]
Call = Callable[[str, dict[str, Any]], Awaitable[Any]]


class Engine(Protocol):
    def set_segment(self, volume_id: int, segment_index: int, entries: bytes, version: int) -> None: ...
    def set_map_version(self, version: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Push:
    """``version``: the one that is reached with these segments; ``made``: the one that they are of."""

    version: int
    made: int
    segments: list[tuple[int, int, bytes]]


@dataclass(eq=False, slots=True)
class _Volume:
    """One that the engine knows, or that a segment is asked for of."""

    told_at: dict[int, float] = field(default_factory=dict)  # segments that the engine has -> when it was last asked
    asking: int | None = None
    lock: trio.Lock = field(default_factory=trio.Lock)  # one question at a time


class Segments:
    """``gone`` is called with a volume that the MDM says does not exist."""

    def __init__(self, engine: Engine, call: Call, sds_id: int, gone: Callable[[int], None]) -> None:
        self._engine = engine
        self._call = call
        self._sds_id = sds_id
        self._gone = gone
        self._volumes: dict[int, _Volume] = {}
        self._complete = False  # every push since what the segments were fetched with has been seen
        self._registrations = 0
        self._stale: set[Key] = set()
        self._newest = NONE
        self._in_force = NONE
        self._raised = trio.Event()
        self._log = get_logger("sds.segments")

    # -- what the engine knows

    def add(self, volume_id: int) -> None:
        """The engine knows the volume from here on: pushes of its segments are for it."""
        self._volumes.setdefault(volume_id, _Volume())

    def forget(self, volume_id: int) -> None:
        self._volumes.pop(volume_id, None)
        self._stale = {key for key in self._stale if key[0] != volume_id}
        self._settle()

    # -- the version

    async def reached(self, version: int) -> None:
        """Returns when the engine's version is this one or a newer one."""
        while self._in_force < version:
            await self._raised.wait()

    def lost(self) -> None:
        """There is no session, or something that was pushed could not be taken: the version stays as it is."""
        self._complete = False

    def registered(self, version: int) -> bool:
        """A session begins at this version. True when ``catch_up`` has to be run."""
        self._newest = max(self._newest, version)
        self._registrations += 1
        self._complete = True
        self._stale.clear()
        if version != self._in_force:
            for volume_id, volume in self._volumes.items():
                segments = volume.told_at.keys() | ({volume.asking} - {None})
                self._stale.update((volume_id, segment) for segment in segments if segment is not None)
        self._settle()
        return bool(self._stale)

    async def catch_up(self) -> None:
        """Fetches again what may have changed unseen; ends early when another registration begins anew."""
        todo = sorted(self._stale)
        async with trio.open_nursery() as nursery:
            for _ in range(FETCHES_MAX):
                nursery.start_soon(self._fetch_each, todo, self._registrations)

    def pushed(self, push: Push) -> None:
        """What the MDM has changed; all of it is in the engine's queue when this returns."""
        for volume_id, segment, entries in push.segments:
            volume = self._volumes.get(volume_id)
            if volume is not None and (segment in volume.told_at or volume.asking == segment or self._is_in(entries)):
                volume.told_at.setdefault(segment, -math.inf)
                self._engine.set_segment(volume_id, segment, entries, push.made)
        self._newest = max(self._newest, push.version)
        self._settle()

    def ours(self, push: Push) -> set[int]:
        """The volumes in it that have chunks of ours."""
        return {volume_id for volume_id, _, entries in push.segments if self._is_in(entries)}

    def parse_push(self, body: Any) -> Push:
        """The parameters of ``map.changed``. ProtocolError when they are none: then a change is missing here."""
        try:
            segments = [(int(volume_id), int(segment), entries) for volume_id, segment, entries in body["segments"]]
            push = Push(int(body["version"]), int(body["made"]), segments)
        except (TypeError, KeyError, ValueError) as error:
            self.lost()
            raise ProtocolError(f"the MDM's change of the map cannot be read: {error!r}") from None
        if not all(_is_whole(entries) for _, _, entries in segments):
            self.lost()
            raise ProtocolError("a segment in the MDM's change of the map has a wrong size")
        return push

    def _settle(self) -> None:
        if self._complete and not self._stale and self._newest > self._in_force:
            self._in_force = self._newest
            self._engine.set_map_version(self._newest)
            self._raised.set()
            self._raised = trio.Event()

    # -- asking

    async def prefetch(self, volume_id: int, segments: int, *, whole: bool = False) -> None:
        """A volume's first segments, or all, as far as they have chunks of ours; until the volume is forgotten."""
        for segment in range(segments if whole else min(segments, PREFETCH_SEGMENTS_MAX)):
            if volume_id not in self._volumes:
                return
            await self.fetch(volume_id, segment, only_ours=True)

    async def answer_miss(self, volume_id: int, segment: int) -> None:
        """Fetches what the engine lacks, or doubts because it was named a newer epoch.

        Who names epochs freely must not have us ask without a pause.
        """
        volume = self._volumes.get(volume_id)
        asked_at = volume.told_at.get(segment, -math.inf) if volume is not None else -math.inf
        await trio.sleep_until(asked_at + MAP_REFRESH_SECONDS)
        await self.fetch(volume_id, segment)

    async def fetch(self, volume_id: int, segment: int, *, only_ours: bool = False) -> bool:
        """Asks the MDM, however long it is away, and tells the engine. False: its answer cannot be used."""
        volume = self._volumes.setdefault(volume_id, _Volume())
        async with volume.lock:
            volume.asking = segment
            try:
                return await self._fetch(volume_id, volume, segment, only_ours=only_ours)
            finally:
                volume.asking = None

    async def _fetch(self, volume_id: int, volume: _Volume, segment: int, *, only_ours: bool) -> bool:
        try:
            entries, made, registrations = await self._ask(volume_id, segment)
        except NotFoundError:
            self._gone(volume_id)
            return True
        except Error as error:
            # The engine must get an answer, or it would wait for this one for ever: a map that has no chunk of ours.
            # It replaces nothing that the engine has, and what is stale stays so.
            self._log.error("map cannot be looked up", volume=volume_id, segment=segment, reason=error.message)
            entries, made, registrations = bytes(SEGMENT_MAP_BYTES), NONE, -1
        # No await from here on.
        if self._volumes.get(volume_id) is not volume:
            return False  # forgotten meanwhile: nothing of it is to come back
        if not only_ours or segment in volume.told_at or self._is_in(entries):
            volume.told_at[segment] = trio.current_time()
            self._engine.set_segment(volume_id, segment, entries, made)
        if registrations == self._registrations:
            self._stale.discard((volume_id, segment))
            self._settle()
        return registrations >= 0

    async def _ask(self, volume_id: int, segment: int) -> tuple[bytes, int, int]:
        """The entries, the version that they are of, and how many registrations there had been at the question."""
        while True:
            registrations = self._registrations
            try:
                body = await self._call("map.segment", {"volume_id": volume_id, "segment": segment})
            except (UnreachableError, TimedOutError):
                await trio.sleep(RETRY_SECONDS)
                continue
            try:
                entries, made = body["entries"], int(body["version"])
            except (TypeError, KeyError, ValueError) as error:
                raise ProtocolError(f"the MDM's map of volume {volume_id} cannot be read: {error!r}") from None
            if not _is_whole(entries):
                raise ProtocolError(f"the MDM's map of segment {segment} of volume {volume_id} has a wrong size")
            return entries, made, registrations

    async def _fetch_each(self, todo: list[Key], registrations: int) -> None:
        while todo and registrations == self._registrations:
            key = todo.pop()
            if key in self._stale:
                await self.fetch(*key)
                if key in self._stale:
                    todo.append(key)
                    await trio.sleep(RETRY_SECONDS)

    def _is_in(self, entries: bytes) -> bool:
        us = self._sds_id
        return any(
            us in (primary, secondary, learner) for _, primary, secondary, learner, _ in _ENTRY.iter_unpack(entries)
        )


def _is_whole(entries: Any) -> bool:
    return isinstance(entries, bytes) and len(entries) == SEGMENT_MAP_BYTES
