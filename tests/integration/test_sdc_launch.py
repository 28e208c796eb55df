"""The daemon as a process: started until it answers, ended with its mount, and what it says when it cannot."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from pfvol import childprocess
from pfvol.config import format_address
from pfvol.errors import ConflictError, UnauthorizedError
from pfvol.sdc import launch, mount, records
from pfvol.sdc.options import MountOptions
from tests.integration.sdc_world import SECRET, World
from tests.support.cluster import detach, is_mounted

MIB = 1024**2
thread = trio.to_thread.run_sync


class Machine(World):
    """A world with a data dir, whose mounts are processes."""

    @property
    def data_dir(self) -> Path:
        return self.path.with_name("data")

    def spec(self, secret: bytes = SECRET) -> launch.Launch:
        secret_file = self.data_dir / "secret"
        secret_file.write_bytes(secret)
        return launch.Launch(
            mountpoint=str(self.path),
            sdc="me",
            mdm=format_address(self.address),
            secret_file=secret_file,
            data_dir=self.data_dir,
            options=MountOptions(),
            source=f"pfvol:{self.data_dir}",
        )

    async def signal(self, pid: int, number: signal.Signals) -> None:
        """Sends it and waits until the process is gone."""
        identity = childprocess.identify(pid)
        assert identity
        childprocess.send_signal(identity, number)
        assert await thread(childprocess.wait_gone, identity, time.monotonic() + 20)


@asynccontextmanager
async def machine(tmp_path: Path) -> AsyncIterator[Machine]:
    async with trio.open_nursery() as nursery:
        it = Machine(tmp_path / "mount", nursery)
        it.path.mkdir()
        it.data_dir.mkdir()
        it.mdm.map(1, 16 * MIB)
        for number in it.sds:
            await it.start_sds(number)
        await it.start_mdm()
        try:
            yield it
        finally:
            for identity in await thread(launch.daemons_of, it.data_dir, str(it.path)):
                await thread(childprocess.stop, [identity], 10.0)
            left_behind = is_mounted(it.path)
            if left_behind:
                detach(it.path)
            for sds in it.sds.values():
                sds.close()
            nursery.cancel_scope.cancel()
    assert not left_behind
    assert records.live(it.data_dir) == []


async def test_it_returns_when_the_mount_answers_and_ends_with_it(tmp_path: Path) -> None:
    async with machine(tmp_path) as it:
        pid = await thread(launch.start, it.spec())
        assert await thread(os.listdir, it.path) == ["vol1"]
        assert [(record.pid, record.sdc) for record in records.live(it.data_dir)] == [(pid, "me")]
        assert records.file_of(it.data_dir, str(it.path), "log").stat().st_size > 0
        with pytest.raises(ConflictError, match="me has a mount already"):
            launch.check_free(it.data_dir, "me")
        with pytest.raises(ConflictError, match="already"):
            mount.check_mountpoint(str(it.path))
        await thread((it.path / "vol1").write_bytes, b"dirty" * 1000)
        await thread(launch.stop, it.data_dir, str(it.path))
        assert childprocess.identify(pid) is None
        assert bytes(it.chunks[1, 0][:5000]) == b"dirty" * 1000
        assert records.live(it.data_dir) == []


async def test_a_busy_mount_stays_and_names_its_users(tmp_path: Path) -> None:
    async with machine(tmp_path) as it:
        await thread(launch.start, it.spec())
        file = await thread((it.path / "vol1").open, "rb")
        try:
            with pytest.raises(ConflictError, match=rf"pid {os.getpid()}, has vol1 open"):
                await thread(launch.stop, it.data_dir, str(it.path))
            assert await thread(file.read, 10) == bytes(10)
        finally:
            await thread(file.close)
        # From another data dir it is found all the same.
        await thread(launch.stop, tmp_path / "elsewhere", str(it.path))


async def test_sigterm_keeps_what_was_written_even_with_open_files(tmp_path: Path) -> None:
    async with machine(tmp_path) as it:
        pid = await thread(launch.start, it.spec())
        fd = await thread(os.open, it.path / "vol1", os.O_RDWR)
        await thread(os.pwrite, fd, b"late" * 1024, 0)
        await it.signal(pid, signal.SIGTERM)
        assert bytes(it.chunks[1, 0][:4096]) == b"late" * 1024
        with pytest.raises(OSError, match=r".*"):
            await thread(os.pread, fd, 4096, 8 * MIB)
        await thread(_close_dead, fd)


def _close_dead(fd: int) -> None:
    with pytest.raises(OSError, match=r".*"):  # close(2) flushes, and nobody is there
        os.close(fd)


async def test_what_the_daemon_cannot_do_is_told_to_who_started_it(tmp_path: Path) -> None:
    async with machine(tmp_path) as it:
        with pytest.raises(UnauthorizedError):
            await thread(launch.start, it.spec(SECRET[::-1]))
        it.path.rmdir()
        with pytest.raises(Exception, match="does not exist"):
            await thread(launch.start, it.spec())
        it.path.mkdir()


async def test_a_killed_daemon_leaves_a_mount_that_can_be_taken_away(tmp_path: Path) -> None:
    async with machine(tmp_path) as it:
        pid = await thread(launch.start, it.spec())
        await it.signal(pid, signal.SIGKILL)
        assert records.live(it.data_dir) == []
        with pytest.raises(ConflictError, match="pfvol umount"):
            mount.check_mountpoint(str(it.path))
        await thread(launch.stop, it.data_dir, str(it.path))
        pid = await thread(launch.start, it.spec())
        await thread(launch.stop, it.data_dir, str(it.path))
