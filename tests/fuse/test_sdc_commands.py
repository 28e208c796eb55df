"""``pfvol mount`` and ``umount``: what can go wrong is one clear line with its exit code, and nothing stays behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pfvol import childprocess, localcluster
from tests.support.cli import environment, run_cli
from tests.support.cluster import is_mounted
from tests.support.waiting import poll_until

MIB = 1024**2
CHUNK_BYTES = 4 * MIB
STALL_SECONDS_MAX = 3.0  # waiting for the MDM would take as long as that is away; a loaded machine is slow too

MakeVolume = Callable[..., str]
Mounted = Callable[..., Any]


def one_line(text: str) -> str:
    (line,) = text.strip().splitlines()
    assert line.startswith("pfvol: ")
    return line


def test_wrong_mounts_are_refused(cluster: Any, mounted: Mounted, tmp_path: Path) -> None:
    mount = mounted()
    (tmp_path / "file").touch()
    (tmp_path / "dir").mkdir()
    wrong: list[tuple[list[str | Path], int, str]] = [
        ([tmp_path / "missing"], 3, "does not exist"),
        ([tmp_path / "file"], 2, "not a directory"),
        ([mount.path], 4, "already"),
        ([tmp_path / "dir", "-o", "dirct"], 2, "dirct"),
        ([tmp_path / "dir", "-o", "io_deadline=never"], 2, "io_deadline"),
        ([tmp_path / "dir", "--sdc", "no/name"], 2, "no/name"),
        ([tmp_path / "dir", "--sdc", mount.sdc], 4, str(mount.path)),
    ]
    for arguments, code, word in wrong:
        result = cluster.run("mount", *arguments)
        assert (result.code, word in one_line(result.stderr)) == (code, True), (arguments, result)
    assert not is_mounted(tmp_path / "dir")
    assert is_mounted(mount.path)


def test_a_cluster_that_does_not_answer_is_unreachable(cluster: Any, tmp_path: Path) -> None:
    (tmp_path / "dir").mkdir()
    free_port = 1
    result = run_cli(
        "--mdm", f"127.0.0.1:{free_port}", "mount", tmp_path / "dir", "--sdc", "lonely", data_dir=cluster.data_dir
    )
    assert result.code in (7, 8), result
    assert f"127.0.0.1:{free_port}" in one_line(result.stderr)
    assert not is_mounted(tmp_path / "dir")


def test_wrong_umounts_are_refused(cluster: Any, tmp_path: Path) -> None:
    assert cluster.run("umount", tmp_path).code == 3
    assert cluster.run("umount", "/proc").code == 2


def test_a_busy_mount_stays_and_names_who_uses_it(mounted: Mounted, cluster: Any, new_volume: MakeVolume) -> None:
    name = new_volume()
    mount = mounted(name)
    with mount.volume(name).open("rb"):
        result = cluster.run("umount", mount.path)
        assert result.code == 4
        assert f"pid {os.getpid()}" in one_line(result.stderr)
        assert name in result.stderr
        assert is_mounted(mount.path)
    pid = mount.pid()
    mount.unmount()
    assert not is_mounted(mount.path)
    assert childprocess.identify(pid) is None


def test_the_daemon_ends_with_any_unmount(mounted: Mounted, cluster: Any) -> None:
    mount = mounted()
    identity = childprocess.identify(mount.pid())
    assert identity
    subprocess.run(["umount", mount.path], check=True)
    poll_until(lambda: childprocess.identify(identity.pid) is None, what="the daemon gone")


def test_sigterm_writes_what_is_dirty_and_unmounts(mounted: Mounted, cluster: Any, new_volume: MakeVolume) -> None:
    """Also with a file open: its owner gets errors from then on, but what was written is kept."""
    name = new_volume()
    mount = mounted(name)
    file = mount.volume(name).open("r+b", buffering=0)
    try:
        file.write(b"dirty" * 1000)
        identity = childprocess.identify(mount.pid())
        assert identity
        childprocess.send_signal(identity, signal.SIGTERM)
        poll_until(lambda: childprocess.identify(identity.pid) is None, what="the daemon gone")
        assert not is_mounted(mount.path)
        with pytest.raises(OSError, match=r".*"):
            os.pread(file.fileno(), 10, 1 << 20)
    finally:
        with contextlib.suppress(OSError):  # close(2) flushes, and nobody answers any more
            file.close()
    again = cluster.mount(sdc=mount.sdc)
    with again.volume(name).open("rb") as file:
        assert file.read(5000) == b"dirty" * 1000


def test_foreground_ends_cleanly_at_sigint(cluster: Any, tmp_path: Path) -> None:
    path = tmp_path / "dir"
    path.mkdir()
    argv = [sys.executable, "-m", "pfvol.cli", "--data-dir", str(cluster.data_dir), "mount", str(path), "-f"]
    process = subprocess.Popen([*argv, "--sdc", "front"], env=environment(), stderr=subprocess.PIPE, text=True)
    try:
        poll_until(lambda: is_mounted(path) and os.path.isdir(path), what="the mount")
        poll_until(lambda: "front" in {record["sdc"] for record in _records(cluster.data_dir)}, what="the record")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 0, errors
        assert "mounted" in errors
    finally:
        process.kill()
        process.wait()
    assert not is_mounted(path)


def _records(data_dir: Path) -> list[dict[str, Any]]:
    import json

    return [json.loads(path.read_text()) for path in (data_dir / "mounts").glob("*.json")]


def test_the_embedded_cluster_comes_and_goes_with_its_mount(fresh_cluster: Callable[..., Any]) -> None:
    """Nothing configured: a cluster, a volume and a mount by one command, twice, with the data kept in between."""
    cluster = fresh_cluster(start=False)
    first = cluster.mount(sdc="me")
    assert os.listdir(first.path) == ["vol1"]
    assert first.volume("vol1").stat().st_size == 1 << 30
    with first.volume("vol1").open("r+b") as file:
        file.write(b"kept")
    second = cluster.mount(sdc="other")
    assert os.listdir(second.path) == []
    first.unmount()
    assert _states(cluster.data_dir) == {"UP"}  # The other mount needs it.
    second.unmount()
    assert _states(cluster.data_dir) == {"STOPPED"}
    again = cluster.mount(sdc="me")
    with again.volume("vol1").open("rb") as file:
        assert file.read(5) == b"kept\0"
    again.unmount()
    assert _states(cluster.data_dir) == {"STOPPED"}


def _states(data_dir: Path) -> set[str]:
    return {node["state"] for node in localcluster.status(data_dir)["nodes"]}


def test_a_cluster_that_was_started_by_hand_outlives_its_mounts(fresh_cluster: Callable[..., Any]) -> None:
    cluster = fresh_cluster(sds=2)
    mount = cluster.mount()
    assert os.listdir(mount.path) == []
    mount.unmount()
    assert _states(cluster.data_dir) == {"UP"}


def test_io_goes_on_while_the_mdm_is_away(fresh_cluster: Callable[..., Any]) -> None:
    """No request stalls from before the MDM is killed until after it is back: it is on no IO's way."""
    cluster = fresh_cluster(sds=2)
    mount = cluster.mount()
    cluster.volume("v", "64MiB", sdc=mount.sdc)
    path = mount.volume("v")
    poll_until(path.exists, what="the volume")
    writer = _Writer(path, 64 * MIB)
    writer.run_rounds(1)
    cluster.kill("mdm1")
    writer.run_rounds(2)
    assert path.stat().st_size == 64 * MIB
    starting = threading.Thread(target=cluster.up)
    starting.start()
    writer.run_until(lambda: not starting.is_alive())
    cluster.volume("w", "16MiB", sdc=mount.sdc)
    poll_until(mount.volume("w").exists, what="a volume mapped after the MDM came back")
    writer.run_rounds(2)
    writer.check()
    assert writer.longest_seconds < STALL_SECONDS_MAX, writer.longest_seconds


class _Writer:
    """Writes a piece of every chunk in turn, syncs each round, and reads all of the round before back."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        self._path = path
        self._offsets = range(123, size_bytes, CHUNK_BYTES)
        self._data = bytes(5000)
        self.rounds = 0
        self.longest_seconds = 0.0

    def run_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 30
        with self._path.open("r+b", buffering=0) as file:
            while not condition():
                assert time.monotonic() < deadline
                if self.rounds:
                    self._check(file.fileno())
                self._data = os.urandom(5000)
                for offset in self._offsets:
                    self._timed(os.pwrite, file.fileno(), self._data, offset)
                self._timed(os.fsync, file.fileno())
                self.rounds += 1

    def run_rounds(self, count: int) -> None:
        until = self.rounds + count
        self.run_until(lambda: self.rounds >= until)

    def check(self) -> None:
        with self._path.open("rb", buffering=0) as file:
            self._check(file.fileno())

    def _check(self, descriptor: int) -> None:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        for offset in self._offsets:
            assert self._timed(os.pread, descriptor, 5000, offset) == self._data

    def _timed(self, call: Callable[..., Any], *arguments: Any) -> Any:
        started = time.monotonic()
        result = call(*arguments)
        self.longest_seconds = max(self.longest_seconds, time.monotonic() - started)
        return result


def test_the_first_io_of_a_volume_needs_no_mdm(fresh_cluster: Callable[..., Any]) -> None:
    """Of one mapped while the servers ran, and of one that was there when they started."""
    cluster = fresh_cluster(sds=2)
    mount = cluster.mount()
    for name in ("old", "new"):
        cluster.volume(name, "64MiB", sdc=mount.sdc)
        if name == "old":
            cluster.cli("cluster", "restart", "--node", "sds1")
    paths = [mount.volume(name) for name in ("old", "new")]
    poll_until(lambda: all(path.exists() for path in paths), what="the volumes")
    cluster.kill("mdm1")
    for path in paths:
        writer = _Writer(path, 64 * MIB)
        writer.run_rounds(2)
        assert writer.longest_seconds < STALL_SECONDS_MAX, (path.name, writer.longest_seconds)
