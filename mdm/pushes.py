"""Tells SDSs and SDCs of changes of the map: one task per session, one message at a time, each as the map is by then.

A ``Pusher`` remembers the state that its session knows and compares it with the newest one: no list of what is still
to be told that could miss something, and changes that come faster than they are confirmed become one. What a session
was told last is never older than what it was told before. An SDS that does not confirm loses its session; it fetches
its maps anew when it registers again.

``Pushes`` also knows which chunks are *unsettled*: a learner has come in the place of a member, and neither that one
nor the member that stays has confirmed it. Both may still serve each other by the old map, so nobody may be left out
of such a chunk yet. That there are such chunks is durable (``State.moved_version``), which ones is not: an MDM that is
started while there are some takes every chunk for one whose primary and ``left`` it has not heard of yet.

Owns the pushers' tasks, in the nursery given to ``start``. Atomic because no await stands between: taking the state to
tell, and comparing it; a registration's answer, and what the pusher begins with.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import contextmanager

import trio

from mdm.commands import JoinLearners, SettleMoves
from mdm.manager import Manager
from mdm.model import Joined, State
from mdm.segments import count_roles, differences
from pfvol.constants import RPC_TIMEOUT_SECONDS, SEGMENT_CHUNKS, SEGMENT_ENTRY_BYTES
from pfvol.errors import Error
from pfvol.log import get_logger
from pfvol.rpc.session import Session

SEGMENT_BYTES = SEGMENT_CHUNKS * SEGMENT_ENTRY_BYTES
PUSH_SEGMENTS_MAX = 2 * 1024**2 // SEGMENT_BYTES
REPLACED_FIRST_SECONDS_MAX = 0.3

Tell = Callable[[Session, int, State, State], Awaitable[None]]

_log = get_logger(__name__)


class Pusher:
    """``told``: the state whose map the session ``number`` knows."""

    def __init__(self, session: Session, number: int, told: State, tell: Tell) -> None:
        self.session = session
        self.number = number
        self.told = told
        self._tell = tell
        self._wake = trio.Event()
        self._heard = trio.Event()
        self._again = False
        self._scope = trio.CancelScope()

    def begin(self, told: State, *, again: bool) -> None:
        """It has registered and fetches its maps as of ``told``. ``again``: it is to confirm that."""
        self.told = told
        self._again = again
        self._wake.set()

    def wake(self) -> None:
        self._wake.set()

    def stop(self) -> None:
        self._scope.cancel()

    async def heard(self, version: int) -> None:
        """Returns when the session has confirmed this version; never, when it ends."""
        while self.told.map_version < version:
            await self._heard.wait()

    async def run(self, newest: Callable[[], State], confirmed: Callable[[int, int], None]) -> None:
        with self._scope:
            while True:
                await self._wake.wait()
                self._wake = trio.Event()
                told, state = self.told, newest()
                if state.map_version == told.map_version and not self._again:
                    continue
                self._again = False
                try:
                    await self._tell(self.session, self.number, told, state)
                except Error as error:
                    _log.warning("a map was not confirmed", peer=str(self.session.peer), reason=error.message)
                    self.session.close(f"map.changed was not confirmed: {error.message}")
                    return
                if self.told is not told:
                    continue  # It has registered again meanwhile: what it knows was settled then.
                self.told = state
                heard, self._heard = self._heard, trio.Event()
                heard.set()
                confirmed(self.number, state.map_version)


class Pushes:
    """See the module."""

    def __init__(self, manager: Manager) -> None:
        self._manager = manager
        self._nursery: trio.Nursery | None = None
        self._sds: dict[Session, Pusher] = {}
        self._sdc: dict[Session, Pusher] = {}
        self._joining: list[frozenset[tuple[int, int]]] = []
        self._unsettled: dict[tuple[int, int], tuple[int, frozenset[int]]] = {}
        """Per chunk the map version that moved it, and the SDSs of which one has to confirm it."""
        self._inherited = _may_be_unsettled(manager.state)

    def start(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._keep_settled()
        for pusher in (*self._sds.values(), *self._sdc.values()):
            self._run(pusher)

    def sds_registered(self, session: Session, sds_id: int, state: State) -> None:
        """To be called right before the answer that has ``state``'s map version is returned."""
        awaited = any(sds_id in who for who in (*self._inherited, *(who for _, who in self._unsettled.values())))
        self._registered(self._sds, session, sds_id, state, _tell_sds, again=awaited)

    def sdc_registered(self, session: Session, sdc_id: int, state: State) -> None:
        """To be called right before the answer is returned."""
        self._registered(self._sdc, session, sdc_id, state, _tell_sdc, again=False)

    def dropped(self, session: Session) -> None:
        for pushers in (self._sds, self._sdc):
            pusher = pushers.pop(session, None)
            if pusher is not None:
                pusher.stop()

    def publish(self, first: Collection[int] = ()) -> None:
        """The map has changed. Those SDSs in ``first`` hear of it before the others, which wait for them only
        briefly."""
        early = [pusher for pusher in self._sds.values() if pusher.number in first]
        for pusher in early:
            pusher.wake()
        if early and self._nursery is not None:
            self._nursery.start_soon(self._publish_after, early, self._manager.state.map_version)
        else:
            self._wake_all()

    # -- chunks that are unsettled

    @contextmanager
    def joining(self, command: JoinLearners) -> Iterator[None]:
        """While the command is carried out, all of its chunks count as unsettled."""
        chunks = frozenset((volume_id, chunk) for volume_id, chunk, _ in command.chunks)
        self._joining.append(chunks)
        try:
            yield
        finally:
            self._joining.remove(chunks)
            self._keep_settled()

    def joined(self, joined: Joined, version: int) -> None:
        for volume_id, chunk, stays, goes in joined.moved:
            self._unsettled[volume_id, chunk] = (version, frozenset((stays, goes)))

    def unsettled(self) -> frozenset[tuple[int, int]]:
        return frozenset(self._unsettled).union(*self._joining)

    def inherited(self) -> frozenset[tuple[int, int]]:
        """(primary, left) of pairs that may be unsettled since before this MDM was started."""
        return frozenset(self._inherited)

    def _confirmed(self, sds_id: int, version: int) -> None:
        settled = [key for key, (since, who) in self._unsettled.items() if since <= version and sds_id in who]
        for key in settled:
            del self._unsettled[key]
        self._inherited = {pair for pair in self._inherited if sds_id not in pair}
        self._keep_settled()

    def _keep_settled(self) -> None:
        """Has it written down when nothing is unsettled any more."""
        version = self._manager.state.moved_version
        if version and self._nursery is not None and not (self._unsettled or self._joining or self._inherited):
            self._nursery.start_soon(self._settle, version)

    async def _settle(self, version: int) -> None:
        try:
            await self._manager.execute(SettleMoves(version=version))
        except Error as error:  # The next start takes care.
            _log.warning("it cannot be kept that moves are settled", reason=error.message)

    # -- parts

    def _registered(
        self, pushers: dict[Session, Pusher], session: Session, number: int, state: State, tell: Tell, *, again: bool
    ) -> None:
        if session not in pushers:
            pushers[session] = Pusher(session, number, state, tell)
            self._run(pushers[session])
        pushers[session].begin(state, again=again)

    def _run(self, pusher: Pusher) -> None:
        if self._nursery is not None:
            self._nursery.start_soon(pusher.run, lambda: self._manager.state, self._confirmed_by(pusher))

    def _confirmed_by(self, pusher: Pusher) -> Callable[[int, int], None]:
        return self._confirmed if pusher.session in self._sds else lambda _number, _version: None

    async def _publish_after(self, early: list[Pusher], version: int) -> None:
        with trio.move_on_after(REPLACED_FIRST_SECONDS_MAX):
            for pusher in early:
                await pusher.heard(version)
        self._wake_all()

    def _wake_all(self) -> None:
        for pusher in (*self._sds.values(), *self._sdc.values()):
            pusher.wake()


def _may_be_unsettled(state: State) -> set[tuple[int, int]]:
    """The (primary, left) of all pairs, if a move may be unsettled: the one that stays leads, the other one is
    ``left``."""
    if not state.moved_version:
        return set()
    roles = (roles for segments in state.maps.values() for roles in count_roles(segments))
    return {(one.primary, one.left) for one in roles if one.secondary and one.left}


async def _tell_sds(session: Session, sds_id: int, told: State, state: State) -> None:
    """The segments of its domain; only with the last of them the new version. Also those in which it has no part in
    either state: it may have had one in between, and looked."""
    sds = state.sds.get(sds_id)
    changed = [
        (volume_id, index)
        for volume_id, index in differences(told.maps, state.maps)
        if sds is not None and state.pools[state.volumes[volume_id].pool_id].pd_id == sds.pd_id
    ]
    batches = [changed[at : at + PUSH_SEGMENTS_MAX] for at in range(0, len(changed), PUSH_SEGMENTS_MAX)] or [[]]
    for number, batch in enumerate(batches, start=1):
        params = {
            "version": state.map_version if number == len(batches) else told.map_version,
            "made": state.map_version,
            "segments": [
                [volume_id, index, state.maps[volume_id][index].ljust(SEGMENT_BYTES, b"\0")]
                for volume_id, index in batch
            ],
        }
        await session.call("map.changed", params, timeout=RPC_TIMEOUT_SECONDS)


async def _tell_sdc(session: Session, sdc_id: int, told: State, state: State) -> None:
    """Which segments of the volumes that are mapped to it have changed: it fetches those that it has."""
    changed: dict[int, list[int]] = {}
    for volume_id, index in differences(told.maps, state.maps):
        if state.volumes[volume_id].mapping(sdc_id) is not None:
            changed.setdefault(volume_id, []).append(index)
    for volume_id, segments in changed.items():
        params = {"volume_id": volume_id, "segments": segments}
        await session.call("map.changed", params, timeout=RPC_TIMEOUT_SECONDS)
