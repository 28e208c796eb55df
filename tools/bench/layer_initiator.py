"""The initiator alone: its load generator against SDSs that store nothing, over loopback TCP. No FUSE, no disk.

``python tools/bench/layer_initiator.py [--seconds S] [--json]``. What it prints bounds what any mount can do
through this engine; a figure that falls here shows a slow initiator, frame or checksum, whatever the disks do.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import socket
import struct
import time
from typing import Any

from datapath.benchpeers import serve_null_sds
from datapath.histogram import quantile_ns
from datapath.initiator import BenchResult, Initiator

VOLUME = 1
VOLUME_BYTES = 1 << 30
SDS_COUNT = 2
ROWS = [
    ("read", 4096, 1),
    ("read", 4096, 32),
    ("write", 4096, 1),
    ("write", 4096, 32),
    ("seqread", 1 << 20, 4),
    ("seqwrite", 1 << 20, 4),
]


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


def run(seconds: float) -> list[dict[str, Any]]:
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
    rows = []
    for kind, block_size, depth in ROWS:
        before = os.times()
        engine.bench(VOLUME, kind, block_size, depth, seconds, VOLUME_BYTES)
        result = completed(engine, seconds + 10)
        after = os.times()
        cpu = after.user + after.system - before.user - before.system
        rows.append(
            {
                "kind": kind,
                "block_bytes": block_size,
                "depth": depth,
                "iops": round(result.ops / result.seconds),
                "bandwidth_mbps": round(result.ops * block_size / result.seconds / 1e6),
                "p50_us": quantile_ns(result.histogram, 0.5) / 1000,
                "p99_us": quantile_ns(result.histogram, 0.99) / 1000,
                "cpu_us_per_io": round(cpu / max(result.ops, 1) * 1e6, 2),
                "errors": result.errors,
            }
        )
    engine.stop()
    for pid in children:
        os.waitpid(pid, 0)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=2.0, help="per row")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = run(options.seconds)
    if options.json:
        print(json.dumps({"layer": "initiator", "rows": rows}))
        return
    print(f"{'':10}{'block':>9}{'depth':>6}{'IOPS':>10}{'MB/s':>8}{'p50 us':>9}{'p99 us':>9}{'CPU us/IO':>11}")
    for row in rows:
        print(
            f"{row['kind']:10}{row['block_bytes']:9}{row['depth']:6}{row['iops']:10}{row['bandwidth_mbps']:8}"
            f"{row['p50_us']:9.1f}{row['p99_us']:9.1f}{row['cpu_us_per_io']:11.2f}"
        )


if __name__ == "__main__":
    main()
