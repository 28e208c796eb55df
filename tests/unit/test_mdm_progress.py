"""What is shown of a rebuild, from one survey after the other."""

from __future__ import annotations

from typing import Any

from mdm.events import EventType
from mdm.progress import STUCK_SECONDS, Progress, RebuildState
from mdm.rebuild import Work
from pfvol.constants import CHUNK_SIZE_BYTES

MIB4 = CHUNK_SIZE_BYTES


class Watched:
    """A progress that is updated once a second."""

    def __init__(self) -> None:
        self.progress = Progress()
        self.now = 1000.0
        self.events: list[EventType] = []

    def see(self, *, copied: int = 0, paused: bool = False, **work: Any) -> RebuildState:
        self.now += 1.0
        found = Work(left=float(work.get("copying", 0) + work.get("wanted", 0)), **work)
        told = self.progress.update(found, paused=paused, copied_bytes=copied, limit_mbps=100, now=self.now)
        self.events += [event.type for event in told]
        return self.progress.status.state


def test_a_rebuild_from_its_start_to_its_end() -> None:
    """Goal: chunks are counted down, bytes and rate are those copied, and it ends at 100 %."""
    seen = Watched()
    assert seen.see() is RebuildState.IDLE
    assert seen.see(wanted=100, degraded=100) is RebuildState.IN_PROGRESS
    assert seen.progress.status.total_bytes == 100 * MIB4
    percents = []
    for left in range(90, 0, -10):
        assert seen.see(copying=left, degraded=left, copied=10 * MIB4) is RebuildState.IN_PROGRESS
        percents.append(seen.progress.status.percent)
    status = seen.progress.status
    assert percents == [10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0]
    assert (status.bytes_rebuilt, status.total_bytes) == (90 * MIB4, 100 * MIB4)
    assert abs(status.rate_mbps - 10 * MIB4 / 1e6) < 0.01
    assert status.eta_seconds == 1.0
    assert seen.see(copied=10 * MIB4) is RebuildState.COMPLETED
    status = seen.progress.status
    assert (status.percent, status.bytes_rebuilt, status.total_bytes, status.eta_seconds) == (
        100.0, 100 * MIB4, 100 * MIB4, 0.0,
    )  # fmt: skip
    assert (seen.events[0], seen.events[-1]) == (EventType.REBUILD_START, EventType.REBUILD_COMPLETE)
    assert seen.events.count(EventType.REBUILD_PROGRESS) == 9
    assert seen.see() is RebuildState.COMPLETED
    assert seen.see(wanted=5) is RebuildState.IN_PROGRESS
    assert (seen.progress.status.percent, seen.progress.status.bytes_rebuilt) == (0.0, 0)


def test_progress_never_goes_back() -> None:
    """Goal: a second failure adds work to the same rebuild; an SDS that goes again is no progress."""
    seen = Watched()
    seen.see(copying=100)
    seen.see(copying=20)
    assert seen.progress.status.percent == 80.0
    seen.see(copying=320)
    assert seen.progress.status.percent == 80.0
    seen.see(waiting=320, degraded=320)
    assert (seen.progress.status.state, seen.progress.status.percent) == (RebuildState.IN_PROGRESS, 80.0)
    seen.see(copying=40)
    assert seen.progress.status.percent == 90.0


def test_a_short_outage_is_estimated_by_what_was_copied_so_far() -> None:
    """Goal: of a returning SDS most blocks are the same: the total follows what the first chunks took."""
    seen = Watched()
    seen.see(copying=100)
    seen.see(copying=50, copied=50 * 4096)
    assert seen.progress.status.total_bytes == 100 * 4096


def test_waiting_alone_is_no_rebuild() -> None:
    seen = Watched()
    assert seen.see(waiting=7, degraded=7) is RebuildState.IDLE
    assert seen.progress.status.reason == "7 chunks wait for an SDS that is DOWN"
    assert seen.see() is RebuildState.IDLE
    assert seen.events == []


def test_stalled_failed_and_cancelled() -> None:
    """Goal: each has its event once, and each ends when there is something to do again."""
    seen = Watched()
    seen.see(wanted=10)
    assert seen.see(wanted=10, unplaced=10, reason="full") is RebuildState.STALLED
    assert seen.see(wanted=10, unplaced=10, reason="full") is RebuildState.STALLED
    assert seen.progress.status.reason == "full"
    assert seen.see(wanted=10, unplaced=4, reason="full") is RebuildState.IN_PROGRESS
    assert seen.see(wanted=10, paused=True) is RebuildState.CANCELLED
    assert (seen.progress.status.eta_seconds, seen.progress.status.rate_mbps) == (None, 0.0)
    assert seen.see(copying=10) is RebuildState.IN_PROGRESS
    assert seen.see(lost=3) is RebuildState.FAILED
    assert seen.see() is RebuildState.IDLE
    kinds = [EventType.REBUILD_START, EventType.REBUILD_STALLED, EventType.REBUILD_START, EventType.REBUILD_FAILED]
    assert seen.events == kinds


def test_learners_that_do_not_learn_are_noticed() -> None:
    seen = Watched()
    seen.see(copying=10)
    seen.now += STUCK_SECONDS
    assert seen.see(copying=10) is RebuildState.STALLED
    assert seen.see(copying=10, copied=4096) is RebuildState.IN_PROGRESS


def test_only_waiting_after_a_start_that_copied_nothing_is_no_rebuild() -> None:
    """Goal: chunks that learn for a moment, before the loss of their SDS is known, are no rebuild that waits."""
    seen = Watched()
    assert seen.see(copying=3, degraded=3) is RebuildState.IN_PROGRESS
    assert seen.see(waiting=100, degraded=100) is RebuildState.IDLE
    assert seen.see(copying=100, degraded=100) is RebuildState.IN_PROGRESS
    assert seen.see(copying=60, degraded=60, copied=40 * MIB4) is RebuildState.IN_PROGRESS
    assert seen.see(waiting=60, degraded=60) is RebuildState.IN_PROGRESS


def test_the_time_left_follows_the_bytes() -> None:
    """Goal: chunks that learn together are whole together, so their number says nothing of what is left meanwhile."""
    seen = Watched()
    seen.see(copying=100)
    for _ in range(4):
        seen.see(copying=100, copied=5 * MIB4)
        assert seen.progress.status.percent == 0
    assert seen.progress.status.eta_seconds == 20.0
    seen.see(copying=80, copied=5 * MIB4)
    assert seen.progress.status.eta_seconds == 16.0


def test_nearly_done_is_not_done() -> None:
    seen = Watched()
    seen.see(copying=10000)
    seen.see(copying=1)
    assert seen.progress.status.percent == 99.9
