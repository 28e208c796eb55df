"""The process behind a mount: an SDC, its engine, and pyfuse3 for names and attributes, in one trio loop.

Owns the mount for as long as it runs. Resources are taken in this order and given back in the reverse: registered at
the MDM, mounted, engine started, pyfuse3 answering. Promises that the mount is gone when ``serve`` has ended, and that
what applications wrote was flushed before, if the cluster let us.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyfuse3
import trio

from pfvol.config import Config, format_address
from pfvol.errors import ConfigError, ConflictError, Error, NotFoundError, TimedOutError
from pfvol.log import get_logger
from pfvol.rpc import auth
from pfvol.sdc import mount
from pfvol.sdc.operations import VolumeFiles
from pfvol.sdc.options import MountOptions, parse_options
from pfvol.sdc.session import SdcSession

REGISTER_TIMEOUT_SECONDS = 10.0
ANSWER_TIMEOUT_SECONDS = 10.0
FLUSH_TIMEOUT_SECONDS = 15.0
RELAY_BUFFER_BYTES = 4 * 1024 * 1024  # the largest message is one of 1 MiB; the kernel may cap this for users
OOM_SCORE_ADJUST = -900  # a killed daemon loses what applications have not synced
_PR_SET_IO_FLUSHER = 57

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class MountSpec:
    """One mount as it is to be. ``source`` is what df(1) shows as its device."""

    mountpoint: str
    sdc: str
    mdm: tuple[str, int]
    secret_file: Path
    options: MountOptions
    source: str


def prepare_process() -> None:
    """Before any thread is started, because threads inherit it: memory reclaim in this process must not wait for IO to
    our own mount, as it would with a loop device on a volume. Needs CAP_SYS_RESOURCE; without it such a loop device can
    stall under memory pressure."""
    ctypes.CDLL(None).prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE_ADJUST))


async def serve(spec: MountSpec, stopping: trio.Event, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
    """Mounts, says so through ``task_status.started({"mountpoint"})`` when the mount answers, and serves until it is
    unmounted by anybody or ``stopping`` is set."""
    secret = await trio.to_thread.run_sync(auth.load_secret, spec.secret_file)
    session = SdcSession(
        name=spec.sdc, mdm=spec.mdm, secret=secret, io_deadline_seconds=spec.options.io_deadline_seconds
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(session.run, REGISTER_TIMEOUT_SECONDS)
        fuse_fd = await trio.to_thread.run_sync(mount.mount, spec.mountpoint, spec.options, spec.source)
        try:
            await _serve_mount(spec, session, fuse_fd, stopping, task_status)
        finally:
            await _leave(spec.mountpoint, session)
        nursery.cancel_scope.cancel()


async def _serve_mount(
    spec: MountSpec, session: SdcSession, fuse_fd: int, stopping: trio.Event, task_status: Any
) -> None:
    ours, theirs = _relay()
    with theirs:
        await session.attach(fuse_fd, ours.detach(), spec.mountpoint, force_direct=spec.options.direct)
        files = VolumeFiles(session.table, session, (os.getuid(), os.getgid()))
        pyfuse3.init(files, f"/dev/fd/{theirs.fileno()}", set())
        theirs.detach()  # pyfuse3's from here on: its close closes it.
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_answer_names, session)
            await _await_answer(spec.mountpoint)
            if refused := await trio.to_thread.run_sync(mount.widen_cache, spec.mountpoint):
                _log.debug("buffered IO is slower than it could be", settings=refused)
            _log.info("mounted", mountpoint=spec.mountpoint, sdc=spec.sdc)
            task_status.started({"mountpoint": spec.mountpoint})
            await _until_over(spec.mountpoint, session, stopping)
            nursery.cancel_scope.cancel()
    finally:
        pyfuse3.close(unmount=False)


def _relay() -> tuple[socket.socket, socket.socket]:
    """Between the engine and pyfuse3: one message is one FUSE message."""
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in pair:
        for buffer in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            end.setsockopt(socket.SOL_SOCKET, buffer, RELAY_BUFFER_BYTES)
        end.setblocking(False)
    return pair


async def _answer_names(session: SdcSession) -> None:
    """pyfuse3's loop. It ends, in whatever way, when the engine closes its end because the mount is gone."""
    try:
        await pyfuse3.main()
    except* OSError as errors:
        _log.debug("the relay has ended", errors=[str(error) for error in errors.exceptions])
    with trio.move_on_after(ANSWER_TIMEOUT_SECONDS):
        await session.unmounted.wait()
        return
    raise RuntimeError("pyfuse3 has ended while the filesystem is mounted")


async def _await_answer(mountpoint: str) -> None:
    """Until a request has gone through the kernel, the engine and pyfuse3."""
    with trio.move_on_after(ANSWER_TIMEOUT_SECONDS):
        await trio.to_thread.run_sync(os.statvfs, mountpoint, abandon_on_cancel=True)
        return
    raise TimedOutError(f"the mount at {mountpoint} does not answer within {ANSWER_TIMEOUT_SECONDS:g} s")


async def _until_over(mountpoint: str, session: SdcSession, stopping: trio.Event) -> None:
    """Until the kernel says unmounted; asked to stop, unmounts."""
    async with trio.open_nursery() as nursery:

        async def stop_when_asked() -> None:
            await stopping.wait()
            await _flush_and_unmount(mountpoint)
            nursery.cancel_scope.cancel()

        nursery.start_soon(stop_when_asked)
        await session.unmounted.wait()
        _log.info("unmounted", mountpoint=mountpoint)
        nursery.cancel_scope.cancel()


async def _flush_and_unmount(mountpoint: str) -> None:
    """As clean as it can be: what is dirty is written, and nobody is left with open files unless they do not let go."""
    try:
        with trio.fail_after(FLUSH_TIMEOUT_SECONDS):
            await trio.to_thread.run_sync(mount.flush, mountpoint, abandon_on_cancel=True)
            await trio.to_thread.run_sync(mount.unmount, mountpoint, abandon_on_cancel=True)
    except ConflictError as error:
        _log.warning("stopping although it is in use; open files get errors from now on", reason=str(error))
    except trio.TooSlowError:
        _log.error("stopping with dirty data that the cluster did not take in time", mountpoint=mountpoint)
    except (Error, OSError) as error:
        _log.error("stopping without a clean unmount", reason=str(error))


async def _leave(mountpoint: str, session: SdcSession) -> None:
    """No mount stays behind that nobody answers. Waits only so long: when the engine stops, the kernel lets go."""
    if session.unmounted.is_set():
        return
    with trio.CancelScope(shield=True, deadline=trio.current_time() + ANSWER_TIMEOUT_SECONDS):
        try:
            await trio.to_thread.run_sync(lambda: mount.unmount(mountpoint, detach=True), abandon_on_cancel=True)
        except NotFoundError:
            pass  # Unmounted a moment ago: the engine has not heard of it yet.
        except Error as error:
            _log.error("cannot unmount", mountpoint=mountpoint, reason=str(error))


async def run_role(node: Any, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
    """The sdc capability of a node: mounts at the configuration's ``[sdc] mountpoint``."""
    config: Config = node.config
    if config.sdc.mountpoint is None:
        raise ConfigError("capability sdc needs [sdc] mountpoint in the configuration")
    options = parse_options(config.sdc.options)
    mdm = config.cluster.mdm or (config.node.bind, config.mdm.control_port)
    spec = MountSpec(
        mountpoint=mount.resolve(str(config.sdc.mountpoint)),
        sdc=options.sdc or node.name,
        mdm=mdm,
        secret_file=config.secret_file,
        options=options,
        source=f"{mount.SUBTYPE}:{format_address(mdm)}",
    )
    prepare_process()
    await serve(spec, node.stopping, task_status=task_status)
