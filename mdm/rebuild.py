"""Which chunk gets which SDS as its learner: lost copies made again, SDSs emptied, copies spread evenly. Pure.

Works on counts (how many chunks of a volume have the same ``Holders``), so that it costs the same for a GiB and a PiB;
only the chunks of one batch are looked for in the maps. Promises:

- a learner is never on an SDS that has a copy (I7), and in another fault set than the copy that stays whenever the
  room left allows it for all;
- what can be placed is placed: chunks that need a copy are matched to room (``mdm.matching``). If room is left only
  where the copy that stays is, another chunk's copy is moved there first. What then is not placed has no place;
- chunks with a single copy come first, then those of SDSs that are to be emptied; copies are moved for evenness only
  while nothing else is to be done in the protection domain;
- an SDS gets a batch at a time (``BATCH_SLOTS``), so that its failure does not strand many. The rest of what was
  matched still fits afterwards.

A slot that is promised to a thick volume is never given away. A thin chunk takes a slot only once it was written, and
only the SDSs know which were: of each volume the part that they report counts.
"""

from __future__ import annotations

import struct
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from math import ceil

from mdm.matching import deal, match
from mdm.model import Holders, SdsState, State, Volume
from mdm.segments import ENTRY
from pfvol.constants import SEGMENT_CHUNKS

BATCH_SLOTS = 256  # learners of an SDS that are expected to take a slot, assigned and not yet joined
BATCH_CHUNKS = 8192  # and of all, never written ones too
UNEVEN_PERCENT = 10  # copies are moved when an SDS has so much less than its share, and then until all are even
UNEVEN_CHUNKS = 2

MEMBERS = struct.Struct("<HH")  # the second of an entry's three words

Choices = dict[int, list[tuple[int, int, int]]]
"""volume_id: [(chunk, epoch, learner), ...]"""


class Need(IntEnum):
    """What has to be done about a chunk, the most urgent first."""

    COPY = 0  # its only copy needs another one, and nobody is there to take it
    EMPTY = 1  # a copy has to leave its SDS
    COPYING = 2  # a learner is there
    WAIT = 3  # one copy serves; its learner, or the member to be left out, may come back
    LOST = 4  # no copy serves
    STRAY = 5  # two copies serve, and the learner that one would have moved to is gone
    NONE = 6


@dataclass(frozen=True, kw_only=True)
class Server:
    """An SDS. ``room``: slots that are neither taken nor promised, learners that are under way counted as taken."""

    sds_id: int
    fault_set_id: int | None
    slots: int
    room: int
    copies: int = 0
    up: bool
    removing: bool = False


@dataclass(frozen=True, kw_only=True)
class VolumeUse:
    """``full``: the part of its chunks that takes a slot (1 for a thick volume)."""

    volume_id: int
    pool_id: int
    full: float
    entries: Mapping[Holders, int]


@dataclass(frozen=True, kw_only=True)
class Domain:
    """One protection domain as it is. ``away``: per pool the SDSs that have been DOWN longer than it waits;
    ``paused``: pools whose rebuild was cancelled; ``evening``: copies are being moved for evenness."""

    servers: Mapping[int, Server]
    volumes: Sequence[VolumeUse]
    away: Mapping[int, frozenset[int]] = field(default_factory=dict)
    paused: frozenset[int] = frozenset()
    evening: bool = False

    def need(self, pool_id: int, entry: Holders) -> Need:
        servers = self.servers
        members = entry.members
        up = [sds_id for sds_id in members if servers[sds_id].up]
        if not up:
            return Need.LOST
        if len(up) < len(members):
            return Need.WAIT
        learner = servers.get(entry.learner)
        if len(members) == 1:
            if learner is None or (not learner.up and (learner.removing or self.is_away(pool_id, learner.sds_id))):
                return Need.COPY
            return Need.COPYING if learner.up else Need.WAIT
        if learner is not None and learner.up and not learner.removing:
            return Need.COPYING
        if any(servers[sds_id].removing for sds_id in members):
            return Need.EMPTY
        return Need.NONE if learner is None else Need.STRAY

    def is_away(self, pool_id: int, sds_id: int) -> bool:
        return sds_id in self.away.get(pool_id, frozenset())

    def leaver(self, entry: Holders) -> int:
        """The member in whose place the learner comes when it joins: as ``transition.sets`` decides it then."""

        def why(sds_id: int) -> tuple[bool, bool, float]:
            server = self.servers[sds_id]
            shares = entry.learner != 0 and self.together(sds_id, entry.learner)
            return server.removing, shares, server.copies / max(1, server.slots)

        return max((entry.secondary, entry.primary), key=why)

    def together(self, one: int, other: int) -> bool:
        """Whether two SDSs are in one fault set."""
        fault_set_id = self.servers[one].fault_set_id
        return fault_set_id is not None and fault_set_id == self.servers[other].fault_set_id

    def staying(self, entry: Holders) -> int:
        """The member beside which a learner is wanted: the other one, if there is one, is to go."""
        if not entry.secondary or self.servers[entry.secondary].removing:
            return entry.primary
        return entry.secondary


@dataclass
class Work:
    """What there is to do in a pool, in chunks. ``left``: in expected slots, all that is copied or shall be."""

    chunks: int = 0
    degraded: int = 0
    copying: int = 0
    wanted: int = 0
    waiting: int = 0
    lost: int = 0
    unplaced: int = 0
    left: float = 0.0
    reason: str | None = None
    """Why ``unplaced`` ones have no place."""

    @property
    def open(self) -> bool:
        """Whether anything may change without the state changing: what is waited for, or copied."""
        return bool(self.degraded or self.copying or self.wanted or self.lost)


@dataclass
class Plan:
    """``choices``: the learners to be set now (0: none any more); ``work`` per pool; ``evening`` for the next plan."""

    choices: Choices
    work: dict[int, Work]
    evening: bool = False


def domain_of(
    state: State,
    pd_id: int,
    reports: Mapping[int, Mapping[int, Sequence[int]]],
    *,
    away: Mapping[int, frozenset[int]],
    failed: Mapping[int, frozenset[int]] | None = None,
    evening: bool = False,
) -> Domain:
    """The protection domain in ``state``. ``reports``: per SDS and volume (chunks, blocks, chunks that it leads, ...)
    that hold data, as last told; ``failed``: per SDS the devices that take nothing any more."""
    domain = state.sds_of(pd_id)
    pool_ids = {pool.pool_id for pool in state.pools_of(pd_id)}
    up = {sds.sds_id for sds in domain if sds.state is not SdsState.DOWN}
    taken: Counter[int] = Counter()
    volumes = []
    for volume in state.volumes.values():
        if volume.pool_id in pool_ids:
            held = {sds.sds_id: reports.get(sds.sds_id, {}).get(volume.volume_id, (0, 0, 0)) for sds in domain}
            full = _full(volume, {sds_id: held[sds_id][2] for sds_id in up})
            entries = volume.placement
            volumes.append(VolumeUse(volume_id=volume.volume_id, pool_id=volume.pool_id, full=full, entries=entries))
            placed: Counter[int] = Counter()
            for entry, count in entries.items():
                placed.update(dict.fromkeys(entry.all, count))
            for sds_id, figures in held.items():
                taken[sds_id] += max(ceil(full * placed[sds_id]), 0 if volume.thick else figures[0])
    lost = failed or {}
    slots = {
        sds.sds_id: sum(item.slots for item in sds.devices if item.index not in lost.get(sds.sds_id, ()))
        for sds in domain
    }
    servers = {
        sds.sds_id: Server(
            sds_id=sds.sds_id,
            fault_set_id=sds.fault_set_id,
            slots=slots[sds.sds_id],
            room=max(0, slots[sds.sds_id] - taken[sds.sds_id]),
            copies=sds.copies,
            up=sds.sds_id in up,
            removing=sds.removing,
        )
        for sds in domain
    }
    paused = frozenset(pool_id for pool_id in pool_ids if state.pools[pool_id].rebuild_cancelled)
    return Domain(servers=servers, volumes=volumes, away=away, paused=paused, evening=evening)


def _full(volume: Volume, written: Mapping[int, int]) -> float:
    """The part of a volume's chunks that takes slots. ``written``: chunks with data that the SDSs that are UP lead."""
    if volume.thick:
        return 1
    led = sum(count for entry, count in volume.placement.items() if entry.primary in written)
    return min(1, sum(written.values()) / led) if led else 0


def survey(domain: Domain) -> dict[int, Work]:
    """What there is to do in each pool that has volumes, without planning it."""
    found: dict[int, Work] = {}
    for volume in domain.volumes:
        work = found.setdefault(volume.pool_id, Work())
        for entry, count in volume.entries.items():
            need = domain.need(volume.pool_id, entry)
            work.chunks += count
            work.degraded += count if need is not Need.LOST and (need is Need.WAIT or not entry.secondary) else 0
            work.copying += count if need is Need.COPYING else 0
            work.wanted += count if need in (Need.COPY, Need.EMPTY) else 0
            work.waiting += count if need is Need.WAIT else 0
            work.lost += count if need is Need.LOST else 0
            work.left += count * volume.full if need in (Need.COPY, Need.EMPTY, Need.COPYING) else 0
    return found


def plan(domain: Domain, maps: Mapping[int, Sequence[bytes]]) -> Plan:
    """The next batch of learners."""
    return _Planner(domain).plan(maps)


@dataclass
class _Wish:
    """Chunks that are alike and need a learner: ``quotas`` says how many shall get which."""

    need: Need
    volume: VolumeUse
    entry: Holders
    count: int
    quotas: dict[int, int] = field(default_factory=dict)


class _Planner:
    def __init__(self, domain: Domain) -> None:
        self.domain = domain
        self.room = {key: server.room for key, server in domain.servers.items() if server.up and not server.removing}
        self.work = survey(domain)
        self.wishes: list[_Wish] = []
        self.strays: list[_Wish] = []
        self.settled: list[_Wish] = []
        self.copying: Counter[Holders] = Counter()
        for volume in domain.volumes:
            if volume.pool_id not in domain.paused:
                self._sort(volume)

    def _sort(self, volume: VolumeUse) -> None:
        for entry, count in volume.entries.items():
            need = self.domain.need(volume.pool_id, entry)
            wish = _Wish(need, volume, entry, count)
            if need in (Need.COPY, Need.EMPTY):
                self.wishes.append(wish)
            elif need is Need.STRAY:
                self.strays.append(wish)
            elif need is Need.COPYING:
                self.copying[entry] += count
            elif need is Need.NONE:
                self.settled.append(wish)

    def plan(self, maps: Mapping[int, Sequence[bytes]]) -> Plan:
        for need in (Need.COPY, Need.EMPTY):
            self._match([wish for wish in self.wishes if wish.need is need])
        chosen = [*self.wishes, *self.settled]  # of the settled ones those that make room
        evening = False
        if not self.wishes and not any(work.degraded or work.lost for work in self.work.values()):
            evening = self._even_out()
        for wish in self.settled:
            count = sum(wish.quotas.values())
            self.work[wish.volume.pool_id].wanted += count
            self.work[wish.volume.pool_id].left += count * wish.volume.full
        for wish in self.strays:
            wish.quotas = {0: wish.count}
        choices = _pick([*chosen, *self.strays], self._budgets(), maps)
        return Plan(choices, self.work, evening)

    # -- copies that are needed

    def _match(self, wishes: list[_Wish]) -> None:
        """Gives wishes of one urgency their quotas out of the room that is left."""
        groups: dict[int, list[_Wish]] = {}
        for wish in wishes:
            groups.setdefault(self.domain.staying(wish.entry), []).append(wish)
        demands = {base: _slots(group) for base, group in groups.items()}
        placed = match(demands, self.room, self._penalty)
        for (_, target), count in placed.items():
            self.room[target] -= count
        for base, group in groups.items():
            found = {target: count for (demand, target), count in placed.items() if demand == base}
            self._share(base, group, demands[base], found)
            if short := demands[base] - sum(found.values()):
                self._no_place(base, group, short)

    def _penalty(self, base: int, target: int) -> int | None:
        if base == target:
            return None
        return 1 if self.domain.together(base, target) else 0

    def _share(self, base: int, group: list[_Wish], demand: int, found: dict[int, int]) -> None:
        """Cuts what was placed beside ``base`` into quotas: exactly for chunks that take a slot, and the others
        alike, since nobody here knows which are written."""
        rest = dict(found)
        for wish in group:
            if wish.volume.full == 1:
                self._take(wish, min(wish.count, sum(rest.values())), rest, rest)
                demand -= wish.count
        others = [wish for wish in group if wish.volume.full < 1]
        if demand > 0:
            slots = sum(rest.values())
            for wish in others:
                self._take(wish, wish.count * min(slots, demand) // demand, rest, None)
        else:
            targets = [target for target in self.room if self._penalty(base, target) is not None]
            apart = [target for target in targets if self._penalty(base, target) == 0]
            weights = {target: max(0, self.room[target]) + 1 for target in apart or targets}
            for wish in others:
                self._take(wish, wish.count if weights else 0, weights, None)
                if not weights:
                    self._unplaced(wish, wish.count, "there is no other SDS that is UP")

    def _take(self, wish: _Wish, count: int, weights: dict[int, int], used: dict[int, int] | None) -> None:
        """Deals ``count`` chunks of ``wish`` over targets by their weights, which are used up if they are slots."""
        targets = [target for target, weight in weights.items() if weight > 0]
        if not count or not targets:
            return
        for target, part in zip(targets, deal(count, [weights[target] for target in targets]), strict=True):
            if part:
                wish.quotas[target] = wish.quotas.get(target, 0) + part
                if used is not None:
                    used[target] -= part

    def _no_place(self, base: int, group: list[_Wish], short: int) -> None:
        """Chunks beside ``base`` are left without a place: is there one after another chunk's copy has moved?"""
        name = self.domain.servers
        if not [target for target in self.room if target != base]:
            reason = "there is no other SDS that is UP"
        elif self.room.get(base, 0) > 0:
            short -= self._make_room(base, short)
            if short <= 0:
                return
            reason = "the only free slots are on the SDS that has the other copy"
        else:
            total = sum(server.slots for server in name.values() if server.up and not server.removing)
            reason = f"all {total} slots of the SDSs that could take them are taken or promised: add an SDS"
        for wish in group:
            missing = wish.count - sum(wish.quotas.values())
            if missing and wish.volume.full:
                part = min(missing, ceil(short / wish.volume.full))
                self._unplaced(wish, part, reason)
                short -= ceil(part * wish.volume.full)
                if short <= 0:
                    return

    def _unplaced(self, wish: _Wish, count: int, reason: str) -> None:
        work = self.work[wish.volume.pool_id]
        work.unplaced += count
        work.reason = reason

    def _make_room(self, base: int, short: int) -> int:
        """Moves copies of other chunks to ``base``, which has room that its own chunks cannot use; the slots gained."""
        gained = sum(count for entry, count in self.copying.items() if entry.secondary and entry.learner == base)
        for wish in self.settled:
            if gained >= short or self.room[base] <= 0:
                break
            if base in wish.entry or not wish.volume.full:
                continue
            slots = min(short - gained, self.room[base])
            count = min(wish.count, ceil(slots / wish.volume.full))
            wish.quotas[base] = count
            self.room[base] -= ceil(count * wish.volume.full)
            gained += ceil(count * wish.volume.full)
        return gained

    # -- evenness

    def _even_out(self) -> bool:
        """Moves copies from SDSs that have more than their share; whether there was anything to move."""
        now = self._copies_then()
        shares = _shares(
            {key: self.domain.servers[key].slots for key in self.room},
            sum(now[key] for key in self.room),
            sum(work.chunks for work in self.work.values()),
        )
        lacking = {key: share - now[key] for key, share in shares.items()}
        uneven = [
            key
            for key, lack in lacking.items()
            if lack >= UNEVEN_CHUNKS and (self.domain.evening or lack * 100 > shares[key] * UNEVEN_PERCENT)
        ]
        if not uneven:
            return False
        wanting = {key: min(lack, self.room[key]) for key, lack in lacking.items() if lack > 0 and self.room[key] > 0}
        moved = 0
        for donor in sorted(lacking, key=lambda key: lacking[key]):
            if lacking[donor] < 0:
                moved += self._move_from(donor, -lacking[donor], wanting, now)
        return moved > 0

    def _copies_then(self) -> Counter[int]:
        """Copies per SDS once those under way have moved."""
        copies: Counter[int] = Counter()
        for volume in self.domain.volumes:
            for entry, count in volume.entries.items():
                for sds_id in entry.members:
                    copies[sds_id] += count
        for entry, count in self.copying.items():
            copies[entry.learner] += count
            if entry.secondary:
                copies[self.domain.leaver(entry)] -= count
        return copies

    def _move_from(self, donor: int, excess: int, wanting: dict[int, int], now: Counter[int]) -> int:
        wishes = [wish for wish in self.settled if donor in wish.entry[:2] and self.domain.leaver(wish.entry) == donor]
        movable = sum(wish.count for wish in wishes)
        excess = min(excess, movable)
        moved = 0
        for wish in wishes:
            other = wish.entry.secondary if wish.entry.primary == donor else wish.entry.primary
            targets = {
                target: lack
                for target, lack in wanting.items()
                if lack > 0 and target not in wish.entry[:2] and not self.domain.together(target, other)
            }
            count = min(-(-excess * wish.count // movable), wish.count, excess - moved, sum(targets.values()))
            self._take(wish, count, targets, wanting)
            moved += count
        return moved

    # -- the batch

    def _budgets(self) -> _Budgets:
        taken, chunks = Counter[int](), Counter[int]()
        for volume in self.domain.volumes:
            for entry, count in volume.entries.items():
                if entry.learner:
                    chunks[entry.learner] += count
                    taken[entry.learner] += ceil(count * volume.full)
        return _Budgets(
            {key: float(BATCH_SLOTS - taken[key]) for key in self.room},
            {key: BATCH_CHUNKS - chunks[key] for key in self.room},
        )


def _slots(wishes: Iterable[_Wish]) -> int:
    """Slots that these chunks are expected to take."""
    exact = sum(wish.count for wish in wishes if wish.volume.full == 1)
    return exact + ceil(sum(wish.count * wish.volume.full for wish in wishes if wish.volume.full < 1))


def _shares(slots: Mapping[int, int], copies: int, chunks: int) -> dict[int, int]:
    """Copies per SDS by its slots, rounded down, none with more than one of each chunk."""
    shares: dict[int, int] = {}
    open_ = dict(slots)
    while open_:
        total = sum(open_.values())
        full = [key for key, weight in open_.items() if copies * weight >= chunks * total]
        if not full:
            return shares | {key: copies * weight // total for key, weight in open_.items()}
        for key in full:
            shares[key] = chunks
            del open_[key]
            copies = max(0, copies - chunks)
    return shares


class _Budgets:
    """What may still be given to each SDS in this batch."""

    def __init__(self, slots: dict[int, float], chunks: dict[int, int]) -> None:
        self._slots = slots
        self._chunks = chunks
        self._chunks[0] = BATCH_CHUNKS  # learners that are taken back
        self._slots[0] = float("inf")

    def allows(self, target: int) -> bool:
        return self._slots[target] > 0 and self._chunks[target] > 0

    def take(self, target: int, slots: float) -> None:
        self._slots[target] -= slots
        self._chunks[target] -= 1


class _Dealer:
    """Goes through chunks that are alike and says which of them get which learner: evenly among all of them."""

    def __init__(self, wish: _Wish, budgets: _Budgets) -> None:
        self._wish = wish
        self._budgets = budgets
        self._wanted = sum(wish.quotas.values())
        self._left = dict(wish.quotas)
        self._seen = 0

    def next(self) -> int | None:
        """The learner of the next chunk, or None when it gets none now."""
        count = self._wish.count
        before, self._seen = self._seen, self._seen + 1
        if before * self._wanted // count == self._seen * self._wanted // count:
            return None
        targets = [target for target, left in self._left.items() if left > 0 and self._budgets.allows(target)]
        if not targets:
            return None
        target = max(targets, key=lambda target: (self._left[target] / self._wish.quotas[target], -target))
        self._left[target] -= 1
        self._budgets.take(target, self._wish.volume.full)
        return target

    @property
    def done(self) -> bool:
        return not any(left > 0 and self._budgets.allows(target) for target, left in self._left.items())


def _pick(wishes: Iterable[_Wish], budgets: _Budgets, maps: Mapping[int, Sequence[bytes]]) -> Choices:
    """The chunks of the batch: those of urgent wishes before others."""
    choices: Choices = {}
    groups: dict[tuple[Need, int], dict[tuple[int, int, int], _Dealer]] = {}
    for wish in wishes:
        if wish.quotas:
            group = groups.setdefault((wish.need, wish.volume.volume_id), {})
            group[wish.entry] = _Dealer(wish, budgets)
    for (_, volume_id), dealers in sorted(groups.items()):
        chosen = choices.setdefault(volume_id, [])
        if all(dealer.done for dealer in dealers.values()):
            continue
        for chunk, epoch, entry in _entries(maps[volume_id], dealers):
            dealer = dealers.get(entry)
            if dealer is None:
                continue
            target = dealer.next()
            if target is not None:
                chosen.append((chunk, epoch, target))
            if dealer.done and all(other.done for other in dealers.values()):
                break
    return {volume_id: chosen for volume_id, chosen in choices.items() if chosen}


def _entries(
    segments: Sequence[bytes], wanted: Iterable[tuple[int, int, int]]
) -> Iterator[tuple[int, int, tuple[int, int, int]]]:
    """Of the segments that may have any of ``wanted``: the last few chunks of a large volume lie far apart."""
    members = {MEMBERS.pack(*holders[:2]) for holders in wanted}
    for index, segment in enumerate(segments):
        column = array("I", segment)[1::3].tobytes()
        if not any(pair in column for pair in members):
            continue
        chunk = index * SEGMENT_CHUNKS
        for epoch, primary, secondary, learner, _left in ENTRY.iter_unpack(segment):
            yield chunk, epoch, (primary, secondary, learner)
            chunk += 1
