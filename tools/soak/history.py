"""Judges what readers and writers saw of one block: is there an order in which a single copy would have answered so?

Pure. A block is a register: reads and writes have a moment of invocation and one of response, and each appears to
happen at one instant between them (linearizability). Every write has a value of its own, which makes it decidable at
once: a write and the reads of its value stand together in any order that explains the history. So for two such groups
A and B it only matters whether something of A ended before something of B began, and the reverse: if both, no order
exists; if that is true of no two groups, one does (Gibbons and Korach, "Testing shared memories", 1997).

What was never answered, or was answered with an error, may have happened at any moment after it was begun, or not at
all: a write like that which nobody read is left out.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
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
    first_end: Operation
    last_begin: Operation
    reads: int = 0

    def add(self, read: Operation) -> None:
        self.reads += 1
        if read.end < self.first_end.end:
            self.first_end = read
        if read.begin > self.last_begin.begin:
            self.last_begin = read


def problems(operations: Iterable[Operation], initial: int = 0) -> list[str]:
    """What cannot be explained, a sentence each; ``initial`` is what the block had before everything."""
    groups, reads = _groups(operations, initial)
    found = []
    for read in reads:
        group = groups.get(read.value)
        if group is None:
            found.append(f"{read}: nobody wrote that")
        elif read.end < group.write.begin:
            found.append(f"{read}, but the {group.write} began later")
        else:
            group.add(read)
    happened = [group for group in groups.values() if group.reads or group.write.end < NEVER]
    return (found + _conflicts(happened))[:PROBLEMS_MAX]


def last_value(operations: Iterable[Operation], initial: int = 0) -> int:
    """What the newest read saw: the block's content, if that read was alone and no write is without an answer."""
    newest = max((one for one in operations if not one.is_write), key=lambda read: read.begin, default=None)
    return newest.value if newest else initial


def _groups(operations: Iterable[Operation], initial: int) -> tuple[dict[int, Group], list[Operation]]:
    start = Operation(BEFORE_ALL, BEFORE_ALL, initial, True)
    groups = {initial: Group(start, start, start)}
    reads = []
    for one in operations:
        if not one.is_write:
            reads.append(one)
        elif one.value in groups:
            raise ValueError(f"two writes have the value {one.value:#x}: each must have its own")
        else:
            groups[one.value] = Group(one, one, one)
    return groups, reads


def _conflicts(groups: list[Group]) -> list[str]:
    """Pairs of groups of which each has something that ended before something of the other began."""
    # A group that was surely there from `first_end` to `last_begin`: nothing else can have been in between.
    lasting = sorted(
        (group for group in groups if group.first_end.end < group.last_begin.begin),
        key=lambda group: group.first_end.end,
    )
    ends = [group.first_end.end for group in lasting]
    # Of those that begin to be there up to a moment, the one that is there longest.
    longest = list(accumulate(lasting, lambda one, other: max(one, other, key=lambda group: group.last_begin.begin)))
    found = []
    for group in groups:
        index = bisect_left(ends, group.last_begin.begin) - 1
        other = longest[index] if index >= 0 else None
        if other is group:
            # It may itself be the one that is there longest: then what was there before its end decides.
            index = bisect_left(ends, group.first_end.end) - 1
            other = longest[index] if index >= 0 else None
        if other is not None and other is not group and group.first_end.end < other.last_begin.begin:
            found.append(_sentence(other, group))
    return found


def _sentence(lasting: Group, other: Group) -> str:
    return (
        f"{lasting.write.value:#x} was there from the end of the {lasting.first_end} to the {lasting.last_begin}, "
        f"yet {other.write.value:#x} was there in between: {other.write}; {other.first_end}; {other.last_begin}"
    )
