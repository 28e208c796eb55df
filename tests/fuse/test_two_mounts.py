"""Two SDCs on one volume, mounted with ``-o direct``: what one has written the other reads, and a reader only reads."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import random
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.waiting import poll_until

MIB = 1024**2
CHUNK_BYTES = 4 * MIB
SIZE = 32 * MIB
ROUNDS = 240
RACES = 400
STAMP = struct.Struct("<Q")
# EPERM: a volume is never truncated. EBADF, EINVAL: the kernel's own words for a descriptor that only reads.
REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM, errno.EBADF, errno.EINVAL)
FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE = 1, 2, 16

MakeVolume = Callable[..., str]
Mounted = Callable[..., Any]
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


@pytest.fixture
def pair(mounted: Mounted, new_volume: MakeVolume) -> tuple[Path, Path]:
    """The files of one fresh 32 MiB volume in two direct mounts."""
    name = new_volume("32MiB")
    return tuple(mounted(name, options=("direct",)).volume(name) for _ in range(2))  # type: ignore[return-value]


def stamped(round_: int, length: int) -> bytes:
    """Content that says which write it is, at every place of it."""
    return (STAMP.pack(round_) * (length // STAMP.size + 1))[:length]


def test_each_mount_reads_what_the_other_has_just_written(pair: tuple[Path, Path]) -> None:
    """Goal: after a write has returned, no read of the other mount sees what was there before."""
    rng = random.Random(7)
    expected = bytearray(SIZE)
    descriptors = [os.open(path, os.O_RDWR) for path in pair]
    try:
        for round_ in range(1, ROUNDS + 1):
            writer, reader = descriptors if round_ % 2 else descriptors[::-1]
            length = rng.choice((8, 512, 4096, 5000, 65536, 200_000))
            # Every fourth write lies across two chunks, whose servers differ.
            middle = rng.randrange(1, SIZE // CHUNK_BYTES) * CHUNK_BYTES if round_ % 4 == 0 else rng.randrange(SIZE)
            offset = min(max(0, middle - length // 2), SIZE - length)
            data = stamped(round_, length)
            assert os.pwrite(writer, data, offset) == length
            expected[offset : offset + length] = data
            low, high = max(0, offset - 5000), min(SIZE, offset + length + 5000)
            assert os.pread(reader, high - low, low) == expected[low:high], (round_, offset, length)
        for descriptor in descriptors:
            assert os.pread(descriptor, SIZE, 0) == expected
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def test_a_reader_beside_a_writer_never_sees_the_past_again(pair: tuple[Path, Path]) -> None:
    """Goal: reads of one mount that run beside writes of the other see the last completed write or a later one."""
    started = completed = 0
    failures: list[str] = []
    over = threading.Event()

    def read_on() -> None:
        descriptor = os.open(pair[1], os.O_RDONLY)
        seen = 0
        try:
            while not over.is_set() and not failures:
                at_least = max(seen, completed)
                (seen,) = STAMP.unpack(os.pread(descriptor, STAMP.size, CHUNK_BYTES))
                if not at_least <= seen <= started:
                    failures.append(f"read {seen}, of {at_least} completed and {started} started")
        finally:
            os.close(descriptor)

    threads = [threading.Thread(target=read_on) for _ in range(2)]
    descriptor = os.open(pair[0], os.O_RDWR)
    try:
        for thread in threads:
            thread.start()
        for started in range(1, RACES + 1):
            os.pwrite(descriptor, stamped(started, 4096), CHUNK_BYTES)
            completed = started
    finally:
        over.set()
        for thread in threads:
            thread.join()
        os.close(descriptor)
    assert not failures, failures


def test_a_hole_that_one_mount_punches_the_other_reads_as_zeros(pair: tuple[Path, Path]) -> None:
    writer, reader = (os.open(path, os.O_RDWR) for path in pair)
    try:
        os.pwrite(writer, stamped(1, 2 * CHUNK_BYTES), 0)
        assert os.pread(reader, 4096, 8192) == stamped(1, 4096)
        assert _libc.fallocate(writer, FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, 4096, CHUNK_BYTES) == 0
        assert os.pread(reader, CHUNK_BYTES + 8192, 0) == (stamped(1, 4096) + bytes(CHUNK_BYTES) + stamped(1, 4096))
    finally:
        os.close(writer)
        os.close(reader)


def test_a_read_only_mount_of_a_volume_cannot_write_it(cluster: Any, mounted: Mounted, new_volume: MakeVolume) -> None:
    """Goal: whatever a program tries at the read-only side, also after a chmod, the writer's bytes stay."""
    name = new_volume("32MiB")
    writer, reader = mounted(name, options=("direct",)), mounted(options=("direct",))
    cluster.cli("vol", "map", name, reader.sdc, "--ro")
    path = reader.volume(name)
    poll_until(path.exists, what="the volume")
    content = stamped(1, 2 * CHUNK_BYTES)
    writing = os.open(writer.volume(name), os.O_RDWR)
    reading = os.open(path, os.O_RDONLY)
    try:
        os.pwrite(writing, content, 0)
        for mode in (0o444, 0o666):
            path.chmod(mode)
            for attempt in writes_of(path, reading):
                with pytest.raises(OSError, match=r".*") as raised:
                    attempt()
                assert raised.value.errno in REFUSED, (mode, raised)
            assert os.pread(reading, len(content), 0) == content
        assert os.pread(writing, len(content), 0) == content
        assert path.stat().st_size == SIZE
        # It is a live reader nonetheless.
        os.pwrite(writing, stamped(2, 5000), 3333)
        assert os.pread(reading, 5000, 3333) == stamped(2, 5000)
    finally:
        os.close(writing)
        os.close(reading)


def writes_of(path: Path, reading: int) -> list[Callable[[], Any]]:
    """All the ways to change a file of which only a reading descriptor is to be had."""

    def opened(flags: int) -> None:
        os.close(os.open(path, flags))

    def fallocated(mode: int) -> None:
        if _libc.fallocate(reading, mode, 0, CHUNK_BYTES):
            raise OSError(ctypes.get_errno(), "fallocate")

    def mapped() -> None:
        mmap.mmap(reading, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE).close()

    return [
        *(lambda flags=flags: opened(flags) for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDWR | os.O_DIRECT)),
        lambda: opened(os.O_WRONLY | os.O_TRUNC),
        lambda: os.close(os.open(f"/proc/self/fd/{reading}", os.O_RDWR)),
        lambda: os.pwrite(reading, b"x" * 4096, 0),
        lambda: os.ftruncate(reading, 0),
        lambda: os.truncate(path, 0),
        lambda: os.truncate(path, SIZE - 4096),
        lambda: fallocated(FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE),
        lambda: fallocated(FALLOC_ZERO_RANGE | FALLOC_KEEP_SIZE),
        mapped,
    ]


def test_a_writer_that_becomes_a_reader_writes_no_more(cluster: Any, mounted: Mounted, new_volume: MakeVolume) -> None:
    """Goal: a descriptor that was opened for writing is no way around a mapping that was taken back since."""
    name = new_volume("32MiB")
    keeper, other = (mounted(name, options=("direct",)) for _ in range(2))
    path = other.volume(name)
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.pwrite(descriptor, stamped(1, 8192), 0)
        cluster.cli("vol", "unmap", name, other.sdc)
        poll_until(lambda: not path.exists(), what="the name gone")
        for _ in range(2):
            with pytest.raises(OSError, match=r".*") as raised:
                os.pwrite(descriptor, stamped(2, 8192), 0)
            assert raised.value.errno in (errno.ENODEV, errno.EIO)
            if not path.exists():
                cluster.cli("vol", "map", name, other.sdc, "--ro")
                poll_until(path.exists, what="the name again")
        assert keeper.volume(name).read_bytes()[:8192] == stamped(1, 8192)
        with path.open("rb") as file:
            assert file.read(8192) == stamped(1, 8192)
    finally:
        with contextlib.suppress(OSError):  # The kernel holds the old file for bad since the new one is there.
            os.close(descriptor)
