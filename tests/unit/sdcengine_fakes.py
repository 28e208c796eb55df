"""An SDS in Python, true to the frames, and a harness around the initiator: for tests of the SDC engine alone.

The fake keeps whole chunks in a dict that the SDSs of one test share, as if replication were instant. What it answers
can be bent per request by a rule, so that a test says exactly which answer is wrong, late or missing.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from datapath import wire
from datapath.checksum import range_checks, range_mismatch
from datapath.initiator import Initiator

MIB = 1 << 20
CHUNK = 4 * MIB
BLOCK = 4096
VOLUME = 7
INODE = 256 + VOLUME
ALIVE_SECONDS = 10.0

Rule = Callable[[dict[str, Any], bytes], Any]


class Silent:
    """A rule's answer: none at all."""


class Close:
    """A rule's answer: the connection ends."""


class FakeSds:
    """One SDS: a connection at a time, served by a thread."""

    def __init__(self, sds_id: int, chunks: dict[tuple[int, int], bytearray], durable_incarnation: int = 1) -> None:
        self.id = sds_id
        self.chunks = chunks
        self.durable = durable_incarnation
        self.rule: Rule | None = None
        self.seen: list[dict[str, Any]] = []
        self.connections = 0
        self._socket: socket.socket | None = None
        self._threads: list[threading.Thread] = []

    def connect(self) -> int:
        """A fresh connection: the engine's end, as a file descriptor it may own."""
        ours, theirs = socket.socketpair()
        self._socket = ours
        self.connections += 1
        thread = threading.Thread(target=self._serve, args=(ours,), daemon=True)
        thread.start()
        self._threads.append(thread)
        return theirs.detach()

    def reset(self) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.reset()
        for thread in self._threads:
            thread.join(ALIVE_SECONDS)

    def count(self, opcode: int) -> int:
        return sum(header["opcode"] == opcode for header in self.seen)

    def _serve(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError, EOFError):
            while True:
                header = dict(wire.unpack_header(_exactly(sock, wire.HEADER_SIZE)))
                body = _exactly(sock, header["body_length"])
                self.seen.append(header)
                answer = self.rule(header, body) if self.rule else None
                if answer is Close:
                    return
                if answer is Silent:
                    continue
                if answer is None:
                    answer = self.answer(header, body)
                elif isinstance(answer, int):
                    answer = self.reply(header, status=answer)
                sock.sendall(answer)

    def reply(self, header: dict[str, Any], body: bytes = b"", **changes: Any) -> bytes:
        fields = {
            "request_id": header["request_id"],
            "volume_id": header["volume_id"],
            "chunk_index": header["chunk_index"],
            "offset": header["offset"],
            "length": header["length"],
            "incarnation": self.durable,
            "op_id": header["op_id"],
            "body_length": len(body),
        } | changes
        opcode = fields.pop("opcode", header["opcode"] | wire.OP_REPLY)
        return wire.pack_header(opcode, **fields) + body

    def answer(self, header: dict[str, Any], body: bytes) -> bytes:
        """What a healthy SDS says."""
        opcode, offset, length = header["opcode"], header["offset"], header["length"]
        key = (header["volume_id"], header["chunk_index"])
        if opcode == wire.OP_READ:
            if key not in self.chunks:
                return self.reply(header, flags=wire.FLAG_ZEROS | wire.FLAG_ABSENT)
            payload = bytes(self.chunks[key][offset : offset + length])
            return self.reply(header, checks(header, payload) + payload)
        if opcode == wire.OP_WRITE:
            count = (len(body) - length) // 4
            values, payload = struct.unpack(f"<{count}I", body[: 4 * count]), body[4 * count :]
            if range_mismatch(key[0], key[1], offset, payload, values) >= 0:
                return self.reply(header, status=wire.ST_PAYLOAD)
            self.chunks.setdefault(key, bytearray(CHUNK))[offset : offset + length] = payload
        elif opcode == wire.OP_DISCARD and key in self.chunks:
            self.chunks[key][offset : offset + length] = bytes(length)
        elif opcode == wire.OP_SEEK:
            if key not in self.chunks:
                return self.reply(header, flags=wire.FLAG_ABSENT)
            return self.reply(header, bitmap(self.chunks[key]))
        return self.reply(header)


def checks(header: dict[str, Any], payload: bytes) -> bytes:
    values = range_checks(header["volume_id"], header["chunk_index"], header["offset"], payload)
    return struct.pack(f"<{len(values)}I", *values)


def bitmap(chunk: bytearray) -> bytes:
    bits = bytearray(128)
    for block in range(1024):
        if any(chunk[block * BLOCK : (block + 1) * BLOCK]):
            bits[block >> 3] |= 1 << (block & 7)
    return bytes(bits)


def _exactly(sock: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = sock.recv(size - len(data))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)


def segment(*entries: tuple[int, int, int]) -> bytes:
    """A map segment of (epoch, primary, secondary) for the first chunks; the last entry repeats to the end."""
    full = list(entries) + [entries[-1]] * (1024 - len(entries))
    return b"".join(struct.pack("<IHHHH", epoch, primary, secondary, 0, 0) for epoch, primary, secondary in full)


class Rig:
    """An initiator with its SDSs. It answers events as the trio side would, unless a test takes that over."""

    def __init__(
        self,
        *,
        sds: int = 2,
        size: int = 64 * MIB,
        deadline: float = 30.0,
        read_only: bool = False,
        iops_limit: int = 0,
        bandwidth_limit: int = 0,
    ) -> None:
        self.chunks: dict[tuple[int, int], bytearray] = {}
        self.sds = {n: FakeSds(n, self.chunks) for n in range(1, sds + 1)}
        self.map = segment((1, 1, 2 if sds > 1 else 0))
        self.size = size
        self.read_only = read_only
        self.events: list[tuple[Any, ...]] = []
        self.done: dict[int, tuple[int, bytes]] = {}
        self.reconnect = True
        self.refuse_opens = False
        self.answer_map = True
        self.answer_capability = True
        self.capability = b"capability"
        self._token = 0
        self.engine = Initiator(3, 9, io_deadline_seconds=deadline)
        self.engine.add_volume(
            VOLUME,
            INODE,
            size,
            read_only=read_only,
            capability=self.capability,
            iops_limit=iops_limit,
            bandwidth_limit_bytes=bandwidth_limit,
        )

    def connect(self, sds_id: int) -> None:
        self.engine.add_sds(sds_id, self.sds[sds_id].connect(), self.sds[sds_id].durable)

    def pump(self, seconds: float = 0.02) -> None:
        """Waits for events and answers them."""
        select.select([self.engine.event_fd], [], [], seconds)
        for event in self.engine.events():
            self.events.append(event)
            name = event[0]
            if name == "completed":
                self.done[event[1]] = (event[2], event[3])
            elif name in ("sds_needed", "sds_closed") and self.reconnect and event[1] in self.sds:
                self.connect(event[1])
            elif name in ("map_miss", "stale_map") and self.answer_map:
                self.engine.set_segment(event[1], event[2], self.map)
            elif name == "capability_refused" and self.answer_capability:
                self.engine.set_capability(event[1], self.capability)

    def until(self, condition: Callable[[], Any], seconds: float = ALIVE_SECONDS) -> None:
        limit = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < limit, f"not in time; events: {self.events[-10:]}, {self.engine.stats()}"
            self.pump()

    def start(self, kind: str, offset: int = 0, length: int = 0, data: bytes = b"") -> int:
        self._token += 1
        self.engine.submit(self._token, kind, VOLUME, offset, length, data)
        return self._token

    def finish(self, token: int) -> tuple[int, bytes]:
        self.until(lambda: token in self.done)
        return self.done.pop(token)

    def do(self, kind: str, offset: int = 0, length: int = 0, data: bytes = b"") -> tuple[int, bytes]:
        return self.finish(self.start(kind, offset, length, data))

    def write(self, offset: int, data: bytes) -> None:
        assert self.do("write", offset, data=data) == (0, b"")

    def read(self, offset: int, length: int) -> bytes:
        error, data = self.do("read", offset, length)
        assert error == 0
        return data

    def seen(self, name: str) -> list[tuple[Any, ...]]:
        return [event for event in self.events if event[0] == name]

    def close(self) -> None:
        self.engine.stop()
        for sds in self.sds.values():
            sds.close()


@contextlib.contextmanager
def rig(**options: Any) -> Iterator[Rig]:
    it = Rig(**options)
    it.engine.start()
    try:
        yield it
    finally:
        it.close()


def only(opcode: int, answer: Any, times: int = 1 << 30) -> Rule:
    """A rule: the first `times` requests of one opcode get this answer (a status, Silent, Close or bytes)."""
    left = [times]

    def rule(header: dict[str, Any], body: bytes) -> Any:
        if header["opcode"] != opcode or left[0] == 0:
            return None
        left[0] -= 1
        return answer

    return rule
