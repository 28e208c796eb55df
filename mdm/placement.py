"""Where the two copies of every chunk go. Pure, and the same for the same arguments.

Promises, in this order: the copies of a chunk are on two SDSs; no SDS gets more than its limit; as few chunks as
possible have both copies in one fault set (none when that can be); each SDS gets its share by weight, of copies as of
primaries, in a whole volume and in any longer stretch of it; the partners of one SDS are spread, so that many sources
can rebuild it. A solution is found whenever one exists: two copies fit if and only if the SDSs can hold 2 n copies with
none counted for more than n (n chunks), and every step below keeps that true.

How: shares are cut top down (fault sets, then their SDSs) by weight under caps. The volume is then cut into rounds,
each taking its proportional part of what is left, rounded so that the rest stays solvable. Within a round all copies
are laid in a row, SDS by SDS and fault set by fault set in a shuffled order, and copy k goes with copy k + n: a run of
at most n never meets itself, which settles both the SDSs and the fault sets. The work is per round and SDS, not per
chunk.
"""

from __future__ import annotations

import random
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from mdm.model import Holders
from mdm.segments import EPOCH_FIRST
from pfvol.constants import SEGMENT_CHUNKS, SEGMENT_ENTRY_FORMAT

ROUND_CHUNKS_MIN = 16  # one stripe over a few SDSs: small volumes still meet several orders
ROUNDS_WANTED = 64  # a volume is cut into about so many rounds, until they would be longer than a segment
ORDERS = 32  # shuffled orders per volume, used in turn
GOLDEN = 0.6180339887498949  # neighbours in a round end up this part of the round apart, so any stretch is even


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """An SDS that may get copies.

    ``weight`` is its share by capacity (at least 1), ``limit`` the most copies it can take, ``load`` how full it is
    already (any unit, the same for all; breaks ties), ``primary_excess`` how many more than half of its copies are
    primaries, twice.
    """

    sds_id: int
    fault_set_id: int | None
    weight: int
    limit: int
    load: float = 0.0
    primary_excess: int = 0


class Placed(NamedTuple):
    """``pieces`` are packed map entries in chunk order, none across a segment's end, equal ones the same object.
    ``holders`` counts them by who has them."""

    pieces: list[bytes]
    holders: dict[Holders, int]


_Sides = tuple[tuple[int, int, int, int], ...]  # (one, other, chunks with one as primary, with the other) of a round


@dataclass
class _Share:
    """A fault set, or within one an SDS, while shares are cut: ``left`` copies are still to be laid."""

    key: int
    weight: int
    cap: int
    load: float
    members: list[_Share] = field(default_factory=list)
    left: int = 0


def place(chunks: int, candidates: Sequence[Candidate], *, first_chunk: int, seed: int) -> Placed | None:
    """Places ``chunks`` chunks, of which the first is the volume's ``first_chunk``; None when they do not fit."""
    groups = _groups(chunks, candidates)
    if chunks < 1 or sum(min(group.cap, 2 * chunks) for group in groups) < 2 * chunks:
        return None
    _cut(chunks, groups)
    orders = _orders(groups, seed)
    excess = {candidate.sds_id: candidate.primary_excess for candidate in candidates}
    pairs: Counter[tuple[int, int]] = Counter()
    pieces: list[bytes] = []
    packed: dict[_Sides, bytes] = {}
    left = chunks
    for number, size in enumerate(_rounds(chunks, first_chunk)):
        counts = _take(groups, size, left)
        left -= size
        order = orders[number % len(orders)]
        runs = _runs([(sds_id, counts[sds_id]) for sds_id in order if counts[sds_id]], size)
        sides = _sides(runs, excess, pairs)
        if sides not in packed:
            packed[sides] = _pack(sides, size)
        pieces.append(packed[sides])
    return Placed(pieces, {Holders(*pair): count for pair, count in pairs.items()})


def fits(chunks: int, limits: Sequence[int]) -> bool:
    """Whether two copies of ``chunks`` chunks fit on SDSs with these limits."""
    return sum(min(limit, chunks) for limit in limits) >= 2 * chunks


def _groups(chunks: int, candidates: Sequence[Candidate]) -> list[_Share]:
    """Fault sets with their SDSs; an SDS without a fault set is one of its own."""
    groups: dict[tuple[str, int], _Share] = {}
    for candidate in sorted(candidates, key=lambda item: item.sds_id):
        cap = min(candidate.limit, chunks)
        if cap <= 0:
            continue
        alone = candidate.fault_set_id is None
        key = ("sds", candidate.sds_id) if candidate.fault_set_id is None else ("set", candidate.fault_set_id)
        group = groups.setdefault(key, _Share(-candidate.sds_id if alone else key[1], 0, 0, 0.0))
        weight = max(candidate.weight, 1)
        group.members.append(_Share(candidate.sds_id, weight, cap, candidate.load))
        group.weight += weight
        group.cap += cap
    for group in groups.values():
        group.load = sum(member.load for member in group.members) / len(group.members)
    return list(groups.values())


def _cut(chunks: int, groups: list[_Share]) -> None:
    """Gives every group and every SDS its copies of the whole volume."""
    caps = [min(group.cap, chunks) for group in groups]
    if sum(caps) < 2 * chunks:
        # Only one group can be larger than n. It has to hold both copies of some chunks: of as few as the
        # others' caps allow.
        large = max(range(len(groups)), key=lambda index: groups[index].cap)
        caps[large] = 2 * chunks - (sum(caps) - caps[large])
    _share_out(2 * chunks, groups, caps)
    for group in groups:
        _share_out(group.left, group.members, [member.cap for member in group.members])


def _share_out(total: int, shares: list[_Share], caps: list[int]) -> None:
    """Sets ``left`` by weight under ``caps``; the odd ones go to the emptiest."""
    open_ = list(range(len(shares)))
    rest = total
    while True:
        weight = sum(shares[index].weight for index in open_)
        full = {index for index in open_ if rest * shares[index].weight >= caps[index] * weight}
        if not full:
            break
        for index in full:
            shares[index].left = caps[index]
        rest -= sum(caps[index] for index in full)
        open_ = [index for index in open_ if index not in full]
        if not open_:
            return
    for index in open_:
        shares[index].left = rest * shares[index].weight // weight
    odd = rest - sum(shares[index].left for index in open_)
    for index in sorted(open_, key=lambda index: (shares[index].load, -(rest * shares[index].weight % weight)))[:odd]:
        shares[index].left += 1


def _orders(groups: list[_Share], seed: int) -> list[list[int]]:
    """Shuffled rows of SDSs in which those of one fault set stay together."""
    rng = random.Random(seed)
    orders = []
    for _ in range(ORDERS):
        row = []
        for group in rng.sample(groups, len(groups)):
            row += [member.key for member in rng.sample(group.members, len(group.members))]
        orders.append(row)
    return orders


def _rounds(chunks: int, first_chunk: int) -> list[int]:
    """Sizes of the rounds; none crosses a segment, so that equal segments come out as equal bytes."""
    usual = min(max(chunks // ROUNDS_WANTED, ROUND_CHUNKS_MIN), SEGMENT_CHUNKS)
    sizes = []
    position, end = first_chunk, first_chunk + chunks
    while position < end:
        size = min(usual, end - position, SEGMENT_CHUNKS - position % SEGMENT_CHUNKS)
        sizes.append(size)
        position += size
    return sizes


def _take(groups: list[_Share], size: int, left: int) -> dict[int, int]:
    """The round's copies per SDS: of each group and SDS the part ``size / left``, rounded down or up.

    A share between two whole bounds keeps them when it is rounded, so no cap of the round or of the rest is broken.
    """
    counts: dict[int, int] = {}
    for group, taken in zip(groups, _part(groups, 2 * size, size, left), strict=True):
        for member, copies in zip(group.members, _part(group.members, taken, size, left), strict=True):
            counts[member.key] = copies
            member.left -= copies
        group.left -= taken
    return counts


def _part(shares: list[_Share], total: int, size: int, left: int) -> list[int]:
    parts = [share.left * size // left for share in shares]
    odd = total - sum(parts)
    if odd:
        remainders = [share.left * size % left for share in shares]
        for index in sorted(range(len(shares)), key=lambda index: -remainders[index])[:odd]:
            parts[index] += 1
    return parts


def _runs(row: list[tuple[int, int]], size: int) -> list[tuple[int, int, int]]:
    """The row of 2 ``size`` copies cut in the middle and laid side by side: (one SDS, the other, chunks)."""
    runs = []
    near, far = iter(row), iter(_second_half(row, size))
    near_id, near_count = next(near)
    far_id, far_count = next(far)
    done = 0
    while True:
        count = min(near_count, far_count, size - done)
        runs.append((near_id, far_id, count))
        done += count
        if done == size:
            return runs
        near_count -= count
        far_count -= count
        if not near_count:
            near_id, near_count = next(near)
        if not far_count:
            far_id, far_count = next(far)


def _second_half(row: list[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    skip = size
    for index, (sds_id, count) in enumerate(row):
        if skip < count:
            return [(sds_id, count - skip), *row[index + 1 :]]
        skip -= count
    raise AssertionError("a row has two copies per chunk")


def _sides(runs: list[tuple[int, int, int]], excess: dict[int, int], pairs: Counter[tuple[int, int]]) -> _Sides:
    """Halves each run into chunks with the one and with the other SDS as primary, an odd one where there are fewer."""
    sides = []
    for one, other, count in runs:
        if count % 2:
            if excess[one] > excess[other]:
                one, other = other, one
            excess[one] += 1
            excess[other] -= 1
        ahead, behind = (count + 1) // 2, count // 2
        pairs[one, other] += ahead
        if behind:
            pairs[other, one] += behind
        sides.append((one, other, ahead, behind))
    return tuple(sides)


def _pack(sides: _Sides, size: int) -> bytes:
    """The entries of a round, scattered over it."""
    entries: list[bytes] = []
    for one, other, ahead, behind in sides:
        entries += [_entry(one, other)] * ahead
        entries += [_entry(other, one)] * behind
    return b"".join(map(entries.__getitem__, _scatter(size)))


@lru_cache(maxsize=65536)
def _entry(primary: int, secondary: int) -> bytes:
    return struct.pack(SEGMENT_ENTRY_FORMAT, EPOCH_FIRST, primary, secondary, 0, 0)


@lru_cache(maxsize=1024)
def _scatter(size: int) -> tuple[int, ...]:
    """A fixed permutation of a round in which neighbours are far apart."""
    return tuple(sorted(range(size), key=lambda index: index * GOLDEN % 1.0))
