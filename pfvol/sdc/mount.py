"""The kernel's side of a mount: making it, taking it away, and saying who keeps it busy.

Owns mount(2), umount2(2) and ``fusermount3``, which nothing else of pfvol calls. Assumes Linux. Every function blocks
and belongs in a worker thread; none looks into a mount whose daemon may be gone, except ``flush``, whose purpose it is.
Promises one clear line for everything that is wrong with a mountpoint.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import os
import re
import shutil
import socket
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path

from pfvol.errors import ConfigError, ConflictError, DeniedError, DeviceError, NotFoundError
from pfvol.sdc.options import MountOptions

FUSE_DEVICE = "/dev/fuse"
SUBTYPE = "pfvol"
FILESYSTEM = f"fuse.{SUBTYPE}"
FUSERMOUNT = "fusermount3"
FUSERMOUNT_TIMEOUT_SECONDS = 20.0
BUSY_NAMED_MAX = 10
ROOT_MODE = stat.S_IFDIR | 0o755
BDI_DIRECTORY = Path("/sys/class/bdi")
# Of the kernel's page cache, per mount. FUSE starts with 128 KiB of read-ahead, which INIT cannot raise, and with 1 %
# of the memory for dirty pages, strictly: a buffered dd would wait for each few MiB.
BDI_SETTINGS = {"read_ahead_kb": 4096, "max_ratio": 100, "strict_limit": 0}

_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 1, 2, 4, 8
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class MountEntry:
    """One line of /proc/self/mountinfo."""

    mountpoint: str
    filesystem: str
    device: str


def mount_table(text: str | None = None) -> list[MountEntry]:
    """What is mounted, oldest first (so that the last entry of a path is the one seen)."""
    lines = (Path("/proc/self/mountinfo").read_text() if text is None else text).splitlines()
    entries = []
    for line in lines:
        fields, _, tail = line.partition(" - ")
        parts, words = fields.split(), tail.split()
        if len(parts) >= 5 and words:
            entries.append(MountEntry(_unescape(parts[4]), words[0], parts[2]))
    return entries


def _unescape(field: str) -> str:
    """The kernel writes blank, tab, newline and backslash of a path as three octal digits."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def mounted_at(mountpoint: str) -> MountEntry | None:
    """What is mounted at exactly this (absolute) path."""
    return next((entry for entry in reversed(mount_table()) if entry.mountpoint == mountpoint), None)


def resolve(mountpoint: str) -> str:
    """The absolute path without symbolic links, found without touching what is mounted there."""
    path = Path(os.path.abspath(mountpoint))
    if mounted_at(str(path)):
        return str(path)
    return os.path.join(os.path.realpath(path.parent), path.name) if _is_mount_below(path) else os.path.realpath(path)


def _is_mount_below(path: Path) -> bool:
    return mounted_at(os.path.join(os.path.realpath(path.parent), path.name)) is not None


def check_mountpoint(mountpoint: str) -> None:
    """Raises what is wrong with a place to mount at: missing, no directory, or a pfvol mount already."""
    there = mounted_at(mountpoint)
    if there is not None and there.filesystem == FILESYSTEM:
        raise ConflictError(f"{mountpoint} is a pfvol mount already; `pfvol umount {mountpoint}` ends it")
    try:
        info = os.stat(mountpoint)
    except FileNotFoundError:
        raise NotFoundError(f"mountpoint {mountpoint} does not exist; create it with `mkdir -p {mountpoint}`") from None
    except OSError as error:
        raise ConfigError(f"mountpoint {mountpoint} cannot be used: {error.strerror}") from None
    if not stat.S_ISDIR(info.st_mode):
        raise ConfigError(f"mountpoint {mountpoint} is not a directory")


def check_system() -> None:
    """Raises what this machine lacks for a FUSE mount by this user."""
    if not os.path.exists(FUSE_DEVICE):
        raise ConfigError(f"{FUSE_DEVICE} does not exist; load the kernel's FUSE with `modprobe fuse`")
    if os.geteuid() != 0 and shutil.which(FUSERMOUNT) is None:
        raise ConfigError(f"{FUSERMOUNT} is not installed; users other than root need it (Debian: apt install fuse3)")
    if not os.access(FUSE_DEVICE, os.R_OK | os.W_OK):
        raise DeniedError(f"{FUSE_DEVICE} may not be opened by this user")


def mount(mountpoint: str, options: MountOptions, source: str) -> int:
    """Mounts; ``source`` is what df(1) shows as the device.

    Returns the /dev/fuse descriptor, whose requests somebody now has to answer.
    Root mounts by itself; others, and a root without the right to (a container), through fusermount3.
    """
    check_system()
    check_mountpoint(mountpoint)
    if os.geteuid() != 0:
        return _mount_by_helper(mountpoint, options, source)
    try:
        return _mount_directly(mountpoint, options, source)
    except PermissionError:
        if shutil.which(FUSERMOUNT) is None:
            raise DeniedError(f"mounting at {mountpoint} is not permitted (CAP_SYS_ADMIN is missing)") from None
        return _mount_by_helper(mountpoint, options, source)
    except OSError as error:
        raise ConfigError(f"cannot mount at {mountpoint}: {error.strerror}") from error


def _mount_directly(mountpoint: str, options: MountOptions, source: str) -> int:
    descriptor = os.open(FUSE_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    words = [f"fd={descriptor}", f"rootmode={ROOT_MODE:o}", f"user_id={os.getuid()}", f"group_id={os.getgid()}"]
    words.append("default_permissions")
    if options.allow_other is not False:
        words.append("allow_other")
    flags = _MS_RDONLY if options.read_only else 0
    flags |= 0 if options.suid else _MS_NOSUID
    flags |= 0 if options.dev else _MS_NODEV
    flags |= 0 if options.exec_ else _MS_NOEXEC
    data = ",".join(words).encode()
    if _libc.mount(os.fsencode(source), os.fsencode(mountpoint), FILESYSTEM.encode(), flags, data) != 0:
        code = ctypes.get_errno()
        os.close(descriptor)
        raise OSError(code, os.strerror(code), mountpoint)
    return descriptor


def _mount_by_helper(mountpoint: str, options: MountOptions, source: str) -> int:
    """fusermount3 mounts and sends the descriptor through the socket named in ``_FUSE_COMMFD``."""
    fsname = source.replace("\\", "\\\\").replace(",", "\\,")
    words = [f"fsname={fsname}", f"subtype={SUBTYPE}", "default_permissions"]
    words += ["ro"] if options.read_only else []
    words += [] if options.exec_ else ["noexec"]
    words += ["allow_other"] if options.allow_other else []
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        done = _fusermount(["-o", ",".join(words), "--", mountpoint], theirs.fileno())
        if done.returncode != 0:
            raise DeniedError(f"cannot mount at {mountpoint}: {_last_line(done)}")
        theirs.close()
        ours.settimeout(FUSERMOUNT_TIMEOUT_SECONDS)
        _, ancillary, _, _ = ours.recvmsg(1, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
    descriptors = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
    if len(descriptors) != 1:
        raise ConfigError(f"{FUSERMOUNT} mounted {mountpoint} but handed over no descriptor")
    return descriptors[0]


def widen_cache(mountpoint: str) -> list[str]:
    """Sets read-ahead and limits of dirty pages for a mount that has answered INIT (which lowers them again).

    Returns what this system does not let us set, as "NAME: reason": that costs speed of buffered IO and nothing else.
    Users other than root are not let.
    """
    entry = mounted_at(mountpoint)
    refused = []
    for name, value in BDI_SETTINGS.items():
        try:
            (BDI_DIRECTORY / (entry.device if entry else "") / name).write_text(f"{value}\n")
        except OSError as error:
            refused.append(f"{name}: {error.strerror}")
    return refused


def _fusermount(arguments: list[str], comm_fd: int | None = None) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ, LC_ALL="C")
    if comm_fd is not None:
        environment["_FUSE_COMMFD"] = str(comm_fd)
    try:
        return subprocess.run(
            [FUSERMOUNT, *arguments],
            env=environment,
            pass_fds=() if comm_fd is None else (comm_fd,),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=FUSERMOUNT_TIMEOUT_SECONDS,
            check=False,
        )
    except FileNotFoundError:
        raise ConfigError(f"{FUSERMOUNT} is not installed (Debian: apt install fuse3)") from None


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = done.stderr.strip().splitlines()
    return lines[-1].removeprefix(f"{FUSERMOUNT}: ") if lines else f"{FUSERMOUNT} exits with {done.returncode}"


def unmount(mountpoint: str, *, detach: bool = False) -> None:
    """Unmounts. ``detach``: out of the tree at once, whoever still uses it.

    Raises ConflictError, naming who keeps it busy; NotFoundError if nothing is mounted there; DeniedError.
    """
    flags = _UMOUNT_NOFOLLOW | (_MNT_DETACH if detach else 0)
    if _libc.umount2(os.fsencode(mountpoint), flags) == 0:
        return
    code = ctypes.get_errno()
    if code == errno.EPERM and shutil.which(FUSERMOUNT) is not None:
        done = _fusermount(["-u", *(["-z"] if detach else []), "--", mountpoint])
        if done.returncode == 0:
            return
        code = errno.EBUSY if "busy" in done.stderr else errno.EPERM
    if code == errno.EBUSY:
        raise ConflictError(f"{mountpoint} is busy: {describe_users(mountpoint)}", users=users_of(mountpoint))
    if code == errno.EINVAL:
        raise NotFoundError(f"nothing is mounted at {mountpoint}")
    if code == errno.EPERM:
        raise DeniedError(f"this user may not unmount {mountpoint}")
    raise ConfigError(f"cannot unmount {mountpoint}: {os.strerror(code)}")


def flush(mountpoint: str) -> None:
    """Has every volume's dirty data written and on the servers' disks; raises DeviceError if it cannot be.

    fsync(2) works on a descriptor opened for reading too, and reaches the disks of both copies.
    """
    root = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in os.listdir(root):
            try:
                _sync_file(root, name)
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.ENODEV, errno.EACCES, errno.EPERM):
                    continue  # Unmapped meanwhile, or not ours to open: the kernel writes it when it unmounts.
                raise DeviceError(
                    f"data of {mountpoint}/{name} cannot be written ({error.strerror}); it stays mounted. "
                    "Repeat when the cluster is healthy"
                ) from error
    finally:
        os.close(root)


def _sync_file(root: int, name: str) -> None:
    descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=root)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def describe_users(mountpoint: str) -> str:
    users = users_of(mountpoint)
    named = ", ".join(users[:BUSY_NAMED_MAX]) or "something that /proc does not show to this user"
    more = len(users) - BUSY_NAMED_MAX
    return f"{named} and {more} more" if more > 0 else named


def users_of(mountpoint: str) -> list[str]:
    """Who keeps a mount busy: processes with files, directories or maps there, loop devices, swap, mounts below.

    Compares paths as text: following them would wait for a daemon that may be gone.
    """
    users = [f"{_command(pid)} (pid {pid}, {how})" for pid in _pids() if (how := _how_used(pid, mountpoint))]
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            if _inside(backing.read_text().strip(), mountpoint):
                users.append(f"loop device /dev/{backing.parts[3]} on {backing.read_text().strip()}")
    with contextlib.suppress(OSError):
        swaps = [_unescape(line.split()[0]) for line in Path("/proc/swaps").read_text().splitlines()[1:]]
        users += [f"swap on {path}" for path in swaps if _inside(path, mountpoint)]
    below = [entry.mountpoint for entry in mount_table() if entry.mountpoint.startswith(mountpoint + "/")]
    users += [f"mount at {path}" for path in below]
    return users


def _pids() -> list[int]:
    return sorted(int(name) for name in os.listdir("/proc") if name.isdigit())


def _inside(path: str, mountpoint: str) -> bool:
    return path == mountpoint or path.startswith(mountpoint.rstrip("/") + "/")


def _how_used(pid: int, mountpoint: str) -> str:
    base = f"/proc/{pid}"
    for link, how in (("cwd", "works there"), ("root", "is rooted there"), ("exe", "runs from there")):
        with contextlib.suppress(OSError):
            if _inside(os.readlink(f"{base}/{link}"), mountpoint):
                return how
    with contextlib.suppress(OSError):
        for descriptor in os.listdir(f"{base}/fd"):
            with contextlib.suppress(OSError):
                path = os.readlink(f"{base}/fd/{descriptor}")
                if _inside(path, mountpoint):
                    return f"has {os.path.basename(path)} open"
    with contextlib.suppress(OSError), open(f"{base}/maps", errors="replace") as maps:
        for line in maps:
            if _inside(line.split(maxsplit=5)[-1].strip(), mountpoint):
                return "maps a file"
    return ""


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return "a process"
