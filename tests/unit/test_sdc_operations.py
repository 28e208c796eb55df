"""A bug in a handler costs one request, never the mount."""

from __future__ import annotations

import errno
from typing import Any

import pyfuse3
import pytest

from pfvol.constants import INODE_ROOT, INODE_VOLUME_BASE
from pfvol.sdc.operations import VolumeFiles, guarded
from pfvol.sdc.volumes import VolumeTable


class Broken:
    """Figures that cannot be had, through a bug."""

    async def freshen(self) -> None:
        raise KeyError("a bug")


async def test_a_bug_becomes_eio() -> None:
    files = VolumeFiles(VolumeTable(), Broken(), (0, 0))
    context: Any = None
    with pytest.raises(pyfuse3.FUSEError) as raised:
        await files.getattr(INODE_VOLUME_BASE + 1, context)
    assert raised.value.errno == errno.EIO
    assert (await files.getattr(INODE_ROOT, context)).st_ino == INODE_ROOT


async def test_an_expected_error_stays_what_it_is() -> None:
    files = VolumeFiles(VolumeTable(), Broken(), (0, 0))
    context: Any = None
    for code, call in (
        (errno.ENOENT, files.lookup(INODE_ROOT, b"missing", context)),
        (errno.ENODEV, files.open(INODE_VOLUME_BASE + 1, 0, context)),
        (errno.EPERM, files.mkdir(INODE_ROOT, b"new", 0o755, context)),
        (errno.ENODEV, files.read(INODE_VOLUME_BASE + 1, 0, 1)),
    ):
        with pytest.raises(pyfuse3.FUSEError) as raised:
            await call
        assert raised.value.errno == code


def test_every_handler_can_only_raise_fuse_errors() -> None:
    """A handler that is not guarded must be one that does nothing but refuse."""
    names = [name for name, value in vars(VolumeFiles).items() if getattr(value, "__code__", None)]
    unguarded = {name for name in names if not hasattr(vars(VolumeFiles)[name], "__wrapped__")}
    refusing = {"create", "mknod", "mkdir", "symlink", "link", "unlink", "rmdir", "rename", "readlink"}
    refusing |= {"setxattr", "getxattr", "listxattr", "removexattr", "read", "write", "fsync", "flush", "forget"}
    assert {name for name in unguarded if not name.startswith("_")} == refusing
    assert guarded.__doc__
