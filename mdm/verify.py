"""Whether the copies of a volume agree: what ``vol verify`` finds, purely, from the map and what the SDSs answer.

An SDS answers per chunk ``[present, tags, bad]`` (``verify`` in docs/internals/interfaces.md): a tag per block as on
its disk (``struct Tag`` of datapath/ondisk.pxd) and a bit per block whose bytes do not match their tag. Equal tags mean
equal bytes, and a hole reads as zeros whoever made it, so nothing else has to be moved to compare.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mdm.model import State
from pfvol.constants import CHUNK_BLOCKS

TAG = struct.Struct("<IIQ")  # check, epoch, seq and flags
TAG_HOLE = 1 << 63
TAG_UNKNOWN = 1 << 62
NEVER_WRITTEN = (0, 0, TAG_HOLE)
DIFFERENCES_KEPT_MAX = 1000  # in a report; all are counted

Answer = Sequence[Any]
Tag = tuple[int, int, int]


@dataclass(frozen=True)
class Difference:
    """``block`` None: the chunk as a whole; ``sds_id`` None: both copies."""

    chunk: int
    problem: str
    detail: str
    block: int | None = None
    sds_id: int | None = None


@dataclass
class VerifyReport:
    """``chunks`` and written ``blocks`` that were looked at, how many differences, and the first of them."""

    chunks: int = 0
    blocks: int = 0
    count: int = 0
    differences: list[Difference] = field(default_factory=list)

    def add(self, difference: Difference) -> None:
        self.count += 1
        if len(self.differences) < DIFFERENCES_KEPT_MAX:
            self.differences.append(difference)


def is_answer(row: object) -> bool:
    """Whether an SDS may answer this: a chunk that is not present has nothing, else both fields are whole."""
    match row:
        case [False, _, _]:
            return True
        case [True, bytes(tags), bytes(bad)]:
            return len(tags) == CHUNK_BLOCKS * TAG.size and len(bad) == CHUNK_BLOCKS // 8
    return False


def check_copies(report: VerifyReport, chunk: int, answers: Mapping[int, Answer | None]) -> None:
    """Adds one chunk to ``report``. ``answers`` (see ``is_answer``): of each SDS that the map names, None from one that
    cannot be asked."""
    report.chunks += 1
    copies: dict[int, list[Tag]] = {}
    for sds_id, answer in answers.items():
        if answer is None:
            report.add(Difference(chunk, "copy unavailable", "its SDS does not answer", sds_id=sds_id))
            continue
        present, tags, bad = answer
        copies[sds_id] = list(TAG.iter_unpack(tags)) if present else []
        for block in _set_bits(bad if present else b""):
            report.add(Difference(chunk, "bad bytes", "the stored bytes do not match their tag", block, sds_id))
        for block, tag in enumerate(copies[sds_id]):
            if tag[2] & TAG_UNKNOWN or tag == (0, 0, 0):
                report.add(Difference(chunk, "unknown bytes", "lost in a crash, to be copied anew", block, sds_id))
    if len(answers) < 2:
        report.add(Difference(chunk, "one copy", "the map names a single copy"))
    report.blocks += max((sum(not tag[2] & TAG_HOLE for tag in tags) for tags in copies.values()), default=0)
    if len(copies) == 2:
        first, second = copies.values()
        for block in _unequal(first, second):
            report.add(Difference(chunk, "copies differ", "the two copies are of different writes", block))


def check_placement(report: VerifyReport, state: State, chunk: int, primary: int, secondary: int) -> None:
    """Adds what the map itself has wrong: both copies on one SDS, or in one fault set while there is another."""
    if primary == secondary:
        report.add(Difference(chunk, "one server", "both copies are on one SDS", sds_id=primary))
        return
    if primary not in state.sds or secondary not in state.sds:
        return
    used = {state.sds[primary].fault_set_id, state.sds[secondary].fault_set_id}
    domain = {sds.fault_set_id for sds in state.sds_of(state.sds[primary].pd_id)}
    if len(used) == 1 and None not in used and domain - used:
        report.add(Difference(chunk, "one fault set", "both copies are in one fault set while there is another"))


def _set_bits(bits: bytes) -> Iterator[int]:
    if any(bits):
        yield from (block for block in range(len(bits) * 8) if bits[block // 8] >> (block % 8) & 1)


def _unequal(first: list[Tag], second: list[Tag]) -> Iterator[int]:
    """Blocks whose tags differ; a copy without the chunk has only holes."""
    if first == second:
        return
    nothing = [NEVER_WRITTEN] * CHUNK_BLOCKS
    for block, (one, other) in enumerate(zip(first or nothing, second or nothing, strict=True)):
        if one != other and not (one[2] & other[2] & TAG_HOLE):
            yield block
