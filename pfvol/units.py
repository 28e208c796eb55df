"""Sizes as people type them. Inside everything is bytes; this is the edge."""

from __future__ import annotations

import re
from decimal import Decimal

from pfvol.errors import InvalidError

SIZE_BYTES_MAX = 2**63 - 1

_SIZE = re.compile(r"(\d{1,20}(?:\.\d{1,20})?) ?([A-Za-z]*)")
_PREFIXES = "KMGTP"
_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{prefix}B": 1000**power for power, prefix in enumerate(_PREFIXES, 1)}
_UNITS |= {f"{prefix}{end}": 1024**power for power, prefix in enumerate(_PREFIXES, 1) for end in ("", "IB")}


def parse_size(text: str) -> int:
    """Bytes of ``800MB`` (decimal), ``1.5GiB`` or ``2G`` (binary), or a bare number of bytes.

    Raises ``InvalidError`` for anything else, and for what is no whole number of bytes.
    """
    match = _SIZE.fullmatch(text.strip())
    factor = _UNITS.get(match[2].upper()) if match else None
    if match is None or factor is None:
        raise InvalidError(f"{text!r} is not a size: a number and a unit, such as 800MB (decimal) or 1.5GiB (binary)")
    size = Decimal(match[1]) * factor
    if size != int(size):
        raise InvalidError(f"{text!r} is not a whole number of bytes")
    if size > SIZE_BYTES_MAX:
        raise InvalidError(f"{text!r} is more than any volume can have")
    return int(size)


def format_size(size_bytes: int) -> str:
    """A size for people: binary units, at most two decimals (``1.5 GiB``, ``512 MiB``, ``0 B``)."""
    for power in range(len(_PREFIXES), 0, -1):
        if abs(size_bytes) >= 1024**power:
            text = f"{size_bytes / 1024**power:.2f}".rstrip("0").rstrip(".")
            return f"{text} {_PREFIXES[power - 1]}iB"
    return f"{size_bytes} B"
