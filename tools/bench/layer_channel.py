"""The FUSE channel alone: a mount whose one file is zeros, served without an initiator, a network or a disk.

``python tools/bench/layer_channel.py [--seconds S] [--json]``, as root, with fio. What
it prints is what FUSE and the channel leave to everything behind them.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from typing import Any

FILE_INODE = 257
FILE_BYTES = 1 << 30
FILE_NAME = b"zeros"
ROWS = [
    ("randread", "4k", 1),
    ("randread", "4k", 32),
    ("randwrite", "4k", 1),
    ("randwrite", "4k", 32),
    ("read", "1m", 4),
    ("write", "1m", 4),
]
MNT_DETACH = 2


def serve(path: str) -> None:
    """Mounts at ``path`` and serves until it is unmounted: pyfuse3 for the names, the null file for the bytes."""
    import pyfuse3
    import trio

    from datapath.benchpeers import serve_null_file

    class Names(pyfuse3.Operations):  # type: ignore[misc]
        async def getattr(self, inode: int, ctx: Any = None) -> Any:
            entry = pyfuse3.EntryAttributes()
            entry.st_ino = inode
            directory = inode == pyfuse3.ROOT_INODE
            entry.st_mode = stat.S_IFDIR | 0o755 if directory else stat.S_IFREG | 0o644
            entry.st_size = 0 if directory else FILE_BYTES
            entry.attr_timeout = entry.entry_timeout = 60
            return entry

        async def lookup(self, parent_inode: int, name: bytes, ctx: Any = None) -> Any:
            if name != FILE_NAME:
                raise pyfuse3.FUSEError(errno.ENOENT)
            return await self.getattr(FILE_INODE)

        async def open(self, inode: int, flags: int, ctx: Any) -> Any:
            return pyfuse3.FileInfo(fh=inode)

    fuse_fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    libc = ctypes.CDLL(None, use_errno=True)
    options = f"fd={fuse_fd},rootmode=40000,user_id=0,group_id=0".encode()
    if libc.mount(b"pfvol-bench", path.encode(), b"fuse.pfvol-bench", 0, options):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    async def names() -> None:
        token = trio.lowlevel.current_trio_token()

        def bytes_until_unmounted() -> None:
            serve_null_file(fuse_fd, ours.fileno(), FILE_INODE)
            token.run_sync_soon(pyfuse3.terminate)

        threading.Thread(target=bytes_until_unmounted).start()
        print("ready", flush=True)
        await pyfuse3.main()

    pyfuse3.init(Names(), f"/dev/fd/{theirs.fileno()}", {"fsname=pfvol-bench"})
    trio.run(names)
    pyfuse3.close(unmount=False)


def fio(path: str, kind: str, block: str, depth: int, seconds: float) -> dict[str, Any]:
    command = [
        "fio",
        "--name=layer",
        f"--filename={path}",
        "--ioengine=libaio",
        "--direct=1",
        f"--rw={kind}",
        f"--bs={block}",
        f"--iodepth={depth}",
        f"--runtime={seconds}",
        "--time_based",
        "--output-format=json",
    ]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    job = json.loads(output[output.index("{") :])["jobs"][0]
    side = job["read" if "read" in kind else "write"]
    return {
        "kind": kind,
        "block": block,
        "depth": depth,
        "iops": round(side["iops"]),
        "bandwidth_mbps": round(side["bw_bytes"] / 1e6),
        "p50_us": side["clat_ns"]["percentile"]["50.000000"] / 1000,
    }


def run(seconds: float) -> list[dict[str, Any]]:
    path = tempfile.mkdtemp(prefix="pfvol-bench-")
    child = subprocess.Popen([sys.executable, __file__, "--serve", path], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        if child.stdout.readline() != "ready\n":
            raise SystemExit("the mount did not come up")
        return [fio(os.path.join(path, FILE_NAME.decode()), *row, seconds) for row in ROWS]
    finally:
        ctypes.CDLL(None).umount2(path.encode(), MNT_DETACH)
        child.wait(10)
        os.rmdir(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=2.0, help="per row")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", metavar="PATH", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
        return
    if shutil.which("fio") is None:
        raise SystemExit("fio is not installed")
    rows = run(options.seconds)
    if options.json:
        print(json.dumps({"layer": "channel", "rows": rows}))
        return
    print(f"{'':10}{'block':>6}{'depth':>6}{'IOPS':>10}{'MB/s':>8}{'p50 us':>9}")
    for row in rows:
        print(
            f"{row['kind']:10}{row['block']:>6}{row['depth']:6}{row['iops']:10}{row['bandwidth_mbps']:8}"
            f"{row['p50_us']:9.1f}"
        )


if __name__ == "__main__":
    main()
