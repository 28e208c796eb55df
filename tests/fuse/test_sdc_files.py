"""A mount's files behave as block devices would: what is written is read, sizes are fixed, holes are holes."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import mmap
import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.waiting import poll_until

MIB = 1024**2
CHUNK_BYTES = 4 * MIB
SIZE = 32 * MIB
FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE = 1, 2, 16

MakeVolume = Callable[..., str]
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    if _libc.fallocate(fd, mode, offset, length):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


@pytest.fixture
def volume(mounted: Callable[..., Any], new_volume: MakeVolume) -> Path:
    """The file of a fresh 32 MiB volume."""
    name = new_volume("32MiB")
    return Path(mounted(name).volume(name))


def dd(*words: str) -> None:
    done = subprocess.run(["dd", "status=none", *words], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("block", "count", "seek", "flags"),
    [
        (1000, 2500, 3, ""),
        (512, 300, 1, "direct"),
        (4096, 2000, 7, "direct"),
        (1 << 20, 9, 1, ""),
        (1 << 20, 9, 1, "direct"),
        (CHUNK_BYTES - 512, 3, 1, ""),
    ],
)
def test_dd_reads_what_dd_wrote(volume: Path, tmp_path: Path, block: int, count: int, seek: int, flags: str) -> None:
    source, copy = tmp_path / "source", tmp_path / "copy"
    source.write_bytes(random.Random(block).randbytes(block * count))
    out = [f"oflag={flags}"] if flags else []
    into = [f"iflag={flags}"] if flags else []
    dd(f"if={source}", f"of={volume}", f"bs={block}", f"seek={seek}", "conv=notrunc,fsync", *out)
    dd(f"if={volume}", f"of={copy}", f"bs={block}", f"skip={seek}", f"count={count}", *into)
    assert copy.read_bytes() == source.read_bytes()
    # What lies around it was never written.
    with volume.open("rb") as file:
        assert not any(file.read(block * seek))
        file.seek(block * (seek + count))
        assert not any(file.read(8192))


def test_random_writes_of_odd_sizes_are_all_there(volume: Path) -> None:
    """Buffered and direct descriptors in turn, on one volume, against a copy in memory."""
    rng = random.Random(2)
    expected = bytearray(SIZE)
    for _ in range(60):
        offset = rng.randrange(SIZE)
        data = rng.randbytes(min(rng.choice((1, 511, 4096, 5000, 70_000, CHUNK_BYTES)), SIZE - offset))
        with volume.open("r+b") as file:
            file.seek(offset)
            file.write(data)
        expected[offset : offset + len(data)] = data
    with volume.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert hashlib.sha256(file.read()).digest() == hashlib.sha256(expected).digest()


def test_a_mapped_file_is_written_back(volume: Path, tmp_path: Path) -> None:
    with volume.open("r+b") as file, mmap.mmap(file.fileno(), SIZE) as view:
        view[CHUNK_BYTES - 3 : CHUNK_BYTES + 3] = b"across"
        view.flush()
    dd(
        f"if={volume}",
        f"of={tmp_path / 'copy'}",
        "bs=4096",
        f"skip={CHUNK_BYTES // 4096 - 1}",
        "count=2",
        "iflag=direct",
    )
    assert (tmp_path / "copy").read_bytes()[4093:4099] == b"across"


def test_the_size_cannot_be_changed(volume: Path) -> None:
    volume.write_bytes(b"kept")  # opens with O_TRUNC, which devices ignore
    assert volume.stat().st_size == SIZE
    for size in (0, 1, SIZE - 1, SIZE + 1, 2 * SIZE):
        with pytest.raises(PermissionError):
            os.truncate(volume, size)
        with volume.open("r+b") as file, pytest.raises(PermissionError):
            os.ftruncate(file.fileno(), size)
    os.truncate(volume, SIZE)
    assert volume.stat().st_size == SIZE
    assert volume.read_bytes()[:5] == b"kept\0"


@pytest.mark.parametrize("direct", [False, True])
def test_writing_past_the_end_fails_and_does_not_grow_the_file(volume: Path, direct: bool) -> None:
    block = mmap.mmap(-1, 4096)
    block.write(b"x" * 4096)
    fd = os.open(volume, os.O_WRONLY | (os.O_DIRECT if direct else 0))
    try:
        with pytest.raises(OSError, match=r".*") as raised:
            write_and_sync(fd, block, SIZE)  # buffered, it is fsync that says so
    finally:
        with contextlib.suppress(OSError):  # close(2) flushes, and tells of the write that failed once more
            os.close(fd)
    assert raised.value.errno in (errno.EFBIG, errno.ENOSPC)
    poll_until(lambda: volume.stat().st_size == SIZE, what="the true size")
    with volume.open("rb") as file:
        assert file.seek(0, os.SEEK_END) == SIZE
        assert file.read(1) == b""


def write_and_sync(fd: int, data: Any, offset: int) -> None:
    os.pwrite(fd, data, offset)
    os.fsync(fd)


@pytest.mark.usefixtures("root")
def test_the_page_cache_reads_ahead_and_writes_behind_as_for_a_disk(volume: Path) -> None:
    device = volume.stat().st_dev
    settings = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}")
    values = {name: (settings / name).read_text().strip() for name in ("read_ahead_kb", "max_ratio", "strict_limit")}
    assert values == {"read_ahead_kb": "4096", "max_ratio": "100", "strict_limit": "0"}


def test_nothing_can_be_made_or_removed_in_the_directory(volume: Path) -> None:
    directory = volume.parent
    attempts: list[Callable[[], Any]] = [
        lambda: (directory / "new").touch(),
        lambda: (directory / "new").mkdir(),
        lambda: (directory / "new").symlink_to("x"),
        lambda: os.link(volume, directory / "new"),
        lambda: os.mkfifo(directory / "new"),
        volume.unlink,
        lambda: volume.rename(directory / "new"),
        lambda: directory.chmod(0o777),
    ]
    for attempt in attempts:
        with pytest.raises(PermissionError):
            attempt()
    for call in (lambda: os.setxattr(volume, "user.a", b"b"), lambda: os.getxattr(volume, "user.a")):
        with pytest.raises(OSError, match=r".*") as raised:
            call()
        assert raised.value.errno == errno.ENOTSUP
    assert os.listdir(directory) == [volume.name]


def test_mode_owner_and_times_are_the_nodes_own(volume: Path) -> None:
    before = volume.stat()
    assert before.st_mode & 0o777 == 0o644
    assert (before.st_uid, before.st_gid) == (os.getuid(), os.getgid())
    volume.chmod(0o600)
    os.utime(volume, (1, 2))
    after = volume.stat()
    assert after.st_mode & 0o777 == 0o600
    assert (after.st_atime, after.st_mtime) == (1, 2)


def test_allocated_blocks_follow_writes_and_holes(volume: Path, cluster: Any) -> None:
    assert volume.stat().st_blocks == 0
    with volume.open("r+b") as file:
        file.write(os.urandom(2 * CHUNK_BYTES))
        os.fsync(file.fileno())
    poll_until(lambda: volume.stat().st_blocks * 512 >= 2 * CHUNK_BYTES, what="allocated blocks")
    assert volume.stat().st_blocks * 512 < 3 * CHUNK_BYTES
    with volume.open("r+b") as file:
        fallocate(file.fileno(), FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, 0, SIZE)
    poll_until(lambda: volume.stat().st_blocks == 0, what="no allocated blocks")


def test_statfs_is_the_pools_truth(volume: Path, cluster: Any) -> None:
    shown = os.statvfs(volume.parent)
    pool = next(pool for pool in cluster.cli("pool", "list") if pool["name"] == "default")
    assert shown.f_blocks * shown.f_frsize == pool["total_capacity_bytes"] // shown.f_frsize * shown.f_frsize
    assert shown.f_files == 1
    assert shown.f_ffree == 0
    assert 0 < shown.f_bfree <= shown.f_blocks


def test_holes_are_punched_found_and_read_as_zeros(volume: Path) -> None:
    data = os.urandom(3 * CHUNK_BYTES)
    with volume.open("r+b", buffering=0) as file:
        fd = file.fileno()
        os.pwrite(fd, data, CHUNK_BYTES)
        assert os.lseek(fd, 0, os.SEEK_DATA) == 0  # The kernel may hold dirty pages anywhere.
    with volume.open("rb", buffering=0) as file:
        fd = file.fileno()
        poll_until(lambda: os.lseek(fd, 0, os.SEEK_DATA) == CHUNK_BYTES, what="the writer's release")
        assert os.lseek(fd, CHUNK_BYTES, os.SEEK_HOLE) == 4 * CHUNK_BYTES
        with pytest.raises(OSError, match=r".*") as raised:
            os.lseek(fd, 4 * CHUNK_BYTES, os.SEEK_DATA)
        assert raised.value.errno == errno.ENXIO
    with volume.open("r+b", buffering=0) as file:
        fd = file.fileno()
        # Unaligned at both ends: the edges are zeroed, the blocks between are given back.
        fallocate(fd, FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, CHUNK_BYTES + 100, CHUNK_BYTES)
        fallocate(fd, FALLOC_ZERO_RANGE | FALLOC_KEEP_SIZE, 3 * CHUNK_BYTES, 8192)
        expected = bytearray(CHUNK_BYTES) + data + bytearray(SIZE - 4 * CHUNK_BYTES)
        expected[CHUNK_BYTES + 100 : 2 * CHUNK_BYTES + 100] = bytes(CHUNK_BYTES)
        expected[3 * CHUNK_BYTES : 3 * CHUNK_BYTES + 8192] = bytes(8192)
        assert os.pread(fd, SIZE, 0) == expected
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(fd, SIZE, 0) == expected
        with pytest.raises(OSError, match=r".*") as raised:
            fallocate(fd, 0, 0, 2 * SIZE)
        assert raised.value.errno in (errno.EOPNOTSUPP, errno.EFBIG, errno.ENOSPC, errno.EPERM)
    with volume.open("rb", buffering=0) as file:
        fd = file.fileno()
        hole = poll_until(lambda: (at := os.lseek(fd, CHUNK_BYTES, os.SEEK_HOLE)) < SIZE and at, what="the release")
        assert CHUNK_BYTES < hole <= CHUNK_BYTES + 4096
    assert volume.stat().st_size == SIZE
