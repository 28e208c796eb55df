"""Speaks to a live SDS engine as an SDC and as another SDS that are authenticated and mean harm.

Owns one engine on a small device. Each round connects a client, a primary and a secondary that send frames whose
headers are sealed and mostly legal, with any volume, place, epoch, status and body, in the wrong order and in pieces;
meanwhile the map changes, and the other SDS is left out and taken back. Two claims are tried: the engine goes on
serving, and a volume that none of them may touch stays as it was written.
"""

from __future__ import annotations

import argparse
import random
import select
import socket
import struct
import sys
import tempfile
import time
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

from datapath import checksum, wire
from datapath.blockfile import BlockDevice
from datapath.target import Target
from tools.fuzz.fuzz_frame import BLOCK, CHUNK, DATA_OPCODES, blocks_touched, flipped, odd_header

SLOTS = 24
OPEN, CLOSED, UNKNOWN = 1, 2, 99
CHUNKS = 9
US, OWNER, HOSTILE_SDC, HOSTILE_SDS, ABSENT_SDS = 1, 7, 8, 2, 3
ANSWER_SECONDS = 20.0
FRAMES_PER_STREAM_MAX = 20
NEVER_NS = 2**62
RESYNC_RATE = 10**9
DISTURBED = 0.005  # of turns
OBLIGING = 0.1  # of rounds, which last a little longer: copying to a learner takes some steps
OBLIGING_SECONDS = 0.3
LIES = 0.01
ANSWER_REPEATS = ("volume_id", "chunk_index", "offset", "length", "request_id", "op_id", "epoch", "seq")
FIRST_ROLES = [(US, 0, 0, 0), (US, HOSTILE_SDS, 0, 0), (HOSTILE_SDS, US, 0, 0)]
ALL_ROLES = [  # primary, secondary, learner, who has left
    (primary, secondary, learner, left)
    for primary, secondary, learner, left in product((US, HOSTILE_SDS, ABSENT_SDS), *[range(4)] * 3)
    if primary not in (secondary, learner) and (learner == 0 or learner != secondary)
    if left == 0 or left not in (primary, secondary)
]
OF_CLIENTS = [wire.OP_CAPABILITY, wire.OP_READ, wire.OP_WRITE, wire.OP_DISCARD, wire.OP_FLUSH, wire.OP_SEEK]
OF_PRIMARIES = [
    *(wire.OP_REPLICATE, wire.OP_REPLICATE_DISCARD, wire.OP_DIRTY, wire.OP_TAGS, wire.OP_PULL, wire.OP_PUSH),
    *(wire.OP_PING, wire.OP_VERIFY, wire.OP_REPAIR),
]
OF_SECONDARIES = [opcode | wire.OP_REPLY for opcode in OF_PRIMARIES]
KINDS = {"client": OF_CLIENTS, "primary": OF_PRIMARIES, "secondary": OF_SECONDARIES}


def body_of(rng: random.Random, opcode: int, fields: dict[str, int]) -> bytes:
    """What has to follow a legal header; its check values are right more often than not."""
    offset, length = fields["offset"], fields["length"]
    if opcode in DATA_OPCODES or opcode == wire.OP_PULL | wire.OP_REPLY:
        data = rng.randbytes(length)
        checks = checksum.range_checks(fields["volume_id"], fields["chunk_index"], offset, data)
        if rng.random() < 0.3:
            checks = [rng.getrandbits(32) for _ in checks]
        tags = DATA_OPCODES.get(opcode, 20) == 20
        return (
            struct.pack(f"<{len(checks)}I", *checks)
            + (rng.randbytes(16 * blocks_touched(offset, length)) if tags else b"")
            + data
        )
    if opcode == wire.OP_CAPABILITY:
        return rng.randbytes(rng.choice((0, 64, 64, 65)))
    if opcode == wire.OP_TAGS | wire.OP_REPLY:
        return bytes(16384) if rng.random() < 0.5 else rng.randbytes(16384)
    if opcode == wire.OP_DIRTY | wire.OP_REPLY:
        return b"".join(struct.pack("<QII", OPEN, rng.randrange(CHUNKS + 1), 0) for _ in range(rng.randrange(5)))
    return b""


def hostile_frame(rng: random.Random, opcodes: list[int], map_epoch: int) -> bytes:
    opcode = rng.choice(opcodes)
    kind = opcode & ~wire.OP_REPLY
    fields = {"volume_id": rng.choice((OPEN, OPEN, OPEN, CLOSED, UNKNOWN)), "chunk_index": rng.randrange(CHUNKS + 2)}
    fields["offset"] = rng.randrange(CHUNK // BLOCK) * BLOCK
    fields["length"] = 0
    if kind in (*DATA_OPCODES, wire.OP_READ, wire.OP_DISCARD, wire.OP_REPLICATE_DISCARD, wire.OP_PULL):
        fields["length"] = min(rng.choice((1, 1, 2, 64)) * BLOCK, CHUNK - fields["offset"])
        if kind == wire.OP_WRITE and rng.random() < 0.5:
            fields["length"] = rng.randint(1, fields["length"])
    body = body_of(rng, opcode, fields)
    if opcode & wire.OP_REPLY and rng.random() < 0.2:
        fields["status"], body = rng.choice((wire.ST_NOT_READY, wire.ST_IO_ERROR, wire.ST_NO_SPACE)), b""
    header = wire.pack_header(
        opcode,
        **fields,
        flags=rng.choice((0, 0, wire.FLAG_RESYNC, wire.FLAG_COMMIT, wire.FLAG_REPLY_MORE, wire.FLAG_ABSENT)),
        request_id=rng.choice((rng.randrange(4) | rng.randrange(64) << 32, rng.getrandbits(64))),
        body_length=len(body),
        epoch=rng.choice((map_epoch, map_epoch, map_epoch, map_epoch - 1, map_epoch + 1, 0)),
        node_id=rng.choice((HOSTILE_SDC, HOSTILE_SDS, OWNER)),
        seq=rng.getrandbits(62),
        op_id=rng.getrandbits(64),
        incarnation=rng.choice((0, 1, 2**63)),
    )
    return header + body


def as_a_good_one(kind: str, version: int) -> bytes:
    """What each has to say first, without which the engine takes little from it: a capability, leases, agreement."""
    now = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    if kind == "client":
        return wire.pack_header(wire.OP_CAPABILITY, volume_id=OPEN, body_length=64) + bytes(64)
    if kind == "primary":
        lease, agreed = {"op_id": now, "seq": version}, {"flags": wire.FLAG_RESYNC}
        return wire.pack_header(wire.OP_PING, **lease) + wire.pack_header(wire.OP_PING, **agreed)
    reply = wire.OP_REPLY
    return wire.pack_header(wire.OP_PING | reply, op_id=now) + wire.pack_header(wire.OP_DIRTY | reply)


def hostile_stream(rng: random.Random, opcodes: list[int], map_epoch: int) -> bytes:
    frames = [hostile_frame(rng, opcodes, map_epoch) for _ in range(rng.randint(1, FRAMES_PER_STREAM_MAX))]
    if rng.random() < 0.3:
        frames.append(rng.choice((odd_header(rng), flipped(rng, frames[0][: wire.HEADER_SIZE]), rng.randbytes(100))))
    stream = b"".join(frames)
    return stream[: rng.randrange(len(stream))] if rng.random() < 0.2 else stream


def answers(rng: random.Random, inbox: bytearray) -> bytes:
    """What an SDS would say to what it was asked, with a lie now and then. Takes whole frames out of ``inbox``."""
    said = b""
    while len(inbox) >= wire.HEADER_SIZE:
        fields: dict[str, Any] = {**wire.unpack_header(bytes(inbox[: wire.HEADER_SIZE]))}
        size = wire.HEADER_SIZE + fields["body_length"]
        if len(inbox) < size:
            break
        del inbox[:size]
        if fields["opcode"] & wire.OP_REPLY:
            continue
        opcode = fields["opcode"] | wire.OP_REPLY
        body, flags, status = b"", 0, wire.ST_OK
        if rng.random() < LIES:
            status = rng.choice((wire.ST_NOT_READY, wire.ST_IO_ERROR, wire.ST_NO_SPACE, wire.ST_NOT_MEMBER))
        elif opcode == wire.OP_TAGS | wire.OP_REPLY and rng.random() < 0.5:
            flags = wire.FLAG_ABSENT
        elif opcode != wire.OP_DIRTY | wire.OP_REPLY or rng.random() < LIES:
            body = body_of(rng, opcode, fields)
        same = {name: fields[name] for name in ANSWER_REPEATS}
        said += wire.pack_header(opcode, **same, flags=flags, status=status, body_length=len(body)) + body
    return said


class World:
    """The engine, with a trustworthy client whose volume is not to change."""

    def __init__(self, directory: Path, rng: random.Random) -> None:
        path = directory / "device"
        BlockDevice.create(path, cluster_id=bytes(range(16)), sds_id=1, size_bytes=SLOTS * CHUNK)
        device = BlockDevice.open(path)
        device.recover()
        self.target = Target(US, device.incarnation, device.durable_incarnation)
        self.target.add_device(device)
        self.target.start()
        self.target.set_resync_rate(0, RESYNC_RATE)
        self.version = 0
        self.maps = {CLOSED: struct.pack("<IHHHH", 1, US, 0, 0, 0) * CHUNKS}
        self._new_map([FIRST_ROLES[chunk % len(FIRST_ROLES)] for chunk in range(CHUNKS)])
        self.granted = CLOSED
        self.owner = self.connect("client", OWNER)
        self.owner.setblocking(True)
        self.owner.settimeout(ANSWER_SECONDS)
        self.owner.sendall(wire.pack_header(wire.OP_CAPABILITY, volume_id=CLOSED, body_length=64) + bytes(64))
        self._until_readable()
        self._answer()
        self.granted = OPEN
        self.written = [rng.randbytes(BLOCK) for _ in range(CHUNKS)]
        for chunk, data in enumerate(self.written):
            self._write(chunk, data)

    def _new_map(self, roles: list[tuple[int, ...]]) -> None:
        """Every change has a new version, which is the epoch of what it changes."""
        self.version += 1
        self.maps[OPEN] = b"".join(struct.pack("<IHHHH", self.version, *one) for one in roles)
        for volume, entries in self.maps.items():
            self.target.set_volume(volume, CHUNKS * CHUNK, commit=False, thick=False)
            self.target.set_segment(volume, 0, entries, self.version)
        self.target.set_map_version(self.version)

    def _write(self, chunk: int, data: bytes) -> None:
        """An engine that was just started serves nothing alone for as long as a lease of before may last."""
        body = struct.pack("<I", *checksum.range_checks(CLOSED, chunk, 0, data)) + data
        deadline = time.monotonic() + ANSWER_SECONDS
        while (status := self.ask(wire.OP_WRITE, chunk, body)[0]) == wire.ST_NOT_READY and time.monotonic() < deadline:
            time.sleep(0.02)
        assert status == wire.ST_OK, f"the first write ended with status {status}"

    def disturb(self, rng: random.Random, what: int) -> None:
        """What the SDS's trio side and the MDM may do at any time."""
        if what == 0:
            self._new_map(rng.choices(ALL_ROLES, k=CHUNKS))
        elif what == 1:
            self._new_map(rng.choices(FIRST_ROLES, k=CHUNKS))
        elif what == 2:
            self.target.leave(HOSTILE_SDS)
        else:
            self.target.verify(0, OPEN, rng.randrange(CHUNKS))

    def connect(self, kind: str, node: int) -> socket.socket:
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setblocking(False)
        if kind == "client":
            self.target.add_client(theirs.detach(), node, 1)
        else:
            self.target.add_peer(theirs.detach(), node, 1, outgoing=kind == "secondary")
        return ours

    def turn(self) -> None:
        """Answers as the SDS's trio side would."""
        for event in self.target.events():
            self._event(event)

    def _event(self, event: tuple[Any, ...]) -> None:
        if event[0] == "capability":
            _, connection, request, volume, _ = event
            if volume == self.granted:
                self.target.grant(connection, request, volume, write=True, expires_boot_ns=NEVER_NS)
            else:
                self.target.refuse(connection, request, volume, wire.ST_NOT_AUTHORIZED)
        elif event[0] == "map_miss":
            if event[1] in self.maps:
                self.target.set_segment(event[1], event[2], self.maps[event[1]] if event[2] == 0 else bytes(12))
            else:
                self.target.drop_volume(event[1])
        elif event[0] == "leaving":
            self._new_map([(US, 0, HOSTILE_SDS, HOSTILE_SDS)] * CHUNKS)
            self.target.stay(HOSTILE_SDS)
        assert event[0] != "device_failed", f"the device went out of service: {event}"

    def ask(self, opcode: int, chunk: int, body: bytes = b"") -> tuple[int, bytes]:
        header = wire.pack_header(
            opcode, volume_id=CLOSED, chunk_index=chunk, length=BLOCK, body_length=len(body), epoch=1, node_id=OWNER
        )
        self.owner.sendall(header + body)
        self._until_readable()
        return self._answer()

    def _until_readable(self) -> None:
        deadline = time.monotonic() + ANSWER_SECONDS
        while not select.select([self.owner], [], [], 0.01)[0]:
            self.turn()
            assert time.monotonic() < deadline, f"no answer within {ANSWER_SECONDS:g} s"

    def _answer(self) -> tuple[int, bytes]:
        fields = wire.unpack_header(self._exactly(wire.HEADER_SIZE))
        return fields["status"], self._exactly(fields["body_length"])

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self.owner.recv(size - len(data))
            assert part, "the trustworthy client's connection was closed"
            data += part
        return data

    def check(self, chunk: int) -> None:
        status, body = self.ask(wire.OP_READ, chunk)
        assert status == wire.ST_OK, f"a read of what nobody may touch ended with status {status}"
        assert body[4:] == self.written[chunk], "bytes changed that nobody may touch"


def round_of(world: World, rng: random.Random) -> int:
    """All three kinds at once; how many bytes were taken."""
    kinds = rng.sample(sorted(KINDS), rng.randint(1, 3))
    ends = {kind: world.connect(kind, HOSTILE_SDC if kind == "client" else HOSTILE_SDS) for kind in kinds}
    left = {
        kind: (as_a_good_one(kind, world.version) if rng.random() < 0.9 else b"")
        + hostile_stream(rng, KINDS[kind], world.version)
        for kind in kinds
    }
    obliging = rng.random() < OBLIGING
    if obliging and "secondary" in left:
        world.disturb(rng, 0)
        left["secondary"] = as_a_good_one("secondary", world.version)
    inbox = bytearray()
    taken = 0
    begun = time.monotonic()
    while left or (obliging and time.monotonic() < begun + OBLIGING_SECONDS):
        assert time.monotonic() < begun + ANSWER_SECONDS, f"the engine takes nothing any more from {sorted(left)}"
        kind = rng.choice(sorted(left or ends))
        left.setdefault(kind, b"")
        piece = rng.choice((1, 79, 81, 5000, 300_000))
        try:
            sent = ends[kind].send(left[kind][:piece])
        except BlockingIOError:
            sent = 0
        except OSError:
            sent = len(left[kind])
        taken += sent
        left[kind] = left[kind][sent:]
        if not left[kind]:
            del left[kind]
        for kind, end in ends.items():
            with suppress(OSError):
                got = end.recv(1 << 20)
                if kind == "secondary" and obliging:
                    inbox += got
        if said := answers(rng, inbox):
            left["secondary"] = left.get("secondary", b"") + said
        world.turn()
        if not left:
            select.select(list(ends.values()), [], [], 0.002)
        if rng.random() < DISTURBED:
            world.disturb(rng, rng.randrange(4))
    world.check(rng.randrange(CHUNKS))
    for end in ends.values():
        end.close()
    return taken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    rounds = taken = 0
    with tempfile.TemporaryDirectory(prefix="pfvol-fuzz-") as directory:
        world = World(Path(directory), rng)
        # From here on: opening and first writes are no part of what is fuzzed.
        deadline = time.monotonic() + arguments.seconds
        while time.monotonic() < deadline:
            taken += round_of(world, rng)
            rounds += 1
        for chunk in range(CHUNKS):
            world.check(chunk)
        closed = world.target.stats()["bad_frames"]
        world.owner.close()
        world.target.stop()
    print(f"seed {arguments.seed}: {rounds} rounds, {taken} bytes taken ({closed} connections closed for damage)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
