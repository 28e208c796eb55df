"""How far each pool's rebuild is: what follows from one survey after the other. Pure, the time is passed in.

A rebuild begins when there is something to copy and ends when nothing is left; what comes on top in between belongs to
it. Its progress counts chunks and never goes back. Bytes are those that the SDSs say they have copied; how many there
will be is not known before (most blocks of a returning SDS are the same), so what is left is estimated from the chunks
that were finished so far, and the total becomes exact only with the last.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from mdm.events import EventType
from mdm.rebuild import Work
from pfvol.constants import CHUNK_SIZE_BYTES

RATE_SECONDS = 5.0
STUCK_SECONDS = 30.0
EVENT_PERCENT = 10
MB = 1_000_000


class RebuildState(StrEnum):
    IDLE = "IDLE"
    IN_PROGRESS = "IN_PROGRESS"
    STALLED = "STALLED"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


UNDER_WAY = (RebuildState.IN_PROGRESS, RebuildState.STALLED)


@dataclass(frozen=True)
class Status:
    """``eta_seconds`` None: not known. ``reason``: why it does not go on."""

    state: RebuildState = RebuildState.IDLE
    percent: float = 0.0
    bytes_rebuilt: int = 0
    total_bytes: int = 0
    rate_mbps: float = 0.0
    eta_seconds: float | None = None
    degraded_chunks: int = 0
    reason: str | None = None


class Told(NamedTuple):
    """An event to make."""

    type: EventType
    message: str
    details: dict[str, int | float | str]


class _Sample(NamedTuple):
    at: float
    bytes: int
    done: int


@dataclass
class Progress:
    """One pool's. ``update`` is given what there is to do now; ``status`` is what is shown."""

    status: Status = field(default_factory=Status)
    _done: int = 0
    _left: int = 0
    _bytes: int = 0
    _moved_at: float = 0.0
    _samples: deque[_Sample] = field(default_factory=deque)

    @property
    def under_way(self) -> bool:
        return self.status.state in UNDER_WAY

    def update(self, work: Work, *, paused: bool, copied_bytes: int, limit_mbps: int, now: float) -> list[Told]:
        """``copied_bytes``: since the last call; ``limit_mbps``: the pool's; ``now``: a clock that never goes back."""
        before = self.status.state
        state, reason = self._state(work, paused, before)
        left = work.copying + work.wanted + (work.waiting + work.lost if before in UNDER_WAY else 0)
        if state in UNDER_WAY and before not in UNDER_WAY and before is not RebuildState.CANCELLED:
            self._done = self._left = self._bytes = 0
            self._moved_at = now
            self._samples.clear()
            self.status = Status()
        if left < self._left or copied_bytes or paused:
            self._moved_at = now
        self._done += max(0, self._left - left)
        self._left = left
        self._bytes += copied_bytes
        self._sample(now)
        if state is RebuildState.IN_PROGRESS and now - self._moved_at >= STUCK_SECONDS:
            state, reason = RebuildState.STALLED, f"no chunk was copied for {STUCK_SECONDS:.0f} s"
        old, self.status = self.status, self._status(state, reason, work, limit_mbps)
        return self._events(before, old.percent)

    def _state(self, work: Work, paused: bool, before: RebuildState) -> tuple[RebuildState, str | None]:
        if paused:
            return RebuildState.CANCELLED, "it was cancelled: start it again"
        if work.copying or work.wanted > work.unplaced:
            return RebuildState.IN_PROGRESS, work.reason
        if work.unplaced:
            return RebuildState.STALLED, work.reason
        if work.lost:
            return RebuildState.FAILED, f"{work.lost} chunks have no copy that serves: start their SDSs"
        if work.waiting:
            waits = f"{work.waiting} chunks wait for an SDS that is DOWN"
            begun = before in UNDER_WAY and (self._done or self._bytes)
            return (RebuildState.IN_PROGRESS if begun else RebuildState.IDLE), waits
        if before in (*UNDER_WAY, RebuildState.COMPLETED):
            return RebuildState.COMPLETED, None
        return RebuildState.IDLE, None

    def _sample(self, now: float) -> None:
        self._samples.append(_Sample(now, self._bytes, self._done))
        while len(self._samples) > 2 and self._samples[1].at <= now - RATE_SECONDS:
            self._samples.popleft()

    def _status(self, state: RebuildState, reason: str | None, work: Work, limit_mbps: int) -> Status:
        if state is RebuildState.IDLE:
            return Status(degraded_chunks=work.degraded, reason=reason)
        first, last = self._samples[0], self._samples[-1]
        seconds = last.at - first.at
        rate = (last.bytes - first.bytes) / seconds if seconds and state in UNDER_WAY else 0.0
        if state is RebuildState.COMPLETED:
            return Status(state, 100.0, self._bytes, self._bytes, eta_seconds=0.0, degraded_chunks=work.degraded)
        per_chunk = self._bytes / self._done if self._done and self._bytes else CHUNK_SIZE_BYTES
        left_bytes = min(per_chunk * self._left, CHUNK_SIZE_BYTES * work.left)
        percent = min(99.9, 100.0 * self._done / (self._done + self._left)) if self._left else 0.0
        eta = None
        if state is RebuildState.IN_PROGRESS and self._left:
            chunk_rate = (last.done - first.done) / seconds if seconds else 0.0
            by_bytes = rate or not chunk_rate  # else nothing of them is copied: they are the same, or never written
            eta = left_bytes / (rate or limit_mbps * MB) if by_bytes else self._left / chunk_rate
        return Status(
            state,
            round(max(self.status.percent, percent), 1),
            self._bytes,
            round(self._bytes + left_bytes),
            round(rate / MB, 2),
            None if eta is None else round(eta, 1),
            work.degraded,
            reason,
        )

    def _events(self, before: RebuildState, percent: float) -> list[Told]:
        status = self.status
        if status.state is not before:
            match status.state:
                case RebuildState.IN_PROGRESS if before is not RebuildState.STALLED:
                    return [Told(EventType.REBUILD_START, "rebuild started", {"chunks": self._left})]
                case RebuildState.COMPLETED:
                    message = f"rebuild completed, {status.bytes_rebuilt} bytes copied"
                    return [Told(EventType.REBUILD_COMPLETE, message, {"bytes": status.bytes_rebuilt})]
                case RebuildState.STALLED:
                    return [Told(EventType.REBUILD_STALLED, f"rebuild stalled: {status.reason}", {})]
                case RebuildState.FAILED:
                    return [Told(EventType.REBUILD_FAILED, f"rebuild failed: {status.reason}", {})]
        if status.state is RebuildState.IN_PROGRESS and status.percent // EVENT_PERCENT > percent // EVENT_PERCENT:
            message = f"rebuild at {status.percent:.0f} %"
            return [Told(EventType.REBUILD_PROGRESS, message, {"percent": status.percent})]
        return []
