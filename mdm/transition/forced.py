"""One SDS made to serve chunks alone whose members are gone: what an operator asks for who accepts the loss of data.

Never done by itself. Which copies may be forced follows from the map:

- a *member* has every write that was acknowledged: it could only not agree with the other one, which is gone;
- a learner that is also ``left``, the last to leave the set, has an older copy, which was whole once;
- any other learner was given the chunk to make a new copy, and has a part of it at most: only when that is asked for.

An entry that goes to a copy without all acknowledged writes gets an epoch of the next era (``EPOCH_ERA``): whoever
sees the era change knows that data was lost, whatever else it has missed. Its tags are newer than all that others may
hold, so no (epoch, seq) is ever given twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Final

from mdm import commands
from mdm.events import EventType
from mdm.health import down
from mdm.identity import Kind
from mdm.model import Sds, SdsState, Volume
from mdm.segments import Rewriter, Roles, count_roles, edit, entry_of
from mdm.transition.draft import Draft
from mdm.transition.sets import Changes
from pfvol.constants import EPOCH_ERA
from pfvol.errors import ConflictError, InvalidError

MEMBER: Final = "member"
OLDER: Final = "older"
INCOMPLETE: Final = "incomplete"
VOLUMES_NAMED_MAX: Final = 10

Found = list[tuple[Volume, Counter[str], set[int]]]
"""Per volume how many chunks of which kind could be forced, and the SDSs that have what is newer."""


def force_alone(draft: Draft, command: commands.ForceAlone) -> int:
    sds: Sds = draft.get(Kind.SDS, command.sds_id)
    if sds.state is SdsState.DOWN:
        raise ConflictError(f"SDS {sds.name} is DOWN: start it before it is made to serve alone")
    if command.chunks is not None and command.volume_id is None:
        raise InvalidError("chunks are those of one volume: name it")
    every = list(draft.table("volumes").values())
    volumes = every if command.volume_id is None else [draft.get(Kind.VOLUME, command.volume_id)]
    kind_of = _kinds(sds, down(draft.state))
    if not command.accepted:
        raise _refusal(draft, sds, _survey(draft, volumes, command, kind_of), incomplete=command.incomplete)
    taken = {MEMBER, OLDER, INCOMPLETE} if command.incomplete else {MEMBER, OLDER}
    changes = Changes(draft)
    for kinds, step in ((taken & {MEMBER}, 1), (taken - {MEMBER}, EPOCH_ERA)):
        _rewrite(draft, changes, volumes, command, _rule(sds, kind_of, kinds), step)
    if changes.entries:
        names = ", ".join(sorted(volume.name for volume in changes.volumes.values())[:VOLUMES_NAMED_MAX])
        draft.event(
            EventType.DATA_LOSS_ACCEPTED,
            f"SDS {sds.name} was forced to serve {changes.entries} chunks of {names} alone: "
            "what only other copies had is lost",
            pd_id=sds.pd_id,
            volume_id=command.volume_id,
            sds_id=sds.sds_id,
            details={"chunks": changes.entries},
        )
    return changes.finish()


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
    draft: Draft,
    changes: Changes,
    volumes: Iterable[Volume],
    command: commands.ForceAlone,
    change: Callable[[Roles], Roles | None],
    step: int,
) -> None:
    rewriter = Rewriter(change, step=step)
    for volume in volumes:
        segments = draft.table("maps")[volume.volume_id]
        if command.chunks is None:
            done = rewriter.rewrite(segments)
        else:
            done = edit(segments, command.chunks, lambda _, entry: change(entry.roles), step=step)
        changes.take(volume, done)


def _survey(draft: Draft, volumes: Iterable[Volume], command: commands.ForceAlone, kind_of: KindOf) -> Found:
    found: Found = []
    for volume in volumes:
        segments = draft.table("maps")[volume.volume_id]
        if command.chunks is None:
            roles = count_roles(segments)
        else:
            roles = Counter(entry_of(segments, chunk).roles for chunk in command.chunks if chunk < volume.chunks)
        kinds: Counter[str] = Counter()
        newer: set[int] = set()
        for each, count in roles.items():
            if (kind := kind_of(each)) is not None:
                kinds[kind] += count
                newer.update(each.holders.members)
        newer.discard(command.sds_id)
        if kinds:
            found.append((volume, kinds, newer))
    return found


def _refusal(draft: Draft, sds: Sds, found: Found, *, incomplete: bool) -> ConflictError:
    servers = draft.table("sds")
    total: Counter[str] = sum((kinds for _, kinds, _ in found), Counter())
    names = ", ".join(sorted({servers[sds_id].name for *_, newer in found for sds_id in newer}))
    details = [
        {
            "name": volume.name,
            "member_chunks": kinds[MEMBER],
            "older_chunks": kinds[OLDER],
            "incomplete_chunks": kinds[INCOMPLETE],
            "newer_at": sorted(servers[sds_id].name for sds_id in newer),
        }
        for volume, kinds, newer in found
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
    OLDER: "as they were when it left: what was written to them later is lost",
    INCOMPLETE: "that were never whole here: what is missing reads as zeros",
}
