"""Sizes as people write them, to bytes and back. Pure.

KB, MB, GB, TB, PB are decimal; KiB … PiB, and the bare letters K … P, are binary; a bare number is bytes.
"""

from __future__ import annotations

import re
from fractions import Fraction

from pfvol.errors import InvalidError

SIZE_BYTES_MAX = 2**63 - 1
SIZE_TEXT_LENGTH_MAX = 40

_LETTERS = "kmgtp"
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(?:([kmgtp])(i?)(b?)|b|bytes)?", re.IGNORECASE | re.ASCII)


def parse_size(text: str) -> int:
    """Bytes of a size such as ``1GiB``, ``800MB``, ``1G`` (binary), ``1.5TiB`` or ``4096``.

    Raises ``InvalidError`` when it does not parse, is not a whole number of bytes, is zero, or does not fit 63 bits.
    """
    match = _SIZE.fullmatch(text.strip()) if len(text) <= SIZE_TEXT_LENGTH_MAX else None
    if match is None:
        raise InvalidError(
            f"{text[:SIZE_TEXT_LENGTH_MAX]!r} is not a size: expected a number and a unit, such as 1GiB, 800MB or 4096"
        )
    number, letter, binary, byte = match.groups()
    if binary and not byte:
        raise InvalidError(f"{text!r} is not a size: the unit ends in B, such as {letter.upper()}iB")
    factor = 1
    if letter:
        power = _LETTERS.index(letter.lower()) + 1
        factor = 1000**power if byte and not binary else 1024**power
    size = Fraction(number) * factor
    if size.denominator != 1:
        raise InvalidError(f"{text!r} is not a whole number of bytes")
    if not 0 < size <= SIZE_BYTES_MAX:
        raise InvalidError(f"{text!r} is not a size: it must be more than 0 and less than 8 EiB")
    return int(size)


def format_size(size_bytes: int) -> str:
    """A size for people: binary units, at most two decimals, none when it is exact (``1.5 GiB``, ``0 B``)."""
    for power in range(len(_LETTERS), 0, -1):
        if abs(size_bytes) >= 1024**power:
            text = f"{size_bytes / 1024**power:.2f}".rstrip("0").rstrip(".")
            return f"{text} {_LETTERS[power - 1].upper()}iB"
    return f"{size_bytes} B"
