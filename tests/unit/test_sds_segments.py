"""Goal: the engine is never told a version of the map that something it knows has not reached."""

from __future__ import annotations

import random
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from pfvol.constants import SEGMENT_ENTRY_FORMAT
from pfvol.errors import ConflictError, NotFoundError, ProtocolError, UnreachableError
from pfvol.sds.segments import SEGMENT_MAP_BYTES, Push, Segments
from tests.support.waiting import comes_to, pass_time

US, VOLUME = 1, 9
SETTLED = 0.005


def entries(epoch: int, primary: int = US, secondary: int = 2) -> bytes:
    return struct.pack(SEGMENT_ENTRY_FORMAT, epoch, primary, secondary, 0, 0).ljust(SEGMENT_MAP_BYTES, b"\0")


def epoch_of(packed: bytes) -> int:
    return int.from_bytes(packed[:4], "little")


class Engine:
    """Merges by epoch; refuses a version that a segment which it has does not reach, by what the MDM has."""

    def __init__(self, mdm: Mdm) -> None:
        self.mdm = mdm
        self.segments: dict[tuple[int, int], int] = {}
        self.version = 0

    def set_segment(self, volume_id: int, segment_index: int, entries: bytes, version: int) -> None:
        key = (volume_id, segment_index)
        # Whoever left a set by this change must be known to know it.
        epoch = epoch_of(entries)
        assert all(made <= version for made, of in self.mdm.history.get(key, []) if of <= epoch)
        self.segments[key] = max(self.segments.get(key, 0), epoch_of(entries))
        self.check()

    def set_map_version(self, version: int) -> None:
        assert version > self.version
        self.version = version
        self.check()

    def check(self) -> None:
        for key, epoch in self.segments.items():
            assert epoch >= self.mdm.epoch_at(key, self.version), f"{key} is older than version {self.version}"


class Mdm:
    """Each change raises the version and one segment's epoch. A question waits at ``gate`` with its answer."""

    def __init__(self) -> None:
        self.version = 0
        self.maps: dict[tuple[int, int], bytes] = {}
        self.history: dict[tuple[int, int], list[tuple[int, int]]] = {}
        self.gate = trio.Event()
        self.gate.set()
        self.away = False
        self.failing: list[Exception] = []
        self.asked = 0
        self.at_once = 0
        self.at_once_max = 0

    def change(self, segment: int = 0, volume_id: int = VOLUME, *members: int) -> Push:
        key = (volume_id, segment)
        self.version += 1
        epoch = epoch_of(self.maps.get(key, bytes(4))) + 1
        self.maps[key] = entries(epoch, *members)
        self.history.setdefault(key, []).append((self.version, epoch))
        return Push(self.version, self.version, [(volume_id, segment, self.maps[key])])

    def epoch_at(self, key: tuple[int, int], version: int) -> int:
        return max((epoch for at, epoch in self.history.get(key, []) if at <= version), default=0)

    async def call(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        assert method == "map.segment"
        self.asked += 1
        self.at_once += 1
        self.at_once_max = max(self.at_once_max, self.at_once)
        try:
            if self.away:
                raise UnreachableError("away")
            if self.failing:
                raise self.failing.pop()
            answer = self.maps.get((params["volume_id"], params["segment"]))
            version = self.version
            await self.gate.wait()
            if self.away:
                raise UnreachableError("lost")
            if answer is None:
                raise NotFoundError("no such volume")
            return {"version": version, "entries": answer}
        finally:
            self.at_once -= 1


class Running:
    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery
        self.mdm = Mdm()
        self.engine = Engine(self.mdm)
        self.segments = Segments(self.engine, self.mdm.call, US, self.gone)

    def gone(self, volume_id: int) -> None:
        for key in [key for key in self.engine.segments if key[0] == volume_id]:
            del self.engine.segments[key]
        self.segments.forget(volume_id)

    def register(self) -> None:
        self.segments.lost()
        if self.segments.registered(self.mdm.version):
            self.nursery.start_soon(self.segments.catch_up)

    def fetch(self, segment: int = 0, volume_id: int = VOLUME) -> None:
        self.nursery.start_soon(self.segments.fetch, volume_id, segment)

    async def settle(self) -> None:
        await trio.testing.wait_all_tasks_blocked(SETTLED)

    async def begin(self) -> None:
        """Registered, and the engine has a segment of version 1."""
        self.register()
        self.mdm.change()
        self.fetch()
        await self.settle()


@asynccontextmanager
async def running() -> AsyncIterator[Running]:
    async with trio.open_nursery() as nursery:
        yield Running(nursery)
        nursery.cancel_scope.cancel()


async def test_a_push_raises_the_version_when_its_segments_are_there() -> None:
    async with running() as it:
        await it.begin()
        it.segments.pushed(it.mdm.change())
        assert it.engine.segments == {(VOLUME, 0): 2}
        assert it.engine.version == 2


@pytest.mark.parametrize("changes", [1, 2])
async def test_the_first_version_is_that_of_the_registration(changes: int) -> None:
    async with running() as it:
        for _ in range(changes):
            it.mdm.change()
        it.register()
        assert it.engine.version == changes


async def test_nothing_is_raised_before_there_was_a_registration() -> None:
    async with running() as it:
        it.segments.pushed(it.mdm.change())
        assert it.engine.version == 0


async def test_what_the_engine_does_not_know_or_has_no_part_in_is_left_out_of_a_push() -> None:
    async with running() as it:
        it.register()
        it.segments.pushed(it.mdm.change())
        assert it.engine.segments == {}
        it.segments.add(VOLUME)
        it.segments.pushed(it.mdm.change(3, VOLUME, 2, 3))
        assert it.engine.segments == {}
        it.segments.pushed(it.mdm.change(3))
        assert it.engine.segments == {(VOLUME, 3): 2}
        it.segments.pushed(it.mdm.change(3, VOLUME, 2, 3))  # it has to learn that it is out
        assert it.engine.segments == {(VOLUME, 3): 3}
        assert it.engine.version == 4


async def test_a_push_that_overtakes_an_older_answer_is_not_undone_by_it() -> None:
    async with running() as it:
        it.register()
        it.mdm.change()
        it.mdm.gate = trio.Event()
        it.fetch()
        await it.settle()  # the answer of version 1 is on its way
        it.segments.pushed(it.mdm.change())
        assert it.engine.version == 2
        it.mdm.gate.set()
        await it.settle()
        assert it.engine.segments == {(VOLUME, 0): 2}


async def test_what_was_missed_holds_the_version_back_until_all_is_fetched(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with running() as it:
        it.register()
        for segment in range(20):
            it.mdm.change(segment)
            it.fetch(segment)
        await comes_to(lambda: len(it.engine.segments), 20)
        it.segments.pushed(Push(it.mdm.version, it.mdm.version, []))
        for segment in range(20):  # nobody is told
            it.mdm.change(segment)
        it.mdm.gate = trio.Event()
        it.mdm.at_once_max = 0
        it.register()
        it.segments.pushed(it.mdm.change(7))
        await comes_to(lambda: it.engine.version, 20)
        it.mdm.gate.set()
        await comes_to(lambda: it.engine.version, 41)
        assert it.mdm.at_once_max <= 8
        assert it.segments._stale == set()


async def test_a_push_of_the_new_session_before_its_registration_does_not_raise() -> None:
    async with running() as it:
        await it.begin()
        it.mdm.change()  # missed
        it.segments.lost()
        it.segments.pushed(it.mdm.change(1))
        assert it.engine.version == 0
        assert it.segments.registered(it.mdm.version)
        assert it.engine.version == 0
        await it.segments.catch_up()
        assert it.engine.version == 3


async def test_an_answer_from_before_the_registration_does_not_count(autojump_clock: trio.testing.MockClock) -> None:
    async with running() as it:
        it.register()
        it.mdm.change()
        it.mdm.gate = trio.Event()
        it.fetch()
        await it.settle()
        gate, it.mdm.gate = it.mdm.gate, trio.Event()
        it.mdm.change()  # missed
        it.register()
        await it.settle()
        gate.set()  # the answer of version 1 arrives after all
        await it.settle()
        assert it.engine.segments == {(VOLUME, 0): 1}
        assert it.engine.version == 0
        it.mdm.gate.set()
        await comes_to(lambda: (it.engine.segments, it.engine.version), ({(VOLUME, 0): 2}, 2))


async def test_a_registration_during_the_catching_up_begins_anew(autojump_clock: trio.testing.MockClock) -> None:
    async with running() as it:
        it.register()
        for segment in range(20):
            it.mdm.change(segment)
            it.fetch(segment)
        await comes_to(lambda: len(it.engine.segments), 20)
        it.mdm.gate = trio.Event()
        it.register()
        await it.settle()
        it.mdm.away = True
        it.mdm.gate.set()
        await it.settle()
        it.mdm.away = False
        it.mdm.change(5)
        it.register()
        await comes_to(lambda: it.engine.version, 21)
        assert it.engine.segments[VOLUME, 5] == 2


async def test_a_version_that_did_not_move_asks_for_nothing() -> None:
    async with running() as it:
        await it.begin()
        it.segments.pushed(Push(it.mdm.version, it.mdm.version, []))
        asked = it.mdm.asked
        it.register()
        await it.settle()
        assert it.mdm.asked == asked
        it.segments.pushed(it.mdm.change())
        assert it.engine.version == 2


@pytest.mark.parametrize("error", [ConflictError("too many"), ProtocolError("nonsense")])
async def test_an_answer_that_cannot_be_used_replaces_nothing_and_is_asked_for_again(
    error: Exception, autojump_clock: trio.testing.MockClock
) -> None:
    async with running() as it:
        it.register()
        it.mdm.change()
        it.fetch()
        await comes_to(lambda: it.engine.segments, {(VOLUME, 0): 1})
        it.mdm.change()
        it.mdm.failing = [error, error]
        it.register()
        await it.settle()
        assert (it.engine.segments, it.engine.version) == ({(VOLUME, 0): 1}, 0)
        await comes_to(lambda: (it.engine.segments, it.engine.version), ({(VOLUME, 0): 2}, 2))


async def test_a_volume_that_is_gone_holds_nothing_back(autojump_clock: trio.testing.MockClock) -> None:
    async with running() as it:
        it.register()
        for volume_id in (VOLUME, VOLUME + 1):
            it.mdm.change(0, volume_id)
            it.fetch(0, volume_id)
        await comes_to(lambda: len(it.engine.segments), 2)
        it.mdm.change()
        del it.mdm.maps[VOLUME, 0]
        it.register()
        await comes_to(lambda: (it.engine.segments, it.engine.version), ({(VOLUME + 1, 0): 1}, 3))


async def test_what_was_forgotten_while_it_was_asked_for_does_not_come_back() -> None:
    async with running() as it:
        it.register()
        it.mdm.change()
        it.mdm.gate = trio.Event()
        it.fetch()
        await it.settle()
        it.segments.forget(VOLUME)
        it.mdm.gate.set()
        await it.settle()
        assert it.engine.segments == {}


@pytest.mark.parametrize(
    "body",
    [
        {},
        None,
        {"version": 2, "segments": []},
        {"version": 2, "made": 2, "segments": [[VOLUME, 0]]},
        {"version": 2, "made": 2, "segments": [[VOLUME, 0, b"short"]]},
        {"version": "x", "made": 2, "segments": []},
    ],
)
async def test_a_push_that_cannot_be_read_stops_the_version_until_the_next_registration(body: Any) -> None:
    async with running() as it:
        await it.begin()
        it.mdm.change()
        with pytest.raises(ProtocolError):
            it.segments.parse_push(body)
        it.segments.pushed(it.mdm.change(1))
        assert it.engine.version == 0
        it.register()
        await it.settle()
        assert it.engine.version == 3


async def test_waiting_for_a_version_ends_when_it_is_in_force() -> None:
    async with running() as it:
        it.register()
        reached: list[int] = []

        async def wait(version: int) -> None:
            await it.segments.reached(version)
            reached.append(version)

        for version in (0, 1, 2):
            it.nursery.start_soon(wait, version)
        await it.settle()
        assert reached == [0]
        it.segments.pushed(it.mdm.change())
        await it.settle()
        assert reached == [0, 1]


@pytest.mark.parametrize("seed", range(40))
async def test_any_order_of_answers_pushes_and_sessions(seed: int, autojump_clock: trio.testing.MockClock) -> None:
    """The fake engine asserts the promise at every command."""
    rng = random.Random(seed)
    async with running() as it:
        it.register()
        unsent: list[Push] = []
        connected = True
        for _ in range(120):
            match rng.randrange(8):
                case 0 | 1:
                    change = it.mdm.change(rng.randrange(4), VOLUME, *rng.choice([(), (2, 3), (3, US)]))
                    if connected:
                        unsent.append(change)
                case 2 | 3 if unsent:
                    it.segments.pushed(unsent.pop(0))
                case 4:
                    it.nursery.start_soon(it.segments.answer_miss, VOLUME, rng.randrange(4))
                case 5:
                    it.mdm.gate.set()
                    await pass_time(rng.random())
                    it.mdm.gate = trio.Event()
                case 6:
                    connected = it.mdm.away
                    it.mdm.away = not connected
                    unsent.clear()
                    if connected:
                        it.register()
                case _:
                    await pass_time(rng.random() / 3)
        it.mdm.away = False
        it.mdm.gate.set()
        it.register()
        await comes_to(lambda: it.engine.version, it.mdm.version)
