"""Checks of command fields that several transitions share. Each raises ``InvalidError`` and says what would be
right."""

from __future__ import annotations

import re
from enum import StrEnum
from ipaddress import ip_address
from typing import Any, TypeVar

from pfvol.config import parse_address
from pfvol.errors import InvalidError

E = TypeVar("E", bound=StrEnum)

RATE_MAX = 1_000_000_000  # of any rate limit, whatever its unit
TEXT_LENGTH_MAX = 1024
HOST_LENGTH_MAX = 253

# The last label is not a number: what looks like an IP address has to be one.
_LABEL = "[a-z0-9](?:[a-z0-9_-]{0,61}[a-z0-9])?"
_HOST = re.compile(rf"(?:{_LABEL}\.)*(?![0-9]+\.?$){_LABEL}\.?", re.IGNORECASE)


def whole(what: str, value: Any, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidError(f"{what} must be a whole number from {low} to {high}, not {value!r}")
    return value


def choice(what: str, kind: type[E], value: Any) -> E:
    try:
        return kind(value)
    except ValueError:
        raise InvalidError(f"{what} must be one of {', '.join(kind)}, not {value!r}") from None


def text(what: str, value: Any) -> str:
    if not isinstance(value, str) or len(value) > TEXT_LENGTH_MAX or not value.isprintable():
        raise InvalidError(f"{what} must be at most {TEXT_LENGTH_MAX} printable characters")
    return value


def host(what: str, value: Any) -> str:
    """An IP address or a host's name, which is not looked up: the MDM need not know it."""
    if isinstance(value, str) and len(value) <= HOST_LENGTH_MAX:
        try:
            ip_address(value)
            return value
        except ValueError:
            if _HOST.fullmatch(value):
                return value
    raise InvalidError(f"{what} must be an IP address or a host name, not {str(value)[:HOST_LENGTH_MAX]!r}")


def host_or_address(what: str, value: Any) -> str:
    """A ``host``, with or without a port."""
    bare = value
    if isinstance(value, str) and (value.startswith("[") or value.count(":") == 1):
        bare, _ = parse_address(value)
    host(what, bare)
    return str(value)
