"""Faults on purpose: how they are written, what they may be, and how they go over the control RPC. Pure.

    pread=EIO@1%       of these calls one in a hundred fails (without @: each)
    pwrite=20ms        each of these calls waits that long first (us, ms, s)
    vol1/12:345        block 345 of chunk 12 of volume vol1; without a volume when there is only one that can be meant

What is wrong with a text is an InvalidError that says what would be right.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Final

from pfvol.constants import CHUNK_BLOCKS
from pfvol.errors import InvalidError

CALLS: Final = ("pread", "pwrite", "fdatasync", "fallocate")
ERRORS: Final = ("EIO", "ENOSPC", "EDQUOT", "EROFS", "ENODEV", "ENXIO", "ESTALE")  # what a disk may say of itself
NEEDS_ROOM: Final = ("pwrite", "fallocate")
MILLION: Final = 1_000_000
DELAY_MICROSECONDS_MAX: Final = 10 * MILLION
FAIL_SECONDS_MAX: Final = 30 * 24 * 3600.0
PLACES_MAX: Final = 256  # a call
CHUNK_INDEX_MAX: Final = 2**32 - 1
TEXT_LENGTH_MAX: Final = 128

_ERROR: Final = re.compile(r"([a-z0-9_]+)=([A-Z0-9]+)(?:@([0-9.]+)%)?", re.ASCII)
_DELAY: Final = re.compile(r"([a-z0-9_]+)=([0-9]+(?:\.[0-9]+)?)(us|ms|s)", re.ASCII)
_PLACE: Final = re.compile(r"(?:([^/:]+)/)?([0-9]{1,10}):([0-9]{1,10})", re.ASCII)
_MICROSECONDS: Final = {"us": 1, "ms": 1000, "s": MILLION}


def check_fail_seconds(seconds: float) -> None:
    """How long an SDS may fail on purpose; no number (nan) and infinity are refused too."""
    if not 0 < seconds <= FAIL_SECONDS_MAX:
        raise InvalidError(f"a failure lasts more than 0 and at most {FAIL_SECONDS_MAX:.0f} s, not {seconds:g}")


def _check_call(call: Any) -> None:
    if call not in CALLS:
        raise InvalidError(f"{str(call)[:TEXT_LENGTH_MAX]!r} is no call of a disk: there are {', '.join(CALLS)}")


@dataclass(frozen=True, slots=True)
class DiskError:
    """Of a million such calls of an SDS's disks ``per_million`` fail with ``error``."""

    call: str
    error: str
    per_million: int

    def __post_init__(self) -> None:
        _check_call(self.call)
        if self.error not in ERRORS:
            raise InvalidError(f"{str(self.error)[:32]!r} is no error that a disk gives: there are {', '.join(ERRORS)}")
        if self.error == "ENOSPC" and self.call not in NEEDS_ROOM:
            raise InvalidError(f"{self.call} needs no room on a disk: ENOSPC is for {' and '.join(NEEDS_ROOM)}")
        if type(self.per_million) is not int or not 1 <= self.per_million <= MILLION:
            raise InvalidError("the share of calls that fail must be more than 0 (0.0001% or more) and at most 100%")

    @property
    def errno(self) -> int:
        return int(getattr(errno, self.error))

    def __str__(self) -> str:
        percent = f"{self.per_million / 10_000:.4f}".rstrip("0").rstrip(".")
        return f"{self.call}={self.error}@{percent}%"


@dataclass(frozen=True, slots=True)
class DiskDelay:
    """Each such call of an SDS's disks takes that much longer."""

    call: str
    microseconds: int

    def __post_init__(self) -> None:
        _check_call(self.call)
        if type(self.microseconds) is not int or not 0 < self.microseconds <= DELAY_MICROSECONDS_MAX:
            raise InvalidError(f"a delay must be more than 0 and at most {DELAY_MICROSECONDS_MAX // MILLION}s")

    def __str__(self) -> str:
        if self.microseconds % 1000:
            return f"{self.call}={self.microseconds}us"
        return f"{self.call}={self.microseconds // 1000}ms"


@dataclass(frozen=True, slots=True)
class Place:
    """A block of a chunk of a volume (its name or id); None: of the only one that there is."""

    volume: str | None
    chunk: int
    block: int


FULL_DISK: Final = tuple(DiskError(call, "ENOSPC", MILLION) for call in NEEDS_ROOM)


def parse_error(text: str) -> DiskError:
    """``CALL=ERRNO[@PERCENT%]``"""
    match = _ERROR.fullmatch(text) if len(text) <= TEXT_LENGTH_MAX else None
    if match is None:
        raise InvalidError(
            f"{text[:TEXT_LENGTH_MAX]!r} is no error to inject: expected CALL=ERRNO@PERCENT%, such as pread=EIO@1%"
        )
    call, error, percent = match.groups()
    try:
        share = Fraction(percent or 100) * MILLION / 100
    except ValueError:
        raise InvalidError(f"{percent}% is no percentage: expected a number, such as 1% or 0.5%") from None
    return DiskError(call, error, int(share))


def parse_delay(text: str) -> DiskDelay:
    """``CALL=TIME``"""
    match = _DELAY.fullmatch(text) if len(text) <= TEXT_LENGTH_MAX else None
    if match is None:
        raise InvalidError(
            f"{text[:TEXT_LENGTH_MAX]!r} is no delay to inject: expected CALL=TIME in us, ms or s, such as pwrite=20ms"
        )
    call, number, unit = match.groups()
    return DiskDelay(call, int(Fraction(number) * _MICROSECONDS[unit]))


def parse_place(text: str) -> Place:
    """``[VOLUME/]CHUNK:BLOCK``"""
    match = _PLACE.fullmatch(text) if len(text) <= TEXT_LENGTH_MAX else None
    if match is None:
        raise InvalidError(
            f"{text[:TEXT_LENGTH_MAX]!r} is no block: expected VOLUME/CHUNK:BLOCK, such as vol1/12:345, "
            "or CHUNK:BLOCK where only one volume can be meant"
        )
    volume, chunk, block = match.groups()
    check_block(int(chunk), int(block))
    return Place(volume, int(chunk), int(block))


def check_block(chunk: int, block: int) -> None:
    if not 0 <= block < CHUNK_BLOCKS:
        raise InvalidError(f"a chunk has blocks 0 to {CHUNK_BLOCKS - 1}, not {block}")
    if not 0 <= chunk <= CHUNK_INDEX_MAX:
        raise InvalidError(f"no volume has a chunk {chunk}")


@dataclass(frozen=True, slots=True)
class Rules:
    """What is injected into an SDS's disks: per call at most one error and one delay."""

    errors: dict[str, DiskError] = field(default_factory=dict)
    delays: dict[str, DiskDelay] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.errors or self.delays)

    def with_more(self, errors: Sequence[DiskError], delays: Sequence[DiskDelay]) -> Rules:
        return Rules(self.errors | {one.call: one for one in errors}, self.delays | {one.call: one for one in delays})

    def texts(self) -> list[str]:
        return [str(one) for one in (*self.errors.values(), *self.delays.values())]

    def to_wire(self) -> dict[str, Any]:
        return {
            "errors": [[one.call, one.error, one.per_million] for one in self.errors.values()],
            "delays": [[one.call, one.microseconds] for one in self.delays.values()],
        }

    @staticmethod
    def from_wire(body: Any) -> Rules:
        """Raises InvalidError for what is none."""
        try:
            errors = [DiskError(*row) for row in body["errors"]]
            delays = [DiskDelay(*row) for row in body["delays"]]
        except (TypeError, KeyError) as error:
            raise InvalidError(f"faults to inject cannot be read: {error!r}") from None
        return Rules().with_more(errors, delays)
