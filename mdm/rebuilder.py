"""Carries out the rebuild: looks at the state whenever it has changed, plans, assigns learners, says how fast.

Owns what is only in memory (``Progress`` of each pool, what each SDS was told of rates, counters as last seen), its
one task, and the tasks that tell SDSs their rates, one at a time each. Everything else follows from the state, so a
restart of the MDM begins again where the last one was. Planning is pure and runs in a worker thread; a plan is dropped
when more was promised to thick volumes meanwhile, and SDSs that have taken part in a change since are protected by the
epochs in it.

After a start nobody is taken for gone, and nothing is assigned by what nobody has reported yet, before SDSs had the
time to find the MDM again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from functools import partial
from typing import Any, NamedTuple

import trio

from mdm import commands
from mdm.manager import utc_now
from mdm.model import Pool, SdsState, State
from mdm.orchestrator import Orchestrator
from mdm.progress import Progress, Told
from mdm.rates import Rates, leads_of, rates_of
from mdm.rebuild import Plan, Work, domain_of, plan
from pfvol.constants import RPC_TIMEOUT_SECONDS, SDS_DOWN_AFTER_SECONDS
from pfvol.errors import Error, NotFoundError
from pfvol.log import get_logger
from pfvol.rpc.session import Session

STEP_SECONDS = 1.0
STEP_SECONDS_MIN = 0.25
RATE_CHANGE_PERCENT = 2  # smaller changes of an SDS's share are not told

_log = get_logger(__name__)


class _Told(NamedTuple):
    """What an SDS knows of rates; ``limits`` are those of the whole pools, in MB/s."""

    session: Session
    limits: dict[int, int]
    rates: Rates


class Rebuilder:
    """See the module. ``run`` belongs into the daemon's nursery."""

    def __init__(self, orchestrator: Orchestrator, *, now: Callable[[], datetime] = utc_now) -> None:
        self._orchestrator = orchestrator
        self._manager = orchestrator.manager
        self._membership = orchestrator.membership
        self._now = now
        self._wake = trio.Event()
        self._threads = trio.CapacityLimiter(1)
        self._seen: State | None = None
        self._work: dict[int, Work] = {}
        self._evening: dict[int, bool] = {}
        self._progress: dict[int, Progress] = {}
        self._copied: dict[int, int] = {}
        """What each SDS has copied, as last seen."""
        self._told: dict[int, _Told] = {}
        self._telling: set[int] = set()

    def wake(self) -> None:
        self._wake.set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Rebuilds until cancelled."""
        self._orchestrator.watchers.append(self.wake)
        grace_until = trio.current_time() + SDS_DOWN_AFTER_SECONDS
        task_status.started()
        async with trio.open_nursery() as nursery:
            while True:
                self._wake = trio.Event()
                try:
                    await self._step(nursery, grace=trio.current_time() < grace_until)
                except Error as error:
                    _log.error("a step of the rebuild failed", reason=error.message)
                await trio.sleep(STEP_SECONDS_MIN)  # Many changes at once are one.
                with trio.move_on_after(STEP_SECONDS - STEP_SECONDS_MIN):
                    await self._wake.wait()

    async def _step(self, nursery: trio.Nursery, *, grace: bool) -> None:
        if self._manager.state is not self._seen or any(work.open for work in self._work.values()):
            await self._plan(grace=grace)
        await self._remove_empty()
        self._tell_rates(nursery)
        for pool_id, told in self._follow():
            await self._make_event(pool_id, told)

    async def _plan(self, *, grace: bool) -> None:
        state = self._seen = self._manager.state
        reports = {sds_id: stats.get("volumes", {}) for sds_id, stats in self._membership.sds_stats.items()}
        away = {pool_id: frozenset() if grace else self._away(state, pool) for pool_id, pool in state.pools.items()}
        failed = {
            sds_id: frozenset(index for index, _ in runtime.failed_devices)
            for sds_id, runtime in self._membership.sds.items()
        }
        plans = await trio.to_thread.run_sync(
            partial(_plans, state, reports, away, failed, dict(self._evening)), limiter=self._threads
        )
        self._work = {pool_id: work for planned in plans.values() for pool_id, work in planned.work.items()}
        if grace and any(sds.state is not SdsState.DOWN for key, sds in state.sds.items() if key not in reports):
            return  # What they have written is not known yet.
        for pd_id, planned in plans.items():
            self._evening[pd_id] = planned.evening
            if planned.choices and not _promised_more(state, self._manager.state):
                await self._orchestrator.execute(commands.SetLearners(choices=planned.choices))

    def _away(self, state: State, pool: Pool) -> frozenset[int]:
        """SDSs that this pool does not wait for any longer."""
        until = self._now() - timedelta(seconds=pool.rebuild_delay_seconds)
        return frozenset(
            sds.sds_id
            for sds in state.sds_of(pool.pd_id)
            if sds.state is SdsState.DOWN
            and (
                sds.down_since is None
                or sds.down_since <= until
                or (pool.rebuild_started_at is not None and sds.down_since <= pool.rebuild_started_at)
            )
        )

    async def _remove_empty(self) -> None:
        for sds in list(self._manager.state.sds.values()):
            if sds.removing and not sds.copies:
                try:
                    await self._orchestrator.execute(commands.RemoveSds(sds_id=sds.sds_id))
                except NotFoundError:
                    continue  # Removed just now.

    # -- progress

    def _follow(self) -> list[tuple[int, Told]]:
        """Brings the status of every pool up to date; the events to make."""
        state, told = self._manager.state, []
        copied = self._newly_copied(state)
        self._progress = {pool_id: self._progress.get(pool_id, Progress()) for pool_id in state.pools}
        for pool_id, progress in self._progress.items():
            pool = state.pools[pool_id]
            events = progress.update(
                self._work.get(pool_id, Work()),
                paused=pool.rebuild_cancelled,
                copied_bytes=copied[pool_id],
                limit_mbps=pool.rebuild_rate_limit_mbps,
                now=trio.current_time(),
            )
            told += [(pool_id, event) for event in events]
        self._membership.rebuilds = {pool_id: progress.status for pool_id, progress in self._progress.items()}
        return told

    async def _make_event(self, pool_id: int, told: Told) -> None:
        command = commands.TellRebuild(pool_id=pool_id, type=told.type, message=told.message, details=told.details)
        try:
            await self._manager.execute(command)
        except NotFoundError:
            return  # The pool is gone.

    def _newly_copied(self, state: State) -> Counter[int]:
        """Bytes copied since the last time, per pool: an SDS counts them for all pools, in proportion to what it
        leads."""
        copied: Counter[int] = Counter()
        leads = leads_of(state)
        for sds_id, runtime in self._membership.sds.items():
            now = runtime.copied_bytes
            if now is None:
                continue
            before = self._copied.get(sds_id, now if self._orchestrator.is_known(sds_id) else 0)
            more = now - before if now >= before else now  # less: it was started anew
            self._copied[sds_id] = now
            shares = {pool_id: count for (leader, pool_id), count in leads.items() if leader == sds_id}
            if not shares:  # what it copied last has joined
                shares = dict.fromkeys((pool_id for pool_id, item in self._progress.items() if item.under_way), 1)
            for pool_id, share in shares.items():
                copied[pool_id] += more * share // sum(shares.values())
        return copied

    # -- rates

    def _tell_rates(self, nursery: trio.Nursery) -> None:
        state = self._manager.state
        leads = leads_of(state)
        for sds_id, runtime in self._membership.sds.items():
            if sds_id not in state.sds or not runtime.serving or sds_id in self._telling:
                continue
            rates = rates_of(state, leads, sds_id)
            limits = {pool_id: state.pools[pool_id].rebuild_rate_limit_mbps for pool_id in rates}
            new, told = _Told(runtime.session, limits, rates), self._told.get(sds_id)
            if told is None or told[:2] != new[:2] or _differ(told.rates, rates):
                self._telling.add(sds_id)
                nursery.start_soon(self._tell, sds_id, new)

    async def _tell(self, sds_id: int, told: _Told) -> None:
        try:
            await told.session.call("resync", {"pools": told.rates}, timeout=RPC_TIMEOUT_SECONDS)
            self._told[sds_id] = told
        except Error as error:  # It is told again.
            _log.info("a rebuild rate was not confirmed", peer=str(told.session.peer), reason=error.message)
        finally:
            self._telling.discard(sds_id)


def _plans(
    state: State,
    reports: Mapping[int, Any],
    away: Mapping[int, frozenset[int]],
    failed: Mapping[int, frozenset[int]],
    evening: Mapping[int, bool],
) -> dict[int, Plan]:
    """In a worker thread."""
    plans = {}
    for pd_id in state.pds:
        domain = domain_of(state, pd_id, reports, away=away, failed=failed, evening=evening.get(pd_id, False))
        plans[pd_id] = plan(domain, state.maps)
    return plans


def _promised_more(then: State, now: State) -> bool:
    return any(sds_id in then.sds and sds.thick_slots > then.sds[sds_id].thick_slots for sds_id, sds in now.sds.items())


def _differ(told: Rates, rates: Rates) -> bool:
    """Whether shares of the same pools have to be told: one that begins or ends at once, others when it matters."""
    return any(
        bool(rate) is not bool(told[pool_id]) or abs(rate - told[pool_id]) * 100 > told[pool_id] * RATE_CHANGE_PERCENT
        for pool_id, rate in rates.items()
    )
