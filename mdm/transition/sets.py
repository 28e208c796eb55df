"""Who has a chunk: members left out, learners named and joined. (``forced``: one SDS made to go on alone.)

Each command is for many chunks at once: one SDS down is one command over all that it shared with another one. Each is
a compare-and-set, entry by entry: what is no longer as the command assumes is passed over.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from mdm import commands
from mdm.events import EventType
from mdm.identity import Kind
from mdm.model import MOVED, SETTLED, Holders, Joined, Sds, SdsState, Volume
from mdm.segments import Entry, Rewriter, Rewritten, Roles, edit
from mdm.transition.draft import Draft
from pfvol.errors import ConflictError, InvalidError


def leave_out(draft: Draft, command: commands.LeaveOut) -> int:
    keeper: Sds = draft.get(Kind.SDS, command.keeper)
    left: Sds = draft.get(Kind.SDS, command.left)
    if keeper is left:
        raise InvalidError(f"SDS {keeper.name} cannot leave itself out")
    named = command.chunks is not None

    def change(roles: Roles) -> Roles | None:
        members = (roles.primary, roles.secondary)
        if roles.secondary and (roles.primary, roles.left) in command.unsettled:
            return None
        if (command.as_primary and members == (keeper.sds_id, left.sds_id)) or (
            command.as_secondary and members == (left.sds_id, keeper.sds_id)
        ):
            # It is brought up to date when it comes back, unless it was to go anyway and another one is on its way.
            learner = roles.learner if left.removing and roles.learner else left.sds_id
            return Roles(keeper.sds_id, 0, learner, left.sds_id)
        return roles if named and (roles.primary, roles.learner) == (keeper.sds_id, left.sds_id) else None

    except_chunks = _by_volume(command.except_chunks)
    only = _by_volume(command.chunks or ())
    rewriter, changes = Rewriter(change), Changes(draft)
    pair = {keeper.sds_id, left.sds_id}
    for volume in _volumes(draft):
        if not any(pair.issubset(holders) and change(Roles(*holders, 0)) for holders in volume.placement):
            continue  # Who has trouble with an SDS asks again and again, long after nothing is left to change.
        kept = except_chunks.get(volume.volume_id, set())
        segments = draft.table("maps")[volume.volume_id]
        if named:
            chunks = only.get(volume.volume_id, set()) - kept
            done = edit(segments, chunks, lambda _, entry: change(entry.roles))
        else:
            done = rewriter.rewrite(segments, kept)
        changes.take(volume, done)
    changes.tell_left(left, keeper, "left out of")
    return changes.finish()


def withdraw(draft: Draft, command: commands.Withdraw) -> int:
    sds: Sds = draft.get(Kind.SDS, command.sds_id)
    peer: Sds = draft.get(Kind.SDS, command.peer)
    if peer.incarnation != command.incarnation:
        raise ConflictError(f"SDS {peer.name} has restarted meanwhile")

    def change(roles: Roles) -> Roles | None:
        if roles.secondary and (roles.primary, roles.left) in command.unsettled:
            return None
        if {roles.primary, roles.secondary} == {sds.sds_id, peer.sds_id}:
            return Roles(peer.sds_id, 0, roles.learner, sds.sds_id)
        return roles._replace(learner=0) if (roles.primary, roles.learner) == (peer.sds_id, sds.sds_id) else None

    changes = Changes(draft)
    for volume_id, chunks in _by_volume(command.chunks).items():
        changes.edit(volume_id, chunks, lambda _, entry: change(entry.roles))
    changes.tell_left(sds, peer, "cannot keep")
    return changes.finish()


def join_learners(draft: Draft, command: commands.JoinLearners) -> Joined:
    draft.get(Kind.SDS, command.primary)
    learner: Sds = draft.get(Kind.SDS, command.learner)
    epochs: dict[int, dict[int, int]] = {}
    for volume_id, chunk, epoch in command.chunks:
        epochs.setdefault(volume_id, {})[chunk] = epoch
    moved: list[tuple[int, int, int, int]] = []
    changes = Changes(draft)
    for volume_id, of_volume in epochs.items():

        def change(
            chunk: int, entry: Entry, volume_id: int = volume_id, of_volume: dict[int, int] = of_volume
        ) -> Roles | None:
            roles = entry.roles
            expected = (of_volume[chunk], command.primary, learner.sds_id)
            if (entry.epoch, roles.primary, roles.learner) != expected:
                return None
            if not roles.secondary:
                return Roles(roles.primary, learner.sds_id, 0, 0 if roles.left == learner.sds_id else roles.left)
            goes = _who_goes(draft, roles.holders)
            stays = roles.secondary if goes == roles.primary else roles.primary
            moved.append((volume_id, chunk, stays, goes))
            return Roles(stays, learner.sds_id, 0, goes)

        changes.edit(volume_id, of_volume, change)
    if changes.entries:
        draft.event(
            EventType.CHUNKS_JOINED,
            f"SDS {learner.name} has {changes.entries} chunks whole",
            pd_id=learner.pd_id,
            sds_id=learner.sds_id,
            details={"chunks": changes.entries, "moved": len(moved)},
        )
    return Joined(changes.finish(moves=bool(moved)), tuple(moved))


def settle_moves(draft: Draft, command: commands.SettleMoves) -> None:
    if draft.table("counters").get(SETTLED, 0) < command.version:
        draft.set_counter(SETTLED, command.version)


def set_learners(draft: Draft, command: commands.SetLearners) -> int:
    changes = Changes(draft)
    unsettled = draft.state.moved_version  # `left` says then whom the MDM has to hear of
    for volume_id, choices in command.choices.items():
        volume = draft.table("volumes").get(volume_id)
        if volume is None:
            continue
        domain = draft.table("pools")[volume.pool_id].pd_id
        wanted = {chunk: (epoch, sds_id) for chunk, epoch, sds_id in choices}
        fitting = {0} | {sds.sds_id for sds in draft.table("sds").values() if sds.pd_id == domain}

        def change(
            chunk: int,
            entry: Entry,
            wanted: dict[int, tuple[int, int]] = wanted,
            fitting: set[int] = fitting,
        ) -> Roles | None:
            epoch, sds_id = wanted[chunk]
            roles = entry.roles
            if epoch != entry.epoch or sds_id not in fitting or sds_id == roles.learner:
                return None
            if sds_id in roles.holders.members or (unsettled and roles.secondary and roles.left == sds_id):
                return None
            # A learner that is `left` has an older copy. Who was passed over has given it back.
            return roles._replace(learner=sds_id, left=0 if roles.left == sds_id else roles.left)

        changes.edit(volume_id, wanted, change)
    return changes.finish()


def _volumes(draft: Draft) -> Iterable[Volume]:
    return list(draft.table("volumes").values())


def _by_volume(chunks: Iterable[tuple[int, int]]) -> dict[int, set[int]]:
    found: dict[int, set[int]] = {}
    for volume_id, chunk in chunks:
        found.setdefault(volume_id, set()).add(chunk)
    return found


def _who_goes(draft: Draft, holders: Holders) -> int:
    """Which member a learner replaces: one that is down, one that is being removed, one in the learner's fault set, at
    last the fuller one."""
    servers = draft.table("sds")
    fault_set_id = servers[holders.learner].fault_set_id

    def why(sds_id: int) -> tuple[bool, bool, bool, float]:
        sds: Sds = servers[sds_id]
        shares = fault_set_id is not None and sds.fault_set_id == fault_set_id
        return sds.state is SdsState.DOWN, sds.removing, shares, sds.copies / max(1, sds.slots)

    return max((holders.secondary, holders.primary), key=why)


class Changes:
    """What a command changes in maps, volume by volume."""

    def __init__(self, draft: Draft) -> None:
        self._draft = draft
        self.volumes: dict[int, Volume] = {}
        """As they were, by id."""
        self.entries = 0
        self._counts: Counter[Holders] = Counter()

    def edit(self, volume_id: int, chunks: Iterable[int], change: Callable[[int, Entry], Roles | None]) -> None:
        """Single chunks of a volume, if it is still there."""
        volume = self._draft.table("volumes").get(volume_id)
        if volume is not None:
            self.take(volume, edit(self._draft.table("maps")[volume_id], chunks, change))

    def take(self, volume: Volume, done: Rewritten) -> None:
        if done.entries:
            self._draft.change_map(self._draft.table("volumes")[volume.volume_id], done)
            self.volumes.setdefault(volume.volume_id, volume)
            self.entries += done.entries
            self._counts.update(done.counts)

    def tell_left(self, left: Sds, alone: Sds, what: str) -> None:
        """An event if ``left`` is no member any more of chunks that ``alone`` serves alone now."""
        lost = -sum(count for holders, count in self._counts.items() if left.sds_id in holders.members)
        if lost:
            self._draft.event(
                EventType.CHUNKS_LEFT_OUT,
                f"SDS {left.name} {what} {lost} chunks: SDS {alone.name} serves them alone",
                pd_id=left.pd_id,
                sds_id=left.sds_id,
                details={"chunks": lost, "alone": alone.name},
            )

    def finish(self, *, moves: bool = False) -> int:
        """Raises the map's version and tells whose health is another now; how many entries changed. ``moves``: in some
        a member was replaced."""
        if self.entries:
            version = self._draft.next_number("map", 2**63 - 1) + 1
            if moves:
                self._draft.set_counter(MOVED, version)
            self._draft.tell_health(self.volumes.values())
        return self.entries
