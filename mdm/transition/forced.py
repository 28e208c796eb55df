"""One SDS made to serve chunks alone whose members are gone: what an operator asks for who accepts the loss of data.

Never done by itself. Which copies may be forced follows from the map:

- a *member* has every write that was acknowledged: it could only not agree with the other one, which is gone;
- a learner that is also ``left``, the last to leave the set, has an older copy, which was whole once, and which newer
  blocks have partly overwritten if it had begun to be brought up to date;
- any other learner was given the chunk to make a new copy, and has a part of it at most: only when that is asked for.

An entry that goes to a copy without all acknowledged writes gets an epoch of the next era (``EPOCH_ERA``): whoever
sees the era change knows that data was lost, whatever else it has missed. Its tags are newer than all that others may
hold, so no (epoch, seq) is ever given twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Final

from mdm import commands
from mdm.events import EventType
from mdm.health import down
from mdm.identity import Kind
from mdm.model import Forced, Sds, SdsState, State, Volume
from mdm.segments import Rewriter, Roles, count_roles
from mdm.transition.draft import Draft
from mdm.transition.sets import Changes
from pfvol.constants import EPOCH_ERA
from pfvol.errors import ConflictError

MEMBER: Final = "member"
OLDER: Final = "older"
INCOMPLETE: Final = "incomplete"
VOLUMES_NAMED_MAX: Final = 10

Found = list[tuple[Volume, Counter[str], set[int]]]
"""Per volume how many chunks of which kind could be forced, and who else is a member of those that are taken."""


def force_alone(draft: Draft, command: commands.ForceAlone) -> Forced:
    sds: Sds = draft.get(Kind.SDS, command.sds_id)
    if sds.state is SdsState.DOWN:
        raise ConflictError(f"SDS {sds.name} is DOWN: start it before it is made to serve alone")
    if command.volume_id is not None:
        draft.get(Kind.VOLUME, command.volume_id)
    found = _survey(draft.state, command)
    if not command.accepted:
        raise _refusal(draft, sds, found, incomplete=command.incomplete)
    kind_of, taken = _kinds(sds, down(draft.state)), _taken(command)
    changes = Changes(draft)
    _rewrite(draft, changes, found, _rule(sds, kind_of, taken & {MEMBER}), 1)
    members = changes.entries
    for other in sorted({sds_id for *_, others in found for sds_id in others}):
        changes.tell_left(draft.table("sds")[other], sds, "left out of")
    older = _rewrite(draft, changes, found, _rule(sds, kind_of, taken - {MEMBER}), EPOCH_ERA)
    if older:
        names = ", ".join(sorted(older)[:VOLUMES_NAMED_MAX])
        draft.event(
            EventType.DATA_LOSS_ACCEPTED,
            f"SDS {sds.name} was forced to serve {changes.entries - members} chunks of {names} alone: "
            "what only other copies had is lost",
            pd_id=sds.pd_id,
            volume_id=command.volume_id,
            sds_id=sds.sds_id,
            details={"chunks": changes.entries - members},
        )
    return Forced(changes.finish(), members)


def forced_out(state: State, command: commands.ForceAlone) -> frozenset[int]:
    """The SDSs that would be no members any more of what the command takes. Looks at whole maps: for a thread."""
    return frozenset(sds_id for *_, others in _survey(state, command) for sds_id in others)


KindOf = Callable[[Roles], str | None]


def _kinds(sds: Sds, gone: frozenset[int]) -> KindOf:
    """What kind of copy the SDS has of a chunk that nobody else can serve; None: of another chunk, or none."""

    def kind_of(roles: Roles) -> str | None:
        others = [sds_id for sds_id in roles.holders.members if sds_id != sds.sds_id]
        if not others or not gone.issuperset(others):
            return None
        if sds.sds_id in roles.holders.members:
            return MEMBER
        if roles.learner != sds.sds_id:
            return None
        return OLDER if roles.left == sds.sds_id else INCOMPLETE

    return kind_of


def _rule(sds: Sds, kind_of: KindOf, kinds: set[str]) -> Callable[[Roles], Roles | None]:
    def change(roles: Roles) -> Roles | None:
        if kind_of(roles) not in kinds:
            return None
        other = next(sds_id for sds_id in roles.holders.members if sds_id != sds.sds_id)
        return Roles(sds.sds_id, 0, other, other)

    return change


def _rewrite(
    draft: Draft, changes: Changes, found: Found, change: Callable[[Roles], Roles | None], step: int
) -> list[str]:
    """The names of the volumes that have changed."""
    rewriter = Rewriter(change, step=step)
    names = []
    for volume, _, _ in found:
        done = rewriter.rewrite(draft.table("maps")[volume.volume_id])
        changes.take(volume, done)
        names += [volume.name] if done.entries else []
    return names


def _taken(command: commands.ForceAlone) -> set[str]:
    return {MEMBER, OLDER, INCOMPLETE} if command.incomplete else {MEMBER, OLDER}


def _survey(state: State, command: commands.ForceAlone) -> Found:
    kind_of, taken = _kinds(state.sds[command.sds_id], down(state)), _taken(command)
    found: Found = []
    for volume in state.volumes.values():
        if command.volume_id not in (None, volume.volume_id) or not volume.uses(command.sds_id):
            continue
        kinds: Counter[str] = Counter()
        others: set[int] = set()
        for each, count in count_roles(state.maps[volume.volume_id]).items():
            if (kind := kind_of(each)) is not None:
                kinds[kind] += count
                others.update(each.holders.members if kind in taken else ())
        others.discard(command.sds_id)
        if kinds:
            found.append((volume, kinds, others))
    return found


def _refusal(draft: Draft, sds: Sds, found: Found, *, incomplete: bool) -> ConflictError:
    servers = draft.table("sds")
    total: Counter[str] = sum((kinds for _, kinds, _ in found), Counter())
    names = ", ".join(sorted({servers[sds_id].name for *_, others in found for sds_id in others}))
    details = [
        {
            "name": volume.name,
            "member_chunks": kinds[MEMBER],
            "older_chunks": kinds[OLDER],
            "incomplete_chunks": kinds[INCOMPLETE],
            "newer_at": sorted(servers[sds_id].name for sds_id in others),
        }
        for volume, kinds, others in found
    ]
    more = (
        f" Of {total[INCOMPLETE]} other chunks it never had a whole copy: --incomplete serves these too, and what is "
        "missing reads as zeros."
        if total[INCOMPLETE] and not incomplete
        else ""
    )
    would = total[MEMBER] + total[OLDER] + (total[INCOMPLETE] if incomplete else 0)
    if not would:
        return ConflictError(
            f"nothing to promote: no chunk waits for another SDS of which SDS {sds.name} has a whole copy.{more}",
            volumes=details,
        )
    said = [
        f"{kinds[kind]} chunks of volume {volume.name} {what}"
        for volume, kinds, _ in found[:VOLUMES_NAMED_MAX]
        for kind, what in _WHAT.items()
        if kinds[kind] and (incomplete or kind != INCOMPLETE)
    ]
    if len(found) > VOLUMES_NAMED_MAX:
        said.append(f"and {len(found) - VOLUMES_NAMED_MAX} more volumes")
    lost = f" What only SDS {names} has is lost then, for good." if would > total[MEMBER] else ""
    return ConflictError(
        f"nothing was changed. SDS {sds.name} would serve alone: {'; '.join(said)}.{lost}{more} Better start SDS "
        f"{names} again. If that is impossible, be sure that it is dead: clients that still reach it would go on with "
        "it. To accept all this: --accept-data-loss",
        volumes=details,
    )


_WHAT: Final = {
    MEMBER: "with every acknowledged write",
    OLDER: "as they were when it left, partly overwritten if it had begun to be brought up to date: what was written "
    "to them later is lost",
    INCOMPLETE: "that were never whole here: what is missing reads as zeros",
}
