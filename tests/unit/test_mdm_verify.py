"""What verifying finds: each way in which two copies can disagree, and none where they agree."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from mdm.commands import AddSds, CreateFaultSet, CreateProtectionDomain
from mdm.model import Cluster, State
from mdm.transition import apply
from mdm.verify import (
    DIFFERENCES_KEPT_MAX,
    NEVER_WRITTEN,
    TAG,
    TAG_HOLE,
    TAG_UNKNOWN,
    VerifyReport,
    check_copies,
    check_placement,
)
from pfvol.constants import CHUNK_BLOCKS

NOW = datetime(2026, 1, 1, tzinfo=UTC)
WRITTEN = (123, 2, 77)


def answer(tags: dict[int, tuple[int, int, int]] | None = None, bad: tuple[int, ...] = ()) -> list[object]:
    """A present chunk: ``tags`` by block, every other block never written; ``bad`` blocks."""
    packed = b"".join(TAG.pack(*(tags or {}).get(block, NEVER_WRITTEN)) for block in range(CHUNK_BLOCKS))
    bits = bytearray(CHUNK_BLOCKS // 8)
    for block in bad:
        bits[block // 8] |= 1 << (block % 8)
    return [True, packed, bytes(bits)]


ABSENT: list[object] = [False, None, None]


def found(*answers: list[object] | None) -> tuple[VerifyReport, list[tuple[str, int | None, int | None]]]:
    report = VerifyReport()
    check_copies(report, 5, dict(enumerate(answers, 1)))
    assert all(item.chunk == 5 for item in report.differences)
    return report, [(item.problem, item.block, item.sds_id) for item in report.differences]


@pytest.mark.parametrize(
    ("first", "second", "blocks"),
    [
        (ABSENT, ABSENT, 0),
        (answer(), ABSENT, 0),
        (answer({3: WRITTEN, 4: WRITTEN}), answer({3: WRITTEN, 4: WRITTEN}), 2),
        (answer({3: (9, 2, 80 | TAG_HOLE)}), ABSENT, 0),
        (answer({3: (9, 2, 80 | TAG_HOLE)}), answer({3: (8, 1, 60 | TAG_HOLE)}), 0),
    ],
)
def test_copies_that_agree(first: list[object], second: list[object], blocks: int) -> None:
    """Goal: a chunk that one side does not have is all holes, and holes are alike."""
    report, differences = found(first, second)
    assert differences == []
    assert (report.chunks, report.blocks, report.count) == (1, blocks, 0)


@pytest.mark.parametrize(
    ("first", "second", "difference"),
    [
        (answer({3: WRITTEN}), ABSENT, ("copies differ", 3, None)),
        (answer({3: WRITTEN}), answer(), ("copies differ", 3, None)),
        (answer({3: WRITTEN}), answer({3: (124, 2, 77)}), ("copies differ", 3, None)),
        (answer({1023: WRITTEN}), answer({1023: (123, 2, 78)}), ("copies differ", 1023, None)),
        (answer({3: WRITTEN}), answer({3: (123, 2, 77 | TAG_HOLE)}), ("copies differ", 3, None)),
        (answer({3: WRITTEN}), answer({3: WRITTEN}, bad=(3,)), ("bad bytes", 3, 2)),
        (answer({3: WRITTEN}, bad=(1023,)), answer({3: WRITTEN}), ("bad bytes", 1023, 1)),
        (answer({3: WRITTEN}), None, ("copy unavailable", None, 2)),
    ],
)
def test_one_difference(
    first: list[object], second: list[object] | None, difference: tuple[str, int | None, int | None]
) -> None:
    report, differences = found(first, second)
    assert differences == [difference]
    assert report.count == 1


def test_unknown_bytes() -> None:
    tags = {7: (1, 2, 77 | TAG_UNKNOWN)}
    assert found(answer(tags), answer(tags))[1] == [("unknown bytes", 7, 1), ("unknown bytes", 7, 2)]
    assert ("unknown bytes", 8, 1) in found(answer({8: (0, 0, 0)}), answer())[1]


def test_a_single_copy() -> None:
    assert found(answer())[1] == [("one copy", None, None)]


def test_all_differences_are_counted_but_not_all_kept() -> None:
    report = VerifyReport()
    for chunk in range(3):
        check_copies(report, chunk, {1: answer(dict.fromkeys(range(CHUNK_BLOCKS), WRITTEN)), 2: ABSENT})
    assert report.count == 3 * CHUNK_BLOCKS
    assert len(report.differences) == DIFFERENCES_KEPT_MAX


def cluster(*fault_sets: int | None) -> State:
    """A state with one SDS per argument, in that fault set."""
    state = State(
        cluster=Cluster(cluster_id=bytes(16), salt=bytes(3), capability_key=bytes(32), api_token="", created_at=NOW)
    )
    commands = [CreateProtectionDomain(name="pd")]
    commands += [CreateFaultSet(pd_id=1, name=f"fs{number}") for number in range(1, 3)]
    commands += [
        AddSds(pd_id=1, name=f"s{index}", capacity_bytes=2**30, fault_set_id=number)
        for index, number in enumerate(fault_sets)
    ]
    for command in commands:
        state = apply(state, command, NOW).state
    return state


@pytest.mark.parametrize(
    ("fault_sets", "pair", "problems"),
    [
        ((1, 2), (1, 2), []),
        ((1, 1, 2), (1, 3), []),
        ((1, 1, 2), (1, 2), ["one fault set"]),
        ((1, 1), (1, 2), []),
        ((None, None), (1, 2), []),
        ((1, 2), (1, 1), ["one server"]),
    ],
)
def test_placement(fault_sets: tuple[int | None, ...], pair: tuple[int, int], problems: list[str]) -> None:
    """Goal: one fault set is wrong only while there is another."""
    report = VerifyReport()
    check_placement(report, cluster(*fault_sets), 0, *pair)
    assert [item.problem for item in report.differences] == problems
