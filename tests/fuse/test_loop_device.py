"""Filesystems on a loop device on a volume's file: made, filled, trimmed, checked, and worked on by a database."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import sqlite3
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.waiting import poll_until

MIB = 1024**2
SIZE = "400MiB"  # mkfs.xfs takes nothing below 300 MiB
BALLAST_BYTES = 40 * MIB
TREE_BYTES_MAX = 24 * MIB
MAKE = {"ext4": ["mkfs.ext4", "-q", "-F"], "xfs": ["mkfs.xfs", "-q", "-f"]}
CHECK = {"ext4": ["e2fsck", "-f", "-n"], "xfs": ["xfs_repair", "-n"]}

MakeVolume = Callable[..., str]

pytestmark = pytest.mark.usefixtures("root")


def tool(*words: str | Path, timeout_seconds: float = 50) -> str:
    """Runs a system tool; what it printed. Its own words when it fails."""
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    done = subprocess.run(
        [shutil.which(str(words[0]), path=path) or str(words[0]), *map(str, words[1:])],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_seconds,
        check=False,
    )
    assert done.returncode == 0, (words, done.stdout)
    return done.stdout.strip()


@contextmanager
def attached(file: Path, *, direct: bool) -> Iterator[str]:
    """A loop device on a file. ``direct`` goes around the file's page cache, as one would for a database."""
    device = tool("losetup", "--find", "--show", f"--direct-io={'on' if direct else 'off'}", file)
    try:
        yield device
    finally:
        tool("losetup", "--detach", device)
        # Detaching is done by the last who lets go, udev's probes included.
        poll_until(lambda: not os.path.exists(f"/sys/block/{Path(device).name}/loop/backing_file"), what="it detached")


@contextmanager
def filesystem(device: str, directory: Path, kind: str) -> Iterator[Path]:
    directory.mkdir(exist_ok=True)
    tool("mount", "-t", kind, device, directory)
    try:
        yield directory
    finally:
        tool("umount", directory)


@pytest.fixture
def volume(cluster: Any, mounted: Callable[..., Any], new_volume: MakeVolume) -> Path:
    """The file of a fresh, thin volume."""
    name = new_volume(SIZE)
    return Path(mounted(name).volume(name))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source tree: packages of Python's library, as many as TREE_BYTES_MAX takes, with links and modes."""
    root = tmp_path_factory.mktemp("source") / "tree"
    library = Path(sysconfig.get_path("stdlib"))
    total = 0
    for package in sorted(path for path in library.iterdir() if (path / "__init__.py").exists()):
        files = [file for file in package.rglob("*.py") if file.is_file()]
        total += sum(file.stat().st_size for file in files)
        if total > TREE_BYTES_MAX:
            break
        for file in files:
            copy = root / file.relative_to(library)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
    (root / "link").symlink_to("json/decoder.py")
    (root / "json" / "tool.py").chmod(0o755)
    (root / "empty").mkdir()
    return root


def listing(root: Path) -> dict[str, tuple[Any, ...]]:
    """Every path below ``root`` with its mode and what it holds."""
    found: dict[str, tuple[Any, ...]] = {}
    for path in root.rglob("*"):
        info = path.lstat()
        if path.is_symlink():
            content = os.readlink(path)
        else:
            content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        found[str(path.relative_to(root))] = (info.st_mode, content)
    return found


@pytest.mark.parametrize(("kind", "direct"), [("ext4", False), ("xfs", True)])
def test_a_filesystem_holds_a_source_tree_and_gives_its_space_back(
    cluster: Any, volume: Path, tree: Path, tmp_path: Path, kind: str, direct: bool
) -> None:
    def used_bytes() -> int:
        return int(cluster.cli("vol", "show", volume.name)["used_capacity_bytes"])

    archive = tmp_path / "tree.tar"
    tool("tar", "-C", tree, "-cf", archive, ".")
    wanted = listing(tree)
    content_bytes = BALLAST_BYTES + sum(path.stat().st_size for path in tree.rglob("*.py"))
    with attached(volume, direct=direct) as device:
        tool(*MAKE[kind], device)
        with filesystem(device, tmp_path / "fs", kind) as fs:
            (fs / "unpacked").mkdir()
            tool("tar", "-C", fs / "unpacked", "-xf", archive)
            (fs / "ballast").write_bytes(random.Random(4).randbytes(BALLAST_BYTES))
            tool("sync", "-f", fs)
            filled = poll_until(lambda: (used := used_bytes()) >= content_bytes and used, what="the space taken")
        # From the servers, not from memory: neither the filesystem's pages nor the file's are kept.
        with volume.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with filesystem(device, tmp_path / "fs", kind) as fs:
            assert listing(fs / "unpacked") == wanted
            (fs / "ballast").unlink()
        # The unmount between: XFS frees what was unlinked in the background, and trims only what is free.
        with filesystem(device, tmp_path / "fs", kind) as fs:
            tool("fstrim", fs)
            poll_until(lambda: used_bytes() <= filled - BALLAST_BYTES * 3 // 4, what="the trimmed space given back")
            assert listing(fs / "unpacked") == wanted
        tool(*CHECK[kind], device)
    assert cluster.run("vol", "verify", volume.name).code == 0


def test_a_database_on_a_volume_is_whole_after_umount_and_mount(
    cluster: Any, mounted: Callable[..., Any], new_volume: MakeVolume, tmp_path: Path
) -> None:
    """Goal: an sqlite that syncs each commit works on ext4 on a loop device, and finds all of it in another mount."""
    name = new_volume("64MiB")
    mount = mounted(name)
    with attached(mount.volume(name), direct=True) as device:
        tool(*MAKE["ext4"], device)
        with filesystem(device, tmp_path / "fs", "ext4") as fs:
            expected = work_on(fs / "data.db")
    mount.unmount()
    again = cluster.mount(sdc=mount.sdc)
    with attached(again.volume(name), direct=True) as device:
        tool(*CHECK["ext4"], device)
        with (
            filesystem(device, tmp_path / "fs", "ext4") as fs,
            contextlib.closing(sqlite3.connect(fs / "data.db")) as db,
        ):
            assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            assert dict(db.execute("SELECT account, balance FROM accounts")) == expected


def work_on(path: Path) -> dict[int, int]:
    """Transfers between accounts in many small transactions, some of them undone; the balances that must be there."""
    rng = random.Random(5)
    balances = dict.fromkeys(range(200), 1000)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        assert db.execute("PRAGMA journal_mode=WAL").fetchone() == ("wal",)
        db.execute("PRAGMA synchronous=FULL")
        db.execute("CREATE TABLE accounts (account INTEGER PRIMARY KEY, balance INTEGER)")
        db.execute("CREATE TABLE transfers (giver INTEGER, taker INTEGER, amount INTEGER, note BLOB)")
        db.execute("CREATE INDEX by_taker ON transfers (taker, amount)")
        db.executemany("INSERT INTO accounts VALUES (?, ?)", balances.items())
        for round_ in range(150):
            db.execute("BEGIN")
            after = dict(balances)
            for _ in range(20):
                giver, taker, amount = rng.randrange(200), rng.randrange(200), rng.randrange(100)
                after[giver] -= amount
                after[taker] += amount
                db.execute("UPDATE accounts SET balance = balance - ? WHERE account = ?", (amount, giver))
                db.execute("UPDATE accounts SET balance = balance + ? WHERE account = ?", (amount, taker))
                note = rng.randbytes(rng.randrange(1000))
                db.execute("INSERT INTO transfers VALUES (?, ?, ?, ?)", (giver, taker, amount, note))
            keep = round_ % 5 != 0
            db.execute("COMMIT" if keep else "ROLLBACK")
            balances = after if keep else balances
            if round_ == 75:
                db.execute("DELETE FROM transfers WHERE amount < 50")
                db.execute("VACUUM")
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert dict(db.execute("SELECT account, balance FROM accounts")) == balances
    return balances
