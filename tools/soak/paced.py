"""A program that reads and writes one volume at an even rate, knows what every block of it holds, and times each IO.

    python -m tools.soak.paced VOLUME LOG --iops 1000 --seed N --volume-number N

It fills the volume with blocks that say who they are (``tools.soak.stamps``), says ``filled``, then reads and writes
random blocks of 4 KiB, one at a time, until SIGTERM. Each read is compared with what was last written there. At the end
it reads all of the volume back and prints how many blocks were wrong; it ends with 1 if any was, or if an IO failed.

LOG then has two doubles for each IO: when it began, by the clock that all processes of a machine share, and the seconds
it took. What could not be begun in time is not made up for, beyond a tenth of a second.
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import signal
import sys
import time
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tools.soak.stamps import BLOCK_BYTES, block_content

RUN_BLOCKS = 256  # filled and read back at a time
BEHIND_SECONDS_MAX = 0.1
WRONG_SHOWN = 10
STAMPS_PER_VOLUME = 1 << 32
FILLED = "filled"


class Io(NamedTuple):
    begin: float
    seconds: float


def read_log(path: Path) -> list[Io]:
    values = array("d")
    values.frombytes(path.read_bytes())
    return [Io(*pair) for pair in zip(values[::2], values[1::2], strict=True)]


@dataclass
class Volume:
    """The volume through one descriptor. ``stamps``: what each block holds."""

    descriptor: int
    stamps: list[int]
    ios: array[float] = field(default_factory=lambda: array("d"))
    problems: list[str] = field(default_factory=list)
    ended: bool = False

    def fill(self) -> None:
        with mmap.mmap(-1, RUN_BLOCKS * BLOCK_BYTES) as buffer:
            for run in self._runs():
                part = memoryview(buffer)[: len(run) * BLOCK_BYTES]
                part[:] = b"".join(block_content(block, self.stamps[block]) for block in run)
                os.pwrite(self.descriptor, part, run.start * BLOCK_BYTES)
                part.release()
        os.fsync(self.descriptor)

    def read_back(self) -> None:
        with mmap.mmap(-1, RUN_BLOCKS * BLOCK_BYTES) as buffer:
            for run in self._runs():
                with memoryview(buffer)[: len(run) * BLOCK_BYTES] as part:
                    os.preadv(self.descriptor, [part], run.start * BLOCK_BYTES)
                    for index, block in enumerate(run):
                        self._compare(block, part[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES].tobytes())

    def work(self, iops: float, rng: random.Random) -> None:
        """Until ``ended``: half of the IOs are writes."""
        due = time.monotonic()
        with mmap.mmap(-1, BLOCK_BYTES) as buffer:
            while not self.ended:
                due = max(due + 1 / iops, time.monotonic() - BEHIND_SECONDS_MAX)
                time.sleep(max(0.0, due - time.monotonic()))
                block, writes = rng.randrange(len(self.stamps)), rng.random() < 0.5
                if writes:
                    self.stamps[block] += 1
                    buffer[:] = block_content(block, self.stamps[block])
                begin = time.monotonic()
                if writes:
                    os.pwrite(self.descriptor, buffer, block * BLOCK_BYTES)
                else:
                    os.preadv(self.descriptor, [buffer], block * BLOCK_BYTES)
                self.ios.extend((begin, time.monotonic() - begin))
                if not writes:
                    self._compare(block, buffer[:])

    def _compare(self, block: int, content: bytes) -> None:
        if content != block_content(block, self.stamps[block]):
            self.problems.append(f"block {block} does not hold what was written last")

    def _runs(self) -> Iterator[range]:
        for first in range(0, len(self.stamps), RUN_BLOCKS):
            yield range(first, min(first + RUN_BLOCKS, len(self.stamps)))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Reads and writes a volume at an even rate.")
    parser.add_argument("volume", type=Path)
    parser.add_argument("log", type=Path)
    parser.add_argument("--iops", type=float, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--volume-number", type=int, default=0, help="makes the content differ from other volumes'")
    arguments = parser.parse_args(argv)
    descriptor = os.open(arguments.volume, os.O_RDWR | os.O_DIRECT)
    blocks = os.fstat(descriptor).st_size // BLOCK_BYTES
    volume = Volume(descriptor, [arguments.volume_number * STAMPS_PER_VOLUME + 1] * blocks)
    signal.signal(signal.SIGTERM, lambda *_: setattr(volume, "ended", True))
    try:
        volume.fill()
        print(FILLED, flush=True)
        volume.work(arguments.iops, random.Random(arguments.seed))
        volume.read_back()
    except OSError as error:
        volume.problems.append(f"an IO failed: {error.strerror}")
    finally:
        os.close(descriptor)
    arguments.log.write_bytes(volume.ios.tobytes())
    shown = volume.problems[:WRONG_SHOWN]
    print("\n".join(f"{arguments.volume}: {problem}" for problem in shown) or "every block is as it was written")
    return 1 if volume.problems else 0


if __name__ == "__main__":
    sys.exit(main())
