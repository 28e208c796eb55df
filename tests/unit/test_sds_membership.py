"""Goal: a peer in trouble is left out by the MDM's word only, and nothing goes on with it while that word is due."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing
from structlog.testing import capture_logs

from pfvol.errors import ConflictError, InternalError, InvalidError, TimedOutError, UnreachableError
from pfvol.sds.membership import (
    ASK_AGAIN_SECONDS,
    ASK_TIMEOUT_SECONDS,
    CHUNKS_PER_CALL_MAX,
    LEARNED_PAUSE_SECONDS,
    Membership,
)
from tests.support.waiting import comes_to, pass_time, poll_until_async

PEER, INCARNATION = 2, 7
CHUNK, OTHER = (9, 0), (9, 1)
ASKED = {"peer": PEER, "as_primary": True, "as_secondary": False, "except": [], "chunks": None}


class Engine:
    """Says ``leaving`` a moment after ``leave``; between that and ``stay`` it works with the peer on nothing."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.roles: tuple[bool, bool, list[tuple[int, int]]] = (True, False, [])
        self.left: set[int] = set()
        self.slow = False

    def leave(self, sds_id: int) -> None:
        assert sds_id not in self.left
        assert sds_id in self.world.held
        self.left.add(sds_id)
        self.world.did("leave", sds_id)
        if not self.slow:
            self.say(sds_id)

    def say(self, sds_id: int) -> None:
        self.world.nursery.start_soon(self._say, sds_id)

    async def _say(self, sds_id: int) -> None:
        await pass_time(0.01)
        self.world.membership.leaving(sds_id, *self.roles)

    def stay(self, sds_id: int) -> None:
        assert self.world.outstanding[sds_id] == 0, "what was asked may still be carried out"
        self.left.remove(sds_id)
        self.world.did("stay", sds_id)

    def peer_dead(self, sds_id: int, incarnation: int) -> None:
        self.world.did("peer_dead", sds_id, incarnation)


class World:
    """The engine, the connections, the MDM and the map, all at once."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery
        self.done: list[tuple[Any, ...]] = []
        self.held: set[int] = set()
        self.port_refuses = False
        self.known: int | None = INCARNATION
        self.connected = True
        self.answers: list[Any] = []
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.asked_at: list[float] = []
        self.outstanding = dict.fromkeys(range(10), 0)
        self.gate = trio.Event()
        self.gate.set()
        self.version = 0
        self.raised = trio.Event()
        self.engine = Engine(self)
        self.membership = Membership(self.engine, self, self, self)

    def did(self, *what: Any) -> None:
        self.done.append(what)

    def names(self) -> list[str]:
        return [name for name, *_ in self.done]

    # Links

    def hold(self, sds_id: int) -> None:
        self.held.add(sds_id)

    def release(self, sds_id: int) -> None:
        assert sds_id not in self.engine.left
        self.held.remove(sds_id)

    def incarnation(self, sds_id: int) -> int | None:
        return self.known

    async def refuses(self, sds_id: int) -> bool:
        await pass_time(0.01)
        return self.port_refuses

    # Maps

    async def reached(self, version: int) -> None:
        while self.version < version:
            await self.raised.wait()

    def raise_to(self, version: int) -> None:
        self.version = version
        self.raised.set()
        self.raised = trio.Event()

    # Mdm

    async def call(
        self,
        method: str,
        params: dict[str, Any] | None = None,
        *,
        timeout: float = 10,  # noqa: ASYNC109
    ) -> Any:
        assert params is not None
        assert self.connected
        assert timeout == ASK_TIMEOUT_SECONDS
        self.asked.append((method, params))
        self.asked_at.append(trio.current_time())
        of_trouble = method == "sds.leave_out" and params["chunks"] is None
        if of_trouble:
            assert params["peer"] in self.engine.left, "asked before the engine had finished with the peer"
            self.outstanding[params["peer"]] += 1
        await self.gate.wait()
        await pass_time(0.01)
        answer = self.answers.pop(0) if self.answers else ConflictError("refused")
        if isinstance(answer, UnreachableError | TimedOutError):
            raise answer  # it may be carried out later
        if of_trouble:
            self.outstanding[params["peer"]] = 0
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def troubled(self, seconds: float, every: float = 0.1) -> None:
        """As the connections and the engine say it: again and again."""
        until = trio.current_time() + seconds
        while trio.current_time() < until:
            self.membership.trouble(PEER)
            await pass_time(every)


@asynccontextmanager
async def world() -> AsyncIterator[World]:
    async with trio.open_nursery() as nursery:
        it = World(nursery)
        await nursery.start(it.membership.run)
        yield it
        nursery.cancel_scope.cancel()


def answer(left: int = 5, dead: bool = False, version: int = 3) -> dict[str, Any]:
    return {"left": left, "dead": dead, "version": version}


async def test_a_peer_is_left_out_and_taken_back_when_the_map_says_so(autojump_clock: trio.testing.MockClock) -> None:
    async with world() as it:
        it.answers = [answer()]
        it.membership.trouble(PEER)
        await comes_to(lambda: (it.names(), it.asked), (["leave"], [("sds.leave_out", ASKED)]))
        it.raise_to(3)
        await comes_to(it.names, ["leave", "stay"])
        assert it.held == set()


async def test_what_is_asked_is_what_the_engine_says(autojump_clock: trio.testing.MockClock) -> None:
    async with world() as it:
        it.engine.roles = (False, True, [CHUNK, OTHER])
        it.membership.trouble(PEER)
        wanted = {"as_primary": False, "as_secondary": True, "except": [[9, 0], [9, 1]]}
        await comes_to(lambda: it.asked, [("sds.leave_out", ASKED | wanted)])


async def test_with_nothing_to_ask_nothing_is_asked(autojump_clock: trio.testing.MockClock) -> None:
    async with world() as it:
        it.engine.roles = (False, False, [])
        with capture_logs() as lines:
            await it.troubled(10)
        assert it.asked == []
        assert it.names()[:2] == ["leave", "stay"]
        assert 15 <= len(it.done) / 2 <= 10 / ASK_AGAIN_SECONDS
        assert lines == []


async def test_the_engine_is_waited_for(autojump_clock: trio.testing.MockClock) -> None:
    async with world() as it:
        it.engine.slow = True
        await it.troubled(10)
        assert (it.names(), it.asked) == (["leave"], [])
        it.engine.say(PEER)
        await comes_to(it.names, ["leave", "stay"])


async def test_a_refusal_is_asked_again_while_the_trouble_lasts_and_not_afterwards(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with world() as it:
        with capture_logs() as lines:
            await it.troubled(10)
        asked = len(it.asked)
        assert 15 <= asked <= 10 / ASK_AGAIN_SECONDS
        assert it.names() == ["leave", "stay"] * asked
        assert len(lines) == 2, "the trouble and the refusal, told once"
        await pass_time(10)
        assert len(it.asked) == asked


async def test_a_new_trouble_after_the_peer_was_back_is_told_anew(autojump_clock: trio.testing.MockClock) -> None:
    async with world() as it:
        with capture_logs() as lines:
            await it.troubled(2)
            it.membership.connected(PEER)
            await it.troubled(2)
        assert len(lines) == 4


async def test_nothing_is_left_out_is_no_reason_to_wait_for_a_map(autojump_clock: trio.testing.MockClock) -> None:
    async with world() as it:
        it.answers = [answer(left=0, version=0)]
        it.membership.trouble(PEER)
        await comes_to(it.names, ["leave", "stay"])


async def test_without_the_mdm_the_peer_is_left_alone(autojump_clock: trio.testing.MockClock) -> None:
    async with world() as it:
        it.connected = False
        await it.troubled(10)
        assert it.done == []
        it.connected = True
        await it.troubled(0.2)
        assert it.names() == ["leave", "stay"]


async def test_when_the_mdm_goes_before_it_is_asked_the_engine_goes_on_with_the_peer(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with world() as it:
        it.engine.slow = True
        it.membership.trouble(PEER)
        it.connected = False
        it.engine.say(PEER)
        await comes_to(lambda: (it.names(), it.asked), (["leave", "stay"], []))


@pytest.mark.parametrize("lost", [UnreachableError("gone"), TimedOutError("no answer")])
async def test_what_was_sent_and_not_answered_is_asked_until_there_is_an_answer(
    lost: Exception, autojump_clock: trio.testing.MockClock
) -> None:
    async with world() as it:
        it.answers = [lost, lost, answer()]
        it.membership.trouble(PEER)
        await poll_until_async(lambda: it.asked)
        it.connected = False
        await it.troubled(60)
        assert (it.names(), len(it.asked)) == (["leave"], 1)
        it.connected = True
        it.raise_to(3)
        await comes_to(lambda: it.asked, [("sds.leave_out", ASKED)] * 3)
        assert it.names() == ["leave", "stay"]


async def test_one_procedure_per_peer_and_each_peer_for_itself(autojump_clock: trio.testing.MockClock) -> None:
    async with world() as it:
        it.gate = trio.Event()
        for _ in range(5):
            for peer in (PEER, 3, 4):
                it.membership.trouble(peer)
            await pass_time(0.5)
        assert sorted(it.done) == [("leave", 2), ("leave", 3), ("leave", 4)]
        assert sorted(params["peer"] for _, params in it.asked) == [2, 3, 4]


async def test_who_is_known_to_be_dead_is_buried(autojump_clock: trio.testing.MockClock) -> None:
    async with world() as it:
        it.port_refuses = True
        it.answers = [answer(dead=True)]
        it.membership.trouble(PEER)
        await comes_to(lambda: it.done, [("leave", PEER), ("peer_dead", PEER, INCARNATION)])
        it.raise_to(3)
        await comes_to(it.names, ["leave", "peer_dead", "stay"])


async def test_a_death_that_the_mdm_notices_a_little_later_is_heard_of(autojump_clock: trio.testing.MockClock) -> None:
    async with world() as it:
        it.port_refuses = True
        it.raise_to(3)
        it.answers = [answer(), answer(left=0), answer(left=0, dead=True)]
        it.membership.trouble(PEER)
        await comes_to(lambda: it.done, [("leave", PEER), ("peer_dead", PEER, INCARNATION), ("stay", PEER)])


@pytest.mark.parametrize(
    ("port_refuses", "dead", "known"), [(False, True, INCARNATION), (True, False, INCARNATION), (True, True, None)]
)
async def test_half_a_proof_buries_nobody(
    port_refuses: bool, dead: bool, known: int | None, autojump_clock: trio.testing.MockClock
) -> None:
    async with world() as it:
        it.port_refuses, it.known = port_refuses, known
        it.raise_to(3)
        it.answers = [answer(dead=dead)] + [answer(left=0, dead=dead)] * 10
        it.membership.trouble(PEER)
        await pass_time(3)
        assert it.names() == ["leave", "stay"]


@pytest.mark.parametrize("nonsense", [None, {}, {"left": 1}, {"left": "x", "dead": False, "version": 1}])
async def test_an_answer_that_is_none_ends_the_asking(nonsense: Any, autojump_clock: trio.testing.MockClock) -> None:
    async with world() as it:
        it.answers = [nonsense]
        it.membership.trouble(PEER)
        await comes_to(it.names, ["leave", "stay"])


async def test_an_engine_that_says_leaving_unasked_disturbs_nothing(autojump_clock: trio.testing.MockClock) -> None:
    async with world() as it:
        it.membership.leaving(PEER, True, True, [])
        await pass_time(1)
        assert (it.done, it.asked) == ([], [])


# -- learners


@pytest.mark.parametrize(
    "error", [UnreachableError("gone"), TimedOutError("slow"), ConflictError("busy"), InternalError("bug")]
)
async def test_what_a_learner_has_is_told_until_it_is_answered(
    error: Exception, autojump_clock: trio.testing.MockClock
) -> None:
    async with world() as it:
        it.answers = [error] * 5 + [{"joined": 1, "version": 4}]
        with capture_logs() as lines:
            it.membership.learned(PEER, [(9, 0, 12)], 4096)
            await pass_time(60)
        assert it.asked == [("sds.learned", {"learner": PEER, "chunks": [[9, 0, 12]], "resync_bytes": 4096})] * 6
        assert it.asked_at[-1] - it.asked_at[0] >= 5 * ASK_AGAIN_SECONDS
        assert len(lines) == 1


async def test_news_of_a_learner_that_comes_meanwhile_goes_with_the_next_call(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with world() as it:
        it.gate = trio.Event()
        it.answers = [{"joined": 1, "version": 4}] * 9
        it.membership.learned(PEER, [(9, 0, 12)], 4096)
        await poll_until_async(lambda: it.asked)
        it.membership.learned(PEER, [(9, 1, 3)], 5000)
        it.membership.learned(PEER, [(9, 0, 13)], 6000)
        it.membership.learned(3, [(9, 5, 1)], 7000)
        await poll_until_async(lambda: len(it.asked) == 2)
        it.gate.set()
        await pass_time(0.9 * LEARNED_PAUSE_SECONDS)
        assert [params for _, params in it.asked] == [
            {"learner": PEER, "chunks": [[9, 0, 12]], "resync_bytes": 4096},
            {"learner": 3, "chunks": [[9, 5, 1]], "resync_bytes": 7000},
        ]
        await pass_time(0.2 * LEARNED_PAUSE_SECONDS)
        assert [params for _, params in it.asked[2:]] == [
            {"learner": PEER, "chunks": [[9, 0, 13], [9, 1, 3]], "resync_bytes": 7000},
        ]
        it.membership.learned(PEER, [(9, 0, 14)], 8000)
        await pass_time(LEARNED_PAUSE_SECONDS)
        assert it.asked[-1][1] == {"learner": PEER, "chunks": [[9, 0, 14]], "resync_bytes": 8000}


async def test_a_great_many_chunks_go_in_several_calls(autojump_clock: trio.testing.MockClock) -> None:
    async with world() as it:
        it.answers = [{"joined": 1, "version": 4}] * 9
        it.membership.learned(PEER, [(9, chunk, 1) for chunk in range(CHUNKS_PER_CALL_MAX + 1)], 0)
        await comes_to(lambda: [len(params["chunks"]) for _, params in it.asked], [CHUNKS_PER_CALL_MAX, 1])


async def test_a_learner_that_is_lost_is_taken_out_until_it_is_answered(autojump_clock: trio.testing.MockClock) -> None:
    async with world() as it:
        it.answers = [UnreachableError("gone"), InvalidError("odd"), answer(left=1)]
        it.membership.learner_lost(PEER, [CHUNK, OTHER])
        await comes_to(lambda: it.asked, [("sds.leave_out", ASKED | {"chunks": [[9, 0], [9, 1]]})] * 3)
        assert it.done == []


async def test_what_a_lost_learner_has_is_told_no_more(autojump_clock: trio.testing.MockClock) -> None:
    """It may never come back, and until it does the MDM takes no news of it."""
    async with world() as it:
        away = ConflictError("not connected")
        it.answers = [away, answer(left=1), away, away, answer(left=1)]
        it.membership.learned(PEER, [(*CHUNK, 12), (*OTHER, 3)], 4096)
        await pass_time(0.1)
        it.membership.learner_lost(PEER, [CHUNK])
        await pass_time(1)
        it.membership.learner_lost(PEER, [OTHER])
        await pass_time(1)
        asked = [params["chunks"] for method, params in it.asked if method == "sds.learned"]
        assert asked[0] == [[9, 0, 12], [9, 1, 3]]
        assert asked[1:] == [[[9, 1, 3]]] * 2
        count = len(it.asked)
        it.answers = [{"joined": 1, "version": 5}]
        it.membership.learned(PEER, [(*CHUNK, 14)], 4096)
        await pass_time(10)
        assert [params for _, params in it.asked[count:]] == [
            {"learner": PEER, "chunks": [[9, 0, 14]], "resync_bytes": 4096}
        ]


async def test_a_learner_that_is_lost_while_the_mdm_answers_is_no_surprise(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with world() as it:
        it.gate = trio.Event()
        it.answers = [{"joined": 1, "version": 5}, answer(left=1)]
        it.membership.learned(PEER, [(*CHUNK, 12)], 4096)
        await poll_until_async(lambda: it.asked)
        it.membership.learner_lost(PEER, [CHUNK])
        it.gate.set()
        await comes_to(lambda: [method for method, _ in it.asked], ["sds.learned", "sds.leave_out"])


async def test_what_a_disk_cannot_keep_is_given_over_to_each_peer(autojump_clock: trio.testing.MockClock) -> None:
    async with world() as it:
        it.answers = [{"left": 1, "version": 4}] * 2
        it.gate = trio.Event()
        for _ in range(5):  # the engine says it again until the map has changed
            it.membership.lost([(*CHUNK, PEER, INCARNATION), (*OTHER, PEER, INCARNATION), (*CHUNK, 3, 8)])
            await pass_time(0.2)
        it.gate.set()
        await pass_time(1)
        asked = [
            {"peer": PEER, "incarnation": INCARNATION, "chunks": [[9, 0], [9, 1]]},
            {"peer": 3, "incarnation": 8, "chunks": [[9, 0]]},
        ]
        assert sorted(it.asked, key=lambda call: call[1]["peer"]) == [("sds.withdraw", params) for params in asked]


async def test_the_mdm_is_asked_again_to_take_chunks_back(autojump_clock: trio.testing.MockClock) -> None:
    async with world() as it:
        it.answers = [UnreachableError("gone"), ConflictError("restarted"), {"left": 1, "version": 4}]
        with capture_logs() as lines:
            for _ in range(7):
                it.membership.lost([(*CHUNK, PEER, INCARNATION)])
                await pass_time(0.2)
        assert len(it.asked) == 3
        assert [line["reason"] for line in lines] == ["gone", "restarted"]


async def test_a_peer_whose_disk_refuses_is_left_out_of_those_chunks(autojump_clock: trio.testing.MockClock) -> None:
    async with world() as it:
        it.answers = [answer(left=1)]
        it.membership.copy_refused(PEER, [CHUNK])
        await comes_to(lambda: it.asked, [("sds.leave_out", ASKED | {"chunks": [[9, 0]]})])


async def test_a_chunk_that_is_lost_again_while_the_mdm_answers_is_told_again(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with world() as it:
        it.gate = trio.Event()
        it.answers = [answer(left=1)] * 2
        it.membership.learner_lost(PEER, [CHUNK])
        await poll_until_async(lambda: it.asked)
        it.membership.learner_lost(PEER, [CHUNK])
        it.gate.set()
        await comes_to(lambda: len(it.asked), 2)
