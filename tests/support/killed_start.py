"""Makes an SDS's devices for the first time and is killed on the way, at each step in turn; then makes them in peace.

A program of its own: ``python -m tests.support.killed_start DIRECTORY``. A step is whatever Python audits: each file
that is opened, made, renamed or removed. Prints the number of steps; fails when a start after a kill does not find or
make all devices whole.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

import trio

from pfvol.sds.devices import Devices, load_state, parse_specs

CLUSTER = bytes(range(1, 17))
SDS_ID = 3
DEVICES, SLOTS = 2, 4
STEPS_MAX = 1000


async def start(directory: Path) -> None:
    """What an SDS does with its devices between the start and the first request."""
    devices = Devices(directory, load_state(directory))
    await devices.open()
    devices.adopt(CLUSTER, SDS_ID)
    told = [{"index": index, "path": None, "slots": SLOTS} for index in range(DEVICES)]
    missing = devices.missing(parse_specs(directory, told))
    if missing:
        await devices.make(missing)
    if devices.failed or sorted(devices.opened) != list(range(DEVICES)):
        raise SystemExit(f"opened {sorted(devices.opened)}, failed {devices.failed}")
    await devices.close()
    if leftover := [path for path in (directory / "devices").iterdir() if path.name.endswith(".unfinished")]:
        raise SystemExit(f"left behind: {leftover}")


def in_child(directory: Path, killed_at: int | None) -> int:
    """The exit code of a start in a process of its own; -SIGKILL when it came to step ``killed_at``."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    steps = 0

    def audit(event: str, _arguments: object) -> None:
        nonlocal steps
        if event == "open" or event.startswith(("os.", "fcntl.")):
            steps += 1
            if steps == killed_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)
    try:
        trio.run(start, directory)
    except BaseException as error:
        print(f"after a kill at step {killed_at}: {error!r}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def main(directory: Path) -> None:
    for step in range(1, STEPS_MAX):
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        ended = in_child(directory, step)
        if ended == 0:
            print(step - 1)
            return
        if ended != -signal.SIGKILL or in_child(directory, None) != 0:
            raise SystemExit(f"step {step} failed")
    raise SystemExit("it never ends")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
