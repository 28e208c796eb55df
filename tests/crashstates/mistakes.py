"""Known mistakes: each leaves something out of a recording, as if the product had not done it. The search has to find
it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from tests.crashstates.recording import (
    CREATE,
    MKDIR,
    PAGES_BEGIN,
    PAGES_END,
    SYNC_BEGIN,
    SYNC_END,
    Operation,
)

LeftOut = Callable[[Operation, str], bool]


@dataclass(frozen=True)
class Mistake:
    """``left_out`` is asked with each operation and the name under which its file was made; when the devices are in
    use, or also ``while_made``."""

    name: str
    workload: str
    left_out: LeftOut
    while_made: bool = False
    in_place: bool = True

    def leave_out(self, operations: list[Operation]) -> list[Operation]:
        names: dict[int, str] = {}
        kept = []
        opened = max(at for at, operation in enumerate(operations) if operation.mark and operation.mark[0] == "opened")
        if len([one for one in operations if one.mark and one.mark[0] == "opened"]) > 2:
            opened = next(at for at, operation in enumerate(operations) if operation.mark)  # started more than once
        for at, operation in enumerate(operations):
            if operation.kind in (CREATE, MKDIR):
                names[operation.file] = operation.data.decode().rpartition("/")[2].removesuffix(".unfinished")
            if (at < opened and not self.while_made) or not self.left_out(operation, names.get(operation.file, "")):
                kept.append(operation)
        return kept


def no_sync(*files: str) -> LeftOut:
    kinds = (SYNC_BEGIN, SYNC_END, PAGES_BEGIN, PAGES_END)
    return lambda operation, name: operation.kind in kinds and name in files


def no_pages(operation: Operation, _: str) -> bool:
    """The tag table's pages are not waited for, before the sync of the block file."""
    return operation.kind in (PAGES_BEGIN, PAGES_END)


def nothing(_: Operation, __: str) -> bool:
    """The recording as it is: what is wrong is the disk."""
    return False


MISTAKES: Final = (
    Mistake("blocks are not synced", "overwrites", no_sync("blocks")),
    Mistake("tags are not synced", "overwrites", no_sync("tags")),
    Mistake("tags are not waited for where they are in place", "committed writes", no_pages),
    Mistake("pages that were waited for are not with the disk", "committed writes", nothing, in_place=False),
    Mistake("tags are not synced, not in place", "flushes between, not in place", no_sync("tags")),
    Mistake("intents are not synced", "overwrites", no_sync("journal")),
    Mistake("intents of a device are not synced", "random work on a device", no_sync("journal")),
    Mistake("the slot table is not synced at a checkpoint", "checkpoints in the middle", no_sync("slots")),
    Mistake("slots are freed without a sync", "reused slots", no_sync("blocks", "tags")),
    Mistake("the superblock is not synced", "killed and started", no_sync("superblock", "superblock.new")),
    Mistake("the device's directory is not synced", "killed and started", no_sync("dev0")),
    Mistake("the directory above the device is not synced", "first writes", no_sync("devices"), while_made=True),
    Mistake("the directory above the SDS's is not synced", "first writes", no_sync(""), while_made=True),
)
