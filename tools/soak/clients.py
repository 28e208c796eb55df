"""A program that reads and writes volumes of one mount at random and says when each IO began and ended, and its reader.

    python -m tools.soak.clients LOG VOLUME... --seed N --first-stamp N --blocks N --threads N --rate N

runs until SIGTERM; with ``--read-back`` it reads every block once instead. Each block of 4 KiB that is written says who
it is and has a stamp of its own (``tools.soak.stamps``). Most IO goes to few blocks, which all programs on all mounts
read and write at once; some is of several blocks together. An IO that fails is noted, and the program goes on.

A record of the log is one write(2), so it survives its writer: before a write which stamps it will write, after each IO
how it went. Times are of the clock that all processes of a machine share.
"""

from __future__ import annotations

import argparse
import errno
import mmap
import os
import random
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, pairwise
from pathlib import Path

from tools.soak.history import NEVER, Operation
from tools.soak.stamps import BLOCK_BYTES, STAMP, block_content, blocks_of

RECORD = struct.Struct("<BBHIQqq")  # kind, volume, errno, block, stamp, begin, end (nanoseconds)
READ, WILL_WRITE, WROTE, TORN = 1, 2, 3, 4
RUN_BLOCKS_MAX = 16
HOT_BLOCKS = 32
HOT_SHARE, RUN_SHARE = 0.5, 0.2
ERROR_PAUSE_SECONDS = 0.01
NANOSECONDS = 10**9

Place = tuple[int, int]  # volume, block
Io = Callable[[int, Sequence[memoryview], int], int]


@dataclass
class Work:
    """What one program does, and the log that it writes."""

    volumes: Sequence[Path]
    log: int
    blocks: list[int]
    seed: int
    stamps: Iterator[int]
    writes: float
    stop: threading.Event = field(default_factory=threading.Event)

    def run(self, thread: int, pause_seconds: float) -> None:
        """Until ``stop``: one IO after the other, with pauses of ``pause_seconds`` between them on average."""
        rng = random.Random(f"{self.seed}/{thread}")
        with mmap.mmap(-1, RUN_BLOCKS_MAX * BLOCK_BYTES) as buffer:
            descriptors = self._open()
            try:
                while not self.stop.is_set():
                    volume = rng.randrange(len(descriptors))
                    blocks = self._choose(rng)
                    io = self._write if rng.random() < self.writes else self._read
                    if not io(descriptors[volume], memoryview(buffer), volume, blocks):
                        self.stop.wait(ERROR_PAUSE_SECONDS)
                    elif pause_seconds:
                        self.stop.wait(rng.expovariate(1 / pause_seconds))
            finally:
                self._close(descriptors)

    def read_back(self) -> None:
        with mmap.mmap(-1, RUN_BLOCKS_MAX * BLOCK_BYTES) as buffer:
            descriptors = self._open()
            try:
                for volume, descriptor in enumerate(descriptors):
                    for blocks in _runs(sorted(self.blocks)):
                        self._read(descriptor, memoryview(buffer), volume, blocks)
            finally:
                self._close(descriptors)

    def _choose(self, rng: random.Random) -> range:
        """Those that are next to each other come first in ``blocks``, and begin at 0 (``blocks_of``)."""
        together = len(self.blocks) // 4
        kind = rng.random()
        if kind < HOT_SHARE:
            first, number = self.blocks[rng.randrange(HOT_BLOCKS) * len(self.blocks) // HOT_BLOCKS], 1
        elif kind < HOT_SHARE + RUN_SHARE and together >= RUN_BLOCKS_MAX:
            number = rng.randint(2, RUN_BLOCKS_MAX)
            first = rng.randrange(together - number + 1)
        else:
            first, number = rng.choice(self.blocks), 1
        return range(first, first + number)

    def _write(self, descriptor: int, buffer: memoryview, volume: int, blocks: range) -> bool:
        stamps = [next(self.stamps) for _ in blocks]
        part = buffer[: len(blocks) * BLOCK_BYTES]
        part[:] = b"".join(map(block_content, blocks, stamps))
        begin = time.monotonic_ns()
        pairs = list(zip(blocks, stamps, strict=True))
        self._say(RECORD.pack(WILL_WRITE, volume, 0, block, stamp, begin, 0) for block, stamp in pairs)
        failure = _tried(os.pwritev, descriptor, part, blocks)
        end = time.monotonic_ns()
        self._say(RECORD.pack(WROTE, volume, failure, block, stamp, begin, end) for block, stamp in pairs)
        return not failure

    def _read(self, descriptor: int, buffer: memoryview, volume: int, blocks: range) -> bool:
        part = buffer[: len(blocks) * BLOCK_BYTES]
        begin = time.monotonic_ns()
        failure = _tried(os.preadv, descriptor, part, blocks)
        end = time.monotonic_ns()
        records = []
        for index, block in enumerate(blocks):
            content = part[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES].tobytes()
            stamp = 0 if failure else STAMP.unpack_from(content)[1]
            whole = content == (block_content(block, stamp) if stamp else bytes(BLOCK_BYTES))
            kind = READ if failure or whole else TORN
            records.append(RECORD.pack(kind, volume, failure, block, stamp, begin, end))
        self._say(records)
        return not failure

    def _say(self, records: Iterable[bytes]) -> None:
        os.write(self.log, b"".join(records))

    def _open(self) -> list[int]:
        return [os.open(path, os.O_RDWR | os.O_DIRECT) for path in self.volumes]

    def _close(self, descriptors: Sequence[int]) -> None:
        for descriptor in descriptors:
            os.close(descriptor)


def _tried(
    io: Callable[[int, Sequence[memoryview], int], int], descriptor: int, part: memoryview, blocks: range
) -> int:
    """0, or the errno."""
    try:
        done = io(descriptor, [part], blocks.start * BLOCK_BYTES)
    except OSError as error:
        return error.errno or errno.EIO
    return 0 if done == len(part) else errno.EIO


def _runs(blocks: Sequence[int]) -> Iterator[range]:
    """Ascending blocks in runs of those that are next to each other."""
    start = 0
    for index in range(1, len(blocks) + 1):
        ends = index == len(blocks) or blocks[index] != blocks[index - 1] + 1
        if ends or index - start == RUN_BLOCKS_MAX:
            yield range(blocks[start], blocks[index - 1] + 1)
            start = index


@dataclass
class Log:
    """What the programs of a mount said. ``ended`` are the moments at which an IO came back well, in order."""

    operations: dict[Place, list[Operation]] = field(default_factory=dict)
    ended: list[float] = field(default_factory=list)
    slow: list[tuple[float, float]] = field(default_factory=list)  # begin and end of what took 0.1 s and more
    errors: list[str] = field(default_factory=list)
    torn: list[str] = field(default_factory=list)

    def read(self, path: Path) -> None:
        """Adds what a file says."""
        content = path.read_bytes()
        written: dict[tuple[Place, int], Operation] = {}
        for record in RECORD.iter_unpack(content[: len(content) // RECORD.size * RECORD.size]):
            kind, volume, failure, block, stamp, begin_ns, end_ns = record
            begin, end, place = begin_ns / NANOSECONDS, end_ns / NANOSECONDS, (volume, block)
            if kind == WILL_WRITE:
                written[place, stamp] = Operation(begin, NEVER, stamp, True)
                continue
            if failure:
                what = "write" if kind == WROTE else "read"
                code = errno.errorcode.get(failure, str(failure))
                self.errors.append(
                    f"{what} of volume {volume} block {block} at {begin:.3f}, {end - begin:.3f} s: {code}"
                )
                continue
            self.ended.append(end)
            if end - begin > 0.1:
                self.slow.append((begin, end))
            if kind == TORN:
                self.torn.append(f"volume {volume} block {block} read at {begin:.3f} is torn or another's: {stamp:#x}")
            elif kind == WROTE:
                written[place, stamp] = Operation(begin, end, stamp, True)
            else:
                self.operations.setdefault(place, []).append(Operation(begin, end, stamp, False))
        for (place, _stamp), operation in written.items():
            self.operations.setdefault(place, []).append(operation)
        self.ended.sort()

    def longest_stall(self, begin: float, end: float) -> float:
        """The longest time within these moments in which no IO came back."""
        moments = [begin, *(moment for moment in self.ended if begin < moment < end), end]
        return max(later - earlier for earlier, later in pairwise(moments))

    def slowest(self, begin: float, end: float) -> float:
        """The longest IO that was under way between these moments; 0.0 if none took as long as 0.1 s."""
        return max((until - since for since, until in self.slow if since < end and until > begin), default=0.0)


def main() -> int:
    parser = argparse.ArgumentParser(description="Reads and writes volumes and says when.")
    parser.add_argument("log", type=Path)
    parser.add_argument("volumes", type=Path, nargs="+")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first-stamp", type=int, default=1)
    parser.add_argument("--blocks", type=int, required=True, help="of each volume")
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--rate", type=float, default=0, help="IOs a second of all threads together; 0: what goes")
    parser.add_argument("--writes", type=float, default=0.4, help="their share")
    parser.add_argument("--read-back", action="store_true")
    arguments = parser.parse_args()
    descriptor = os.open(arguments.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    blocks = blocks_of(0, arguments.volumes[0].stat().st_size // BLOCK_BYTES, arguments.blocks)
    stamps = count(arguments.first_stamp)
    work = Work(arguments.volumes, descriptor, blocks, arguments.seed, stamps, arguments.writes)
    if arguments.read_back:
        work.read_back()
        return 0
    signal.signal(signal.SIGTERM, lambda *_: work.stop.set())
    pause_seconds = arguments.threads / arguments.rate if arguments.rate else 0.0
    threads = [threading.Thread(target=work.run, args=(number, pause_seconds)) for number in range(arguments.threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return 0


if __name__ == "__main__":
    sys.exit(main())
