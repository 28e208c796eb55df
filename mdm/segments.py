"""Packed map segments: counted and rewritten in bulk. Pure.

An entry is five numbers (``SEGMENT_ENTRY_FORMAT``): the epoch, who has the chunk (``model.Holders``), and ``left``, the
member that was last taken out of the set (0: none): whoever serves now waits until that one has no lease any more.

A map has few different entries besides their epochs, however many chunks there are. So ``Rewriter`` asks once per
different entry what is to become of it; per chunk there are only list operations (1 TiB, 262,144 chunks: 0.1 s). Each
entry that changes gets the next epoch, or that of the next era (``EPOCH_ERA``).
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import NamedTuple

from mdm.model import Holders
from pfvol.constants import SEGMENT_CHUNKS, SEGMENT_ENTRY_FORMAT

ENTRY = struct.Struct(SEGMENT_ENTRY_FORMAT)
EPOCH_FIRST = 1
_WORDS = 3  # an entry is that many words of 32 bits: epoch, primary and secondary, learner and left
_LOW = 0xFFFF
_ROLES_AT = 4  # behind the epoch
_EPOCH_FIRST = struct.pack("<I", EPOCH_FIRST)


class Roles(NamedTuple):
    """An entry without its epoch."""

    primary: int
    secondary: int
    learner: int
    left: int

    @property
    def holders(self) -> Holders:
        return Holders(self.primary, self.secondary, self.learner)


class Entry(NamedTuple):
    epoch: int
    roles: Roles


@dataclass
class Rewritten:
    """``segments``: the new ones, by index. ``counts``: by how much there are more or fewer chunks per holders.
    ``entries``: how many changed."""

    segments: dict[int, bytes] = field(default_factory=dict)
    counts: Counter[Holders] = field(default_factory=Counter)
    entries: int = 0

    def add(self, old: Roles, new: Roles, times: int = 1) -> None:
        self.entries += times
        if old.holders != new.holders:
            self.counts[old.holders] -= times
            self.counts[new.holders] += times


_Body = tuple[int, int]  # the last two words of an entry
_Row = tuple[int, int, int]  # the two words that it gets, and by how much its epoch rises


def entry_of(segments: Sequence[bytes], chunk: int) -> Entry:
    epoch, *roles = ENTRY.unpack_from(segments[chunk // SEGMENT_CHUNKS], chunk % SEGMENT_CHUNKS * ENTRY.size)
    return Entry(epoch, Roles(*roles))


def count_roles(segments: Iterable[bytes]) -> Counter[Roles]:
    """Chunks per roles in a map."""
    bodies: Counter[_Body] = Counter()
    for entries, times in Counter(segments).items():
        for body, count in Counter(_bodies(_words(entries))).items():
            bodies[body] += count * times
    return Counter({_roles(body): count for body, count in bodies.items()})


def has_roles(segments: Iterable[bytes], roles: Roles) -> bool:
    """Whether a chunk in a map has these. Cheap also where none has: no entry is taken apart."""
    body = ENTRY.pack(0, *roles)[_ROLES_AT:]
    for entries in set(segments):
        at = entries.find(body)
        while at >= 0 and at % ENTRY.size != _ROLES_AT:
            at = entries.find(body, at + 1)
        if at >= 0:
            return True
    return False


def count_holders(segments: Iterable[bytes]) -> dict[Holders, int]:
    """Chunks per holders in a map."""
    counts: dict[Holders, int] = {}
    for roles, count in count_roles(segments).items():
        counts[roles.holders] = counts.get(roles.holders, 0) + count
    return counts


class Rewriter:
    """Rewrites whole maps by one rule: ``change`` says what becomes of an entry, None: it stays as it is. The epochs of
    those that change rise by ``step``."""

    def __init__(self, change: Callable[[Roles], Roles | None], *, step: int = 1) -> None:
        self._change = change
        self._step = step
        self._rows: dict[_Body, _Row] = {}
        self._done: dict[bytes, tuple[bytes, Rewritten] | None] = {}

    def rewrite(self, segments: Sequence[bytes], kept: Collection[int] = ()) -> Rewritten:
        """``kept``: chunks that the rule is not for."""
        by_segment: dict[int, list[int]] = {}
        for chunk in kept:
            by_segment.setdefault(chunk // SEGMENT_CHUNKS, []).append(chunk % SEGMENT_CHUNKS)
        done = Rewritten()
        for index, entries in enumerate(segments):
            found = self._rewrite(entries, by_segment[index]) if index in by_segment else self._usual(entries)
            if found is not None:
                done.segments[index], of_segment = found
                done.entries += of_segment.entries
                done.counts.update(of_segment.counts)
        return done

    def _usual(self, entries: bytes) -> tuple[bytes, Rewritten] | None:
        """Equal segments come out as one object."""
        if entries not in self._done:
            self._done[entries] = self._rewrite(entries, ())
        return self._done[entries]

    def _rewrite(self, entries: bytes, kept: Collection[int]) -> tuple[bytes, Rewritten] | None:
        words = _words(entries)
        bodies = _bodies(words)
        counts = Counter(bodies)
        self._decide(counts)
        kept = [index for index in set(kept) if index < len(bodies) and self._rows[bodies[index]][2]]
        for index in kept:
            counts[bodies[index]] -= 1
        done = Rewritten()
        for body, count in counts.items():
            first, second, raised = self._rows[body]
            if raised and count:
                done.add(_roles(body), _roles((first, second)), count)
        if not done.entries:
            return None
        rows = [self._rows[body] for body in bodies]
        for index in kept:
            rows[index] = (*bodies[index], 0)
        new = [0] * len(words)
        new[0::_WORDS] = [epoch + row[2] for epoch, row in zip(words[0::_WORDS], rows, strict=True)]
        new[1::_WORDS] = [row[0] for row in rows]
        new[2::_WORDS] = [row[1] for row in rows]
        return struct.pack(f"<{len(new)}I", *new), done

    def _decide(self, bodies: Iterable[_Body]) -> None:
        for body in bodies:
            if body not in self._rows:
                new = self._change(_roles(body))
                self._rows[body] = (*body, 0) if new is None else (*_body(new), self._step)


def edit(segments: Sequence[bytes], chunks: Iterable[int], change: Callable[[int, Entry], Roles | None]) -> Rewritten:
    """Rewrites single chunks, each only once; those that the map does not have are passed over."""
    done = Rewritten()
    drafts: dict[int, bytearray] = {}
    for chunk in dict.fromkeys(chunks):
        index, offset = chunk // SEGMENT_CHUNKS, chunk % SEGMENT_CHUNKS * ENTRY.size
        if not 0 <= index < len(segments) or offset >= len(segments[index]):
            continue
        entry = entry_of(segments, chunk)
        new = change(chunk, entry)
        if new is not None:
            if index not in drafts:
                drafts[index] = bytearray(segments[index])
            ENTRY.pack_into(drafts[index], offset, entry.epoch + 1, *new)
            done.add(entry.roles, new)
    done.segments.update((index, bytes(entries)) for index, entries in drafts.items())
    return done


def differences(old: Mapping[int, tuple[bytes, ...]], new: Mapping[int, tuple[bytes, ...]]) -> list[tuple[int, int]]:
    """(volume, segment) of those segments of ``new`` in which an entry has changed since ``old``, also one that was
    placed since. What no command has touched is the same object in both, so most of it is not looked at."""
    found = []
    for volume_id, segments in new.items():
        before = old.get(volume_id, ())
        if before is not segments:
            pairs = zip_longest(before[: len(segments)], segments, fillvalue=b"")
            found += [
                (volume_id, index)
                for index, (was, is_) in enumerate(pairs)
                if was is not is_ and (was != is_[: len(was)] or not _is_new(is_[len(was) :]))
            ]
    return found


def _is_new(entries: bytes) -> bool:
    """Whether no entry has changed since it was placed."""
    count = len(entries) // ENTRY.size
    return all(entries[at :: ENTRY.size] == _EPOCH_FIRST[at : at + 1] * count for at in range(len(_EPOCH_FIRST)))


def _words(entries: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(entries) // 4}I", entries)


def _bodies(words: tuple[int, ...]) -> list[_Body]:
    return list(zip(words[1::_WORDS], words[2::_WORDS], strict=True))


def _roles(body: _Body) -> Roles:
    return Roles(body[0] & _LOW, body[0] >> 16, body[1] & _LOW, body[1] >> 16)


def _body(roles: Roles) -> _Body:
    return roles.primary | roles.secondary << 16, roles.learner | roles.left << 16
