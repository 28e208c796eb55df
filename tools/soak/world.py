"""A cluster, a mount and their processes for the programs of this directory, each command run as a user would.

Owns ``base``: ``data`` (the cluster) and ``mnt`` (the mount). What fails is a ``SoakError``, and leaves both as they
are, to be looked at.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pfvol import childprocess
from pfvol.sdc import records

COMMAND_SECONDS = 120


class SoakError(Exception):
    """What must not be."""


@dataclass
class World:
    """One cluster and one mount, with every volume mapped to it."""

    base: Path
    sdc: str = "soak"

    @property
    def data_dir(self) -> Path:
        return self.base / "data"

    @property
    def mountpoint(self) -> Path:
        return self.base / "mnt"

    def argv(self, *arguments: str | Path) -> list[str]:
        return [sys.executable, "-m", "pfvol.cli", "--data-dir", str(self.data_dir), *map(str, arguments)]

    def pfvol(self, *arguments: str | Path) -> str:
        return run(*self.argv(*arguments), timeout_seconds=COMMAND_SECONDS)

    def begin(self, shape: Sequence[str], volumes: Sequence[str], size: str) -> None:
        """A new cluster of ``shape`` (options of ``cluster up``) and volumes of ``size``, mounted."""
        self.mountpoint.mkdir()
        self.pfvol("cluster", "up", *shape)
        self.pfvol("sdc", "add", self.sdc)
        for volume in volumes:
            self.pfvol("vol", "create", "default", volume, size)
            self.pfvol("vol", "map", volume, self.sdc)
        self.mount()

    def mount(self) -> None:
        self.pfvol("mount", self.mountpoint, "--sdc", self.sdc)

    def umount(self) -> None:
        self.pfvol("umount", self.mountpoint)

    def end(self) -> None:
        if self.mountpoint.is_mount():
            self.umount()
        self.pfvol("cluster", "down")

    def processes(self) -> dict[str, childprocess.Identity]:
        """What runs by name: the nodes, and ``mount``."""
        nodes = json.loads((self.data_dir / "cluster.json").read_text())["nodes"]
        found = {node["name"]: childprocess.Identity(node["pid"], node["start_ticks"]) for node in nodes if node["pid"]}
        mounts = [record.process for record in records.live(self.data_dir) if record.process]
        return found | dict(zip(["mount"], mounts, strict=False))


def run(*argv: str, timeout_seconds: float, cwd: Path | None = None) -> str:
    """Runs a program; what it wrote to stdout. SoakError with all its words when it fails."""
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            cwd=cwd,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise SoakError(f"{' '.join(argv)} took over {timeout_seconds:g} s") from error
    if done.returncode:
        raise SoakError(f"{' '.join(argv)} ended with {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout
