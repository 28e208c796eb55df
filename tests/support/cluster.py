"""Clusters and mounts for tests. Whoever makes one here gets rid of it here too, whatever state it is in by then."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pfvol import childprocess, localcluster
from pfvol.client import Client, Endpoint
from pfvol.sdc.mount import mount_table
from tests.support.cli import CliResult, run_cli

MIB = 1024**2
DEVICES = 5
DEVICE_SIZE_BYTES = 128 * MIB

_counter = itertools.count(1)


@dataclass
class Mount:
    """One ``pfvol mount``; its volumes are files in ``path``."""

    path: Path
    sdc: str
    cluster: TestCluster

    def volume(self, name: str) -> Path:
        return self.path / name

    def unmount(self) -> None:
        run_cli("umount", self.path, data_dir=self.cluster.data_dir, check=True)
        self.cluster.mounts.remove(self)

    def pid(self) -> int:
        """The SDC's process."""
        (pid,) = childprocess.find_by_argument(str(self.path))
        return pid

    def discard(self) -> None:
        """Gets rid of the mount without asking: for the end of a test that may have failed anywhere."""
        if is_mounted(self.path):
            result = run_cli("umount", self.path, data_dir=self.cluster.data_dir)
            if result.code or is_mounted(self.path):
                detach(self.path)
        kill_with_argument(str(self.path))
        with suppress(OSError):
            self.path.rmdir()


@dataclass
class TestCluster:
    """A local cluster and what was mounted from it."""

    __test__ = False  # a name that pytest would collect

    data_dir: Path
    mounts: list[Mount] = field(default_factory=list)

    @property
    def document(self) -> dict[str, Any]:
        """cluster.json as it is now."""
        return localcluster.status(self.data_dir)

    def client(self) -> Client:
        """The REST client (a context manager)."""
        document = self.document
        return Client(Endpoint(document["api"], document["token"]))

    def cli(self, *arguments: str | Path, check: bool = True) -> Any:
        """Runs a command with ``--json`` and returns its document; with ``check`` a failure is an AssertionError."""
        result = run_cli(*arguments, data_dir=self.data_dir, json_output=True, check=check)
        return result.json if result.stdout.strip() else None

    def run(self, *arguments: str | Path) -> CliResult:
        """Runs a command as it is."""
        return run_cli(*arguments, data_dir=self.data_dir)

    def up(self, **shape: Any) -> None:
        localcluster.up(self.data_dir, **({"devices": DEVICES, "device_size_bytes": DEVICE_SIZE_BYTES} | shape))

    def volume(self, name: str, size: str = "128MiB", *options: str, sdc: str | None = None) -> str:
        """Makes a volume in the default pool (and maps it to ``sdc``); returns its name."""
        self.cli("vol", "create", "default", name, size, *options)
        if sdc:
            self.cli("sdc", "add", sdc) if sdc not in {row["name"] for row in self.cli("sdc", "list")} else None
            self.cli("vol", "map", name, sdc)
        return name

    def mount(self, path: Path | None = None, *, sdc: str | None = None, options: Sequence[str] = ()) -> Mount:
        """``pfvol mount``: every volume mapped to ``sdc`` appears."""
        number = next(_counter)
        path = path or self.data_dir.parent / f"mount{number}"
        sdc = sdc or f"sdc{number}"
        path.mkdir(exist_ok=True)
        mount = Mount(path, sdc, self)
        self.mounts.append(mount)
        option = ["-o", ",".join(options)] if options else []
        run_cli("mount", path, "--sdc", sdc, *option, data_dir=self.data_dir, check=True)
        return mount

    def kill(self, node: str | None = None) -> None:
        """SIGKILL for one node, or for all at once."""
        localcluster.kill_node(self.data_dir, node)

    def discard(self) -> None:
        """Unmounts, stops and removes everything, also when half of it is gone already."""
        for mount in list(self.mounts):
            mount.discard()
        for node in _nodes(self.data_dir):
            kill_with_argument(str(self.data_dir / node / "node.toml"))
        shutil.rmtree(self.data_dir, ignore_errors=True)


def _nodes(data_dir: Path) -> list[str]:
    with suppress(OSError):
        return [entry.name for entry in data_dir.iterdir() if entry.is_dir()]
    return []


def kill_with_argument(argument: str) -> None:
    """Kills the processes that have exactly this word, a path of ours, on their command line."""
    found = (childprocess.identify(pid) for pid in childprocess.find_by_argument(argument) if pid != os.getpid())
    childprocess.kill([identity for identity in found if identity])


def is_mounted(path: Path) -> bool:
    return str(path) in mountpoints()


def mountpoints() -> list[str]:
    """All mountpoints of this namespace."""
    return [entry.mountpoint for entry in mount_table()]


def detach(path: Path) -> None:
    """Takes a mount away at once, whoever uses it."""
    tool = shutil.which("fusermount3") or "fusermount3"
    subprocess.run([tool, "-u", "-z", str(path)], capture_output=True, check=False, timeout=20)
