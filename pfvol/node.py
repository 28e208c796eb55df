"""One node: a process that runs any set of the roles mdm, sds and sdc on one data directory.

Owns the process: its signals, its lock and version in the data directory, the order in which roles start (mdm, sds,
sdc) and stop (the reverse). Roles are found by the entry points ``pfvol.roles``, so nothing here imports them.
Promises: two processes never run one node; a role that ends by an error ends the node, with that error; a clean stop is
given STOP_SECONDS per role.

``python -m pfvol.node`` is this as a program: errors are one line on stderr, exit codes are those of ``pfvol.errors``.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import importlib.metadata
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from pfvol import log as logging
from pfvol.config import CAPABILITIES, Config, load
from pfvol.constants import STATE_VERSION
from pfvol.errors import EXIT_BUG, ConfigError, ConflictError, Error, VersionError
from pfvol.rpc import auth
from pfvol.rpc.session import single_error

ROLE_GROUP = "pfvol.roles"
ROLES_OF_A_CHECKOUT = {
    "mdm": "mdm.daemon:run_role",
    "sds": "pfvol.sds.daemon:run_role",
    "sdc": "pfvol.sdc.daemon:run_role",
}
STOP_SECONDS = 20.0
KEPT_FILES = ("mdm.sqlite", "token", "devices", "sds.json")
"""What only a node that has run has in its directory: with them there is a version file, or something was deleted."""

RoleFunction = Callable[..., Awaitable[None]]


@dataclass(frozen=True)
class Node:
    """What a role gets. ``data_dir`` is the cluster's on this machine; what the node keeps is under ``node_dir``."""

    config: Config
    log: logging.Logger
    stopping: trio.Event = field(default_factory=trio.Event)
    """Set when the role shall end by itself."""

    @property
    def name(self) -> str:
        return self.config.node.name

    @property
    def data_dir(self) -> Path:
        return self.config.node.data_dir

    @property
    def node_dir(self) -> Path:
        return self.config.node_dir

    def secret(self) -> bytes:
        """The cluster secret; raises ``ConfigError`` when it is missing, damaged or open to others."""
        return auth.load_secret(self.config.secret_file)


@dataclass
class _Role:
    """A role and what became of it; also the task status that it is given."""

    name: str
    node: Node
    function: RoleFunction
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    serving: trio.Event = field(default_factory=trio.Event)
    done: trio.Event = field(default_factory=trio.Event)
    info: Any = None
    failure: Exception | None = None

    def started(self, info: Any = None) -> None:
        self.info = info
        self.serving.set()


def run(config: Config, *, ready_fd: int | None = None) -> None:
    """Runs the node until SIGTERM or SIGINT. ready_fd gets one JSON line with the roles' infos when all of them serve.

    Raises the ``Error`` that ended it; returns after a clean stop.
    """
    logging.configure(config.log.level, config.log.format, config.log.file)
    os.umask(0o077)
    with _own(config.node_dir):
        try:
            trio.run(_Runner(config, ready_fd).run)
        except BaseException as raised:
            if (error := single_error(raised)) is not None:
                raise error from raised
            raise


class _Runner:
    def __init__(self, config: Config, ready_fd: int | None) -> None:
        self._ready_fd = ready_fd
        self._log = logging.get_logger("node").bind(node=config.node.name)
        self._stop = trio.Event()
        self._started: list[_Role] = []
        self._roles = [
            _Role(name, Node(config, logging.get_logger(name).bind(node=config.node.name)), find_role(name))
            for name in CAPABILITIES
            if name in config.node.capabilities
        ]

    async def run(self) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch, signals)
                async with trio.open_nursery() as roles:
                    if await self._start(roles):
                        self._tell_ready()
                        await self._stop.wait()
                    await self._stop_roles()
                nursery.cancel_scope.cancel()
        for role in self._started:
            if role.failure is not None:
                raise role.failure

    async def _watch(self, signals: AsyncIterator[int]) -> None:
        async for number in signals:
            name = signal.Signals(number).name
            if self._stop.is_set():
                self._log.warning("told to stop again: stopping at once", signal=name)
                for role in self._started:
                    role.scope.cancel()
                continue
            self._log.info("stopping", signal=name)
            _tell_service_manager("STOPPING=1")
            self._stop.set()

    async def _start(self, nursery: trio.Nursery) -> bool:
        """One role after the other; False when one failed, or we were told to stop before all of them served."""
        for role in self._roles:
            self._started.append(role)
            nursery.start_soon(self._run_role, role)
            await _first(role.serving, self._stop)
            if self._stop.is_set():
                return False
            self._log.info("role serves", role=role.name, **(role.info or {}))
        return True

    async def _run_role(self, role: _Role) -> None:
        """A role that ends, in whatever way, ends the node."""
        try:
            with role.scope:
                await role.function(role.node, task_status=role)
        except Exception as raised:
            error = single_error(raised)
            role.failure = error or raised
            self._log.error("role failed", role=role.name, reason=str(role.failure), exc_info=error is None)
        finally:
            role.done.set()
            self._stop.set()

    async def _stop_roles(self) -> None:
        for role in reversed(self._started):
            role.node.stopping.set()
            if not role.serving.is_set():
                role.scope.cancel()
            with trio.move_on_after(STOP_SECONDS):
                await role.done.wait()
            if not role.done.is_set():
                self._log.error("role does not stop: cancelled", role=role.name, seconds=STOP_SECONDS)
                role.scope.cancel()
        self._log.info("stopped")

    def _tell_ready(self) -> None:
        _tell_service_manager("READY=1")
        if self._ready_fd is not None:
            infos = {role.name: role.info for role in self._roles}
            # Whoever waited may have gone.
            with contextlib.suppress(OSError), os.fdopen(self._ready_fd, "w") as pipe:
                pipe.write(json.dumps(infos) + "\n")


async def _first(*events: trio.Event) -> None:
    async with trio.open_nursery() as nursery:

        async def wait(event: trio.Event) -> None:
            await event.wait()
            nursery.cancel_scope.cancel()

        for event in events:
            nursery.start_soon(wait, event)


def find_role(name: str) -> RoleFunction:
    """The function of a role; raises ``ConfigError`` when no installed package provides it."""
    points = {point.name: point for point in importlib.metadata.entry_points(group=ROLE_GROUP)}
    if not points:
        # A source checkout that was never installed.
        points = {
            key: importlib.metadata.EntryPoint(key, value, ROLE_GROUP) for key, value in ROLES_OF_A_CHECKOUT.items()
        }
    if name not in points:
        raise ConfigError(f"no installed package provides the role {name}: there are {', '.join(sorted(points))}")
    function: RoleFunction = points[name].load()
    return function


@contextmanager
def _own(directory: Path) -> Iterator[None]:
    """The node's directory, made when it is new, checked, and ours alone for as long as the process lives."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Not removed at the end: a lock on a file that others can unlink protects nothing.
        lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"{error.filename or directory} cannot be used: {error.strerror}") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(lock, 32, 0).decode(errors="replace").strip()
            raise ConflictError(f"{directory} is used by a running node, process {holder or 'unknown'}") from None
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        _check_version(directory)
        yield
    finally:
        os.close(lock)


def _check_version(directory: Path) -> None:
    path = directory / "version"
    try:
        text = path.read_text().strip()
    except FileNotFoundError:
        kept = [name for name in KEPT_FILES if (directory / name).exists()]
        if kept:
            raise ConfigError(
                f"{path} is missing although {kept[0]} is there: part of the node's data was deleted; restore it"
            ) from None
        auth.write_private(path, f"{STATE_VERSION}\n".encode())
        return
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if text != str(STATE_VERSION):
        raise VersionError(f"{directory} is of version {text[:20]!r}, this pfvol needs {STATE_VERSION}")


def _tell_service_manager(state: str) -> None:
    """systemd's notification protocol; nothing when nobody listens."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifier:
            notifier.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pfvol.node", description="Runs one node in the foreground.")
    parser.add_argument("--name", help="the node's name")
    parser.add_argument("--capabilities", help="of mdm, sds, sdc; comma-separated")
    parser.add_argument("--config", type=Path, metavar="FILE", help="its configuration (TOML)")
    parser.add_argument("--data-dir", type=Path, metavar="DIR")
    parser.add_argument("--ready-fd", type=int, metavar="N", help="gets a line of JSON when the node serves")
    parser.add_argument("--json", action="store_true", help="an error is also a JSON document on stdout")
    given = parser.parse_args(argv)
    try:
        config = load(
            given.config, node_name=given.name, node_capabilities=given.capabilities, node_data_dir=given.data_dir
        )
        run(config, ready_fd=given.ready_fd)
    except Error as error:
        print(f"pfvol: {error}", file=sys.stderr)
        if given.json:
            print(json.dumps({"error": error.to_wire()}, indent=2, default=str))
        return error.exit_code
    except Exception:
        traceback.print_exc()
        return EXIT_BUG
    return 0


if __name__ == "__main__":
    sys.exit(main())
