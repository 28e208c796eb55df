"""Notifications to the kernel: what it must forget or learn about a file it has cached.

Writing one can wait for locks of the VFS that a request in flight holds (a lookup in the directory, the write-back of a
page), and that request may need the engine or the trio thread to be answered. So they are written by worker threads, to
a descriptor of their own, never by the engine and never by the trio thread.

The layouts are the kernel's (include/uapi/linux/fuse.h), native byte order.
"""

from __future__ import annotations

import errno
import os
import struct

from pfvol.sdc.mount import mounted_at

_INVAL_INODE = 2
_STORE = 4
_DELETE = 6
_OUT_HEADER = struct.Struct("=IiQ")  # length, code, unique (0: nobody asked)
_INVAL_INODE_OUT = struct.Struct("=Qqq")  # inode, offset, length
_DELETE_OUT = struct.Struct("=QQII")  # parent, child, name length, padding
_STORE_OUT = struct.Struct("=QQII")  # inode, offset, size, padding
_ATTRIBUTES_ONLY = -1


def _message(code: int, body: bytes) -> bytes:
    return _OUT_HEADER.pack(_OUT_HEADER.size + len(body), code, 0) + body


def forget_attributes(inode: int) -> bytes:
    """The next stat asks again; cached data stays."""
    return _message(_INVAL_INODE, _INVAL_INODE_OUT.pack(inode, _ATTRIBUTES_ONLY, 0))


def forget_data(inode: int, offset: int, length: int) -> bytes:
    """What is cached of this range is read anew; what was written there and not sent yet is sent first."""
    return _message(_INVAL_INODE, _INVAL_INODE_OUT.pack(inode, offset, length))


def deleted(parent: int, child: int, name: bytes) -> bytes:
    """The name is gone from the directory, whoever has the file open; inotify watchers are told."""
    return _message(_DELETE, _DELETE_OUT.pack(parent, child, len(name), 0) + name + b"\0")


def grown(inode: int, size_bytes: int) -> bytes:
    """The file ends at ``size_bytes`` now: stores its last byte, which makes a kernel that keeps sizes itself grow it.

    One byte at the end of a page leaves the page to be read from us. Only for files that nobody writes.
    """
    return _message(_STORE, _STORE_OUT.pack(inode, size_bytes - 1, 1, 0) + b"\0")


class KernelNotifier:
    """Writes notifications to one /dev/fuse. ``send`` blocks: call it in worker threads."""

    def __init__(self, fuse_fd: int, mountpoint: str) -> None:
        self._fd = os.dup(fuse_fd)
        self.mountpoint = mountpoint
        entry = mounted_at(mountpoint)
        major, _, minor = (entry.device if entry else "0:0").partition(":")
        self.device = os.makedev(int(major), int(minor))
        """st_dev of every file of the mount."""

    def send(self, message: bytes) -> bool:
        """False if the kernel does not know the file (nothing to forget) or has unmounted."""
        try:
            os.write(self._fd, message)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENODEV, errno.ENOTCONN, errno.EBADF, errno.EBUSY):
                return False
            raise
        return True

    def close(self) -> None:
        """Only when no ``send`` can be running any more."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def correct_size(notifier: KernelNotifier, name: str, inode: int, size_bytes: int) -> bool:
    """Has the kernel believe in the true size of a file. Blocks: for worker threads.

    With write-back caching the kernel keeps a file's size itself: it does not see that we extended the volume, and it
    grows the file when somebody writes past the end, before we can refuse. Truncating the file to its true size (which
    our SETATTR accepts) puts both right, and waits for pages that are being written. The path is used only to get hold
    of the file, and only if what is there is ours: something else may be mounted over it.
    """
    try:
        descriptor = os.open(os.path.join(notifier.mountpoint, name), os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        seen = os.fstat(descriptor)
        if (seen.st_dev, seen.st_ino) != (notifier.device, inode):
            return False
        if seen.st_size == size_bytes:
            return True
        try:
            os.truncate(f"/proc/self/fd/{descriptor}", size_bytes)
        except OSError as error:
            # A read-only mount or file cannot be truncated, but nor can anybody write to it while it grows.
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM) or size_bytes < seen.st_size:
                raise
            return notifier.send(grown(inode, size_bytes))
        return True
    finally:
        os.close(descriptor)
