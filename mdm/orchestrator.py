"""The one admin path: a command, and what must be true at other nodes before its caller is answered.

``execute`` assumes that the manager makes a command durable first; what it then does at the SDSs is bounded in time and
not broken off when the caller goes away. An SDS that does not confirm loses its connection: it is DOWN for us, and when
it registers again it doubts all that it knew. ``run`` owns what goes on in the background, each of it found in the
state itself, so that a restart of the MDM forgets none of it: SDSs that are gone become DOWN, deleted volumes are
purged until each SDS has confirmed.

Commands may follow one another faster than SDSs confirm them, and an SDS handles requests concurrently. So what is told
again and again of one thing (a volume, the reservations) is told by one task at a time, each time as it is by then:
what an SDS was told last is never older than what it was told before.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Awaitable, Callable, Iterable, Mapping, Set
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import trio

from mdm import commands
from mdm.commands import Command
from mdm.manager import Manager, Outcome
from mdm.membership import Membership, peers_of
from mdm.model import Holders, Joined, SdsState, State, Volume
from mdm.pushes import Pushes
from mdm.segments import entry_of
from mdm.transition.forced import forced_out
from mdm.verify import Answer, VerifyReport, check_copies, check_placement, is_answer
from pfvol.config import format_address
from pfvol.constants import (
    CHUNK_SIZE_BYTES,
    HEARTBEAT_SECONDS,
    RPC_TIMEOUT_SECONDS,
    SDS_DOWN_AFTER_SECONDS,
)
from pfvol.errors import ConflictError, Error, InvalidError, NotFoundError
from pfvol.log import get_logger
from pfvol.rpc.messages import Params
from pfvol.rpc.session import Session

PURGE_AGAIN_SECONDS = 10.0
PURGES_ASKED_MAX = 256
NOTIFY_SECONDS_MAX = 2.0
VERIFY_CHUNKS_PER_CALL = 32
VERIFY_CALLS_IN_FLIGHT_MAX = 4
VERIFY_CALLS_MAX = 16  # of all that are verified at once: calls of a session that maps and pings have to pass
VERIFY_TRIES = 5
VERIFY_AGAIN_SECONDS = 0.2
VERIFY_TIMEOUT_SECONDS = 60.0

Followers = Callable[[Any, Outcome], Awaitable[None]]

_log = get_logger(__name__)


class Orchestrator:
    """See the module. ``run`` belongs into the daemon's nursery; ``execute`` works from any task."""

    def __init__(self, manager: Manager, membership: Membership) -> None:
        self.manager = manager
        self.membership = membership
        self.pushes = Pushes(manager)
        self.watchers: list[Callable[[], None]] = []
        """Called after each command that was carried out."""
        self._before_us = {sds.sds_id: sds.incarnation for sds in manager.state.sds.values()}
        self._nursery: trio.Nursery | None = None
        self._wake = trio.Event()
        self._purge_asked: dict[tuple[int, int], float] = {}
        self._reserving = trio.Lock()
        self._verifying = trio.Semaphore(VERIFY_CALLS_MAX)
        self._telling: weakref.WeakValueDictionary[int, trio.Lock] = weakref.WeakValueDictionary()
        """Per volume, for as long as somebody holds it or waits for it."""
        self._follow: Mapping[type, Followers] = {
            commands.AddSds: self._after_add_sds,
            commands.RemoveSds: self._after_remove_sds,
            commands.RemoveSdc: self._after_remove_sdc,
            commands.RegisterSds: self._after_register,
            commands.SetSdsState: self._after_sds_change,
            commands.CreateVolume: self._after_create,
            commands.ExtendVolume: self._after_extend,
            commands.DeleteVolume: self._after_delete,
            commands.MapVolume: self._after_map,
            commands.UnmapVolume: self._after_unmap,
            commands.UpdatePool: self._after_pool_update,
            commands.LeaveOut: self._after_map_change,
            commands.Withdraw: self._after_map_change,
            commands.JoinLearners: self._after_join,
            commands.SetLearners: self._after_set_learners,
            commands.ForceAlone: self._after_map_change,
        }

    def is_known(self, sds_id: int) -> bool:
        """Whether the SDS is in an incarnation that the last MDM knew: what it had counted when we first hear of it is
        not new."""
        sds = self.manager.state.sds.get(sds_id)
        return sds is not None and sds.incarnation == self._before_us.get(sds_id)

    # -- commands

    async def execute(self, command: Command) -> Outcome:
        """Carries out a command; when it answers, it is durable and in force. Raises what it is refused with."""
        follow = self._follow.get(type(command))
        if isinstance(command, commands.ForceAlone) and command.accepted:
            await self._refuse_while_alive(command)
        with trio.CancelScope(shield=True):
            with self.pushes.joining(command) if isinstance(command, commands.JoinLearners) else nullcontext():
                outcome = await self.manager.execute(self._completed(command))
                if isinstance(outcome.result, Joined):
                    self.pushes.joined(outcome.result, outcome.state.map_version)
            if follow is not None:
                await follow(command, outcome)
        for watcher in self.watchers:
            watcher()
        return outcome

    def _completed(self, command: Command) -> Command:
        """The command with what only the running nodes can tell."""
        state, membership = self.manager.state, self.membership
        match command:
            case commands.AddSds(node=None, name=name, ip=ip):
                return replace(command, node=membership.node_for(state, name, ip))
            case commands.CreateVolume(pool_id=pool_id):
                return replace(command, **self._thin_use(pool_id))
            case commands.ExtendVolume(volume_id=volume_id) if volume_id in state.volumes:
                return replace(command, **self._thin_use(state.volumes[volume_id].pool_id))
            case commands.RemoveSds():
                return replace(command, thin_slots=membership.thin_slots(state))
            case commands.LeaveOut(except_chunks=except_chunks):
                excepted = except_chunks | self.pushes.unsettled()
                return replace(command, except_chunks=excepted, unsettled=self.pushes.inherited())
            case commands.Withdraw(chunks=chunks):
                settled = chunks - self.pushes.unsettled()
                return replace(command, chunks=settled, unsettled=self.pushes.inherited())
        return command

    async def _refuse_while_alive(self, command: commands.ForceAlone) -> None:
        """Who is DOWN for us may be cut off from us alone, and serve clients: the SDS that is to take its place looks
        whether it still listens."""
        state, runtime = self.manager.state, self.membership.sds.get(command.sds_id)
        sds = state.sds.get(command.sds_id)
        if sds is None or sds.state is SdsState.DOWN:
            return  # The command itself says why not.
        if runtime is None or not runtime.serving:
            raise ConflictError(
                f"SDS {sds.name} is not connected to the MDM now: whether those that it is to replace are still alive "
                "cannot be seen. Promote it when it is here again"
            )
        for sds_id in sorted(await trio.to_thread.run_sync(forced_out, state, command)):
            params: Params = {"peer": sds_id}
            if await runtime.session.call("listens", params, timeout=RPC_TIMEOUT_SECONDS):
                peer = state.sds[sds_id]
                raise ConflictError(
                    f"SDS {peer.name} is DOWN, but something still takes connections at "
                    f"{format_address(peer.data_address) if peer.data_address else 'its address'}: clients may go on "
                    "with it. Stop its process (or have it reach the MDM again), then promote"
                )

    def _thin_use(self, pool_id: int) -> dict[str, Any]:
        state, membership = self.manager.state, self.membership
        return {
            "thin_slots": membership.thin_slots(state),
            "pool_thin_bytes": membership.pool_thin_bytes(state, pool_id, CHUNK_SIZE_BYTES),
        }

    async def _after_add_sds(self, _: Any, outcome: Outcome) -> None:
        node = outcome.state.sds[outcome.result].node
        if node in self.membership.nodes:
            await self._tell([self.membership.nodes[node].session], "sds.admitted", {})

    async def _after_remove_sds(self, command: commands.RemoveSds, outcome: Outcome) -> None:
        if not outcome.result:
            return  # It is emptied first.
        runtime = self.membership.sds.pop(command.sds_id, None)
        self.membership.sds_stats.pop(command.sds_id, None)
        self.membership.faults.pop(command.sds_id, None)
        if runtime is not None:
            await self._tell([runtime.session], "stop", {})
        await self._tell_peers(outcome.state)

    async def _after_remove_sdc(self, command: commands.RemoveSdc, _: Outcome) -> None:
        runtime = self.membership.sdc.pop(command.sdc_id, None)
        if runtime is not None:
            runtime.session.close("the SDC was removed")

    async def _after_register(self, _: Any, outcome: Outcome) -> None:
        self.pushes.publish()  # One that comes back with nothing learns anew.
        await self._after_sds_change(_, outcome)

    async def _after_sds_change(self, _: Any, outcome: Outcome) -> None:
        self.wake()
        await self._tell_peers(outcome.state)

    async def _after_create(self, _: Any, outcome: Outcome) -> None:
        if outcome.state.volumes[outcome.result].thick:
            await self._reserve()

    async def _after_extend(self, command: commands.ExtendVolume, outcome: Outcome) -> None:
        """SDSs first: an SDC that knows the new size writes there at once."""
        if outcome.state.volumes[command.volume_id].thick:
            await self._reserve()
        await self._tell_volume(outcome.state.volumes[command.volume_id])
        await self._tell_mapped(outcome.state, command.volume_id)

    async def _after_delete(self, command: commands.DeleteVolume, outcome: Outcome) -> None:
        self.wake()
        await self._reserve()

    async def _after_map(self, command: commands.MapVolume, outcome: Outcome) -> None:
        await self._tell_volume(outcome.state.volumes[command.volume_id])
        await self._tell_sdc(command.sdc_id)

    async def _after_unmap(self, command: commands.UnmapVolume, outcome: Outcome) -> None:
        """Answered when no SDS lets the SDC in any more."""
        await self._tell_volume(outcome.state.volumes[command.volume_id], revoked_sdc_id=command.sdc_id)
        await self._tell_sdc(command.sdc_id)

    async def _after_pool_update(self, command: commands.UpdatePool, outcome: Outcome) -> None:
        for volume in outcome.state.volumes_of(command.pool_id):
            await self._tell_volume(volume)

    async def _after_map_change(self, _: Any, outcome: Outcome) -> None:
        self.pushes.publish()

    async def _after_set_learners(self, command: commands.SetLearners, _: Outcome) -> None:
        """What a thick volume is promised has to be kept free before the first copy comes."""
        await self._reserve({sds_id for choices in command.choices.values() for _, _, sds_id in choices})
        self.pushes.publish()

    async def _after_join(self, _: Any, outcome: Outcome) -> None:
        """Who was replaced first: the sooner it knows, the shorter the others wait for its lease."""
        self.pushes.publish({goes for *_, goes in outcome.result.moved})
        if outcome.result.moved and self._nursery is not None:
            self._nursery.start_soon(self._reserve)

    # -- what others are told

    async def _tell_volume(self, volume: Volume, *, revoked_sdc_id: int | None = None) -> None:
        """Each connected SDS that has chunks of the volume puts out the SDC, then learns the volume as it is now."""
        volume_id = volume.volume_id
        async with self._telling.setdefault(volume_id, trio.Lock()):
            params: Params
            if revoked_sdc_id is not None:
                params = {"volume_id": volume_id, "sdc_id": revoked_sdc_id}
                await self._ask_holders(self.manager.state.volumes.get(volume_id, volume), "volume.revoked", params)
            state = self.manager.state
            if volume_id in state.volumes:  # Else it was deleted meanwhile.
                params = {"volume_id": volume_id, "info": volume_info(state, volume_id)}
                await self._ask_holders(state.volumes[volume_id], "volume.changed", params)

    async def _reserve(self, only: Set[int] | None = None) -> None:
        """Tells the SDSs (all, or some) how many slots are promised to thick volumes."""
        async with self._reserving, trio.open_nursery() as nursery:
            state = self.manager.state
            for sds_id, session in self.membership.sds_sessions():
                if sds_id in state.sds and (only is None or sds_id in only):
                    params = {"slots": state.sds[sds_id].thick_slots}
                    nursery.start_soon(self._ask, session, "reserved", params)

    async def _ask_holders(self, volume: Volume, method: str, params: Params) -> None:
        """Asks each connected SDS that has chunks of a volume, all at once."""
        async with trio.open_nursery() as nursery:
            for sds_id, session in self.membership.sds_sessions():
                if volume.uses(sds_id):
                    nursery.start_soon(self._ask, session, method, params)

    async def _ask(self, session: Session, method: str, params: Params) -> None:
        try:
            await session.call(method, params, timeout=RPC_TIMEOUT_SECONDS)
        except Error as error:
            _log.warning("an SDS did not confirm", peer=str(session.peer), method=method, reason=error.message)
            session.close(f"{method} was not confirmed: {error.message}")

    async def _tell_mapped(self, state: State, volume_id: int) -> None:
        for mapping in state.volumes[volume_id].mappings:
            await self._tell_sdc(mapping.sdc_id)

    async def _tell_sdc(self, sdc_id: int) -> None:
        if sdc_id in self.membership.sdc:
            await self._tell([self.membership.sdc[sdc_id].session], "volumes.changed", {})

    async def _tell_peers(self, state: State) -> None:
        sessions = [runtime.session for runtime in self.membership.sds.values()]
        sessions += [runtime.session for runtime in self.membership.sdc.values()]
        await self._tell(sessions, "peers", {"peers": peers_of(state)})

    async def _tell(self, sessions: Iterable[Session], method: str, params: Params) -> None:
        """A notification to each; one that does not take it is given up, as it would otherwise not know."""
        async with trio.open_nursery() as nursery:
            for session in sessions:
                nursery.start_soon(self._notify, session, method, params)

    async def _notify(self, session: Session, method: str, params: Params) -> None:
        try:
            with trio.fail_after(NOTIFY_SECONDS_MAX):
                await session.notify(method, params)
        except (Error, trio.TooSlowError):
            session.close(f"it does not take {method}")

    # -- in the background

    def wake(self) -> None:
        """Something has changed that ``run`` shall look at now."""
        self._wake.set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keeps states and purges going until cancelled.

        After a start who has not been here yet is given SDS_DOWN_AFTER_SECONDS to find us again.
        """
        grace_until = trio.current_time() + SDS_DOWN_AFTER_SECONDS
        task_status.started()
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            self.pushes.start(nursery)
            while True:
                self._wake = trio.Event()
                try:
                    await self._set_states(grace=trio.current_time() < grace_until)
                except Error as error:
                    _log.error("states of SDSs cannot be kept", reason=error.message)
                self._ask_for_purges(nursery)
                with trio.move_on_after(HEARTBEAT_SECONDS):
                    await self._wake.wait()

    async def _set_states(self, *, grace: bool) -> None:
        for sds_id in list(self.manager.state.sds):
            sds = self.manager.state.sds.get(sds_id)
            if sds is None:
                continue  # Removed while another one's state was set.
            runtime = self.membership.sds.get(sds_id)
            wanted = sds.state
            if runtime is None and grace and sds_id not in self.membership.seen:
                continue
            if runtime is None or not runtime.serving:
                wanted = SdsState.DOWN
            elif sds.state is not SdsState.DOWN:  # Registering is what makes it UP.
                wanted = SdsState.DEGRADED if runtime.failed_devices else SdsState.UP
            if wanted is not sds.state:
                try:
                    await self.execute(commands.SetSdsState(sds_id=sds_id, state=wanted))
                except NotFoundError:
                    continue  # Removed just now.

    def _ask_for_purges(self, nursery: trio.Nursery) -> None:
        """Asks each SDS that still has something of a deleted volume, and again when it has not confirmed for long."""
        state, now = self.manager.state, trio.current_time()
        pending = {(purge.volume_id, sds_id) for purge in state.purges.values() for sds_id in purge.sds_ids}
        self._purge_asked = {key: at for key, at in self._purge_asked.items() if key in pending}
        due = [key for key in sorted(pending) if now - self._purge_asked.get(key, -math.inf) >= PURGE_AGAIN_SECONDS]
        for volume_id, sds_id in due[:PURGES_ASKED_MAX]:
            runtime = self.membership.sds.get(sds_id)
            if runtime is not None and runtime.serving:
                self._purge_asked[volume_id, sds_id] = now
                nursery.start_soon(self._ask_for_purge, runtime.session, volume_id)

    async def _ask_for_purge(self, session: Session, volume_id: int) -> None:
        try:
            await session.call("volume.deleted", {"volume_id": volume_id})
        except Error as error:  # It is asked again.
            _log.info("purge not confirmed yet", peer=str(session.peer), volume_id=volume_id, reason=error.message)

    async def purged(self, sds_id: int, volume_ids: Iterable[int]) -> None:
        """An SDS has given back all that it had of deleted volumes."""
        for volume_id in volume_ids:
            purge = self.manager.state.purges.get(volume_id)
            if purge is not None and sds_id in purge.sds_ids:
                await self.execute(commands.VolumePurged(volume_id=volume_id, sds_id=sds_id))

    # -- verify

    async def verify_volume(
        self, volume_id: int, first_chunk: int = 0, count: int | None = None, *, repair: bool = False
    ) -> VerifyReport:
        """Compares both copies of every chunk (or some), and each copy's bytes with its tags. IO may go on meanwhile.

        With ``repair`` bad blocks are then rewritten from the other copy: the report is of before.

        Raises NotFoundError when the volume does not exist, or is deleted while this goes on; InvalidError when it has
        no chunk ``first_chunk``.
        """
        volume = self.manager.state.volumes.get(volume_id)
        if volume is None:
            raise NotFoundError(f"no volume number {volume_id}")
        if first_chunk >= volume.chunks:
            raise InvalidError(f"volume {volume.name} has chunks 0 to {volume.chunks - 1}, not {first_chunk}")
        report = VerifyReport()
        step = VERIFY_CHUNKS_PER_CALL * VERIFY_CALLS_IN_FLIGHT_MAX
        end = volume.chunks if count is None else min(first_chunk + count, volume.chunks)
        for first in range(first_chunk, end, step):
            windows = range(first, min(first + step, end), VERIFY_CHUNKS_PER_CALL)
            answers: dict[int, dict[int, list[Answer] | None]] = {}
            async with trio.open_nursery() as nursery:
                for window in windows:
                    width = min(VERIFY_CHUNKS_PER_CALL, end - window)
                    # Not in the task: a NotFoundError has to come out of here as itself and not in a group.
                    chunks = range(window, window + width)
                    holders = {sds for chunk in chunks for sds in self._holders(volume_id, chunk).members}
                    answers[window] = {}
                    for sds_id in holders:
                        nursery.start_soon(self._verify_window, sds_id, volume_id, window, width, answers[window])
            for window in windows:
                for chunk in range(window, min(window + VERIFY_CHUNKS_PER_CALL, end)):
                    of_chunk = {sds_id: rows and rows[chunk - window] for sds_id, rows in answers[window].items()}
                    before = report.count
                    await self._verify_chunk(report, volume_id, chunk, of_chunk)
                    if repair and report.count > before:
                        await self._ask_repair(volume_id, chunk)
        return report

    async def _ask_repair(self, volume_id: int, chunk: int) -> None:
        runtime = self.membership.sds.get(self._holders(volume_id, chunk).primary)
        if runtime is not None:
            await self._tell([runtime.session], "repair", {"volume_id": volume_id, "chunks": [chunk]})

    async def _verify_window(
        self, sds_id: int, volume_id: int, first: int, count: int, answers: dict[int, list[Answer] | None]
    ) -> None:
        """Asks an SDS that has one of these chunks about all of them: the others cost it next to nothing."""
        answers[sds_id] = await self._ask_verify(sds_id, volume_id, first, count)

    async def _verify_chunk(
        self, report: VerifyReport, volume_id: int, chunk: int, answers: Mapping[int, Answer | None]
    ) -> None:
        """Adds one chunk to the report. Copies that IO goes to may differ for a moment, and a copy that has moved is no
        copy: a difference has to last, between those that are the copies by then."""
        holders = self._holders(volume_id, chunk)
        check_placement(report, self.manager.state, chunk, holders.primary, holders.secondary)
        both: dict[int, Answer | None] = {sds_id: answers.get(sds_id) for sds_id in holders.members}
        asked = both.keys() <= answers.keys()  # else it has moved since
        for attempt in range(1, VERIFY_TRIES + 1):
            trial = VerifyReport()
            check_copies(trial, chunk, both)
            # That there is one copy only does not pass while this waits.
            if trial.count == (len(both) < 2) or (asked and None in both.values()) or attempt == VERIFY_TRIES:
                break
            await trio.sleep(VERIFY_AGAIN_SECONDS * attempt)
            both = dict.fromkeys(self._holders(volume_id, chunk).members)
            for sds_id in both:
                rows = await self._ask_verify(sds_id, volume_id, chunk, 1)
                both[sds_id] = rows and rows[0]
            asked = True
        check_copies(report, chunk, both)

    def _holders(self, volume_id: int, chunk: int) -> Holders:
        segments = self.manager.state.maps.get(volume_id)
        if segments is None:
            raise NotFoundError(f"no volume number {volume_id}")
        return entry_of(segments, chunk).roles.holders

    async def _ask_verify(self, sds_id: int, volume_id: int, first: int, count: int) -> list[Answer] | None:
        runtime = self.membership.sds.get(sds_id)
        if runtime is None:
            return None
        params = {"volume_id": volume_id, "first_chunk": first, "count": count}
        try:
            async with self._verifying:
                rows: Any = await runtime.session.call("verify", params, timeout=VERIFY_TIMEOUT_SECONDS)
        except Error as error:
            _log.warning("an SDS cannot verify", peer=str(runtime.session.peer), reason=error.message)
            return None
        if not isinstance(rows, list) or len(rows) != count or not all(is_answer(row) for row in rows):
            _log.error("an SDS answers verify with something else", peer=str(runtime.session.peer))
            return None
        return list(rows)


def volume_info(state: State, volume_id: int) -> dict[str, Any]:
    """A volume as an SDS is told of it; raises NotFoundError."""
    volume = state.volumes.get(volume_id)
    if volume is None:
        raise NotFoundError(f"no volume number {volume_id}")
    return {
        "size_bytes": volume.size_bytes,
        "pool_id": volume.pool_id,
        "thick": volume.thick,
        "commit": state.pools[volume.pool_id].durability == "commit",
        "mappings": [[mapping.sdc_id, mapping.mapping_id, mapping.read_only] for mapping in volume.mappings],
        "segments": len(state.maps[volume_id]),
    }
