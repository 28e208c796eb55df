"""The daemon as a process: started until it answers, ended with its mount, and what it says when it cannot."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from pfvol import childprocess
from pfvol.cli.mount_helper import arguments_of
from pfvol.config import format_address
from pfvol.errors import ConflictError, UnauthorizedError
from pfvol.sdc import launch, mount, records
from pfvol.sdc.options import MountOptions
from tests.integration.sdc_world import SECRET, World, value
from tests.support.cli import CliResult, environment, run_cli
from tests.support.cluster import detach, is_mounted
from tests.support.waiting import poll_until_async

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
        secret_file.chmod(0o600)
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


async def test_the_commands_mount_and_unmount(tmp_path: Path) -> None:
    """The command line and mount(8)'s syntax, on a cluster named by its MDM's address."""
    async with machine(tmp_path) as it:
        it.spec()  # puts the secret in place
        mdm = format_address(it.address)

        def cli(*words: str) -> CliResult:
            return run_cli("--mdm", mdm, *words, data_dir=it.data_dir, json_output=True)

        done = await thread(cli, "mount", str(it.path), "--sdc", "me", "-o", "io_deadline=5", "-o", "direct,rw,_netdev")
        assert done.code == 0, done.stderr
        assert done.json | {"pid": 0} == {"mountpoint": str(it.path), "sdc": "me", "pid": 0, "volumes": ["vol1"]}
        again = await thread(cli, "mount", str(it.path), "--sdc", "other")
        assert (again.code, again.json["error"]["code"]) == (4, "conflict")
        assert len(again.stderr.strip().splitlines()) == 1
        done = await thread(cli, "umount", str(it.path))
        assert (done.code, done.json) == (0, {"mountpoint": str(it.path)})
        assert (await thread(cli, "umount", str(it.path))).code == 3
        words = arguments_of([mdm, str(it.path), "-o", f"ro,noauto,sdc=me,data_dir={it.data_dir}"])
        assert words is not None
        assert (await thread(lambda: run_cli(*words))).code == 0
        assert os.statvfs(it.path).f_flag & os.ST_RDONLY
        assert (await thread(lambda: run_cli("umount", it.path, data_dir=tmp_path / "elsewhere"))).code == 0


async def test_in_the_foreground_it_ends_cleanly_at_sigint(tmp_path: Path) -> None:
    async with machine(tmp_path) as it:
        it.spec()
        words = ["--data-dir", str(it.data_dir), "--mdm", format_address(it.address)]
        command = [sys.executable, "-m", "pfvol.cli", *words, "mount", str(it.path), "-f", "--sdc", "me"]
        process = await trio.lowlevel.open_process(command, env=environment(), stderr=subprocess.PIPE)
        await poll_until_async(lambda: value(records.live(it.data_dir)), what="the record")
        assert await thread(os.listdir, it.path) == ["vol1"]
        process.send_signal(signal.SIGINT)
        with trio.fail_after(20):
            assert await process.wait() == 0
        assert process.stderr is not None
        assert b"mounted" in b"".join([part async for part in process.stderr])
