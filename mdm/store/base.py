"""What the manager needs of a store. All of it blocks; the manager calls it in a worker thread, one call at a time."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Protocol

from mdm.events import Event, EventType
from mdm.model import State
from mdm.transition import Change

EVENTS_KEPT_MAX = 100_000


class Store(Protocol):
    def load(self) -> State:
        """The state as last committed; raises ConfigError when it contradicts itself."""

    def commit(self, state: State, changes: Sequence[Change], events: Sequence[Event]) -> None:
        """Makes the step to ``state`` durable, all of it or nothing, before it returns.

        Raises IntegrityError when what is stored is not the state before this one (somebody else has written), and
        DeviceError when it cannot be written.
        """

    def events(self, *, since: datetime | None, type: EventType | None, limit: int) -> list[Event]:
        """The last ``limit`` events that match, oldest first; raises DeviceError when they cannot be read."""

    def close(self) -> None: ...
