"""The identities people see: 16 hex digits for an object, made of its kind, its cluster's salt and its number.

Inside, an object is a small int counted per kind. At the edge (REST, CLI, exports) it is kind (2 digits), salt (6 digits,
from the cluster id) and number (8 digits), so that an id pasted into the wrong command or the wrong cluster is refused
instead of naming another object. A name is never 16 hex digits, so a reference is either an id or a name, never both.
"""

from __future__ import annotations

import re
from enum import IntEnum

from pfvol.constants import NAME_LENGTH_MAX
from pfvol.errors import InvalidError, NotFoundError

SALT_BYTES = 3
NUMBER_MAX = 2**32 - 1

_ID = re.compile(r"[0-9a-fA-F]{16}")
_NAME = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9_.-]{{0,{NAME_LENGTH_MAX - 1}}}")


class Kind(IntEnum):
    """First byte of an id. Values are part of every id ever printed: never renumber."""

    PROTECTION_DOMAIN = 1
    FAULT_SET = 2
    POOL = 3
    SDS = 4
    SDC = 5
    VOLUME = 6
    SNAPSHOT = 7

    @property
    def noun(self) -> str:
        """What a person calls it."""
        return _NOUNS[self]


_NOUNS = {
    Kind.PROTECTION_DOMAIN: "protection domain",
    Kind.FAULT_SET: "fault set",
    Kind.POOL: "pool",
    Kind.SDS: "SDS",
    Kind.SDC: "SDC",
    Kind.VOLUME: "volume",
    Kind.SNAPSHOT: "snapshot",
}


def format_id(kind: Kind, cluster_id: bytes, number: int) -> str:
    """The id as it is shown; ``number`` is the object's int."""
    if not 0 < number <= NUMBER_MAX:
        raise ValueError(f"{kind.noun} number {number} does not fit an id")
    return f"{kind:02x}{cluster_id[:SALT_BYTES].hex()}{number:08x}"


def is_id(text: str) -> bool:
    return _ID.fullmatch(text) is not None


def parse_id(text: str, kind: Kind, cluster_id: bytes) -> int:
    """The number in an id; raises ``NotFoundError`` for one of another kind or cluster."""
    if not is_id(text):
        raise InvalidError(f"{text!r} is not an id: 16 hex digits")
    text = text.lower()
    if int(text[:2], 16) != kind:
        other = next((k.noun for k in Kind if text.startswith(f"{k:02x}")), "kind unknown here")
        raise NotFoundError(f"{text} is not the id of a {kind.noun} ({other})", id=text)
    if text[2:8] != cluster_id[:SALT_BYTES].hex():
        raise NotFoundError(f"{kind.noun} {text} belongs to another cluster", id=text)
    return int(text[8:], 16)


def is_name(text: str) -> bool:
    """Whether an object may be called so."""
    return _NAME.fullmatch(text) is not None and not is_id(text)


def check_reference(text: str, kind: Kind) -> str:
    """``text`` when it can be an id or a name at all, else ``InvalidError``; keeps odd strings out of paths."""
    if is_id(text) or is_name(text):
        return text
    raise InvalidError(
        f"{text!r} is neither a {kind.noun} name (1 to {NAME_LENGTH_MAX} of A-Z a-z 0-9 _ . -) nor an id (16 hex digits)"
    )
