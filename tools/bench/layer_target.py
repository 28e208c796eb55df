"""The SDS engine over a socket: a primary, its secondary, and a client that only sends and counts frames.

No SDC, no FUSE, no trio: what is measured is the target, its store and the replication between two of them.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datapath import checksum, wire
from datapath.blockfile import BlockDevice
from datapath.connection import TestConnection
from datapath.target import Target
from tools.bench.layers import Row, main, rate

MIB = 1024**2
BLOCK = 4096
VOLUME, CHUNKS, SDC, EPOCH = 1, 32, 7, 1
DEPTH = 32
GATHERED_BYTES_MAX = 65536
SETTLE_SECONDS = 10.0
NEVER_NS = 2**62


class Pair:
    """Two targets that replicate to each other, the volume's chunks all with SDS 1 as their primary."""

    def __init__(self, directory: Path) -> None:
        self.cluster_id = os.urandom(16)
        self.targets = {number: self._target(directory / f"sds{number}", number) for number in (1, 2)}
        self._connect(1, 2)
        self._connect(2, 1)
        ours, theirs = tcp_pair()
        self.client_fd = ours.detach()
        self.client = TestConnection(self.client_fd)
        self.targets[1].add_client(theirs.detach(), SDC, 1)

    def _target(self, path: Path, number: int) -> Target:
        BlockDevice.create(path, cluster_id=self.cluster_id, sds_id=number, size_bytes=2 * CHUNKS * 4 * MIB)
        device = BlockDevice.open(path, cluster_id=self.cluster_id)
        device.recover()
        target = Target(number, device.incarnation, device.durable_incarnation)
        target.add_device(device)
        target.start()
        target.set_volume(VOLUME, CHUNKS * 4 * MIB, commit=False, thick=False)
        entry = struct.pack("<IHHHH", EPOCH, 1, 2, 0, 0)
        target.set_segment(VOLUME, 0, entry * CHUNKS + bytes(12) * (1024 - CHUNKS))
        target.set_map_version(1)
        return target

    def _connect(self, source: int, target: int) -> None:
        ours, theirs = tcp_pair()
        self.targets[source].add_peer(ours.detach(), target, 1, outgoing=True)
        self.targets[target].add_peer(theirs.detach(), source, 1, outgoing=False)

    def authorize(self) -> None:
        """Presents a capability, grants it in the MDM's place, and waits until the pair serves."""
        body = bytes(64)
        self.client.send(wire.pack_header(wire.OP_CAPABILITY, volume_id=VOLUME, body_length=len(body)) + body)
        deadline = time.monotonic() + SETTLE_SECONDS
        while not self.client.frames:
            self.turn(deadline)
        self.client.frames.clear()
        while True:
            frame = request(wire.OP_READ, 0, 0, BLOCK, 1)
            self.client.send(frame)
            while not self.client.frames:
                self.turn(deadline)
            status = struct.unpack_from("<H", self.client.frames.pop()[0], 6)[0]
            if status == wire.ST_OK:
                return
            if status != wire.ST_NOT_READY:
                raise RuntimeError(f"the target answers a read with status {status}")

    def turn(self, deadline: float) -> None:
        """One look at everything that may have happened."""
        if time.monotonic() > deadline:
            raise TimeoutError("the targets do not serve")
        for target in self.targets.values():
            for event in target.events():
                self._answer(target, event)
        if self.client.flush() < 0 or self.client.receive() < 0:
            raise RuntimeError(f"the target closed the connection: {self.client.error}")
        time.sleep(0.001)

    def _answer(self, target: Target, event: tuple[Any, ...]) -> None:
        if event[0] == "capability":
            _, connection, request_id, volume, _ = event
            target.grant(connection, request_id, volume, write=True, expires_boot_ns=NEVER_NS)
        elif event[0] in {"client_closed", "peer_closed", "device_failed"}:
            raise RuntimeError(f"the target says {event}")

    def exchange(self, frames: list[bytes]) -> None:
        """Sends all frames and waits for as many answers."""
        for frame in frames:
            # A large frame does not fit where small ones are gathered.
            if self.client.send(frame, len(frame) > GATHERED_BYTES_MAX) < 0:
                raise RuntimeError(f"a frame of {len(frame)} bytes cannot be sent")
        poller = select.poll()
        poller.register(self.client_fd, select.POLLIN)
        blocked = self.client.flush()
        deadline = time.monotonic() + SETTLE_SECONDS
        while len(self.client.frames) < len(frames):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(self.client.frames)} of {len(frames)} answers within {SETTLE_SECONDS:g} s")
            if blocked == 0:
                poller.poll(1000)
            if self.client.receive() < 0:
                raise RuntimeError(f"the target closed the connection: {self.client.error}")
            blocked = self.client.flush()
        for header, _ in self.client.frames:
            if status := struct.unpack_from("<H", header, 6)[0]:
                raise RuntimeError(f"the target answers with status {status}")
        self.client.frames.clear()

    def stop(self) -> None:
        for target in self.targets.values():
            target.stop(checkpoint=False)


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Two connected TCP sockets of this host, as the product uses them."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
    for end in (ours, theirs):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        end.setblocking(False)
    return ours, theirs


def request(opcode: int, chunk: int, offset: int, length: int, number: int, data: bytes = b"") -> bytes:
    checks = b""
    if data:
        values = checksum.range_checks(VOLUME, chunk, offset, data)
        checks = struct.pack(f"<{len(values)}I", *values)
    body = checks + data
    header = wire.pack_header(
        opcode,
        request_id=number,
        volume_id=VOLUME,
        chunk_index=chunk,
        offset=offset,
        length=length,
        body_length=len(body),
        epoch=EPOCH,
        node_id=SDC,
        op_id=number,
        incarnation=1,
    )
    return header + body


def requests(opcode: int, length: int, depth: int, *, with_data: bool) -> list[list[bytes]]:
    """Batches of ``depth`` requests, over the first MiB of every chunk; no two of a batch touch each other."""
    data = os.urandom(length) if with_data else b""
    places = [(chunk, offset) for offset in range(0, MIB, length) for chunk in range(CHUNKS)]
    frames = [request(opcode, chunk, offset, length, number + 1, data) for number, (chunk, offset) in enumerate(places)]
    return [frames[start : start + depth] for start in range(0, len(frames) - depth + 1, depth)]


def measure(seconds: float) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="pfvol-bench-") as scratch:
        pair = Pair(Path(scratch))
        try:
            pair.authorize()
            return measure_pair(pair, seconds)
        finally:
            pair.stop()


def measure_pair(pair: Pair, seconds: float) -> list[Row]:
    def batch(batches: list[list[bytes]], amount: float) -> Callable[[], float]:
        position = 0

        def run() -> float:
            nonlocal position
            frames = batches[position % len(batches)]
            position += 1
            pair.exchange(frames)
            return len(frames) * amount

        return run

    rows = []
    for name, opcode, length, depth, unit in (
        ("4 KiB writes, 32 at a time", wire.OP_WRITE, BLOCK, DEPTH, "IOPS"),
        ("4 KiB writes, one at a time", wire.OP_WRITE, BLOCK, 1, "IOPS"),
        ("4 KiB reads, 32 at a time", wire.OP_READ, BLOCK, DEPTH, "IOPS"),
        ("4 KiB reads, one at a time", wire.OP_READ, BLOCK, 1, "IOPS"),
        ("1 MiB writes, 4 at a time", wire.OP_WRITE, MIB, 4, "MB/s"),
        ("1 MiB reads, 4 at a time", wire.OP_READ, MIB, 4, "MB/s"),
    ):
        batches = requests(opcode, length, depth, with_data=opcode == wire.OP_WRITE)
        amount = 1.0 if unit == "IOPS" else length / 1e6
        rows.append(rate(name, unit, seconds, batch(batches, amount)))
    return rows


if __name__ == "__main__":
    main("target", measure)
