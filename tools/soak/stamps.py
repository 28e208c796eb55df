"""Blocks that say who they are and when they were written, a program that writes them, and a judge of what is read.

A block of 4 KiB is its number and a stamp, 256 times. Each thread of the writer has blocks of its own, so the stamps of
a block only rise. What the writer does it says in a log outside the volume: ``WILL`` before a write, ``DURABLE`` after
what has to survive, that is after fsync for writes through the page cache, and after the write itself for direct ones,
which both servers have by then. A record is one write(2), so it survives the writer.

    python -m tools.soak.stamps VOLUME LOG --seed N --first-stamp N --blocks N

writes until SIGTERM, or until an IO fails, which it says, and ends with 1.
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import signal
import struct
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BLOCK_BYTES = 4096
THREADS = 6  # every other one direct
WRITES_PER_FSYNC_MAX = 8
WILL, DURABLE = 1, 2
RECORD = struct.Struct("<BIQ")  # kind, block, stamp
STAMP = struct.Struct("<QQ")  # block, stamp


def block_content(block: int, stamp: int) -> bytes:
    return STAMP.pack(block, stamp) * (BLOCK_BYTES // STAMP.size)


@dataclass
class Expected:
    """What may be found in a block: the stamp that is known to be durable (0: zeros may be there), or a later one."""

    durable: int = 0
    newest: int = 0

    def problem(self, block: int, content: bytes) -> str | None:
        """What is wrong with the block's content, if anything; if nothing, that is what must be there from now on."""
        found_block, stamp = STAMP.unpack_from(content)
        if content != bytes(BLOCK_BYTES) if stamp == 0 else content != block_content(block, stamp):
            return f"block {block} is torn or another's: it starts as block {found_block} with stamp {stamp}"
        if stamp < self.durable:
            return f"block {block} has stamp {stamp}, but {self.durable} was durable"
        if stamp > self.newest:
            return f"block {block} has stamp {stamp}, which was never written: the newest is {self.newest}"
        self.durable = stamp
        return None


def read_log(path: Path, expected: dict[int, Expected]) -> tuple[int, int]:
    """Adds what the log says; returns how many writes were begun and how many of them are durable."""
    content = path.read_bytes()
    counts = {WILL: 0, DURABLE: 0}
    for kind, block, stamp in RECORD.iter_unpack(content[: len(content) // RECORD.size * RECORD.size]):
        state = expected.setdefault(block, Expected())
        counts[kind] += 1
        if kind == WILL:
            state.newest = max(state.newest, stamp)
        else:
            state.durable = max(state.durable, stamp)
    return counts[WILL], counts[DURABLE]


def blocks_of(seed: int, volume_blocks: int, count: int) -> list[int]:
    """The same blocks in every round: some beside each other, most all over the volume."""
    together = range(count // 4)
    spread = random.Random(seed).sample(range(count // 4, volume_blocks), count - len(together))
    return [*together, *spread]


class Writer:
    """The threads that write. ``stop`` ends them after what they are at."""

    def __init__(self, volume: Path, log: Path, seed: int, first_stamp: int, blocks: list[int]) -> None:
        self._volume = volume
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._seed = seed
        self._first_stamp = first_stamp
        self._blocks = blocks
        self.stop = threading.Event()
        self.errors: list[str] = []

    def run(self, thread: int) -> None:
        try:
            self._write(thread)
        except OSError as error:
            self.errors.append(f"thread {thread}: {error}")
            self.stop.set()

    def _write(self, thread: int) -> None:
        rng = random.Random(self._seed * THREADS + thread)
        own, direct = self._blocks[thread::THREADS], thread % 2 == 1
        stamps = iter(range(self._first_stamp, sys.maxsize))
        descriptor = os.open(self._volume, os.O_RDWR | (os.O_DIRECT if direct else 0))
        try:
            with mmap.mmap(-1, BLOCK_BYTES) as buffer:
                while not self.stop.is_set():
                    blocks = rng.sample(own, rng.randint(1, WRITES_PER_FSYNC_MAX))
                    written = list(self._some(descriptor, buffer, blocks, stamps, direct))
                    os.fsync(descriptor)
                    for block, stamp in written:
                        self._say(DURABLE, block, stamp)
        finally:
            os.close(descriptor)

    def _some(
        self, descriptor: int, buffer: mmap.mmap, blocks: list[int], stamps: Iterator[int], direct: bool
    ) -> Iterator[tuple[int, int]]:
        for block in blocks:
            stamp = next(stamps)
            buffer[:] = block_content(block, stamp)
            self._say(WILL, block, stamp)
            if os.pwritev(descriptor, [buffer], block * BLOCK_BYTES) != BLOCK_BYTES:
                raise OSError(f"a short write of block {block}")
            if direct:
                self._say(DURABLE, block, stamp)
            else:
                yield block, stamp

    def _say(self, kind: int, block: int, stamp: int) -> None:
        os.write(self._log, RECORD.pack(kind, block, stamp))


def main() -> int:
    parser = argparse.ArgumentParser(description="Writes stamped blocks until it is told to stop.")
    parser.add_argument("volume", type=Path)
    parser.add_argument("log", type=Path)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--first-stamp", type=int, required=True)
    parser.add_argument("--blocks", type=int, required=True)
    arguments = parser.parse_args()
    blocks = blocks_of(0, arguments.volume.stat().st_size // BLOCK_BYTES, arguments.blocks)
    writer = Writer(arguments.volume, arguments.log, arguments.seed, arguments.first_stamp, blocks)
    signal.signal(signal.SIGTERM, lambda *_: writer.stop.set())
    threads = [threading.Thread(target=writer.run, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print("\n".join(writer.errors), file=sys.stderr, end="\n" if writer.errors else "")
    return bool(writer.errors)


if __name__ == "__main__":
    sys.exit(main())
