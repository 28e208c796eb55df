"""Goal: while servers refuse, hang, answer late, damage bytes, lose connections and take over from each other, every
write is carried out once and every read is right, no flush fails without a loss, and in the end nothing is left."""

from __future__ import annotations

import random
import struct
import threading
import time
from collections import Counter
from typing import Any

import pytest
from sdcengine_fakes import BLOCK, CHUNK, Close, FakeSds, Rig, Silent, rig, segment

from datapath import wire

CHUNKS = 8
CELLS = [(chunk, block) for chunk in range(CHUNKS) for block in (0, 1, 2, 100)]
LARGE_BLOCKS = 40  # of the cell at block 100: such writes are sent by reference
SECONDS = 3.0
CONNECTION_BUFFER = 262144  # one each way
PUT_OFF = (wire.ST_NOT_READY, wire.ST_BUSY, wire.ST_RANGE, wire.ST_SHUTTING_DOWN)
CHANGING = (wire.OP_WRITE, wire.OP_DISCARD)


class World:
    """What the servers agree on: the map, and which operations have been carried out (by their places)."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.lock = threading.Lock()
        self.entries = [(1, 1 + chunk % 3, 1 + (chunk + 1) % 3) for chunk in range(CHUNKS)]
        self.carried_out: dict[int, int] = {}
        self.late: dict[int, list[bytes]] = {}  # by connection
        self.calm = False
        self.seen: Counter[str] = Counter()

    def segment(self) -> bytes:
        return segment(*self.entries, (1, 0, 0))

    def change(self) -> None:
        """Some chunk gets another set; an epoch may be missed."""
        chunk = self.random.randrange(CHUNKS)
        epoch, primary, secondary = self.entries[chunk]
        other = self.random.choice([n for n in (1, 2, 3) if n != primary])
        new = self.random.choice(
            [(primary, 0), (primary, other), (secondary or primary, 0), (secondary or other, primary)]
        )
        self.entries[chunk] = (epoch + self.random.choice((1, 1, 1, 2)), *new)

    def happens(self, what: str, probability: float) -> bool:
        it = not self.calm and self.random.random() < probability
        self.seen[what] += it
        return it

    def serve(self, sds: FakeSds, header: dict[str, Any], body: bytes) -> Any:
        with self.lock:
            if self.happens("closed", 0.004):
                return Close
            if self.happens("hung", 0.002):
                return Silent
            answer = self._answer(sds, header, body)
            if header["opcode"] in CHANGING and self.happens("carried out, not answered", 0.02):
                return Close
            late = self.late.setdefault(threading.get_ident(), [])
            late.append(answer)
            if self.happens("late", 0.05):
                return Silent
            self.random.shuffle(late)
            answer = b"".join(late)
            late.clear()
            return answer[: len(answer) // 2] if self.happens("half an answer", 0.003) else answer

    def _answer(self, sds: FakeSds, header: dict[str, Any], body: bytes) -> bytes:
        opcode = header["opcode"]
        if opcode in (wire.OP_CAPABILITY, wire.OP_FLUSH):
            return sds.reply(header, status=wire.ST_BUSY if self.happens("busy", 0.05) else wire.ST_OK)
        epoch, primary, secondary = self.entries[header["chunk_index"]]
        if header["epoch"] != epoch:
            return sds.reply(header, status=wire.ST_STALE_MAP if header["epoch"] < epoch else wire.ST_NOT_READY)
        if sds.id != primary and (opcode in CHANGING or sds.id != secondary):
            return sds.reply(header, status=wire.ST_NOT_MEMBER)
        if self.happens("put off", 0.03):
            return sds.reply(header, status=self.random.choice(PUT_OFF))
        if opcode in CHANGING:
            known = self.carried_out.get(header["seq"], 0)
            if known >= header["op_id"]:
                self.seen["sent again"] += 1
                return sds.reply(header, status=wire.ST_OK if known == header["op_id"] else wire.ST_OLD_SESSION)
            self.carried_out[header["seq"]] = header["op_id"]
        answer = bytearray(sds.answer(header, body))
        if opcode == wire.OP_READ and len(answer) > wire.HEADER_SIZE and self.happens("damaged", 0.01):
            answer[-1] ^= 1
        return bytes(answer)


class Load:
    """One operation at a time on each cell, so that it is known what must be there."""

    def __init__(self, r: Rig, seed: int) -> None:
        self.r = r
        self.random = random.Random(seed)
        self.content = dict.fromkeys(CELLS, bytes(8))
        self.busy: dict[tuple[int, int], tuple[int, bytes | None]] = {}
        self.flushes: set[int] = set()
        self.done = 0
        self.stamp = 0

    def start(self) -> None:
        idle = [cell for cell in CELLS if cell not in self.busy]
        for cell in self.random.sample(idle, min(len(idle), 6)):
            offset, length = self.place(cell)
            kind = self.random.choice(("read", "read", "write", "write", "write", "discard"))
            data = None if kind == "read" else bytes(8)
            if kind == "write":
                self.stamp += 1
                data = struct.pack("<Q", self.stamp)
                token = self.r.start("write", offset, data=data * (length // 8))
            else:
                token = self.r.start(kind, offset, length)
            self.busy[cell] = (token, data)
        if self.random.random() < 0.05:
            self.flushes.add(self.r.start("flush"))

    def place(self, cell: tuple[int, int]) -> tuple[int, int]:
        return cell[0] * CHUNK + cell[1] * BLOCK, BLOCK * (LARGE_BLOCKS if cell[1] == 100 else 1)

    def judge(self) -> None:
        for cell, (token, data) in list(self.busy.items()):
            if token not in self.r.done:
                continue
            error, got = self.r.done.pop(token)
            assert error == 0, (cell, data, self.r.seen("io_error"), self.r.engine.stats())
            del self.busy[cell]
            self.done += 1
            if data is not None:
                self.content[cell] = data
            else:
                assert got == self.content[cell] * (self.place(cell)[1] // 8), cell
        for token in self.flushes & self.r.done.keys():
            self.flushes.remove(token)
            assert self.r.done.pop(token)[0] == 0


def settled(stats: dict[str, Any]) -> bool:
    in_flight = [sds["in_flight"] for sds in stats["sds"].values()]
    return not any((stats["parked"], *in_flight)) and stats["buffer_bytes"] <= 2 * len(in_flight) * CONNECTION_BUFFER


@pytest.mark.parametrize("seed", [1, 2])
def test_everything_at_once(seed: int) -> None:
    world = World(seed)
    with rig(sds=3, size=CHUNKS * CHUNK, deadline=60) as r:
        load = Load(r, seed)
        r.map = world.segment()
        for sds in r.sds.values():
            sds.rule = lambda header, body, sds=sds: world.serve(sds, header, body)
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            load.start()
            with world.lock:
                if world.happens("another set", 0.1):
                    world.change()
                    r.map = world.segment()
                    if world.happens("told", 0.5):
                        r.engine.set_segment(7, 0, r.map)
                if world.happens("reset", 0.02):
                    world.random.choice(list(r.sds.values())).reset()
            r.pump(0.002)
            load.judge()
        world.calm = True
        for sds in r.sds.values():
            sds.reset()  # what hangs is asked again
        r.until(lambda: load.judge() or not (load.busy or load.flushes))
        r.until(lambda: settled(r.engine.stats()))
        assert load.done > 1000
        assert not [what for what, times in world.seen.items() if times == 0]
