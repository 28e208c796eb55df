"""What must be true of an SDS's devices after a crash: kept up to date operation by operation, asked for each state.

Of each block it knows every content that was ever written (from the recorded writes, not from what the engine says),
the name that each tag gave it, and how far what was acknowledged has been flushed. The workload marks what it was told:

- ``sent``, ``acknowledged`` (a write or discard; with COMMIT it is flushed too), ``flush``, ``flushed``: of one SDS
- ``purging``: the chunk may go from now on, and does not come back
- ``opened``: devices are in use, under an incarnation; ``recovered``: a recovery has ended; ``forgiven``: what recovery
  reported need not be reported again
"""

from __future__ import annotations

import struct
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, Final

from datapath.checksum import block_check, crc32c
from datapath.tags import HOLE, UNKNOWN, unpack
from tests.crashstates.disk import PAGE, SECTOR, ZEROS, Disk, File, Pages
from tests.crashstates.recording import MARK, PUNCH, WRITE, Operation

SLOT_PAGES: Final = 1024
TAG_BYTES: Final = 16
ENTRY: Final = struct.Struct("<QIIIIII")
USED: Final = 1
SEQ: Final = UNKNOWN - 1

Chunk = tuple[int, int]
Block = tuple[int, int, int]
Name = tuple[int, int]


class Names(dict[tuple[int, int, int, int, int], bytes]):
    """What each (volume, chunk, block, epoch, seq) was, on whichever copy: equal names mean equal bytes."""

    def give(self, block: Block, name: Name, content: bytes) -> None:
        known = self.setdefault((*block, *name), content)
        assert known == content, f"block {block}: two contents have the name {name}"


@dataclass(slots=True)
class Table:
    """A device's slot table as it is in the cache, and which pages of each slot were ever written."""

    owners: dict[int, Chunk] = field(default_factory=dict)
    touched: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))


@dataclass(slots=True)
class Recovered:
    """What a recovery made of a device."""

    used: dict[int, Chunk]
    dirty: set[Chunk]
    freed: set[Chunk]
    lost: list[str]
    blocks: Pages
    tags: Pages
    incarnation: int
    durable_incarnation: int


def tag_at(pages: Pages, slot: int, block: int) -> bytes:
    page, offset = divmod((slot * SLOT_PAGES + block) * TAG_BYTES, PAGE)
    return pages.get(page, ZEROS)[offset : offset + TAG_BYTES]


class Oracle:
    """Of one SDS, whose directory is ``root`` ("" or with a slash at its end) in the recorded stream."""

    def __init__(self, root: str, sds: int, names: Names) -> None:
        self.root, self.sds, self.names = root, sds, names
        self.tables: dict[str, Table] = defaultdict(Table)
        self.contents: dict[Block, list[bytes]] = defaultdict(lambda: [ZEROS])
        self.newest: dict[Block, Name] = {}
        self.floor: dict[Block, int] = {}  # index into contents: nothing older may show
        self.name_floor: dict[Block, Name] = {}
        self.reported: set[Chunk] = set()  # by the last recovery: also by the next
        self.purging: set[Chunk] = set()
        self.opened: set[str] = set()  # devices that are in use
        self.when_recovered: dict[str, Recovered] = {}  # for the mark of a recovery that was recorded
        self.written: set[Chunk] = set()  # since they have their slots
        self.claims = 0  # rises with everything that changes what must be true
        self.incarnation = 0
        self._acknowledged: dict[Block, tuple[int, Name | None]] = {}
        self._flushing: dict[int, dict[Block, tuple[int, Name | None]]] = {}
        self._sent: dict[int, dict[str, Any]] = {}

    def apply(self, operation: Operation, disk: Disk, path: str) -> None:
        """After ``disk`` has taken it; ``path`` is the file's, "" for others."""
        if operation.kind == MARK:
            self._mark(*operation.mark)
        elif operation.kind in (WRITE, PUNCH) and path.startswith(self.root) and ".unfinished/" not in path:
            device, _, name = path.rpartition("/")
            if name not in ("slots", "blocks", "tags"):
                return
            table = self.tables[device]
            file = disk.file(operation)
            assert isinstance(file, File)
            if name == "slots":
                self._slots(table, file)
            elif name == "blocks":
                self._blocks(table, operation, file)
            elif name == "tags" and operation.kind == WRITE:
                blocks = disk.nodes[disk.paths[f"{device}/blocks"]]
                assert isinstance(blocks, File)
                self._tags(table, operation, blocks)

    def _slots(self, table: Table, file: File) -> None:
        table_bytes = b"".join(file.cache.get(page, ZEROS) for page in range(-(-file.size // PAGE)))
        owners = {}
        for slot in range(file.size // ENTRY.size):
            entry = table_bytes[slot * ENTRY.size : (slot + 1) * ENTRY.size]
            volume, chunk, state, _, _, _, crc = ENTRY.unpack(entry)
            if crc != crc32c(entry[:28]):
                if slot in table.owners:
                    owners[slot] = table.owners[slot]  # being written
            elif state == USED:
                owners[slot] = (volume, chunk)
        for slot, owner in table.owners.items():
            if owners.get(slot) != owner:
                self._given_back(owner)
        table.owners = owners

    def _given_back(self, chunk: Chunk) -> None:
        """Its names go with the slot. What it held does not: it has to read as zeros, so it must have been
        discarded."""
        self.written.discard(chunk)
        for names in (self.name_floor, self.newest):
            for block in [one for one in names if one[:2] == chunk]:
                del names[block]
        for reached in (self._acknowledged, *self._flushing.values()):
            for block in [one for one in reached if one[:2] == chunk]:
                reached[block] = (reached[block][0], None)

    def _blocks(self, table: Table, operation: Operation, file: File) -> None:
        if operation.kind == WRITE:
            pages = range(operation.offset // PAGE, (operation.offset + len(operation.data)) // PAGE)
        else:
            pages = range(operation.offset // PAGE, (operation.offset + operation.length) // PAGE)
        for page in pages:
            slot, block = divmod(page, SLOT_PAGES)
            owner = table.owners.get(slot)
            if operation.kind == WRITE:
                assert owner is not None, f"slot {slot} is written to, and nobody has it"
                table.touched[slot].add(block)
            if owner is not None and (block in table.touched[slot] or (*owner, block) in self.contents):
                table.touched[slot].add(block)
                self.written.add(owner)
                self.contents[*owner, block].append(file.cache.get(page, ZEROS))

    def _tags(self, table: Table, operation: Operation, blocks: File) -> None:
        first = operation.offset // TAG_BYTES
        for at in range(len(operation.data) // TAG_BYTES):
            slot, block = divmod(first + at, SLOT_PAGES)
            owner = table.owners.get(slot)
            data = operation.data[at * TAG_BYTES : (at + 1) * TAG_BYTES]
            if owner is None or data == bytes(TAG_BYTES):
                continue
            check, epoch, seq = unpack(data)
            if seq & UNKNOWN or not seq & SEQ:
                continue  # recovery's, or never written
            content = blocks.cache.get(slot * SLOT_PAGES + block, ZEROS)
            if check != block_check(*owner, block, content):
                continue  # a table that is compared by sectors: the neighbour's bytes may be ahead of its tag
            table.touched[slot].add(block)
            key, name = (*owner, block), (epoch, seq & SEQ)
            self.names.give(key, name, content)
            self.newest[key] = max(name, self.newest.get(key, (0, 0)))

    def _mark(self, what: str, fields: dict[str, Any]) -> None:
        self.claims += 1
        if what in ("purging", "sent", "acknowledged"):
            getattr(self, f"_{what}_mark")(fields)
        elif what == "recovered":
            self.rebase(self.when_recovered)
        elif fields.get("sds") == self.sds:
            if what == "flush":
                self._flushing[fields["number"]] = dict(self._acknowledged)
            elif what == "flushed":
                self._raise_floor(self._flushing.pop(fields["number"]))
            elif what == "opened":
                self.incarnation = fields["incarnation"]
                self.opened |= set(fields["devices"])
            elif what == "forgiven":
                self.reported.clear()

    def _purging_mark(self, fields: dict[str, Any]) -> None:
        self.purging.add((fields["volume"], fields["chunk"]))

    def _sent_mark(self, fields: dict[str, Any]) -> None:
        self._sent[fields["number"]] = fields

    def _acknowledged_mark(self, fields: dict[str, Any]) -> None:
        sent = self._sent.pop(fields["number"])
        if self.sds not in sent["copies"]:
            return
        reached = {}
        data = bytes.fromhex(sent["data"]) if sent["data"] is not None else bytes(sent["length"])
        begin, end = sent["offset"], sent["offset"] + len(data)
        for block in range(begin // PAGE, -(-end // PAGE)):
            key = (sent["volume"], sent["chunk"], block)
            content = self.contents[key][-1] if key in self.contents else ZEROS
            first, last = max(begin, block * PAGE), min(end, (block + 1) * PAGE)
            wanted = data[first - begin : last - begin]
            assert content[first - block * PAGE : last - block * PAGE] == wanted, f"{key}: acknowledged and not written"
            reached[key] = (len(self.contents[key]) - 1 if key in self.contents else 0, self.newest.get(key))
        self._acknowledged |= reached
        if sent["commit"]:
            self._raise_floor(reached)

    def _raise_floor(self, reached: dict[Block, tuple[int, Name | None]]) -> None:
        present = {owner for table in self.tables.values() for owner in table.owners.values()}
        for block, (content, name) in reached.items():
            self.floor[block] = max(content, self.floor.get(block, 0))
            if name is not None and block[:2] in present:
                self.name_floor[block] = max(name, self.name_floor.get(block, (0, 0)))

    def rebase(self, recovered: dict[str, Recovered]) -> None:
        """A recovery has ended: what it found is the truth now, and all of it is durable."""
        self.contents.clear()
        self.newest.clear()
        self.floor.clear()
        self.name_floor.clear()
        self._acknowledged.clear()
        self._flushing.clear()
        self._sent.clear()
        self.claims += 1
        self.written = set().union(*(one.used.values() for one in recovered.values()))
        self.reported = set().union(*(one.dirty | one.freed for one in recovered.values()))
        self.incarnation = max(self.incarnation, *(one.incarnation for one in recovered.values()))
        for device, one in recovered.items():
            for slot, owner in one.used.items():
                for block in self.tables[device].touched[slot]:
                    key = (*owner, block)
                    self.contents[key] = [one.blocks.get(slot * SLOT_PAGES + block, ZEROS)]
                    _, epoch, seq = unpack(tag_at(one.tags, slot, block))
                    if seq & SEQ:
                        self.name_floor[key] = self.newest[key] = (epoch, seq & SEQ)

    def adopt(self, disk: Disk) -> None:
        """The slot tables are those of ``disk``, which may be another than the one known so far."""
        for device, table in self.tables.items():
            file = disk.nodes[disk.paths[f"{device}/slots"]]
            assert isinstance(file, File)
            table.owners = {}
            self._slots(table, file)

    # -- judging

    def problems(self, recovered: dict[str, Recovered], disk: Disk) -> list[str]:
        """What is wrong with a state of the disk after recovery."""
        found: list[str] = []
        reported = set().union(*(one.dirty | one.freed for one in recovered.values()))
        holders: dict[Chunk, str] = {}
        for device, one in recovered.items():
            found += [f"{device}: lost {reason}" for reason in one.lost]
            if one.incarnation <= self.incarnation:
                found.append(f"{device}: incarnation {one.incarnation} was in use")
            if one.durable_incarnation != one.incarnation:
                found.append(f"{device}: durable incarnation {one.durable_incarnation} of another boot")
            for slot, owner in one.used.items():
                if owner in holders:
                    found.append(f"chunk {owner} is in a slot of {holders[owner]} and in slot {slot} of {device}")
                holders[owner] = device
            found += self._device(device, one, disk)
        cached = {owner for table in self.tables.values() for owner in table.owners.values()}
        for chunk in (cached ^ holders.keys()) - reported:
            if chunk not in self.purging and chunk not in holders and chunk in self.written:
                found.append(f"chunk {chunk} is gone and not reported")
        for block in [one for one in self.contents if one[:2] not in holders and one[:2] not in self.purging]:
            if ZEROS not in self._allowed(block):
                found.append(f"block {block} is gone with its chunk, and was flushed")
        for chunk in self.reported - reported:
            found.append(f"chunk {chunk} was reported by the last recovery and no checkpoint has ended since")
        return found

    def settled(self, disk: Disk) -> bool:
        """No write is between its bytes and its tag: a process that goes on would write the tag next."""
        for device, table in self.tables.items():
            blocks, tags = (disk.nodes[disk.paths[f"{device}/{name}"]] for name in ("blocks", "tags"))
            assert isinstance(blocks, File)
            assert isinstance(tags, File)
            for slot, owner in table.owners.items():
                for block in table.touched[slot]:
                    content = blocks.cache.get(slot * SLOT_PAGES + block, ZEROS)
                    if unpack(tag_at(tags.cache, slot, block))[0] != block_check(*owner, block, content):
                        return False
        return True

    def since_acknowledged(self, block: Block) -> list[bytes]:
        """What may show of a block as long as one host of the pair has lost nothing."""
        reached = self._acknowledged.get(block, (0, None))[0]
        return self.contents[block][reached:] if block in self.contents else [ZEROS]

    def _allowed(self, block: Block) -> list[bytes]:
        return self.contents[block][self.floor.get(block, 0) :] if block in self.contents else [ZEROS]

    def _device(self, device: str, one: Recovered, disk: Disk) -> list[str]:
        found: list[str] = []
        table = self.tables[device]
        cached_blocks, cached_tags = (disk.nodes[disk.paths[f"{device}/{name}"]] for name in ("blocks", "tags"))
        assert isinstance(cached_blocks, File)
        assert isinstance(cached_tags, File)
        for slot in table.touched.keys() - one.used.keys():
            if any(one.blocks.get(slot * SLOT_PAGES + block, ZEROS) != ZEROS for block in table.touched[slot]):
                found.append(f"{device}: slot {slot} is free and not empty")
        for slot, owner in one.used.items():
            stored = {page - slot * SLOT_PAGES for page in one.blocks if page // SLOT_PAGES == slot}
            if extra := stored - table.touched[slot]:
                found.append(f"{device}: slot {slot} has bytes in blocks {sorted(extra)[:8]}, and nobody wrote there")
            for block in table.touched[slot]:
                page = slot * SLOT_PAGES + block
                content, tag = one.blocks.get(page, ZEROS), tag_at(one.tags, slot, block)
                found += [f"{device}: slot {slot}, {problem}" for problem in self._block((*owner, block), content, tag)]
                if owner in one.dirty or table.owners.get(slot) != owner:
                    continue
                if content != cached_blocks.cache.get(page, ZEROS) or tag != tag_at(cached_tags.cache, slot, block):
                    found.append(f"{device}: slot {slot}, block {(*owner, block)} lost a write and is not reported")
        return found

    def _block(self, key: Block, content: bytes, tag: bytes) -> list[str]:
        found = []
        allowed = self._allowed(key)
        if content not in allowed:
            for at in range(0, PAGE, SECTOR):
                if all(content[at : at + SECTOR] != one[at : at + SECTOR] for one in allowed):
                    what = self._whose(key, content[at : at + SECTOR])
                    found.append(f"block {key}, sector {at // SECTOR}: {what}")
                    break
        check, epoch, seq = unpack(tag)
        name = (epoch, seq & SEQ)
        if tag == bytes(TAG_BYTES) or check != block_check(*key, content):
            found.append(f"block {key}: bytes that are not its tag's")
        elif not seq & UNKNOWN and (epoch, seq) == (0, HOLE):
            if content != ZEROS or ZEROS not in allowed:
                found.append(f"block {key}: said to be never written")
        elif not seq & UNKNOWN and self.names.get((*key, *name)) != content:
            found.append(f"block {key}: the name {name} is not that of these bytes")
        if name < self.name_floor.get(key, (0, 0)):
            found.append(f"block {key}: the name went back from {self.name_floor[key]} to {name}")
        return found

    def _whose(self, key: Block, sector: bytes) -> str:
        if sector == bytes(SECTOR):
            return "zeros, and it was flushed"
        for other, contents in self.contents.items():
            for index, content in enumerate(contents):
                if sector in (content[at : at + SECTOR] for at in range(0, PAGE, SECTOR)):
                    return (
                        f"version {index} where {self.floor.get(key, 0)} was flushed" if other == key else f"of {other}"
                    )
        return "bytes that were never written"
