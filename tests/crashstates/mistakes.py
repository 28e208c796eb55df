"""Known mistakes: each leaves something out of a recording, as if the product had not done it. The search has to find it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from tests.crashstates.recording import CREATE, EXCHANGE, MKDIR, PAGES_BEGIN, SYNC_BEGIN, SYNC_END, Operation


@dataclass(frozen=True)
class Mistake:
    name: str
    workload: str
    left_out: Callable[[Operation, str], bool]
    in_place: bool = True

    def leave_out(self, operations: list[Operation]) -> list[Operation]:
        names: dict[int, str] = {}
        out = []
        for operation in operations:
            if operation.kind in (CREATE, MKDIR):
                names[operation.file] = operation.data.decode().rpartition("/")[2]
            if not self.left_out(operation, names.get(operation.file, "")):
                out.append(operation)
        return out


def no_sync_of(file: str) -> Callable[[Operation, str], bool]:
    return lambda operation, name: operation.kind in (SYNC_BEGIN, SYNC_END) and name == file


MISTAKES: Final = (
    Mistake("the block file is not synced", "overwrites", no_sync_of("blocks")),
)
