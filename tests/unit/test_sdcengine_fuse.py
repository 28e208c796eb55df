"""Goal: through a real mount, with pyfuse3 behind the channel, a volume's file behaves as a disk, fast paths
included."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import mmap
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sdcengine_fakes import BLOCK, CHUNK, MIB, VOLUME

from datapath import wire
from tests.support.processes import running
from tests.support.waiting import poll_until

HERE = Path(__file__).parent
SIZE = 64 * MIB
PUNCH, KEEP, ZERO = 2, 1, 16

libc = ctypes.CDLL(None, use_errno=True)

pytestmark = pytest.mark.usefixtures("root")


class Mount:
    """The child process of sdcengine_mount.py, and its mountpoint."""

    def __init__(self, path: Path, *options: str) -> None:
        self.path = path
        self.vol = str(path / "vol")
        environment = os.environ | {"PYTHONPATH": f"{HERE.parent.parent}:{os.environ.get('PYTHONPATH', '')}"}
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "sdcengine_mount.py"), str(path), str(SIZE), *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self._line() == "ready\n"

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def tell(self, *command: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return json.loads(self._line())

    def close(self) -> None:
        libc.umount2(str(self.path).encode(), 2)
        try:
            assert self.process.wait(15) == 0
        finally:
            self.process.kill()
            self.process.wait()
            for stream in (self.process.stdin, self.process.stdout):
                if stream is not None:
                    stream.close()


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    with mounted(tmp_path) as it:
        yield it


@contextlib.contextmanager
def mounted(path: Path, *options: str) -> Iterator[Mount]:
    point = path / "mnt"
    point.mkdir()
    it = Mount(point, *options)
    try:
        yield it
    finally:
        it.close()


@contextlib.contextmanager
def opened(path: str, flags: int) -> Iterator[int]:
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def fallocate(fd: int, mode: int, offset: int, length: int) -> int:
    """0 or the errno."""
    result = libc.fallocate(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length))
    return ctypes.get_errno() if result else 0


def refusal(call: Callable[[], Any]) -> int:
    """The errno that the call fails with."""
    with pytest.raises(OSError) as failed:  # noqa: PT011 - the caller compares the errno
        call()
    assert failed.value.errno is not None
    return failed.value.errno


def aligned(data: bytes) -> mmap.mmap:
    """A page-aligned copy, as O_DIRECT wants it."""
    buffer = mmap.mmap(-1, len(data))
    buffer[:] = data
    return buffer


def test_names_and_attributes_come_from_pyfuse3(mount: Mount) -> None:
    assert os.listdir(mount.path) == ["vol"]
    assert os.stat(mount.vol).st_size == SIZE
    with pytest.raises(FileNotFoundError):
        os.stat(mount.path / "other")
    assert mount.tell("stats")["relayed"] > 0


@pytest.mark.parametrize("flags", [0, os.O_DIRECT])
def test_bytes_written_are_read_back_by_every_kind_of_open(mount: Mount, flags: int) -> None:
    data = os.urandom(3 * MIB)
    at = CHUNK - MIB
    with opened(mount.vol, os.O_RDWR | flags) as fd:
        with aligned(data) as buffer:
            assert os.pwritev(fd, [buffer], at) == len(data)
        os.fsync(fd)
    for how in (os.O_DIRECT, 0):
        with opened(mount.vol, os.O_RDONLY | how) as fd, mmap.mmap(-1, len(data)) as buffer:
            assert os.preadv(fd, [buffer], at) == len(data)
            assert buffer[:] == data


def test_odd_sizes_and_offsets_buffered_and_direct(mount: Mount) -> None:
    seed = random.randrange(1 << 32)
    rng = random.Random(seed)
    mirror = bytearray(8 * MIB)
    with opened(mount.vol, os.O_RDWR) as buffered:
        for _ in range(150):
            offset = rng.randrange(len(mirror))
            data = rng.randbytes(min(rng.choice([1, 1000, 4096, 100000]), len(mirror) - offset))
            assert os.pwrite(buffered, data, offset) == len(data)
            mirror[offset : offset + len(data)] = data
        os.fsync(buffered)
        with opened(mount.vol, os.O_RDWR | os.O_DIRECT) as direct:
            for _ in range(60):
                offset = rng.randrange(len(mirror) // 512) * 512
                data = rng.randbytes(min(rng.choice([512, 1536, 70144]), len(mirror) - offset))
                with aligned(data) as buffer:
                    assert os.pwritev(direct, [buffer], offset) == len(data)
                mirror[offset : offset + len(data)] = data
        for offset in range(0, len(mirror), 999_999):
            part = mirror[offset : offset + 999_999]
            assert os.pread(buffered, len(part), offset) == part, f"seed {seed}"


def test_direct_writes_of_many_threads_run_in_parallel_and_all_arrive(mount: Mount) -> None:
    blocks = {n: os.urandom(BLOCK) for n in range(256)}
    with opened(mount.vol, os.O_RDWR | os.O_DIRECT) as fd:

        def write(part: int) -> None:
            for n in range(part, 256, 16):
                with aligned(blocks[n]) as buffer:
                    os.pwritev(fd, [buffer], n * BLOCK)

        threads = [threading.Thread(target=write, args=(part,)) for part in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with mmap.mmap(-1, 256 * BLOCK) as buffer:
            os.preadv(fd, [buffer], 0)
            assert buffer[:] == b"".join(blocks.values())
    assert mount.tell("stats")["volumes"][str(VOLUME)]["write_ops"] == 256


def test_end_of_the_volume_for_direct_writes_and_reads(mount: Mount) -> None:
    with opened(mount.vol, os.O_RDWR | os.O_DIRECT) as fd, aligned(b"e" * BLOCK) as buffer:
        assert refusal(lambda: os.pwritev(fd, [buffer], SIZE)) == errno.ENOSPC
        assert refusal(lambda: os.pwritev(fd, [buffer], SIZE + BLOCK)) == errno.EFBIG
        assert os.preadv(fd, [buffer], SIZE) == 0
        assert os.fstat(fd).st_size == SIZE


def test_buffered_write_past_the_end_is_told_so_that_the_size_can_be_put_right(mount: Mount) -> None:
    with opened(mount.vol, os.O_RDWR) as fd:
        os.pwrite(fd, b"z" * BLOCK, SIZE)
        assert refusal(lambda: os.fsync(fd)) in (errno.EIO, errno.EFBIG, errno.ENOSPC)
        limit = time.monotonic() + 10
        while ["past_end", VOLUME] not in mount.tell("events"):
            assert time.monotonic() < limit
        os.truncate(mount.vol, SIZE)
        assert os.fstat(fd).st_size == SIZE


def test_truncating_open_leaves_size_and_bytes(mount: Mount) -> None:
    with opened(mount.vol, os.O_RDWR) as fd:
        os.pwrite(fd, b"kept", 100)
    with opened(mount.vol, os.O_RDWR | os.O_TRUNC) as fd:
        assert os.fstat(fd).st_size == SIZE
        assert os.pread(fd, 4, 100) == b"kept"


@pytest.mark.parametrize("mode", [PUNCH | KEEP, ZERO | KEEP, ZERO])
def test_punching_and_zeroing_read_as_zeros_and_spare_the_rest(mount: Mount, mode: int) -> None:
    with opened(mount.vol, os.O_RDWR) as fd:
        os.pwrite(fd, b"\xff" * (6 * MIB), 0)
        os.fsync(fd)
        assert fallocate(fd, mode, MIB + 100, 4 * MIB) == 0
        data = os.pread(fd, 6 * MIB, 0)
        assert data == b"\xff" * (MIB + 100) + bytes(4 * MIB) + b"\xff" * (MIB - 100)
        assert os.fstat(fd).st_size == SIZE


def test_other_kinds_of_fallocate_are_refused(mount: Mount) -> None:
    with opened(mount.vol, os.O_RDWR) as fd:
        assert fallocate(fd, 0, 0, MIB) == errno.EOPNOTSUPP
        assert fallocate(fd, 8, 0, MIB) == errno.EOPNOTSUPP
        assert fallocate(fd, ZERO, SIZE - BLOCK, 2 * BLOCK) == errno.EFBIG
        assert fallocate(fd, PUNCH | KEEP, SIZE + MIB, BLOCK) == 0
        assert os.fstat(fd).st_size == SIZE


def test_lseek_finds_data_and_holes(mount: Mount) -> None:
    with opened(mount.vol, os.O_RDWR | os.O_DIRECT) as fd, aligned(b"d" * BLOCK) as buffer:
        os.pwritev(fd, [buffer], 9 * MIB)
    with opened(mount.vol, os.O_RDONLY) as fd:
        poll_until(lambda: os.lseek(fd, 0, os.SEEK_DATA) == 9 * MIB, what="the writer's release")
        assert os.lseek(fd, 9 * MIB, os.SEEK_HOLE) == 9 * MIB + BLOCK
        assert refusal(lambda: os.lseek(fd, 10 * MIB, os.SEEK_DATA)) == errno.ENXIO


def test_no_hole_is_told_of_where_the_kernel_may_hold_dirty_pages(mount: Mount) -> None:
    """Goal: who copies data and leaves out holes misses nothing that was written and not yet written back."""
    with opened(mount.vol, os.O_RDONLY) as reader:
        with opened(mount.vol, os.O_RDWR) as writer:
            os.pwrite(writer, b"d" * 10, 9 * MIB)
            for fd in (writer, reader):
                assert os.lseek(fd, MIB + 1, os.SEEK_DATA) == MIB + 1
                assert os.lseek(fd, MIB + 1, os.SEEK_HOLE) == SIZE
                assert refusal(lambda fd=fd: os.lseek(fd, SIZE, os.SEEK_DATA)) == errno.ENXIO
        poll_until(lambda: os.lseek(reader, MIB, os.SEEK_DATA) == 9 * MIB, what="the writer's release")
        # An open that fails leaves no writer behind.
        mount.tell("refuse_opens")
        assert refusal(lambda: os.open(mount.vol, os.O_RDWR)) == errno.EACCES
        assert os.lseek(reader, MIB, os.SEEK_DATA) == 9 * MIB


def test_fsync_reaches_the_servers_and_close_does_not(mount: Mount) -> None:
    with opened(mount.vol, os.O_RDWR | os.O_DIRECT) as fd, aligned(b"f" * BLOCK) as buffer:
        os.pwritev(fd, [buffer], 0)
        before = mount.tell("count", "OP_FLUSH")
        os.fdatasync(fd)
        assert mount.tell("count", "OP_FLUSH") == before + 2
        os.pwritev(fd, [buffer], 0)
    assert mount.tell("count", "OP_FLUSH") == before + 2


def test_shared_mapping_of_a_direct_open_works(mount: Mount) -> None:
    with opened(mount.vol, os.O_RDWR | os.O_DIRECT) as fd:
        with mmap.mmap(fd, 2 * BLOCK) as mapped:
            mapped[10:15] = b"hello"
            mapped.flush()
        with mmap.mmap(-1, BLOCK) as buffer:
            os.preadv(fd, [buffer], 0)
            assert buffer[10:15] == b"hello"


def test_kernel_sends_large_requests_and_many_at_a_time(mount: Mount) -> None:
    with opened(mount.vol, os.O_RDWR | os.O_DIRECT) as fd, aligned(os.urandom(8 * MIB)) as buffer:
        os.pwritev(fd, [buffer], 0)
    v = mount.tell("stats")["volumes"][str(VOLUME)]
    assert v["write_ops"] <= 9, "1 MiB requests"


@pytest.mark.parametrize(
    ("status", "expected"), [("ST_NO_SPACE", errno.ENOSPC), ("ST_IO_ERROR", errno.EIO), ("ST_NO_VOLUME", errno.ENODEV)]
)
def test_status_of_a_server_reaches_the_application(mount: Mount, status: str, expected: int) -> None:
    mount.tell("status", "OP_WRITE", getattr(wire, status), 1)
    with opened(mount.vol, os.O_RDWR | os.O_DIRECT) as fd, aligned(b"x" * BLOCK) as buffer:
        assert refusal(lambda: os.pwritev(fd, [buffer], 0)) == expected


def test_reset_connections_are_not_seen_by_the_application(mount: Mount) -> None:
    stop = threading.Event()
    failures: list[BaseException] = []

    def work(base: int) -> None:
        try:
            with opened(mount.vol, os.O_RDWR | os.O_DIRECT) as fd, mmap.mmap(-1, BLOCK) as buffer:
                count = 0
                while not stop.is_set():
                    count += 1
                    data = count.to_bytes(8, "little") * (BLOCK // 8)
                    buffer[:] = data
                    os.pwritev(fd, [buffer], base)
                    os.preadv(fd, [buffer], base)
                    assert buffer[:] == data
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(n * MIB,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for _ in range(10):
        before = mount.tell("stats")["volumes"][str(VOLUME)]["write_ops"]
        mount.tell("reset")
        limit = time.monotonic() + 10
        while mount.tell("stats")["volumes"][str(VOLUME)]["write_ops"] < before + 20 and time.monotonic() < limit:
            pass
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures


def test_unmapped_volume_gives_enodev_under_an_open_file(mount: Mount) -> None:
    with opened(mount.vol, os.O_RDWR | os.O_DIRECT) as fd, aligned(b"u" * BLOCK) as buffer:
        os.pwritev(fd, [buffer], 0)
        mount.tell("remove")
        assert refusal(lambda: os.preadv(fd, [buffer], 0)) == errno.ENODEV
        assert refusal(lambda: os.fsync(fd)) == errno.ENODEV


def test_killed_process_does_not_disturb_the_mount(mount: Mount) -> None:
    """Its requests are interrupted: INTERRUPT names a request that the engine answers all the same."""
    mount.tell("limit", 1)
    code = f"import os\nfd=os.open({mount.vol!r},os.O_RDWR)\nfor n in range(50): os.pread(fd,4096,n*1048576)\n"
    with running([sys.executable, "-c", code]) as victim:
        poll_until(lambda: mount.tell("stats")["in_flight"], what="a request under way")
        victim.terminate()
        mount.tell("limit", 0)
        assert victim.wait(10) != 0
    with opened(mount.vol, os.O_RDWR | os.O_DIRECT) as fd, aligned(b"k" * BLOCK) as buffer:
        assert os.pwritev(fd, [buffer], 0) == BLOCK


def test_forced_direct_mount_bypasses_the_page_cache(tmp_path: Path) -> None:
    with mounted(tmp_path, "direct") as mount, opened(mount.vol, os.O_RDWR) as fd:
        os.pwrite(fd, b"seen", 10)
        stats = mount.tell("stats")["volumes"][str(VOLUME)]
        assert stats["write_ops"] == 1
        for _ in range(3):
            assert os.pread(fd, 4, 10) == b"seen"
        assert mount.tell("stats")["volumes"][str(VOLUME)]["read_ops"] == stats["read_ops"] + 3


def test_buffered_reads_of_cached_pages_do_not_reach_the_engine(mount: Mount) -> None:
    with opened(mount.vol, os.O_RDWR) as fd:
        os.pread(fd, BLOCK, 0)
        before = mount.tell("stats")["volumes"][str(VOLUME)]["read_ops"]
    for _ in range(3):
        with opened(mount.vol, os.O_RDONLY) as fd:
            os.pread(fd, BLOCK, 0)
    assert mount.tell("stats")["volumes"][str(VOLUME)]["read_ops"] == before


def test_descriptors_of_the_channel_are_not_inherited_open(mount: Mount) -> None:
    """/dev/fuse left open in a child would keep a dead mount alive."""
    for entry in Path(f"/proc/{mount.process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(entry) == "/dev/fuse":
                flags = Path(f"/proc/{mount.process.pid}/fdinfo/{entry.name}").read_text().split("flags:")[1].split()[0]
                assert int(flags, 8) & os.O_CLOEXEC
