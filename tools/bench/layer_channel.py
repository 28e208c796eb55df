"""The FUSE channel alone: a mount whose one file is zeros, served without an initiator, a network or a disk.

What it shows is what FUSE and the channel leave to everything behind them. As root, with fio.
"""

from __future__ import annotations

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
from pathlib import Path
from typing import Any

from tools.bench.layers import Row, main, row

MIB = 1024**2
FILE_INODE = 257
FILE_BYTES = 1 << 30
FILE_NAME = b"zeros"
ROWS = (
    ("4 KiB reads, one at a time", "randread", 4096, 1),
    ("4 KiB reads, 32 at a time", "randread", 4096, 32),
    ("4 KiB writes, one at a time", "randwrite", 4096, 1),
    ("4 KiB writes, 32 at a time", "randwrite", 4096, 32),
    ("1 MiB reads, 4 at a time", "read", MIB, 4),
    ("1 MiB writes, 4 at a time", "write", MIB, 4),
)
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


def cpu_seconds(pid: int) -> float:
    """Processor time of all threads of another process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure_row(file: str, server: int, name: str, kind: str, block_bytes: int, depth: int, seconds: float) -> Row:
    command = ["fio", "--name=layer", f"--filename={file}", "--ioengine=libaio", "--direct=1", f"--rw={kind}"]
    command += [f"--bs={block_bytes}", f"--iodepth={depth}", f"--runtime={seconds:g}", "--time_based"]
    cpu_started = cpu_seconds(server)
    output = subprocess.run([*command, "--output-format=json"], check=True, capture_output=True, text=True).stdout
    job = json.loads(output[output.index("{") :])["jobs"][0]
    side = job["read" if "read" in kind else "write"]
    amount = side["total_ios"] if block_bytes < MIB else side["io_bytes"] / 1e6
    value, unit = (side["iops"], "IOPS") if block_bytes < MIB else (side["bw_bytes"] / 1e6, "MB/s")
    return row(name, value, unit, (cpu_seconds(server) - cpu_started) / amount)


def measure(seconds: float) -> list[Row]:
    if shutil.which("fio") is None:
        raise SystemExit("fio is not installed")
    path = tempfile.mkdtemp(prefix="pfvol-bench-")
    server = subprocess.Popen(
        [sys.executable, "-c", "import sys; from tools.bench.layer_channel import serve; serve(sys.argv[1])", path],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        if server.stdout.readline() != "ready\n":
            raise SystemExit("the mount did not come up")
        file = os.path.join(path, FILE_NAME.decode())
        return [measure_row(file, server.pid, *kind, seconds) for kind in ROWS]
    finally:
        ctypes.CDLL(None).umount2(path.encode(), MNT_DETACH)
        server.wait(10)
        os.rmdir(path)


if __name__ == "__main__":
    main("channel", measure)
