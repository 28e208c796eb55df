"""The model's dataclasses as JSON and back, by their type hints.

Only what the model uses: int, str, enums, datetimes (ISO 8601), optional values, tuples, frozensets, plain
mappings, nested dataclasses. A row must have exactly the fields its class has, so that one of another version does not
load by chance.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping, Set
from datetime import datetime
from enum import Enum
from functools import lru_cache
from typing import Any

# Computed from other rows when the state is loaded (mdm/derived.py), so not stored.
DERIVED = frozenset({"placement", "copies", "primaries", "thick_slots", "thick_bytes"})


class CodecError(Exception):
    """A row that is not what its class says."""


def encode(value: Any) -> str:
    return json.dumps(_plain(value), separators=(",", ":"))


def decode(cls: Any, text: str) -> Any:
    """Raises CodecError for anything but the JSON of a ``cls``."""
    try:
        return _typed(cls, json.loads(text))
    except (ValueError, TypeError, KeyError) as error:
        raise CodecError(f"not a {cls.__name__}: {error}") from error


@lru_cache(maxsize=64)
def _fields(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {item.name: hints[item.name] for item in dataclasses.fields(cls) if item.name not in DERIVED}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: _plain(getattr(value, name)) for name in _fields(type(value))}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Set):
        return sorted(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def _typed(hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        return _object(hint, value)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return None if value is None else _typed(arguments[0], value)
    if origin is frozenset:
        return frozenset(_typed(arguments[0], item) for item in value)
    if origin is tuple:
        hints = (arguments[0],) * len(value) if arguments[1] is Ellipsis else arguments
        return tuple(_typed(item_hint, item) for item_hint, item in zip(hints, value, strict=True))
    if origin is Mapping:
        return dict(value)
    if issubclass(hint, Enum):
        return hint(value)
    if hint is datetime:
        return datetime.fromisoformat(value)
    if type(value) is not hint:
        raise TypeError(f"{value!r} is not of type {hint.__name__}")
    return value


def _object(cls: Any, value: Any) -> Any:
    fields = _fields(cls)
    if not isinstance(value, dict) or value.keys() != fields.keys():
        raise TypeError(f"its fields are not {', '.join(fields)}")
    return cls(**{name: _typed(hint, value[name]) for name, hint in fields.items()})
