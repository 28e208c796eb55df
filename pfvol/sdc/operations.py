"""Names and attributes of a mount: one directory, one regular file per mapped volume.

Owns what the kernel asks apart from IO; the engine answers IO itself and relays the rest to here. Assumes the kernel
checks permissions (``default_permissions`` is always mounted). Promises that no handler raises anything but FUSEError,
because anything else would end the mount: a bug is logged and becomes EIO.

A volume's file behaves as a device node would: its size is the volume's and cannot be set; ``O_TRUNC`` is ignored;
mode, owner and times can be changed and last as long as the mount. Nothing can be created, removed or renamed here.
"""

from __future__ import annotations

import errno
import functools
import os
import stat
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NoReturn, Protocol, TypeVar

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, ReaddirToken, RequestContext, SetattrFields, StatvfsData

from pfvol.constants import BLOCK_SIZE_BYTES, INODE_ROOT, NAME_LENGTH_MAX
from pfvol.log import get_logger
from pfvol.sdc.volumes import Volume, VolumeTable

ATTRIBUTES_VALID_SECONDS = 1.0  # as often as the cluster's figures of what is allocated change
NAMES_VALID_SECONDS = 60.0  # the kernel is told at once when a name goes away
STAT_BLOCK_BYTES = 512
ROOT_PERMISSIONS = 0o755
FILE_PERMISSIONS = 0o644
READ_ONLY_PERMISSIONS = 0o444

# The kernel makes of open(O_TRUNC) an OPEN and then, from the same thread, a SETATTR of size 0 without a handle.
TRUNCATE_AFTER_OPEN_SECONDS = 1.0
OPENS_REMEMBERED_MAX = 1024

_log = get_logger(__name__)
_Handler = TypeVar("_Handler", bound=Callable[..., Awaitable[Any]])


class Freshener(Protocol):
    """Who keeps the table's figures current."""

    async def freshen(self) -> None:
        """Returns soon, with figures no older than about a second if the cluster can be asked."""


def guarded(handler: _Handler) -> _Handler:
    """A handler whose bugs are logged and answered with EIO."""

    @functools.wraps(handler)
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return await handler(*args, **kwargs)
        except FUSEError:
            raise
        except Exception:
            _log.exception("a file operation failed unexpectedly", operation=handler.__name__)
            raise FUSEError(errno.EIO) from None

    return wrapper  # type: ignore[return-value]


def _refuse(code: int) -> NoReturn:
    raise FUSEError(code)


class VolumeFiles(pyfuse3.Operations):  # type: ignore[misc, unused-ignore]
    """The handlers. ``owner`` is (uid, gid) of whoever mounts."""

    supports_dot_lookup = True
    enable_writeback_cache = True

    def __init__(self, table: VolumeTable, freshener: Freshener, owner: tuple[int, int]) -> None:
        super().__init__()
        self._table = table
        self._freshener = freshener
        self._owner = owner
        self._opens: OrderedDict[int, tuple[int, float]] = OrderedDict()

    # --- what there is -----------------------------------------------------------------------------------------

    def _volume(self, inode: int) -> Volume:
        volume = self._table.by_inode(inode)
        if volume is None:
            _refuse(errno.ENODEV)
        return volume

    def _root(self) -> EntryAttributes:
        entry = EntryAttributes()
        entry.st_ino = INODE_ROOT
        entry.st_mode = stat.S_IFDIR | ROOT_PERMISSIONS
        entry.st_nlink = 2
        entry.st_uid, entry.st_gid = self._owner
        entry.st_blksize = BLOCK_SIZE_BYTES
        changed_at_ns = self._table.changed_at_ns
        entry.st_atime_ns = entry.st_ctime_ns = entry.st_mtime_ns = changed_at_ns
        entry.attr_timeout = ATTRIBUTES_VALID_SECONDS
        entry.entry_timeout = NAMES_VALID_SECONDS
        return entry

    def _file(self, volume: Volume) -> EntryAttributes:
        file = self._table.file(volume)
        entry = EntryAttributes()
        entry.st_ino = volume.inode
        entry.generation = file.generation
        default = READ_ONLY_PERMISSIONS if volume.read_only else FILE_PERMISSIONS
        entry.st_mode = stat.S_IFREG | (default if file.mode is None else file.mode)
        entry.st_nlink = 1
        entry.st_uid = self._owner[0] if file.uid is None else file.uid
        entry.st_gid = self._owner[1] if file.gid is None else file.gid
        entry.st_size = volume.size_bytes
        entry.st_blksize = BLOCK_SIZE_BYTES
        entry.st_blocks = volume.used_blocks_bytes // STAT_BLOCK_BYTES
        entry.st_atime_ns = file.atime_ns
        entry.st_mtime_ns = volume.created_at_ns if file.mtime_ns is None else file.mtime_ns
        entry.st_ctime_ns = entry.st_mtime_ns
        entry.attr_timeout = ATTRIBUTES_VALID_SECONDS
        entry.entry_timeout = NAMES_VALID_SECONDS
        return entry

    @guarded
    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        if name in (b".", b".."):
            is_file = name == b"." and parent_inode != INODE_ROOT
            return self._file(self._volume(parent_inode)) if is_file else self._root()
        volume = self._table.by_name(name) if parent_inode == INODE_ROOT else None
        if volume is None:
            _refuse(errno.ENOENT)  # Not cached: a volume may be mapped at any time.
        return self._file(volume)

    @guarded
    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        if inode == INODE_ROOT:
            return self._root()
        await self._freshener.freshen()
        return self._file(self._volume(inode))  # Looked up after the await: it may be unmapped by now.

    @guarded
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        await self._freshener.freshen()
        pools = {volume.pool for volume in self._table}  # volumes of one pool say the same of it
        reply = StatvfsData()
        reply.f_bsize = reply.f_frsize = BLOCK_SIZE_BYTES
        reply.f_blocks = sum(pool.total_bytes for pool in pools) // BLOCK_SIZE_BYTES
        reply.f_bfree = reply.f_bavail = sum(pool.free_bytes for pool in pools) // BLOCK_SIZE_BYTES
        reply.f_files = len(self._table)
        reply.f_ffree = reply.f_favail = 0
        reply.f_namemax = NAME_LENGTH_MAX
        return reply

    @guarded
    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        if inode != INODE_ROOT:
            _refuse(errno.ENOTDIR)
        return INODE_ROOT

    @guarded
    async def readdir(self, fh: int, start_id: int, token: ReaddirToken) -> None:
        for volume in sorted(self._table, key=lambda volume: volume.inode):
            if volume.inode > start_id and not pyfuse3.readdir_reply(
                token, volume.name.encode(), self._file(volume), volume.inode
            ):
                return

    @guarded
    async def access(self, inode: int, mode: int, ctx: RequestContext) -> bool:
        if inode != INODE_ROOT and mode & os.W_OK and self._volume(inode).read_only:
            _refuse(errno.EROFS)
        return True

    # --- opening and changing attributes -----------------------------------------------------------------------

    @guarded
    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        volume = self._volume(inode)
        writes = flags & os.O_ACCMODE != os.O_RDONLY
        if writes and volume.read_only:
            _refuse(errno.EROFS)
        if writes:
            self._remember_open(ctx.pid, inode)
        return FileInfo(fh=inode, keep_cache=True)

    def _remember_open(self, pid: int, inode: int) -> None:
        self._opens.pop(pid, None)
        self._opens[pid] = (inode, trio.current_time())
        if len(self._opens) > OPENS_REMEMBERED_MAX:
            self._opens.popitem(last=False)

    def _is_truncating_open(self, pid: int, inode: int) -> bool:
        opened, opened_at = self._opens.pop(pid, (0, 0.0))
        return opened == inode and trio.current_time() - opened_at <= TRUNCATE_AFTER_OPEN_SECONDS

    @guarded
    async def setattr(
        self, inode: int, attr: EntryAttributes, fields: SetattrFields, fh: int | None, ctx: RequestContext
    ) -> EntryAttributes:
        if inode == INODE_ROOT:
            if fields.update_mode or fields.update_uid or fields.update_gid:
                _refuse(errno.EPERM)
            return self._root()
        volume = self._volume(inode)
        if fields.update_size and attr.st_size != volume.size_bytes:
            # A device ignores O_TRUNC: the answer has the true size, and the kernel goes by the answer.
            truncating_open = fh is None and attr.st_size == 0 and self._is_truncating_open(ctx.pid, inode)
            if not truncating_open:
                _refuse(errno.EPERM)
        file = self._table.file(volume)
        if fields.update_mode:
            file.mode = stat.S_IMODE(attr.st_mode)
        if fields.update_uid:
            file.uid = attr.st_uid
        if fields.update_gid:
            file.gid = attr.st_gid
        if fields.update_atime:
            file.atime_ns = attr.st_atime_ns
        if fields.update_mtime:
            file.mtime_ns = attr.st_mtime_ns
        return self._file(volume)

    @guarded
    async def release(self, fh: int) -> None:
        """Nothing is kept per handle."""

    @guarded
    async def releasedir(self, fh: int) -> None:
        """Nothing is kept per handle."""

    @guarded
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """The directory is the MDM's, which has made it durable."""

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """Inodes are volumes: nothing is kept for the kernel's sake."""

    # --- what the engine answers: here only if it let one pass ----------------------------------------------------

    async def read(self, fh: int, off: int, size: int) -> bytes:
        self._misrouted("read", fh)

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        self._misrouted("write", fh)

    async def fsync(self, fh: int, datasync: bool) -> None:
        self._misrouted("fsync", fh)

    async def flush(self, fh: int) -> None:
        self._misrouted("flush", fh)

    def _misrouted(self, operation: str, inode: int) -> NoReturn:
        """IO of a volume the engine does not know: it was unmapped a moment ago, or else it is a bug."""
        if self._table.by_inode(inode) is None:
            _refuse(errno.ENODEV)
        _log.error("the engine passed on IO that it should have answered", operation=operation, inode=inode)
        _refuse(errno.EIO)

    # --- what cannot be done in a directory of volumes ------------------------------------------------------------

    async def create(self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext) -> NoReturn:  # type: ignore[override, unused-ignore]
        _refuse(errno.EPERM)

    async def mknod(self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: RequestContext) -> NoReturn:
        _refuse(errno.EPERM)

    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: RequestContext) -> NoReturn:
        _refuse(errno.EPERM)

    async def symlink(self, parent_inode: int, name: bytes, target: bytes, ctx: RequestContext) -> NoReturn:
        _refuse(errno.EPERM)

    async def link(self, inode: int, new_parent_inode: int, new_name: bytes, ctx: RequestContext) -> NoReturn:
        _refuse(errno.EPERM)

    async def unlink(self, parent_inode: int, name: bytes, ctx: RequestContext) -> NoReturn:
        _refuse(errno.EPERM)

    async def rmdir(self, parent_inode: int, name: bytes, ctx: RequestContext) -> NoReturn:
        _refuse(errno.EPERM)

    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: RequestContext,
    ) -> NoReturn:
        _refuse(errno.EPERM)

    async def readlink(self, inode: int, ctx: RequestContext) -> NoReturn:
        _refuse(errno.EINVAL)

    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> NoReturn:
        _refuse(errno.ENOTSUP)

    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> NoReturn:
        _refuse(errno.ENOTSUP)

    async def listxattr(self, inode: int, ctx: RequestContext) -> NoReturn:
        _refuse(errno.ENOTSUP)

    async def removexattr(self, inode: int, name: bytes, ctx: RequestContext) -> NoReturn:
        _refuse(errno.ENOTSUP)
