"""A process with a real mount for the FUSE tests: pyfuse3 behind the channel, the initiator, and SDSs that are fakes.

Run as ``python sdcengine_mount.py MOUNTPOINT [SIZE] [direct]``. It says ``ready`` on stdout, then obeys one JSON list
per line of stdin and answers each with one JSON line. Ends with the mount, or with stdin.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import socket
import stat
import sys
import threading
from typing import Any

import pyfuse3
import trio
from sdcengine_fakes import INODE, MIB, VOLUME, Rig, only

from datapath import wire

NAME = b"vol"


def mount(path: str) -> int:
    """Mounts a FUSE file system as root and returns its /dev/fuse descriptor."""
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    libc = ctypes.CDLL(None, use_errno=True)
    options = f"fd={fd},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
    if libc.mount(b"pfvol-test", path.encode(), b"fuse.pfvol-test", 0, options):
        raise OSError(ctypes.get_errno(), "mount")
    return fd


class Names(pyfuse3.Operations):
    """One directory with one file: what pyfuse3 is kept for."""

    def __init__(self, rig: Rig) -> None:
        super().__init__()
        self.rig = rig
        self.open_flags: list[int] = []

    async def getattr(self, inode: int, ctx: Any = None) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_mode = stat.S_IFDIR | 0o755 if inode == pyfuse3.ROOT_INODE else stat.S_IFREG | 0o644
        entry.st_nlink = 1
        entry.st_size = 0 if inode == pyfuse3.ROOT_INODE else self.rig.size
        entry.attr_timeout = entry.entry_timeout = 60
        return entry

    async def lookup(self, parent_inode: int, name: bytes, ctx: Any = None) -> pyfuse3.EntryAttributes:
        if name != NAME:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return await self.getattr(INODE)

    async def setattr(self, inode: int, attr: Any, fields: Any, fh: Any, ctx: Any) -> pyfuse3.EntryAttributes:
        if fields.update_size and attr.st_size not in (0, self.rig.size):
            raise pyfuse3.FUSEError(errno.EPERM)
        return await self.getattr(inode)

    async def open(self, inode: int, flags: int, ctx: Any) -> pyfuse3.FileInfo:
        self.open_flags.append(flags)
        if self.rig.refuse_opens:
            raise pyfuse3.FUSEError(errno.EACCES)
        return pyfuse3.FileInfo(fh=inode)

    async def statfs(self, ctx: Any) -> pyfuse3.StatvfsData:
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = 4096  # a loop device discards only where this is answered
        data.f_blocks = data.f_bfree = data.f_bavail = self.rig.size // 4096
        data.f_namemax = 255
        return data

    async def opendir(self, inode: int, ctx: Any) -> int:
        return inode

    async def readdir(self, fh: int, start_id: int, token: Any) -> None:
        if start_id == 0:
            pyfuse3.readdir_reply(token, NAME, await self.getattr(INODE), 1)


def obey(rig: Rig, command: list[Any]) -> Any:
    name, *arguments = command
    if name == "stats":
        return rig.engine.stats()
    if name == "events":
        return [event for event in rig.events if event[0] != "completed"]
    if name == "status":
        opcode, status, times = arguments
        for sds in rig.sds.values():
            sds.rule = only(getattr(wire, opcode), status, times)
    elif name == "count":
        return sum(sds.count(getattr(wire, arguments[0])) for sds in rig.sds.values())
    elif name == "refuse_opens":
        rig.refuse_opens = True
    elif name == "remove":
        rig.engine.remove_volume(VOLUME)
    elif name == "reset":
        for sds in rig.sds.values():
            sds.reset()
    elif name == "limit":
        rig.engine.set_volume(VOLUME, rig.size, read_only=False, iops_limit=arguments[0])
    else:
        raise AssertionError(name)
    return None


def main() -> None:
    path = sys.argv[1]
    size = int(sys.argv[2]) if len(sys.argv) > 2 else 64 * MIB
    fuse_fd = mount(path)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    rig = Rig(size=size)
    rig.engine.start(fuse_fd, ours.detach(), force_direct="direct" in sys.argv[3:])
    done = threading.Event()

    def look_after() -> None:
        while not done.is_set():
            rig.pump(0.1)
            if rig.seen("unmounted"):
                trio.from_thread.run_sync(pyfuse3.terminate, trio_token=token)
                return

    def listen() -> None:
        for line in sys.stdin:
            print(json.dumps(obey(rig, json.loads(line))), flush=True)

    async def run() -> None:
        nonlocal token
        token = trio.lowlevel.current_trio_token()
        threading.Thread(target=look_after, daemon=True).start()
        threading.Thread(target=listen, daemon=True).start()
        print("ready", flush=True)
        await pyfuse3.main()

    token: Any = None
    pyfuse3.init(Names(rig), f"/dev/fd/{theirs.fileno()}", {"fsname=pfvol-test"})
    theirs.detach()  # pyfuse3's from here on
    trio.run(run)
    done.set()
    rig.close()
    pyfuse3.close(unmount=False)


if __name__ == "__main__":
    main()
