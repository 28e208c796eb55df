"""Who answers: what the MDM says when an SDS has lost another one that leads chunks of both.

An SDS that leads goes on alone whenever it asks. One that does not lead may only take over when the MDM finds too that
the other one does not answer; else two that have merely lost each other would take chunks from each other in turn.
That an answer is wrong costs time and never data: the one left out keeps serving only while it has leases, and
whoever takes over waits for their end.

What is known here is lost with the MDM's process. After a start, who has not come back does not answer, but is not
known to be dead.
"""

from __future__ import annotations

from dataclasses import dataclass

import trio

from mdm.membership import Membership
from pfvol.errors import TimedOutError, UnreachableError

PING_SECONDS_MAX = 0.5
SILENT_AFTER_SECONDS = 1.5
TROUBLE_ENDS_AFTER_SECONDS = 2.0  # who still has trouble asks again every 0.5 s


@dataclass
class _Asked:
    first_at: float
    last_at: float


class Witness:
    def __init__(self, membership: Membership) -> None:
        self._membership = membership
        self._asked: dict[tuple[int, int], _Asked] = {}

    def asked(self, asker: int, peer: int) -> None:
        """``asker`` wants ``peer`` left out."""
        now = trio.current_time()
        self._asked = {
            key: asked for key, asked in self._asked.items() if now - asked.last_at <= TROUBLE_ENDS_AFTER_SECONDS
        }
        self._asked.setdefault((asker, peer), _Asked(now, now)).last_at = now

    def is_silent(self, asker: int, peer: int) -> bool:
        """Without asking it: it has no session, or it has long been in this trouble and does not say a word of it."""
        runtime = self._membership.sds.get(peer)
        if runtime is None or not runtime.serving or runtime.session.closed.is_set():
            return True
        since = self._asked[asker, peer].first_at
        if (peer, asker) in self._asked:
            since = max(since, self._asked[peer, asker].last_at)
        return trio.current_time() - since >= SILENT_AFTER_SECONDS

    async def answers(self, peer: int) -> bool:
        runtime = self._membership.sds.get(peer)
        if runtime is None:
            return False
        try:
            await runtime.session.call("ping", {}, timeout=PING_SECONDS_MAX)
        except (TimedOutError, UnreachableError):
            return False
        return True
