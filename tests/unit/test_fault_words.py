"""How faults on purpose are written, and how each mistake in them is answered."""

from __future__ import annotations

import errno

import pytest

from pfvol.errors import InvalidError
from pfvol.faults import (
    CALLS,
    FULL_DISK,
    MILLION,
    DiskDelay,
    DiskError,
    Place,
    Rules,
    parse_delay,
    parse_error,
    parse_place,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pread=EIO@1%", DiskError("pread", "EIO", 10_000)),
        ("pwrite=ENOSPC", DiskError("pwrite", "ENOSPC", MILLION)),
        ("fdatasync=EIO@0.5%", DiskError("fdatasync", "EIO", 5000)),
        ("fallocate=ENOSPC@100%", DiskError("fallocate", "ENOSPC", MILLION)),
        ("pread=EIO@0.0001%", DiskError("pread", "EIO", 1)),
    ],
)
def test_errors(text: str, expected: DiskError) -> None:
    assert parse_error(text) == expected
    assert parse_error(str(expected)) == expected
    assert errno.errorcode[expected.errno] == expected.error


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("pread", "expected CALL=ERRNO@PERCENT%, such as pread=EIO@1%"),
        ("pread=EIO@1", "expected CALL=ERRNO@PERCENT%"),
        ("pread=EIO@-1%", "expected CALL=ERRNO@PERCENT%"),
        ("read=EIO@1%", "'read' is no call of a disk: there are pread, pwrite, fdatasync, fallocate"),
        ("pread=EWHAT@1%", "'EWHAT' is no error that a disk gives: there are EIO, ENOSPC"),
        ("pread=EAGAIN", "'EAGAIN' is no error that a disk gives"),
        ("pread=ENOSPC", "pread needs no room on a disk: ENOSPC is for pwrite and fallocate"),
        ("pread=EIO@0%", "more than 0"),
        ("pread=EIO@0.00001%", "more than 0"),
        ("pread=EIO@100.1%", "at most 100%"),
        ("pread=EIO@1.2.3%", "1.2.3% is no percentage"),
        ("x" * 1000, "expected CALL=ERRNO@PERCENT%"),
    ],
)
def test_errors_that_are_none(text: str, said: str) -> None:
    with pytest.raises(InvalidError) as refused:
        parse_error(text)
    assert said in refused.value.message
    assert len(refused.value.message) < 300


@pytest.mark.parametrize(
    ("text", "microseconds"),
    [("pwrite=20ms", 20_000), ("pread=1.5ms", 1500), ("pread=7us", 7), ("fdatasync=1s", MILLION)],
)
def test_delays(text: str, microseconds: int) -> None:
    delay = parse_delay(text)
    assert delay.microseconds == microseconds
    assert parse_delay(str(delay)) == delay


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("pwrite=20", "expected CALL=TIME in us, ms or s, such as pwrite=20ms"),
        ("open=20ms", "'open' is no call of a disk"),
        ("pwrite=0ms", "more than 0"),
        ("pwrite=11s", "at most 10s"),
    ],
)
def test_delays_that_are_none(text: str, said: str) -> None:
    with pytest.raises(InvalidError, match=said):
        parse_delay(text)


def test_places() -> None:
    assert parse_place("vol1/12:345") == Place("vol1", 12, 345)
    assert parse_place("0:0") == Place(None, 0, 0)
    for text, said in (
        ("12", "expected VOLUME/CHUNK:BLOCK, such as vol1/12:345"),
        ("a/b/1:2", "expected VOLUME/CHUNK:BLOCK"),
        ("vol1/1:1024", "blocks 0 to 1023, not 1024"),
        ("vol1/4294967296:0", "no volume has a chunk 4294967296"),
    ):
        with pytest.raises(InvalidError, match=said):
            parse_place(text)


def test_rules_go_over_the_wire_and_the_later_one_of_a_call_counts() -> None:
    rules = Rules().with_more([parse_error("pread=EIO@1%"), *FULL_DISK], [DiskDelay("pread", 5)])
    rules = rules.with_more([parse_error("pread=EIO@2%")], [])
    assert Rules.from_wire(rules.to_wire()) == rules
    assert rules.texts() == ["pread=EIO@2%", "pwrite=ENOSPC@100%", "fallocate=ENOSPC@100%", "pread=5us"]
    assert rules
    assert not Rules()
    assert set(CALLS) >= set(rules.errors)


@pytest.mark.parametrize(
    "body",
    [
        None,
        {},
        {"errors": [], "delays": [["pread"]]},
        {"errors": [["pread", "EIO", "1"]], "delays": []},
        {"errors": [["pread", "EIO", True]], "delays": []},
        {"errors": [["pread", "EIO", 0]], "delays": []},
        {"errors": [[["pread"], "EIO", 5]], "delays": []},
        {"errors": 5, "delays": []},
    ],
)
def test_what_comes_over_the_wire_is_checked(body: object) -> None:
    with pytest.raises(InvalidError):
        Rules.from_wire(body)
