"""Judges what readers and writers saw of one block: is there an order in which a single copy would have answered so?

Pure. A block is a register: reads and writes have a moment of invocation and one of response, and each appears to
happen at one instant between them (linearizability). Every write has a value of its own, which makes it decidable at
once: a write and the reads of its value stand together in any order that explains the history. So for two such groups
A and B it only matters whether something of A ended before something of B began, and the reverse: if both, no order
exists; if that is true of no two groups, one does (Gibbons and Korach, "Testing shared memories", 1997).

What was never answered, or was answered with an error, may have happened at any moment after it was begun, or not at
all: a write like that which nobody read is left out. A write that was under way while every server that knew of it was
restarted may be carried out again when it is sent again (docs/internals/protocol.md allows for it): the caller says
which may, and only where nothing else explains the history it is taken for two.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

NEVER = float("inf")
BEFORE_ALL = float("-inf")
PROBLEMS_MAX = 5  # of one block: what follows the first is mostly its consequence


class Operation(NamedTuple):
    """One read or write; times of one clock for all clients, ``end`` is ``NEVER`` for a write without an answer."""

    begin: float
    end: float
    value: int
    is_write: bool

    def __str__(self) -> str:
        until = "without an answer" if self.end == NEVER else f"until {self.end:.6f}"
        return f"{'write' if self.is_write else 'read'} of {self.value:#x} from {self.begin:.6f} {until}"


@dataclass(slots=True)
class Group:
    """A write and the reads of its value."""

    write: Operation
    reads: list[Operation] = field(default_factory=list)

    @property
    def happened(self) -> bool:
        return bool(self.reads) or self.write.end < NEVER

    def first_end(self) -> Operation:
        return min(self.write, *self.reads, key=lambda one: one.end) if self.reads else self.write

    def last_begin(self) -> Operation:
        return max(self.write, *self.reads, key=lambda one: one.begin) if self.reads else self.write


class Verdict(NamedTuple):
    """What cannot be explained, a sentence each, and what was only explained by a write that was carried out again."""

    problems: list[str]
    again: list[int]


def problems(operations: Iterable[Operation], initial: int = 0) -> list[str]:
    return judge(operations, initial).problems


def judge(operations: Iterable[Operation], initial: int = 0, may_again: Container[int] = ()) -> Verdict:
    """``initial`` is what the block had before everything, ``may_again`` the writes that may have happened twice."""
    groups, reads = _groups(operations, initial)
    found = []
    for read in reads:
        group = groups.get(read.value)
        if group is None:
            found.append(f"{read}: nobody wrote that")
        elif read.end < group.write.begin:
            found.append(f"{read}, but the {group.write} began later")
        else:
            group.reads.append(read)
    happened = [group for group in groups.values() if group.happened]
    conflicts = _conflicts(happened)
    again = _explained(happened, may_again, []) if conflicts else None
    if again is None:
        found += [_sentence(*pair) for pair in conflicts]
    return Verdict(found[:PROBLEMS_MAX], again or [])


def last_value(operations: Iterable[Operation], initial: int = 0) -> int:
    """What the newest read saw: the block's content, if that read was alone and no write is without an answer."""
    newest = max((one for one in operations if not one.is_write), key=lambda read: read.begin, default=None)
    return newest.value if newest else initial


def _groups(operations: Iterable[Operation], initial: int) -> tuple[dict[int, Group], list[Operation]]:
    start = Operation(BEFORE_ALL, BEFORE_ALL, initial, True)
    groups = {initial: Group(start)}
    reads = []
    for one in operations:
        if not one.is_write:
            reads.append(one)
        elif one.value in groups:
            raise ValueError(f"two writes have the value {one.value:#x}: each must have its own")
        else:
            groups[one.value] = Group(one)
    return groups, reads


def _explained(groups: list[Group], may_again: Container[int], again: list[int]) -> list[int] | None:
    """The writes that have to have happened twice, if that explains everything."""
    conflicts = _conflicts(groups)
    if not conflicts:
        return again
    for group in conflicts[0]:
        if group.write.value not in may_again or group.write.value in again:
            continue
        others = [other for other in groups if other is not group]
        # Reads of the first time come before those of the second: moved to the same instant, they may be in the order
        # in which they began.
        reads = sorted(group.reads)
        for number in range(1, len(reads) + 1):
            first = Group(group.write._replace(end=NEVER), reads[:number])
            second = Group(group.write, reads[number:])
            tried = [*others, *(one for one in (first, second) if one.happened)]
            explained = _explained(tried, may_again, [*again, group.write.value])
            if explained is not None:
                return explained
    return None


class _Span(NamedTuple):
    """A group was surely there from ``first_end`` to ``last_begin``, if they are in that order."""

    first_end: float
    last_begin: float
    group: Group


def _conflicts(groups: Iterable[Group]) -> list[tuple[Group, Group]]:
    """Pairs of groups of which each has something that ended before something of the other began."""
    spans = [_Span(group.first_end().end, group.last_begin().begin, group) for group in groups]
    lasting = sorted((span for span in spans if span.first_end < span.last_begin), key=lambda span: span.first_end)
    ends = [span.first_end for span in lasting]
    # Of those that begin to be there up to a moment, the one that is there longest.
    longest = list(accumulate(lasting, _longer))
    found = []
    for span in spans:
        index = bisect_left(ends, span.last_begin) - 1
        if index >= 0 and longest[index] is span:
            # Itself. What was there before its end decides; who came later sees this one when it is its turn.
            index = bisect_left(ends, span.first_end) - 1
        if index >= 0 and longest[index] is not span and span.first_end < longest[index].last_begin:
            found.append((longest[index].group, span.group))
    return found


def _longer(one: _Span, other: _Span) -> _Span:
    return other if other.last_begin > one.last_begin else one


def _sentence(lasting: Group, other: Group) -> str:
    return (
        f"{lasting.write.value:#x} was there from the end of the {lasting.first_end()} to the {lasting.last_begin()}, "
        f"yet {other.write.value:#x} in between: {other.write}; {other.first_end()}; {other.last_begin()}"
    )
