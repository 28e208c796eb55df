"""How people name objects: by name, or by an id of 16 hex digits, which no name may look like.

The id is kind (2 digits), the cluster's salt (6) and the object's number (8). What it stands for only the MDM knows
(``mdm.identity``); here is what can be told without it, which keeps odd strings out of paths.
"""

from __future__ import annotations

import re
from enum import Enum

from pfvol.constants import NAME_LENGTH_MAX
from pfvol.errors import InvalidError

_ID = re.compile(r"[0-9a-fA-F]{16}")
_NAME = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9_.-]{{0,{NAME_LENGTH_MAX - 1}}}")


class Noun(Enum):
    """A kind of object: the value is what its routes start with."""

    PROTECTION_DOMAIN = "pd"
    FAULT_SET = "fault-set"
    POOL = "pool"
    SDS = "sds"
    SDC = "sdc"
    VOLUME = "vol"


def is_id(text: str) -> bool:
    return _ID.fullmatch(text) is not None


def is_name(text: str) -> bool:
    """Whether an object may be called so."""
    return _NAME.fullmatch(text) is not None and not is_id(text)


def route(noun: Noun, reference: str, *rest: str) -> str:
    """The REST path of one object (``/vol/vol1/chunks``); ``InvalidError`` for what can be neither a name nor an id."""
    if not (is_id(reference) or is_name(reference)):
        raise InvalidError(
            f"{reference!r} is neither a name (1 to {NAME_LENGTH_MAX} of A-Z a-z 0-9 _ . -, not starting with . or -) "
            "nor an id (16 hex digits)"
        )
    return "/".join(("", noun.value, reference, *rest))
