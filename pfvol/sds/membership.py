"""What this SDS asks the MDM about who is in the sets: leave a peer out, leave itself, take a learner in.

Owns the procedure for a peer in trouble, one at a time per peer, and what the MDM has to be told until it has answered.
Assumes one trio thread and that the engine does as ``datapath.target`` says; that requests about one peer are carried
out by the MDM in the order sent, and those of a session that is over not at all once the next one has registered.
Promises: while the MDM is away nobody is troubled: the engine goes on with the peers that it has; a request that was
sent and not answered may be carried out at any moment, so the engine does not go back to work with a peer before an
answer has come, and, if the map has changed by it, not before it has the new one; nothing here waits for anything else
than its own peer; a trouble that lasts is told once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final, Protocol

import trio

from pfvol.errors import Error, ProtocolError, TimedOutError, UnreachableError
from pfvol.log import get_logger

ASK_AGAIN_SECONDS: Final = 0.5
ASK_TIMEOUT_SECONDS: Final = 5.0
BURY_PAUSES_SECONDS: Final = (0.05, 0.1, 0.2, 0.4)  # until the MDM too has seen a process end whose port refuses
CHUNKS_PER_CALL_MAX: Final = 8192
LEARNED_PAUSE_SECONDS: Final = 1.0  # each call changes maps, and costs every SDS and SDC a few ms of processor
LEARNED_FEW: Final = 64  # at a time; more than that are not kept waiting

Chunk = tuple[int, int]


class Engine(Protocol):
    def leave(self, sds_id: int) -> None: ...
    def stay(self, sds_id: int) -> None: ...
    def peer_dead(self, sds_id: int, incarnation: int) -> None: ...


class Links(Protocol):
    def hold(self, sds_id: int) -> None: ...
    def release(self, sds_id: int) -> None: ...
    def incarnation(self, sds_id: int) -> int | None: ...
    async def refuses(self, sds_id: int) -> bool: ...


class Maps(Protocol):
    async def reached(self, version: int) -> None: ...


class Mdm(Protocol):
    @property
    def connected(self) -> bool: ...
    async def call(  # As in the RPC client: the deadline belongs to the protocol.
        self,
        method: str,
        params: dict[str, Any] | None = None,
        *,
        timeout: float = ...,  # noqa: ASYNC109
    ) -> Any: ...


@dataclass(frozen=True, slots=True)
class _Answer:
    left: int
    dead: bool
    version: int


@dataclass(slots=True)
class _Leaving:
    """The engine's word: it has closed everything with the peer, and what may be asked."""

    said: trio.Event = field(default_factory=trio.Event)
    as_primary: bool = False
    as_secondary: bool = False
    doubtful: list[Chunk] = field(default_factory=list)


class Membership:
    """Told by the engine's events and by the connections; ``run`` owns the tasks."""

    def __init__(self, engine: Engine, links: Links, mdm: Mdm, maps: Maps) -> None:
        self._engine = engine
        self._links = links
        self._mdm = mdm
        self._maps = maps
        self._leaving: dict[int, _Leaving] = {}
        self._ended_at: dict[int, float] = {}
        self._told: dict[int, str] = {}  # peers in trouble -> what the log was told last
        self._learned: dict[int, dict[Chunk, int]] = {}
        self._copied = 0
        self._lost: dict[int, dict[Chunk, int]] = {}
        self._losses = 0
        self._withdrawing: set[tuple[int, int]] = set()
        self._kept: str | None = None  # why the MDM did not let us withdraw when it was asked last
        self._nursery: trio.Nursery | None = None
        self._log = get_logger("sds.membership")

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            await trio.sleep_forever()

    # -- a peer in trouble

    def trouble(self, sds_id: int) -> None:
        """The connection to the peer cannot be made again, or it gives no lease. To be said again while it lasts."""
        ended_at = self._ended_at.get(sds_id, -math.inf)
        if sds_id in self._leaving or trio.current_time() - ended_at < ASK_AGAIN_SECONDS:
            return
        if self._nursery is not None and self._mdm.connected:
            self._leaving[sds_id] = _Leaving()
            self._nursery.start_soon(self._leave, sds_id)

    def connected(self, sds_id: int) -> None:
        """The connection to the peer is there again."""
        self._told.pop(sds_id, None)

    def leaving(self, sds_id: int, as_primary: bool, as_secondary: bool, doubtful: Iterable[Chunk]) -> None:
        """The engine's answer to ``leave``."""
        if (leaving := self._leaving.get(sds_id)) is not None:
            leaving.as_primary, leaving.as_secondary = as_primary, as_secondary
            leaving.doubtful = list(doubtful)
            leaving.said.set()

    async def _leave(self, sds_id: int) -> None:
        leaving = self._leaving[sds_id]
        self._links.hold(sds_id)
        self._engine.leave(sds_id)
        await leaving.said.wait()
        if leaving.as_primary or leaving.as_secondary:
            if sds_id not in self._told:
                self._told[sds_id] = ""
                self._log.warning("peer in trouble: the MDM is asked to leave it out", sds=sds_id)
            await self._have_left_out(sds_id, leaving)
        self._engine.stay(sds_id)
        self._links.release(sds_id)
        self._ended_at[sds_id] = trio.current_time()
        del self._leaving[sds_id]

    async def _have_left_out(self, sds_id: int, leaving: _Leaving) -> None:
        params = {
            "peer": sds_id,
            "as_primary": leaving.as_primary,
            "as_secondary": leaving.as_secondary,
            "except": [list(chunk) for chunk in leaving.doubtful],
            "chunks": None,
        }
        answer = await self._ask(sds_id, params)
        if answer is None:
            return
        if answer.left:
            self._log.warning("peer left out", sds=sds_id, chunks=answer.left, version=answer.version)
            await self._bury(sds_id, params, answer)
        await self._maps.reached(answer.version)

    async def _bury(self, sds_id: int, params: dict[str, Any], answer: _Answer) -> None:
        """Who is known to be dead need not be waited for: its port refuses, and the MDM has seen its end."""
        incarnation = self._links.incarnation(sds_id)
        if incarnation is None or not await self._links.refuses(sds_id):
            return
        for pause in BURY_PAUSES_SECONDS:
            if answer.dead:
                self._engine.peer_dead(sds_id, incarnation)
                return
            await trio.sleep(pause)
            again = await self._ask(sds_id, params)
            if again is None:
                return
            answer = again

    async def _ask(self, sds_id: int, params: dict[str, Any]) -> _Answer | None:
        """The MDM's answer to ``sds.leave_out``; None when it has refused, or was not there to be asked."""
        sent = False
        while True:
            if self._mdm.connected:
                try:
                    return _parse(await self._mdm.call("sds.leave_out", params, timeout=ASK_TIMEOUT_SECONDS))
                except (UnreachableError, TimedOutError):
                    sent = True
                except Error as error:
                    if self._told.get(sds_id) != error.message:
                        self._told[sds_id] = error.message
                        self._log.warning("the MDM does not leave the peer out", sds=sds_id, reason=error.message)
                    return None
            elif not sent:
                return None
            await trio.sleep(ASK_AGAIN_SECONDS)

    # -- disks that fail

    def lost(self, chunks: Iterable[tuple[int, int, int, int]]) -> None:
        """What this SDS cannot keep (volume, chunk, the other member, its incarnation). Said again while it lasts."""
        assert self._nursery is not None
        by_peer: dict[tuple[int, int], list[Chunk]] = {}
        for volume_id, chunk, peer, incarnation in chunks:
            by_peer.setdefault((peer, incarnation), []).append((volume_id, chunk))
        for key in by_peer.keys() - self._withdrawing:
            self._withdrawing.add(key)
            self._nursery.start_soon(self._withdraw, *key, by_peer[key])

    def copy_refused(self, sds_id: int, chunks: Iterable[Chunk]) -> None:
        """The peer's disk keeps the copies from agreeing. Said again while it lasts."""
        self.learner_lost(sds_id, chunks)

    async def _withdraw(self, peer: int, incarnation: int, chunks: list[Chunk]) -> None:
        for at in range(0, len(chunks), CHUNKS_PER_CALL_MAX):
            batch = [list(chunk) for chunk in chunks[at : at + CHUNKS_PER_CALL_MAX]]
            params = {"peer": peer, "incarnation": incarnation, "chunks": batch}
            try:
                await self._mdm.call("sds.withdraw", params, timeout=ASK_TIMEOUT_SECONDS)
                self._kept = None
            except Error as error:
                if self._kept != error.message:
                    self._kept = error.message
                    self._log.warning("the MDM does not take back chunks", sds=peer, reason=error.message)
                await trio.sleep(ASK_AGAIN_SECONDS)
                break
        self._withdrawing.discard((peer, incarnation))

    # -- learners

    def learned(self, sds_id: int, chunks: Iterable[tuple[int, int, int]], resync_bytes: int) -> None:
        """The learner has all of these chunks (volume, chunk, epoch); so many bytes were copied by then, of all."""
        self._copied = resync_bytes
        news = {(volume_id, chunk): epoch for volume_id, chunk, epoch in chunks}
        self._tell(self._learned, sds_id, news, "sds.learned", self._learned_params)

    def learner_lost(self, sds_id: int, chunks: Iterable[Chunk]) -> None:
        """The learner was lost after the MDM may have been told that it has these chunks. It need not be any more."""
        chunks = tuple(chunks)
        for chunk in chunks:
            self._learned.get(sds_id, {}).pop(chunk, None)
        self._losses += 1  # a chunk that is lost once more while the MDM answers is told once more
        self._tell(self._lost, sds_id, dict.fromkeys(chunks, self._losses), "sds.leave_out", _lost)

    def _tell(
        self,
        waiting: dict[int, dict[Chunk, int]],
        sds_id: int,
        news: dict[Chunk, int],
        method: str,
        params: Callable[[int, dict[Chunk, int]], dict[str, Any]],
    ) -> None:
        assert self._nursery is not None
        if sds_id in waiting:
            waiting[sds_id].update(news)
        else:
            waiting[sds_id] = news
            self._nursery.start_soon(self._tell_all, waiting, sds_id, method, params)

    async def _tell_all(
        self,
        waiting: dict[int, dict[Chunk, int]],
        sds_id: int,
        method: str,
        params: Callable[[int, dict[Chunk, int]], dict[str, Any]],
    ) -> None:
        """Until the MDM has answered: the engine waits for the change of the map that comes of it."""
        complained = False
        news = waiting[sds_id]
        while news:
            batch = dict(islice(news.items(), CHUNKS_PER_CALL_MAX))
            try:
                await self._mdm.call(method, params(sds_id, batch), timeout=ASK_TIMEOUT_SECONDS)
            except Error as error:
                if not complained:
                    complained = True
                    self._log.warning("the MDM does not take news of a learner", sds=sds_id, reason=error.message)
                await trio.sleep(ASK_AGAIN_SECONDS)
                continue
            for chunk, mark in batch.items():
                if news.get(chunk) == mark:
                    del news[chunk]
            if waiting is self._learned and len(batch) < LEARNED_FEW:
                await trio.sleep(LEARNED_PAUSE_SECONDS)
        del waiting[sds_id]

    def _learned_params(self, sds_id: int, chunks: dict[Chunk, int]) -> dict[str, Any]:
        found = [[volume_id, chunk, epoch] for (volume_id, chunk), epoch in chunks.items()]
        return {"learner": sds_id, "chunks": found, "resync_bytes": self._copied}


def _parse(body: Any) -> _Answer:
    try:
        return _Answer(int(body["left"]), bool(body["dead"]), int(body["version"]))
    except (TypeError, KeyError, ValueError) as error:
        raise ProtocolError(f"the MDM's answer to sds.leave_out cannot be read: {error!r}") from None


def _lost(sds_id: int, chunks: dict[Chunk, int]) -> dict[str, Any]:
    return {
        "peer": sds_id,
        "as_primary": True,
        "as_secondary": False,
        "except": [],
        "chunks": [list(chunk) for chunk in chunks],
    }
