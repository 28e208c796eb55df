"""Processes that outlive whoever started them, and signals that can only reach the process that was meant.

Owns: starting a program in a session of its own with its output in a log file; naming it later by pid, start time and
command line; stopping it. Assumes Linux (``/proc``, pidfd). Promises: no signal is ever sent to a process other than
the one that was started, however often the kernel has given its pid out again since.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

LOG_TAIL_LINES = 12
LOG_TAIL_BYTES = 16 * 1024
_STAT_START_TICKS = 19  # field of /proc/PID/stat after the command's closing bracket

# Those started by this very process have to be reaped by it, or they stay as zombies.
_children: set[int] = set()


class Identity(NamedTuple):
    """Names one process for good: ``start_ticks`` counts from boot, so the pair never comes again."""

    pid: int
    start_ticks: int


def start_detached(
    argv: Sequence[str], log_path: Path, env: Mapping[str, str], pass_fds: Sequence[int] = ()
) -> Identity:
    """Starts ``argv`` in a session of its own, from ``/`` (it pins no mount), its output appended to ``log_path``."""
    descriptor = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
    try:
        process = subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL,
            stdout=descriptor,
            stderr=descriptor,
            cwd="/",
            env=dict(env),
            start_new_session=True,
            pass_fds=pass_fds,
        )
    finally:
        os.close(descriptor)
    _children.add(process.pid)
    # Popen is to forget it: that it outlives us is what it is for, and nothing to be warned of.
    process.returncode = 0
    # It cannot have been reaped by anybody else yet, so /proc still has it even if it has exited.
    fields = _stat_fields(process.pid)
    return Identity(process.pid, int(fields[_STAT_START_TICKS]) if fields else 0)


def find(pid: int | None, start_ticks: int | None, argument: str) -> Identity | None:
    """The process ``pid`` if it is alive, started at ``start_ticks`` and has ``argument`` on its command line."""
    if not pid or start_ticks is None:
        return None
    identity = Identity(pid, start_ticks)
    return identity if is_alive(identity) and argument in command_line(pid) else None


def is_alive(identity: Identity) -> bool:
    descriptor = _open(identity)
    if descriptor is None:
        return False
    os.close(descriptor)
    return True


def identify(pid: int) -> Identity | None:
    """Whatever process has the pid now. One that has ended and only waits for its parent to notice is none."""
    fields = _stat_fields(pid)
    identity = Identity(pid, int(fields[_STAT_START_TICKS])) if fields else None
    return identity if identity and is_alive(identity) else None


def find_by_argument(argument: str) -> list[int]:
    """Pids of all live processes that have ``argument`` as one of their command line's words."""
    pids = (int(entry) for entry in os.listdir("/proc") if entry.isdigit())
    return [pid for pid in pids if argument in command_line(pid)]


def command_line(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except OSError:
        return []


def send_signal(identity: Identity, number: signal.Signals) -> bool:
    """Sends a signal to exactly that process; False when it is gone."""
    descriptor = _open(identity)
    if descriptor is None:
        return False
    try:
        signal.pidfd_send_signal(descriptor, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(descriptor)
    return True


def wait_gone(identity: Identity, deadline: float) -> bool:
    """Waits for the process to end, until ``deadline`` of the monotonic clock; True when it has ended."""
    descriptor = _open(identity)
    if descriptor is None:
        return True
    try:
        return _ended(descriptor, max(0.0, deadline - time.monotonic()))
    finally:
        os.close(descriptor)
        _reap(identity.pid)


def stop(identities: Sequence[Identity], grace_seconds: float) -> list[Identity]:
    """SIGTERM to all, then SIGKILL to those still there after the grace; returns those that had to be killed."""
    for identity in identities:
        send_signal(identity, signal.SIGTERM)
    deadline = time.monotonic() + grace_seconds
    stubborn = [identity for identity in identities if not wait_gone(identity, deadline)]
    kill(stubborn)
    return stubborn


def kill(identities: Sequence[Identity]) -> None:
    """SIGKILL, and waits until each is gone (a process in an uninterruptible sleep may outlast the wait)."""
    for identity in identities:
        send_signal(identity, signal.SIGKILL)
    deadline = time.monotonic() + 10.0
    for identity in identities:
        wait_gone(identity, deadline)


def log_tail(path: Path, lines: int = LOG_TAIL_LINES) -> str:
    """The last lines of a log file, for an error message; empty when there is none."""
    try:
        with path.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - LOG_TAIL_BYTES))
            return "\n".join(log.read().decode(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""


def _open(identity: Identity) -> int | None:
    """A descriptor of exactly that process; None when it has ended, reaped by its parent or not."""
    try:
        descriptor = os.pidfd_open(identity.pid)
    except ProcessLookupError:
        return None
    # The descriptor pins whatever has the pid now: only after this can the start time be compared without a race.
    fields = _stat_fields(identity.pid)
    if not fields or int(fields[_STAT_START_TICKS]) != identity.start_ticks or _ended(descriptor, 0.0):
        os.close(descriptor)
        _reap(identity.pid)
        return None
    return descriptor


def _ended(descriptor: int, timeout_seconds: float) -> bool:
    """Waits until every thread of the process has ended.

    The state in /proc/PID/stat does not tell: it is the first thread's, which may be a zombie while the others still
    hold the process's ports and locks.
    """
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    return bool(poller.poll(timeout_seconds * 1000))


def _stat_fields(pid: int) -> list[str]:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (OSError, UnicodeDecodeError):
        return []
    # The command is in brackets and may itself contain brackets and blanks.
    return text[text.rindex(")") + 2 :].split()


def _reap(pid: int) -> None:
    if pid in _children:
        with suppress(ChildProcessError):
            if os.waitpid(pid, os.WNOHANG)[0] == 0:
                return
        _children.discard(pid)
