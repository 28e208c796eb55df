"""A few threads that write blocks of a file, remember what they wrote, and note when each write came back.

Owns its threads and one descriptor. Each thread has blocks of its own, so what a block must hold at the end is the last
that was written there. ``stop`` returns when no write is under way any more.
"""

from __future__ import annotations

import mmap
import os
import random
import struct
import threading
import time
from itertools import pairwise
from pathlib import Path

BLOCK_BYTES = 4096
THREADS = 4
BLOCKS_PER_THREAD = 2048
JOIN_SECONDS = 90.0  # longer than the deadline of any IO
_STAMP = struct.Struct("<QQ")


def content(block: int, stamp: int) -> bytes:
    return _STAMP.pack(block, stamp) * (BLOCK_BYTES // _STAMP.size)


class Writers:
    """Writes around the page cache, from byte ``offset`` of the file on."""

    def __init__(self, path: Path, offset: int) -> None:
        self._path = path
        self._first = offset // BLOCK_BYTES
        self._stamps: dict[int, int] = {}
        self._ended: list[list[float]] = [[] for _ in range(THREADS)]
        self._threads: list[threading.Thread] = []
        self._stop = threading.Event()
        self.errors: list[str] = []

    def __enter__(self) -> Writers:
        for number in range(THREADS):
            thread = threading.Thread(target=self._write, args=(number,), daemon=True)
            self._threads.append(thread)
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(JOIN_SECONDS)
            if thread.is_alive():
                self.errors.append("a write does not come back")
        self._threads.clear()

    @property
    def count(self) -> int:
        return sum(len(ended) for ended in self._ended)

    def longest_stall(self, since: float, until: float) -> float:
        """The longest time, by the monotonic clock, in which no write of any thread came back."""
        moments = sorted(at for ended in self._ended for at in ended if since <= at <= until)
        return max(later - earlier for earlier, later in pairwise([since, *moments, until]))

    def wrong_blocks(self) -> int:
        """How many blocks do not hold what was written there last."""
        with _Direct(self._path, os.O_RDONLY) as direct:
            return sum(direct.read(block) != content(block, stamp) for block, stamp in sorted(self._stamps.items()))

    def _write(self, number: int) -> None:
        rng = random.Random(number)
        try:
            with _Direct(self._path, os.O_WRONLY) as direct:
                while not self._stop.is_set():
                    block = self._first + number * BLOCKS_PER_THREAD + rng.randrange(BLOCKS_PER_THREAD)
                    stamp = self._stamps.get(block, 0) + 1
                    direct.write(block, content(block, stamp))
                    self._stamps[block] = stamp
                    self._ended[number].append(time.monotonic())
        except OSError as error:
            self.errors.append(f"thread {number}: {error.strerror}")


class _Direct:
    """The file opened around the page cache, with a buffer that is aligned as that wants it."""

    def __init__(self, path: Path, flags: int) -> None:
        self._buffer = mmap.mmap(-1, BLOCK_BYTES)
        self._descriptor = os.open(path, flags | os.O_DIRECT)

    def __enter__(self) -> _Direct:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)
        self._buffer.close()

    def write(self, block: int, data: bytes) -> None:
        self._buffer[:] = data
        os.pwrite(self._descriptor, self._buffer, block * BLOCK_BYTES)

    def read(self, block: int) -> bytes:
        os.preadv(self._descriptor, [self._buffer], block * BLOCK_BYTES)
        return self._buffer[:]
