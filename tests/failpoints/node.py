"""A node that kills itself at the boundary that it is told: the real node, with nothing of this in the product.

    python -m tests.failpoints.node (what ``python -m pfvol.node`` takes)

A boundary of an MDM is the moment just before and just after

- a transaction of its database,
- the carrying out of a command, pushes that its caller waits for included (only after),
- each message of the control RPC that it sends: answers, questions, notifications (not the heartbeat).

The one just after a message comes when the kernel has it: it arrives, and its receiver may be quicker or slower than
the end of this process. Messages that the product sends together go one by one here, so that there is a boundary
between them. Each boundary is a line of the file ``boundaries`` in the cluster's directory of this host, with the
highest version of the map that was said by then: what was said has to be durable. The file ``kill_at`` there has the
number of the line, or the beginning of the name, at which it ends.

On SIGUSR1 an SDS's disks fail: of its block files only reads work any more.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from functools import wraps
from pathlib import Path
from typing import Any

import mdm.manager
from mdm.orchestrator import Orchestrator
from mdm.store.sqlite import SqliteStore
from pfvol import node
from pfvol.errors import ProtocolError
from pfvol.rpc import codec
from pfvol.rpc.messages import Answer, Message, Request, from_value
from pfvol.rpc.session import PING, Session
from pfvol.rpc.transport import Transport

BOUNDARIES = "boundaries"
KILL_AT = "kill_at"
MANY = 64  # answers whose question is remembered


class Boundaries:
    """Counts them; ends the process at the one that is wanted."""

    def __init__(self, directory: Path) -> None:
        self._kill_at = directory / KILL_AT
        self._log = os.open(directory / BOUNDARIES, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        self._lock = threading.Lock()
        self._passed = 0
        self._version = 0

    def passed(self, name: str, version: int = 0) -> None:
        with self._lock:
            self._passed += 1
            self._version = max(self._version, version)
            os.write(self._log, f"{name}\t{self._version}\n".encode())
            try:
                wanted = self._kill_at.read_text()
            except FileNotFoundError:
                return
            if wanted == str(self._passed) or (not wanted.isdigit() and name.startswith(wanted)):
                os.kill(os.getpid(), signal.SIGKILL)


def watch_database(boundaries: Boundaries) -> None:
    command_of = [""]
    run, commit = mdm.manager._run, SqliteStore.commit

    @wraps(run)
    def watched_run(store: Any, state: Any, command: Any, now: Any) -> Any:
        command_of[0] = type(command).__name__
        return run(store, state, command, now)

    @wraps(commit)
    def watched_commit(self: SqliteStore, *arguments: Any) -> None:
        boundaries.passed(f"before commit {command_of[0]}")
        commit(self, *arguments)
        boundaries.passed(f"after commit {command_of[0]}")

    mdm.manager._run = watched_run
    SqliteStore.commit = watched_commit  # type: ignore[method-assign]


def watch_commands(boundaries: Boundaries) -> None:
    execute = Orchestrator.execute

    @wraps(execute)
    async def watched(self: Orchestrator, command: Any) -> Any:
        outcome = await execute(self, command)
        if outcome.events:
            boundaries.passed(f"done {type(command).__name__}")
        return outcome

    Orchestrator.execute = watched  # type: ignore[method-assign]


def watch_messages(boundaries: Boundaries) -> None:
    make, requested, send = Session.__init__, Session._requested, Transport.send
    sessions: dict[Transport, tuple[str, dict[int, str]]] = {}

    @wraps(make)
    def watched_make(self: Session, transport: Transport, peer: Any, handler: Any) -> None:
        make(self, transport, peer, handler)
        sessions[transport] = (peer.name, {})

    @wraps(requested)
    def watched_requested(self: Session, request: Request, nursery: Any) -> None:
        asked = sessions[self._transport][1]
        asked[request.id] = request.method
        if len(asked) > MANY:
            del asked[next(iter(asked))]
        requested(self, request, nursery)

    @wraps(send)
    async def watched_send(self: Transport, frames: bytes, *timeout: float) -> None:
        if self not in sessions:  # It is being opened.
            await send(self, frames, *timeout)
            return
        peer, asked = sessions[self]
        for frame, message in split(frames):
            name, version = describe(message, asked)
            if name:
                boundaries.passed(f"before {name} to {peer}", version)
            await send(self, frame, *timeout)
            if name:
                boundaries.passed(f"after {name} to {peer}")

    Session.__init__ = watched_make  # type: ignore[method-assign]
    Session._requested = watched_requested  # type: ignore[method-assign]
    Transport.send = watched_send  # type: ignore[method-assign]


def split(frames: bytes) -> Iterator[tuple[bytes, Message]]:
    while frames:
        size = codec.LENGTH.size + codec.body_length(frames[: codec.LENGTH.size])
        yield frames[:size], from_value(codec.decode(frames[codec.LENGTH.size : size]))
        frames = frames[size:]


def describe(message: Message, asked: dict[int, str]) -> tuple[str, int]:
    """Its name, none for what is no boundary, and the version of the map that it says."""
    if isinstance(message, Answer):
        result = message.result if isinstance(message.result, dict) else {}
        version = result.get("map_version", result.get("version", 0))
        return f"answer of {asked.pop(message.id, '?')}", version if isinstance(version, int) else 0
    if message.method == PING:
        return "", 0
    made = message.params.get("made", 0)
    return message.method, made if isinstance(made, int) else 0


def fail_disks(*_: object) -> None:
    """As if the disk below all block files of this process took no more writes."""
    for link in Path("/proc/self/fd").iterdir():
        try:
            path = os.readlink(link)
        except FileNotFoundError:
            continue
        if path.endswith("/blocks"):
            unwritable = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            os.dup2(unwritable, int(link.name), inheritable=False)
            os.close(unwritable)


def main() -> int:
    configuration = Path(sys.argv[sys.argv.index("--config") + 1])
    if "mdm" in sys.argv:
        boundaries = Boundaries(configuration.parent)
        watch_database(boundaries)
        watch_commands(boundaries)
        watch_messages(boundaries)
    signal.signal(signal.SIGUSR1, fail_disks)
    return node.main()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ProtocolError as error:  # What we could not read of our own messages.
        sys.exit(f"the boundaries are wrong: {error}")
