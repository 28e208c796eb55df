"""Starting and ending the daemon of a mount, from another process: what ``pfvol mount`` and ``umount`` do.

Assumes nothing of the command line; everything here blocks. Promises that ``start`` returns when the mount answers or
raises what the daemon could not do, and that ``stop`` returns when data is written, the mount gone and its daemon (with
the embedded cluster, if it was the last to need it) ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pfvol
from pfvol import childprocess
from pfvol.constants import NAME_LENGTH_MAX
from pfvol.errors import ConflictError, Error, InternalError, InvalidError, NotFoundError, TimedOutError
from pfvol.sdc import mount, records
from pfvol.sdc.options import MountOptions

READY_BYTES_MAX = 65536
DAEMON_EXIT_TIMEOUT_SECONDS = 60.0
MODULE = "pfvol.sdc"


@dataclass(frozen=True, slots=True)
class Launch:
    """One mount to be started."""

    mountpoint: str
    sdc: str
    mdm: str
    secret_file: Path
    data_dir: Path
    options: MountOptions
    source: str
    log_level: str = "info"

    def command(self) -> list[str]:
        words = [sys.executable, "-m", MODULE, self.mountpoint, "--sdc", self.sdc, "--mdm", self.mdm]
        words += ["--secret-file", str(self.secret_file), "--data-dir", str(self.data_dir), "--source", self.source]
        return [*words, "-o", self.options.to_text(), "--log-level", self.log_level]


def default_sdc_name(hostname: str) -> str:
    """The machine's name, made to fit the rules for names."""
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", hostname).lstrip("-.")[:NAME_LENGTH_MAX]
    return f"{name[:-1]}_" if re.fullmatch(r"[0-9a-fA-F]{16}", name) else name or "sdc"


def check_free(data_dir: Path, sdc: str) -> None:
    """Two mounts under one name would fence each other off."""
    for record in records.live(data_dir):
        if record.sdc == sdc:
            raise ConflictError(
                f"SDC {sdc} has a mount already, at {record.mountpoint}; give this one a name of its own with --sdc"
            )


def start(launch: Launch) -> int:
    """Starts the daemon; returns its pid when the mount answers. Raises what the daemon says is wrong."""
    records.prepare(launch.data_dir)
    log_path = records.file_of(launch.data_dir, launch.mountpoint, "log")
    ours, theirs = os.pipe()
    try:
        command = [*launch.command(), "--ready-fd", str(theirs)]
        daemon = childprocess.start_detached(command, log_path, environment(), pass_fds=(theirs,))
    finally:
        os.close(theirs)
    with os.fdopen(ours, "rb") as pipe:
        answer = pipe.readline(READY_BYTES_MAX)
    if answer:
        body = json.loads(answer)
        if "error" not in body:
            return daemon.pid
        raise Error.from_wire(body["error"])
    raise InternalError(f"the mount's daemon ended without a word; its log is {log_path}")


def run_in_foreground(launch: Launch, *, json_errors: bool = False) -> NoReturn:
    """Becomes the daemon: logs on stderr, ends at SIGINT or SIGTERM or with the mount. With ``json_errors`` it also
    prints what it could not do as a JSON document."""
    records.prepare(launch.data_dir)
    command = [*launch.command(), *(["--json"] if json_errors else [])]
    os.chdir("/")
    sys.stdout.flush()
    os.execve(command[0], command, environment())


def environment() -> Mapping[str, str]:
    """Ours without pfvol's variables: arguments tell the daemon all it needs. A checkout stays importable from /."""
    result = {key: value for key, value in os.environ.items() if not key.startswith("PFVOL_")}
    root = str(Path(pfvol.__file__).resolve().parent.parent)
    paths = [os.path.abspath(path) for path in result.get("PYTHONPATH", "").split(os.pathsep) if path]
    result["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([root, *paths]))
    return result


def daemons_of(data_dir: Path, mountpoint: str) -> list[childprocess.Identity]:
    """The daemon of a mount; looked for among all processes if its record is in another data directory."""
    record = records.find(data_dir, mountpoint)
    if record is not None and record.process is not None:
        return [record.process]
    found = []
    for pid in childprocess.find_by_argument(mountpoint):
        words = childprocess.command_line(pid)
        identity = childprocess.identify(pid) if words[1:4] == ["-m", MODULE, mountpoint] else None
        found += [identity] if identity else []
    return found


def stop(data_dir: Path, mountpoint: str) -> None:
    """Unmounts after dirty data has been written.

    Raises NotFoundError if nothing is mounted there, InvalidError if it is not pfvol's, ConflictError naming who uses
    it, DeviceError if data cannot be written.
    """
    entry = mount.mounted_at(mountpoint)
    if entry is None:
        raise NotFoundError(f"nothing is mounted at {mountpoint}")
    if entry.filesystem != mount.FILESYSTEM:
        raise InvalidError(f"{mountpoint} is no pfvol mount but {entry.filesystem}; use umount(8)")
    daemons = daemons_of(data_dir, mountpoint)
    with contextlib.suppress(OSError):  # Not ours to open, or the daemon has died: the kernel does what it can.
        mount.flush(mountpoint)
    mount.unmount(mountpoint)
    deadline = time.monotonic() + DAEMON_EXIT_TIMEOUT_SECONDS
    for identity in daemons:
        if not childprocess.wait_gone(identity, deadline):
            raise TimedOutError(
                f"{mountpoint} is unmounted, but its daemon (pid {identity.pid}) has not ended within "
                f"{DAEMON_EXIT_TIMEOUT_SECONDS:g} s"
            )
