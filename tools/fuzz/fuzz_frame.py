"""Fuzzes what reads frames: the header's checks, and the framing of a connection.

Two claims are tried. A header that passes the checks keeps every bound that the engines rely on, recomputed here from
the protocol's description. And a stream of frames, cut into pieces of any size, arrives as exactly the frames that were
sent, up to the first damaged header, which closes the connection.
"""

from __future__ import annotations

import argparse
import random
import socket
import struct
import sys
import time

from datapath import wire
from datapath.connection import TestConnection

CHUNK = 4 * 1024 * 1024
BLOCK = 4096
FRAMES_PER_STREAM_MAX = 12
INTERESTING = (0, 1, 7, 4095, 4096, 4097, 65535, 65536, CHUNK - 1, CHUNK, CHUNK + 1, 2**31, 2**32 - 1, 2**32 - BLOCK)
OPCODES = [value for name, value in sorted(wire.WIRE.items()) if name.startswith("OP_")]
DATA_OPCODES = {wire.OP_WRITE: 4, wire.OP_REPLICATE: 4, wire.OP_PUSH: 20}


def number(rng: random.Random, bits: int) -> int:
    """Mostly near a boundary, sometimes anything."""
    if rng.random() < 0.7:
        return rng.choice(INTERESTING) % 2**bits
    return rng.getrandbits(rng.randint(1, bits))


def blocks_touched(offset: int, length: int) -> int:
    return (offset + length + BLOCK - 1) // BLOCK - offset // BLOCK if length else 0


def good_frame(rng: random.Random) -> tuple[bytes, bytes]:
    """A header and a body that any receiver must take."""
    opcode = rng.choice(
        [wire.OP_READ, wire.OP_WRITE, wire.OP_REPLICATE, wire.OP_PUSH, wire.OP_FLUSH, wire.OP_CAPABILITY]
    )
    offset = length = body = 0
    if opcode == wire.OP_CAPABILITY:
        body = rng.choice((0, 1, 100, wire.CONTROL_BODY_MAX))
    elif opcode != wire.OP_FLUSH:
        blocks = rng.choice((1, 2, 3, 64, 256))
        offset = rng.randrange(0, CHUNK // BLOCK - blocks + 1) * BLOCK
        length = blocks * BLOCK
        body = DATA_OPCODES[opcode] * blocks + length if opcode in DATA_OPCODES else 0
    header = wire.pack_header(
        opcode,
        request_id=rng.getrandbits(64),
        volume_id=rng.getrandbits(64),
        chunk_index=rng.getrandbits(32),
        offset=offset,
        length=length,
        body_length=body,
        epoch=rng.getrandbits(32),
        node_id=rng.getrandbits(32),
        seq=rng.getrandbits(62),
        op_id=rng.getrandbits(64),
    )
    return header, rng.randbytes(body)


def odd_header(rng: random.Random) -> bytes:
    """A sealed header with any values in its fields: only the field checks stand between it and the engine."""
    return wire.pack_header(
        rng.choice((rng.choice(OPCODES), rng.choice(OPCODES) | wire.OP_REPLY, rng.getrandbits(8))),
        status=rng.choice((0, 0, rng.getrandbits(16))),
        flags=rng.choice((0, 1 << rng.randrange(32), rng.getrandbits(5))),
        request_id=rng.getrandbits(64),
        volume_id=number(rng, 64),
        chunk_index=number(rng, 32),
        offset=number(rng, 32),
        length=number(rng, 32),
        body_length=number(rng, 32),
        epoch=number(rng, 32),
        seq=number(rng, 64),
    )


def flipped(rng: random.Random, header: bytes) -> bytes:
    """With one to four bits turned over: the checksum has to see it."""
    value = int.from_bytes(header, "little")
    for bit in rng.sample(range(len(header) * 8), rng.randint(1, 4)):
        value ^= 1 << bit
    return value.to_bytes(len(header), "little")


def check_bounds(header: bytes) -> bool:
    """Whether the header passes; if it does, asserts what the engines rely on."""
    try:
        fields = wire.unpack_header(header)
    except wire.BadFrameError:
        return False
    opcode, offset, length, body = (fields[key] for key in ("opcode", "offset", "length", "body_length"))  # type: ignore[literal-required]
    assert opcode in OPCODES or opcode ^ wire.OP_REPLY in OPCODES, f"opcode {opcode}"
    assert body <= wire.BODY_SIZE_MAX, f"body of {body}"
    assert opcode & ~wire.OP_REPLY == wire.OP_DIRTY or offset + length <= CHUNK, f"range {offset}+{length}"
    if opcode in DATA_OPCODES:
        most = wire.IO_SIZE_MAX + (0 if opcode == wire.OP_WRITE else BLOCK)
        assert 0 < length <= most, f"length {length}"
        assert body == DATA_OPCODES[opcode] * blocks_touched(offset, length) + length, f"{body} for {offset}+{length}"
    if opcode & wire.OP_REPLY and fields["status"] != wire.ST_OK:
        assert body == 0, "a body beside a failure"
    return True


def run_stream(rng: random.Random) -> tuple[int, bool]:
    """Frames through a socket, maybe with a damaged one at the end: how many arrived, and whether it was closed."""
    sent = [good_frame(rng) for _ in range(rng.randint(1, FRAMES_PER_STREAM_MAX))]
    damaged = None
    stream = b"".join(header + body for header, body in sent)
    if rng.random() < 0.5:
        damaged = rng.choice((rng.randbytes(80), flipped(rng, sent[-1][0]), odd_header(rng)))
        if check_bounds(damaged):
            damaged = None
        else:
            stream += damaged + rng.randbytes(rng.choice((0, 1, 5000)))
    ours, theirs = socket.socketpair()
    with ours:
        ours.setblocking(False)
        theirs.setblocking(False)
        connection = TestConnection(theirs.detach(), rng.random() < 0.5)
        result = feed(rng, connection, ours, stream)
    expected = [(header, body) for header, body in sent]
    assert connection.frames == expected, (
        f"{len(connection.frames)} of {len(expected)} frames arrived as they were sent"
    )
    assert (result < 0) == (damaged is not None), f"result {result}, error {connection.error}, damaged {damaged!r}"
    return len(expected), result < 0


def feed(rng: random.Random, connection: TestConnection, sender: socket.socket, stream: bytes) -> int:
    """Sends ``stream`` in pieces and lets the connection read after each; returns the first negative answer, or 0."""
    position = 0
    while position < len(stream):
        piece = rng.choice((1, 79, 80, 81, 4096, 100_000, 2_000_000, rng.randint(1, 5000)))
        try:
            position += sender.send(stream[position : position + piece])
        except BlockingIOError:
            pass
        except (BrokenPipeError, ConnectionResetError):
            return -1
        # It says 1 when more may be waiting than it wanted to read at once.
        while (result := connection.receive()) > 0:
            pass
        if result < 0:
            return result
        connection.release()
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    arguments = parser.parse_args()
    assert struct.calcsize("<IBBHIIQQIIIIIIQQQ") == wire.HEADER_SIZE
    rng = random.Random(arguments.seed)
    deadline = time.monotonic() + arguments.seconds
    headers = passed = streams = closed = 0
    while time.monotonic() < deadline:
        for _ in range(200):
            header = rng.choice((odd_header, lambda r: flipped(r, good_frame(r)[0]), lambda r: r.randbytes(80)))(rng)
            passed += check_bounds(header)
            headers += 1
        for _ in range(5):
            closed += run_stream(rng)[1]
            streams += 1
    print(f"seed {arguments.seed}: {headers} headers ({passed} legal), {streams} streams ({closed} closed for damage)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
