"""The initiator alone: its load generator against SDSs that store nothing, over loopback TCP. No FUSE, no disk.

What it shows bounds what any mount can do through this engine; a figure that falls here shows a slow initiator, frame
or checksum, whatever the disks do.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import time

from datapath.benchpeers import serve_null_sds
from datapath.initiator import BenchResult, Initiator
from tools.bench.layers import Row, main, row

MIB = 1024**2
VOLUME = 1
VOLUME_BYTES = 1 << 30
SDS_COUNT = 2
ROWS = (
    ("4 KiB reads, one at a time", "read", 4096, 1),
    ("4 KiB reads, 32 at a time", "read", 4096, 32),
    ("4 KiB writes, one at a time", "write", 4096, 1),
    ("4 KiB writes, 32 at a time", "write", 4096, 32),
    ("1 MiB reads, 4 at a time", "seqread", MIB, 4),
    ("1 MiB writes, 4 at a time", "seqwrite", MIB, 4),
)


def start_sds() -> tuple[int, int]:
    """A process with an SDS that stores nothing: its pid, and our connection to it."""
    listener = socket.create_server(("127.0.0.1", 0))
    pid = os.fork()
    if pid == 0:
        connection, _ = listener.accept()
        listener.close()
        serve_null_sds(connection.detach())
        os._exit(0)
    client = socket.create_connection(listener.getsockname())
    listener.close()
    return pid, client.detach()


def completed(engine: Initiator, seconds: float) -> BenchResult:
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        select.select([engine.event_fd], [], [], 0.1)
        for event in engine.events():
            if event[0] == "completed":
                return BenchResult(event[3])
    raise TimeoutError("the load generator did not end")


def measure(seconds: float) -> list[Row]:
    engine = Initiator(1, 1)
    engine.add_volume(VOLUME, 256 + VOLUME, VOLUME_BYTES, read_only=False, capability=b"none")
    entries = b"".join(struct.pack("<IHHHH", 1, 1 + n % 2, 2 - n % 2, 0, 0) for n in range(1024))
    engine.set_segment(VOLUME, 0, entries)
    children = []
    for sds_id in range(1, SDS_COUNT + 1):
        pid, fd = start_sds()
        children.append(pid)
        engine.add_sds(sds_id, fd, 1)
    engine.start()
    rows = [measure_row(engine, *kind, seconds) for kind in ROWS]
    engine.stop()
    for pid in children:
        os.waitpid(pid, 0)
    return rows


def measure_row(engine: Initiator, name: str, kind: str, block_bytes: int, depth: int, seconds: float) -> Row:
    cpu_started = time.process_time()
    engine.bench(VOLUME, kind, block_bytes, depth, seconds, VOLUME_BYTES)
    result = completed(engine, seconds + 10)
    if result.errors:
        raise RuntimeError(f"{name}: {result.errors} of {result.ops} failed")
    amount = result.ops if block_bytes < MIB else result.ops * block_bytes / 1e6
    unit = "IOPS" if block_bytes < MIB else "MB/s"
    return row(name, amount / result.seconds, unit, (time.process_time() - cpu_started) / amount)


if __name__ == "__main__":
    main("initiator", measure)
