"""Goal: the SDS's decisions reach its engine (played by a recorder), in order, whatever the MDM does meanwhile."""

from __future__ import annotations

import os
import struct
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing
from structlog.testing import capture_logs

from datapath import wire
from pfvol.capability import Capability, sign
from pfvol.constants import CHECKPOINT_SECONDS, CHUNK_SIZE_BYTES, SEGMENT_CHUNKS, SEGMENT_ENTRY_FORMAT
from pfvol.errors import InvalidError, NotFoundError, TimedOutError, UnreachableError
from pfvol.sds import acceptor, segments, server, volumes
from pfvol.sds.peers import Identity
from pfvol.sds.segments import SEGMENT_MAP_BYTES
from pfvol.sds.server import CATCH_UP_SECONDS, Server
from tests.support.waiting import comes_to, pass_time, poll_until_async

KEY = bytes(range(32))
IDENTITY = Identity(bytes(32), bytes(16), 1, 4, 4)
VOLUME, SDC, CONN, POOL = 9, 7, 100, 3
SEGMENT = SEGMENT_CHUNKS * CHUNK_SIZE_BYTES


class Engine:
    """Records commands; says what the test has it say. Answers ``verify`` unless told to be mute."""

    def __init__(self) -> None:
        self.event_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.commands: list[tuple[Any, ...]] = []
        self.mute = False
        self.unsure = False
        self._events: list[tuple[Any, ...]] = []

    def say(self, *event: Any) -> None:
        self._events.append(event)
        os.eventfd_write(self.event_fd, 1)

    def events(self) -> list[tuple[Any, ...]]:
        os.eventfd_read(self.event_fd)
        events, self._events = self._events, []
        return events

    def verify(self, token: int, volume_id: int, chunk_index: int) -> None:
        self.commands.append(("verify", volume_id, chunk_index))
        if not self.mute:
            self.say("verified", token, volume_id != 0, b"t" * 16384, b"b" * 128)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *arguments, **named: self.commands.append((name, *arguments, *named.values()))

    def named(self, *names: str) -> list[tuple[Any, ...]]:
        return [command for command in self.commands if command[0] in names]


class Mdm:
    """Answers from ``volumes`` and ``maps``; nobody is there while ``away``; a method in ``held`` waits."""

    def __init__(self) -> None:
        self.volumes: dict[int, dict[str, Any]] = {}
        self.maps: dict[tuple[int, int], Any] = {}
        self.away = False
        self.asked: Counter[str] = Counter()
        self.held: dict[str, trio.Event] = {}
        self.replies: dict[str, Any] = {}

    def add(self, size_bytes: int = SEGMENT, mappings: tuple[tuple[int, int, bool], ...] = ((SDC, 11, False),)) -> None:
        self.volumes[VOLUME] = info(size_bytes, mappings)

    @property
    def connected(self) -> bool:
        return not self.away

    async def call(self, method: str, params: dict[str, Any], timeout: float = 10) -> Any:  # noqa: ASYNC109
        self.asked[method] += 1
        await trio.lowlevel.checkpoint()
        if self.away:
            raise UnreachableError("away")
        if method in self.replies:
            return self.replies[method]
        if params["volume_id"] not in self.volumes:
            raise NotFoundError("no such volume")
        answer: Any = self.volumes[params["volume_id"]]
        if method == "map.segment":
            answer = self.maps.get((params["volume_id"], params["segment"]), entries((1, 2)))
        if method in self.held:
            await self.held[method].wait()
        return {"version": 3, "entries": answer} if method == "map.segment" else answer


def info(size_bytes: int, mappings: tuple[tuple[int, int, bool], ...]) -> dict[str, Any]:
    body = {"size_bytes": size_bytes, "thick": False, "commit": False, "pool_id": POOL, "segments": 1}
    return body | {"mappings": [list(mapping) for mapping in mappings]}


def entries(*pairs: tuple[int, int]) -> bytes:
    packed = b"".join(struct.pack(SEGMENT_ENTRY_FORMAT, 1, *pair, 0, 0) for pair in pairs)
    return packed.ljust(SEGMENT_MAP_BYTES, b"\0")


def token(mapping_id: int = 11, read_only: bool = False, seconds: float = 3600) -> bytes:
    return sign(KEY, Capability(SDC, VOLUME, mapping_id, read_only, int(time.time() + seconds)))


class Running:
    def __init__(self, engine: Engine, mdm: Mdm, served: Server) -> None:
        self.engine, self.mdm, self.server = engine, mdm, served
        self._requests = 0

    async def settle(self) -> None:
        await trio.testing.wait_all_tasks_blocked(0.005)

    async def show(self, shown: bytes) -> None:
        self._requests += 1
        self.engine.say("capability", CONN, self._requests, VOLUME, shown)
        await self.settle()


REPLY: dict[str, Any] = {"capability_key": KEY, "reserved_slots": 5, "peers": [], "purge": [], "volumes": []}
REPLY |= {"map_version": 0, "resync": {}, "learning": []}


@asynccontextmanager
async def serving() -> AsyncIterator[Running]:
    sock = await acceptor.bind("127.0.0.1", 0)
    engine, mdm = Engine(), Mdm()
    served = Server(engine, sock, IDENTITY, mdm)  # type: ignore[arg-type]
    served.registered(REPLY)
    served._clients.opened(CONN, SDC)
    async with trio.open_nursery() as nursery:
        await nursery.start(served.run)
        yield Running(engine, mdm, served)
        nursery.cancel_scope.cancel()
    os.close(engine.event_fd)


async def test_a_good_capability_is_granted_after_the_engine_knows_the_volume() -> None:
    async with serving() as sds:
        sds.mdm.add()
        await sds.show(token(seconds=100))
        volume, grant = sds.engine.named("set_volume", "grant")
        assert volume == ("set_volume", VOLUME, SEGMENT, False, False, POOL)
        assert grant[:5] == ("grant", CONN, 1, VOLUME, True)
        left_seconds = (grant[5] - time.clock_gettime_ns(time.CLOCK_BOOTTIME)) / 1e9
        assert 95 < left_seconds <= 100


async def test_known_volumes_are_granted_without_the_mdm() -> None:
    async with serving() as sds:
        sds.mdm.add()
        await sds.show(token())
        sds.mdm.away = True
        await sds.show(token(read_only=True))
        assert [grant[2:5] for grant in sds.engine.named("grant")] == [(1, VOLUME, True), (2, VOLUME, False)]


async def test_a_capability_that_only_the_mdm_can_judge_waits_for_it_a_while(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with serving() as sds:
        sds.mdm.add()
        sds.mdm.away = True
        sds.engine.say("capability", CONN, 1, VOLUME, token())
        await pass_time(server.CAPABILITY_WAIT_SECONDS / 2)
        assert sds.engine.named("grant", "refuse") == []
        await pass_time(server.CAPABILITY_WAIT_SECONDS)
        assert sds.engine.named("grant", "refuse") == [("refuse", CONN, 1, VOLUME, wire.ST_NOT_READY)]
        sds.engine.say("capability", CONN, 2, VOLUME, token())
        await pass_time(server.CAPABILITY_WAIT_SECONDS / 2)
        sds.mdm.away = False
        await comes_to(lambda: [grant[2] for grant in sds.engine.named("grant")], [2])


async def test_a_mapping_made_while_a_question_was_under_way_makes_another_and_is_granted() -> None:
    async with serving() as sds:
        sds.mdm.add()
        sds.mdm.held["map.volume"] = trio.Event()
        await sds.show(token())
        sds.mdm.add(mappings=((SDC, 11, False), (SDC, 12, False)))  # the answer under way does not know 12
        for _ in range(10):
            await sds.show(token(12))
        sds.mdm.held["map.volume"].set()
        await sds.settle()
        assert len(sds.engine.named("grant")) == 11
        assert sds.engine.named("refuse") == []
        assert sds.mdm.asked["map.volume"] == 2


async def test_an_answer_of_the_mdm_that_cannot_be_used_refuses_nobody() -> None:
    async with serving() as sds:
        sds.mdm.volumes[VOLUME] = {"nonsense": True}
        await sds.show(token())
        assert sds.engine.named("refuse") == [("refuse", CONN, 1, VOLUME, wire.ST_NOT_READY)]


async def test_a_volume_that_is_gone_is_dropped_and_refused() -> None:
    async with serving() as sds:
        await sds.show(token())
        assert sds.engine.named("drop_volume") == [("drop_volume", VOLUME)]
        assert sds.engine.named("refuse") == [("refuse", CONN, 1, VOLUME, wire.ST_NO_VOLUME)]


async def test_what_is_refused_over_and_over_does_not_fill_the_log() -> None:
    async with serving() as sds:
        with capture_logs() as lines:
            for _ in range(5):
                await sds.show(token(seconds=-1))
                sds.engine.say("no_space", VOLUME, 0)
            await sds.settle()
    assert len(sds.engine.named("refuse")) == 5
    assert [line["event"] for line in lines if line["log_level"] == "warning"] == ["capability refused"]
    assert [line["event"] for line in lines if line["log_level"] == "error"] == ["no space left for a chunk"]


async def test_a_revocation_that_meets_the_mdms_answer_wins() -> None:
    async with serving() as sds:
        sds.mdm.add()
        sds.mdm.held["map.volume"] = trio.Event()
        await sds.show(token())
        sds.mdm.add(mappings=())
        await sds.server.revoked(VOLUME, SDC)
        sds.mdm.held["map.volume"].set()
        await sds.settle()
        assert sds.engine.named("grant") == []
        assert sds.engine.named("refuse") == [("refuse", CONN, 1, VOLUME, wire.ST_NOT_AUTHORIZED)]


async def test_revoked_returns_only_when_the_engine_has_taken_note(autojump_clock: trio.testing.MockClock) -> None:
    async with serving() as sds:
        sds.engine.mute = True
        with pytest.raises(TimedOutError):
            await sds.server.revoked(VOLUME, SDC)
        assert [command[0] for command in sds.engine.named("revoke", "verify")] == ["revoke", "verify"]
        sds.engine.mute = False
        await sds.server.revoked(VOLUME, SDC)


async def test_a_mapping_lost_while_the_mdm_was_away_is_revoked_when_it_is_back() -> None:
    async with serving() as sds:
        sds.mdm.add(mappings=((SDC, 11, False), (8, 12, False)))
        await sds.show(token())
        sds.mdm.add(mappings=((SDC, 13, True), (8, 12, False)))
        sds.server.registered(REPLY)
        await sds.settle()
        assert sds.engine.named("revoke") == [("revoke", VOLUME, SDC)]
        await sds.show(token())
        assert sds.engine.named("refuse")[-1][-1] == wire.ST_NOT_AUTHORIZED
        await sds.show(token(13))
        assert sds.engine.named("grant")[-1][4] is False


async def test_new_mappings_are_asked_for_as_they_come() -> None:
    async with serving() as sds:
        for mapping in range(11, 21):
            sds.mdm.add(mappings=((SDC, mapping, False),))
            await sds.show(token(mapping))
        assert len(sds.engine.named("grant")) == 10


async def test_old_capabilities_make_one_question_each_and_not_more_than_one_a_second(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with serving() as sds:
        sds.mdm.add()
        await sds.show(token())
        for _ in range(20):
            await sds.show(token(12))
        assert {refusal[-1] for refusal in sds.engine.named("refuse")} == {wire.ST_NOT_AUTHORIZED}
        assert sds.mdm.asked["map.volume"] == 2
        for _ in range(20):
            await sds.show(token(13))
        assert sds.engine.named("refuse")[-1][-1] == wire.ST_NOT_READY
        assert sds.mdm.asked["map.volume"] == 2
        sds.mdm.add(mappings=((SDC, 13, False),))
        await pass_time(volumes.MAPPING_REFRESH_SECONDS)
        await sds.show(token(13))
        assert sds.engine.named("grant")[-1][2] == 42


async def test_a_volume_that_is_gone_is_asked_for_once() -> None:
    async with serving() as sds:
        for _ in range(20):
            await sds.show(token())
        assert {refusal[-1] for refusal in sds.engine.named("refuse")} == {wire.ST_NO_VOLUME}
        assert sds.mdm.asked["map.volume"] == 1


async def test_a_miss_of_the_engine_is_answered_when_the_mdm_is_back(autojump_clock: trio.testing.MockClock) -> None:
    async with serving() as sds:
        sds.mdm.add()
        sds.mdm.away = True
        sds.engine.say("map_miss", VOLUME, 3)
        await pass_time(5)
        assert sds.engine.named("set_segment", "set_volume") == []
        sds.mdm.away = False
        await poll_until_async(lambda: ("set_segment", VOLUME, 3, entries((1, 2)), 3) in sds.engine.commands)


async def test_a_map_that_is_doubted_again_and_again_is_asked_for_now_and_then(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with serving() as sds:
        sds.mdm.add()
        sds.engine.say("map_miss", VOLUME, 0)
        await pass_time(0.4 * segments.MAP_REFRESH_SECONDS)
        assert len(sds.engine.named("set_segment")) == 1
        sds.engine.say("map_miss", VOLUME, 0)
        await pass_time(0.4 * segments.MAP_REFRESH_SECONDS)
        assert len(sds.engine.named("set_segment")) == 1
        await pass_time(0.4 * segments.MAP_REFRESH_SECONDS)
        assert len(sds.engine.named("set_segment")) == 2


@pytest.mark.parametrize("nonsense", [None, b"", bytes(SEGMENT_MAP_BYTES - 1), "text", 5])
async def test_a_map_that_is_none_still_answers_the_engine(nonsense: Any) -> None:
    async with serving() as sds:
        sds.mdm.add()
        sds.mdm.maps[VOLUME, 0] = nonsense
        sds.engine.say("map_miss", VOLUME, 0)
        await sds.settle()
        assert sds.engine.named("set_segment") == [("set_segment", VOLUME, 0, bytes(SEGMENT_MAP_BYTES), 0)]


async def test_only_segments_that_involve_us_are_fetched_ahead() -> None:
    async with serving() as sds:
        sds.mdm.add(size_bytes=4 * SEGMENT)
        sds.mdm.maps = {(VOLUME, 1): entries((2, 3)), (VOLUME, 2): entries((2, 3), (3, 1)), (VOLUME, 3): entries()}
        await sds.show(token())
        assert [command[2] for command in sds.engine.named("set_segment")] == [0, 2]


async def test_a_huge_volume_is_not_fetched_whole() -> None:
    async with serving() as sds:
        sds.mdm.add(size_bytes=1000 * SEGMENT)
        await sds.show(token())
        assert sds.mdm.asked["map.segment"] == segments.PREFETCH_SEGMENTS_MAX


async def test_an_extend_brings_the_new_chunks_before_the_new_size() -> None:
    async with serving() as sds:
        sds.mdm.add(size_bytes=CHUNK_SIZE_BYTES)
        await sds.show(token())
        sds.engine.commands.clear()
        sds.mdm.add(size_bytes=2 * CHUNK_SIZE_BYTES)
        sds.mdm.maps[VOLUME, 0] = entries((1, 2), (2, 1))
        await sds.server.changed(VOLUME, sds.mdm.volumes[VOLUME])
        assert sds.engine.commands == [
            ("set_segment", VOLUME, 0, entries((1, 2), (2, 1)), 3),
            ("set_volume", VOLUME, 2 * CHUNK_SIZE_BYTES, False, False, POOL),
        ]


async def test_a_change_of_a_volume_that_is_mapped_to_nobody_is_not_kept() -> None:
    async with serving() as sds:
        sds.mdm.add(mappings=())
        await sds.server.changed(VOLUME, sds.mdm.volumes[VOLUME])
        assert sds.engine.named("set_volume") == []


async def test_a_volume_is_known_when_its_mapping_is_confirmed_and_needs_no_mdm() -> None:
    async with serving() as sds:
        sds.mdm.add(size_bytes=2 * SEGMENT)
        await sds.server.changed(VOLUME, sds.mdm.volumes[VOLUME])
        assert [command[0] for command in sds.engine.commands[-3:]] == ["set_volume", "set_segment", "set_segment"]
        sds.mdm.away = True
        await sds.show(token())
        assert sds.engine.named("grant")
        assert sds.mdm.asked["map.volume"] == 0


async def test_mapped_volumes_are_learnt_at_registration_before_anybody_asks() -> None:
    async with serving() as sds:
        sds.mdm.add()
        sds.server.registered({**REPLY, "volumes": [VOLUME]})
        await sds.settle()
        sds.mdm.away = True
        assert [len(sds.engine.named(command)) for command in ("set_volume", "set_segment")] == [1, 1]
        await sds.show(token())
        assert sds.engine.named("grant")


async def test_a_deleted_volume_is_purged_told_once_and_its_capability_refused() -> None:
    async with serving() as sds:
        sds.mdm.add()
        await sds.show(token())
        del sds.mdm.volumes[VOLUME]
        await sds.server.deleted(VOLUME)
        assert [command[0] for command in sds.engine.named("purge_volume", "verify")] == ["purge_volume", "verify"]
        sds.engine.say("purged", VOLUME)
        await sds.settle()
        assert sds.server.take_purged() == [VOLUME]
        assert sds.server.take_purged() == []
        await sds.show(token())
        assert sds.engine.named("refuse")[-1][-1] == wire.ST_NO_VOLUME


async def test_purges_and_reservations_told_at_registration_are_carried_out() -> None:
    async with serving() as sds:
        sds.server.registered({**REPLY, "purge": [33, 34], "reserved_slots": 6})
        assert sds.engine.named("purge_volume") == [("purge_volume", 33), ("purge_volume", 34)]
        assert sds.engine.named("set_reserved") == [("set_reserved", 5), ("set_reserved", 6)]


async def test_verify_answers_chunk_by_chunk_within_its_limit() -> None:
    async with serving() as sds:
        answer = await sds.server.verify(VOLUME, 4, 2)
        assert answer == [[True, b"t" * 16384, b"b" * 128]] * 2
        assert sds.engine.named("verify") == [("verify", VOLUME, 4), ("verify", VOLUME, 5)]
        for count in (0, -1, server.VERIFY_CHUNKS_MAX + 1):
            with pytest.raises(InvalidError):
                await sds.server.verify(VOLUME, 0, count)


async def test_a_failed_device_is_kept_for_the_report() -> None:
    async with serving() as sds:
        sds.engine.say("device_failed", 2, 5, "dev2: input/output error")
        await sds.settle()
        assert sds.server.failed_devices == {2: "dev2: input/output error"}


async def test_the_engine_checkpoints_in_time(autojump_clock: trio.testing.MockClock) -> None:
    async with serving() as sds:
        await pass_time(3.5 * CHECKPOINT_SECONDS)
        assert len(sds.engine.named("checkpoint")) == 3


async def test_what_the_engine_only_mentions_is_taken() -> None:
    async with serving() as sds:
        for event in (
            ("client_closed", CONN, SDC, "reset"),
            ("peer_closed", 55, 2, True, "reset"),
            ("peer_synced", 2, 10, 0, 0),
            ("checkpoint", 3, 10, 0.1),
            ("no_space", VOLUME, 0),
            ("repair_needed", VOLUME, 0, 3, "does not match its tag"),
            ("repaired", VOLUME, 0, 3, 1, 1),
            ("scrubbed", 4, 4096, 0),
            ("verified", 12345, False, b"", b""),
        ):
            sds.engine.say(*event)
        await sds.settle()
        sds.engine.say("capability", CONN, 1, VOLUME, token())
        await sds.settle()
        assert sds.engine.named("grant", "refuse") == []  # its connection has closed


def pushed(version: int, *segments: list[Any]) -> dict[str, Any]:
    return {"version": version, "made": version, "segments": list(segments)}


async def test_a_change_of_the_map_is_confirmed_when_the_engine_has_it(autojump_clock: trio.testing.MockClock) -> None:
    async with serving() as sds:
        sds.server.registered({**REPLY, "map_version": 4})
        sds.mdm.add()
        await sds.show(token())
        sds.engine.commands.clear()
        await sds.server.map_changed(pushed(5, [VOLUME, 0, entries((2, 1))], [VOLUME + 1, 0, entries((2, 3))]))
        assert sds.engine.commands == [
            ("set_segment", VOLUME, 0, entries((2, 1)), 5),
            ("set_map_version", 5),
            ("verify", 0, 0),
        ]
        sds.engine.mute = True
        with pytest.raises(TimedOutError):
            await sds.server.map_changed(pushed(6))


async def test_a_volume_that_nobody_uses_is_copied_all_the_same(autojump_clock: trio.testing.MockClock) -> None:
    """Goal: the engine copies only what it knows; of a volume that was never mapped it hears when its copies change."""
    async with serving() as sds:
        sds.server.registered({**REPLY, "map_version": 4})
        sds.mdm.add(size_bytes=100 * SEGMENT, mappings=())
        sds.mdm.away = True
        await sds.server.map_changed(pushed(5, [VOLUME, 99, entries((2, 1))]))
        await sds.server.map_changed(pushed(6, [VOLUME, 98, entries((2, 1))]))
        await pass_time(5)
        assert sds.engine.named("set_volume") == []
        sds.mdm.away = False
        await comes_to(lambda: sorted(command[2] for command in sds.engine.named("set_segment")), list(range(100)))
        assert sds.engine.named("set_volume") == [("set_volume", VOLUME, 100 * SEGMENT, False, False, POOL)]


async def test_a_volume_that_nobody_uses_is_known_from_the_start_when_it_is_copied(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with serving() as sds:
        sds.mdm.add(size_bytes=100 * SEGMENT, mappings=())
        sds.server.registered({**REPLY, "learning": [VOLUME]})
        await comes_to(lambda: sorted(command[2] for command in sds.engine.named("set_segment")), list(range(100)))
        assert len(sds.engine.named("set_volume")) == 1


async def test_a_change_of_the_map_is_not_confirmed_while_others_are_missing(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with serving() as sds:
        sds.server.registered({**REPLY, "map_version": 4})
        sds.mdm.add()
        await sds.show(token())
        sds.mdm.held["map.segment"] = trio.Event()
        sds.server.registering()
        sds.server.registered({**REPLY, "map_version": 5})
        confirmed = False

        async def change() -> None:
            nonlocal confirmed
            await sds.server.map_changed(pushed(6, [VOLUME, 1, entries((2, 1))]))
            confirmed = True

        async with trio.open_nursery() as nursery:
            nursery.start_soon(change)
            await pass_time(5)
            assert (confirmed, sds.engine.named("set_map_version")) == (False, [("set_map_version", 4)])
            sds.mdm.held["map.segment"].set()
        assert sds.engine.named("set_map_version")[1:] == [("set_map_version", 6)]


async def test_a_silent_peer_is_left_out(autojump_clock: trio.testing.MockClock) -> None:
    async with serving() as sds:
        sds.mdm.replies["sds.leave_out"] = {"left": 3, "dead": False, "version": 8}
        sds.engine.say("peer_silent", 3)  # removed: the MDM does not list it
        sds.server.set_peers([{"sds_id": 2, "data_address": ["127.0.0.1", 1], "incarnation": 1, "up": True}])
        sds.engine.say("peer_silent", 2)
        await sds.settle()
        assert sds.engine.named("leave", "stay") == []  # the MDM may be new, and not have told it of the newest map yet
        await pass_time(CATCH_UP_SECONDS)
        sds.engine.say("peer_silent", 2)
        await sds.settle()
        assert sds.engine.named("leave", "stay") == [("leave", 2)]
        sds.engine.say("leaving", 2, True, False, [(VOLUME, 4)])
        await sds.settle()
        assert sds.mdm.asked["sds.leave_out"] == 1
        sds.server.registered({**REPLY, "map_version": 8})
        await sds.settle()
        assert sds.engine.named("leave", "stay") == [("leave", 2), ("stay", 2)]


async def test_learners_are_told_of() -> None:
    async with serving() as sds:
        sds.mdm.replies |= {"sds.learned": {}, "sds.leave_out": {}}
        sds.engine.say("learned", 2, [(VOLUME, 4, 7)], 4096)
        sds.engine.say("learner_lost", 2, [(VOLUME, 5)])
        await sds.settle()
        assert (sds.mdm.asked["sds.learned"], sds.mdm.asked["sds.leave_out"]) == (1, 1)


async def test_the_rates_of_copying_reach_the_engine() -> None:
    async with serving() as sds:
        sds.server.registered({**REPLY, "resync": {3: 10, 4: 0}})
        sds.server.set_rates({3: 20})
        rates = [("set_resync_rate", 3, 10), ("set_resync_rate", 4, 0), ("set_resync_rate", 3, 20)]
        assert sds.engine.named("set_resync_rate") == rates
