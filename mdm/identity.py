"""Names and external ids: the rules for both, and how a user's reference becomes an int id.

An external id is 16 hex digits: kind (2), the cluster's salt (6), number (8). A name never looks like one, so a
reference is never ambiguous between the two.
"""

from __future__ import annotations

from enum import IntEnum

from mdm.model import State
from pfvol.constants import NAME_LENGTH_MAX
from pfvol.errors import ConflictError, InvalidError, NotFoundError
from pfvol.ids import is_id, is_name


class Kind(IntEnum):
    """What an id names; the first two digits of the external id."""

    PD = 1
    FAULT_SET = 2
    POOL = 3
    SDS = 4
    SDC = 5
    VOLUME = 6
    SNAPSHOT = 7


TABLES = {
    Kind.PD: "pds",
    Kind.FAULT_SET: "fault_sets",
    Kind.POOL: "pools",
    Kind.SDS: "sds",
    Kind.SDC: "sdc",
    Kind.VOLUME: "volumes",
}
NOUNS = {
    Kind.PD: "protection domain",
    Kind.FAULT_SET: "fault set",
    Kind.POOL: "pool",
    Kind.SDS: "SDS",
    Kind.SDC: "SDC",
    Kind.VOLUME: "volume",
    Kind.SNAPSHOT: "snapshot",
}


def check_name(name: str, kind: Kind) -> None:
    """Raises InvalidError unless ``name`` may be given to an object of this kind."""
    if not isinstance(name, str) or not is_name(name):
        raise InvalidError(
            f"{name!r} cannot name the {NOUNS[kind]}: use 1 to {NAME_LENGTH_MAX} characters "
            "of A-Z a-z 0-9 _ . - that do not start with . or -, and are not 16 hex digits as an id is",
        )


def external_id(state: State, kind: Kind, number: int) -> str:
    return f"{kind:02x}{state.cluster.salt.hex()}{number:08x}"


def resolve(state: State, kind: Kind, reference: str, *, pd_id: int | None = None) -> int:
    """The int id of the object that a user calls ``reference`` (a name or an external id).

    A pool's name is unique within its protection domain only; ``pd_id`` says which one is meant. Raises NotFoundError,
    or ConflictError when a pool's name is not enough.
    """
    if is_id(reference):
        number = int(reference[8:], 16)
        known = getattr(state, TABLES[kind])
        if reference.lower() == external_id(state, kind, number) and number in known:
            return number
        raise NotFoundError(f"no {NOUNS[kind]} {reference}")
    if kind is Kind.POOL and pd_id is None:
        return _resolve_pool(state, reference)
    found = state.names.get((TABLES[kind], pd_id or 0 if kind is Kind.POOL else 0, reference))
    if found is None:
        raise NotFoundError(f"no {NOUNS[kind]} {reference!r}")
    return found


def _resolve_pool(state: State, name: str) -> int:
    found = [pool for pool in state.pools.values() if pool.name == name]
    if not found:
        raise NotFoundError(f"no pool {name!r}")
    if len(found) > 1:
        domains = ", ".join(sorted(state.pds[pool.pd_id].name for pool in found))
        raise ConflictError(f"several protection domains have a pool {name!r} ({domains}): use its id")
    return found[0].pool_id
