"""Processes are named for good: what is signalled is what was started, or nothing."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from pathlib import Path

from pfvol import childprocess
from tests.support.waiting import poll_until

SLEEPER = "import time\nprint('up', flush=True)\ntime.sleep(600)"
STUBBORN = "import signal, time\nsignal.signal(15, signal.SIG_IGN)\nprint('up', flush=True)\ntime.sleep(600)"

# Its first thread ends, as the kernel ends the threads of a process that was killed one after the other.
HEADLESS = """
import ctypes, platform, socket, threading, time
listener = socket.create_server(("127.0.0.1", 0))
threading.Thread(target=time.sleep, args=(600,)).start()
print("port", listener.getsockname()[1], "up", flush=True)
ctypes.CDLL(None).syscall({"x86_64": 60}.get(platform.machine(), 93), 0)
"""


def start(tmp_path: Path, program: str, word: str) -> childprocess.Identity:
    log = tmp_path / "log"
    identity = childprocess.start_detached([sys.executable, "-c", program, word], log, os.environ)
    poll_until(lambda: "up" in log.read_text(), what="the program's first line")
    return identity


def test_stop_ends_it_and_reaps_it(tmp_path: Path) -> None:
    """Goal: a process that obeys SIGTERM is not killed, is gone afterwards, and leaves no zombie."""
    identity = start(tmp_path, SLEEPER, "obedient")
    assert childprocess.find(identity.pid, identity.start_ticks, "obedient") == identity
    assert childprocess.stop([identity], 10.0) == []
    assert childprocess.find(identity.pid, identity.start_ticks, "obedient") is None
    assert not Path(f"/proc/{identity.pid}").exists()


def test_a_process_lives_until_its_last_thread_has_ended(tmp_path: Path) -> None:
    """Goal: what still holds ports and locks is not taken for dead, and is waited for."""
    identity = start(tmp_path, HEADLESS, "headless")
    poll_until(lambda: " Z " in Path(f"/proc/{identity.pid}/stat").read_text(), what="the first thread has ended")
    port = int((tmp_path / "log").read_text().split()[1])
    assert not childprocess.wait_gone(identity, time.monotonic())
    childprocess.kill([identity])
    assert childprocess.wait_gone(identity, time.monotonic())
    socket.create_server(("127.0.0.1", port)).close()


def test_stop_kills_what_does_not_obey(tmp_path: Path) -> None:
    identity = start(tmp_path, STUBBORN, "stubborn")
    assert childprocess.stop([identity], 0.2) == [identity]
    assert childprocess.find(identity.pid, identity.start_ticks, "stubborn") is None


def test_it_runs_in_a_session_of_its_own_from_the_root(tmp_path: Path) -> None:
    """Goal: neither the caller's terminal nor its working directory ties the process down."""
    identity = start(tmp_path, SLEEPER, "detached")
    try:
        assert os.getsid(identity.pid) == identity.pid
        assert os.readlink(f"/proc/{identity.pid}/cwd") == "/"
    finally:
        childprocess.kill([identity])


def test_another_process_with_the_pid_is_left_alone(tmp_path: Path) -> None:
    """Goal: after the pid was given to somebody else (another start time), no signal is sent."""
    identity = start(tmp_path, SLEEPER, "stranger")
    try:
        stale = childprocess.Identity(identity.pid, identity.start_ticks - 1)
        assert not childprocess.send_signal(stale, signal.SIGKILL)
        assert childprocess.wait_gone(stale, time.monotonic())
        assert childprocess.find(identity.pid, stale.start_ticks, "stranger") is None
        assert childprocess.find(identity.pid, identity.start_ticks, "somebody") is None
        assert childprocess.find(identity.pid, identity.start_ticks, "stranger") == identity
    finally:
        childprocess.kill([identity])


def test_log_tail_is_the_end(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert childprocess.log_tail(log) == ""
    log.write_text("".join(f"line {number}\n" for number in range(10_000)))
    assert childprocess.log_tail(log, 2) == "line 9998\nline 9999"
