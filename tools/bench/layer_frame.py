"""Frames alone: sealing and checking headers, and framed connections over a socket pair."""

from __future__ import annotations

import os
import socket

from datapath import wire
from datapath.connection import TestConnection
from tools.bench.layers import Row, main, rate

HEADERS = 20_000
FRAMES = 64


def measure(seconds: float) -> list[Row]:
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.setblocking(False)
    sender, receiver = TestConnection(ours.detach()), TestConnection(theirs.detach())
    small = wire.pack_header(wire.OP_READ, length=4096)
    payload = os.urandom(65536)
    large = wire.pack_header(wire.OP_WRITE, length=65536, body_length=16 * 4 + 65536) + bytes(64) + payload

    def frames(frame: bytes) -> float:
        for _ in range(FRAMES):
            sender.send(frame)
        while len(receiver.frames) < FRAMES:
            if sender.flush() < 0 or receiver.receive() < 0:
                raise RuntimeError(f"the connection was closed: {sender.error} {receiver.error}")
        receiver.frames.clear()
        return FRAMES

    return [
        rate("headers sealed and checked", "headers/s", seconds, lambda: wire.bench_headers(HEADERS)),
        rate("request frames through a socket", "frames/s", seconds, lambda: frames(small)),
        rate("64 KiB write frames through a socket", "MB/s", seconds, lambda: frames(large) * 0.065536),
    ]


if __name__ == "__main__":
    main("frame", measure)
