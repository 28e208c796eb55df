"""Which repairs of stored blocks are worth an event: one per SDS and INTERVAL_SECONDS, however many blocks; what cannot
be repaired does not wait for what was. Pure. What was counted before the MDM started is no news.

An SDS counts, since it started, the blocks that it had rewritten from their other copy, and those that no copy has; and
the entries of its slot tables that it has mended, and the devices that had lost track of what was in their slots.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

INTERVAL_SECONDS: Final = 60.0


class Repaired(NamedTuple):
    blocks: int
    unrepairable: int


NONE: Final = Repaired(0, 0)


@dataclass
class _Seen:
    counted: Repaired = NONE
    untold: Repaired = NONE
    told_at: float = float("-inf")
    lost_told_at: float = float("-inf")


class Repairs:
    """Of the two counters with these names."""

    def __init__(self, repaired: str = "blocks_repaired", lost: str = "blocks_unrepairable") -> None:
        self._names = repaired, lost
        self._seen: dict[int, _Seen] = {}

    def news(self, sds_id: int, stats: Mapping[str, Any], now: float, *, known: bool = False) -> Repaired | None:
        """What has come since the last time that this was not None, if it is time to tell of it. ``known``: the SDS
        runs since before the MDM does: what it counts when it is first heard of was the last MDM's to tell."""
        counted = Repaired(*(_count(stats, name) for name in self._names))
        seen = self._seen.setdefault(sds_id, _Seen(counted if known else NONE))
        more = [
            now_ - before if now_ >= before else now_  # less: it was started anew
            for now_, before in zip(counted, seen.counted, strict=True)
        ]
        seen.counted = counted
        seen.untold = Repaired(seen.untold.blocks + more[0], seen.untold.unrepairable + more[1])
        told_at = seen.lost_told_at if seen.untold.unrepairable else seen.told_at
        if not any(seen.untold) or now < told_at + INTERVAL_SECONDS:
            return None
        told, seen.untold, seen.told_at = seen.untold, NONE, now
        if told.unrepairable:
            seen.lost_told_at = now
        return told


def _count(stats: Mapping[str, Any], name: str) -> int:
    value = stats.get(name, 0)
    return value if isinstance(value, int) else 0
