"""Checks of command fields that several transitions share. Each raises ``InvalidError`` and says what would be
right."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, TypeVar

from pfvol.errors import InvalidError

E = TypeVar("E", bound=StrEnum)

RATE_MAX = 1_000_000_000  # of any rate limit, whatever its unit
TEXT_LENGTH_MAX = 1024


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
