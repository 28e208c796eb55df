"""A data-plane client written by hand: it does what a test says and nothing that the product's own client would see to.

It shakes hands (or not), shows a capability (or not), and sends any frame with any field.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import Any

import trio

from datapath import wire
from datapath.checksum import range_checks
from pfvol import handshake
from tests.support.waiting import poll_until_async

REPLY_SECONDS = 10.0


@dataclass(frozen=True)
class Reply:
    """A frame that came back; ``status`` and the other fields are the header's."""

    header: dict[str, Any]
    body: bytes

    @property
    def status(self) -> int:
        return int(self.header["status"])

    @property
    def payload(self) -> bytes:
        """Of a READ: the data without its check values; zeros when the SDS says so."""
        if self.header["flags"] & (wire.FLAG_ZEROS | wire.FLAG_ABSENT):
            return bytes(self.header["length"])
        return self.body[len(self.body) - self.header["length"] :]


class ClosedError(Exception):
    """The SDS has closed the connection."""


class DataClient:
    """One connection. Requests go one at a time: ``request`` returns the answer to what it sent."""

    def __init__(self, stream: trio.SocketStream, node_id: int, incarnation: int) -> None:
        self.stream = stream
        self.node_id = node_id
        self.incarnation = incarnation
        self._requests = 0

    @classmethod
    async def connect(
        cls,
        port: int,
        *,
        secret: bytes,
        cluster_id: bytes,
        sds_id: int,
        node_id: int,
        incarnation: int = 1,
        role: int = wire.ROLE_SDC,
    ) -> DataClient:
        fd, _ = await handshake.connect(
            "127.0.0.1",
            port,
            secret=secret,
            cluster_id=cluster_id,
            role=role,
            node_id=node_id,
            incarnation=incarnation,
            sds_id=sds_id,
        )
        sock = trio.socket.fromfd(fd, trio.socket.AF_INET, trio.socket.SOCK_STREAM)
        os.close(fd)
        return cls(trio.SocketStream(sock), node_id, incarnation)

    async def __aenter__(self) -> DataClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await trio.aclose_forcefully(self.stream)

    def header(self, opcode: int, **fields: int) -> bytes:
        """A sealed header of ours with the next request id, unless ``fields`` says otherwise."""
        self._requests += 1
        ours = {"request_id": self._requests, "node_id": self.node_id, "incarnation": self.incarnation}
        return wire.pack_header(opcode, **(ours | {"op_id": self._requests} | fields))

    @staticmethod
    def body(volume_id: int, chunk: int, offset: int, data: bytes) -> bytes:
        """Of a WRITE or REPLICATE: the check values, then the data."""
        checks = range_checks(volume_id, chunk, offset, data)
        return struct.pack(f"<{len(checks)}I", *checks) + data

    async def send(self, data: bytes) -> None:
        try:
            await self.stream.send_all(data)
        except trio.BrokenResourceError as error:
            raise ClosedError from error

    async def receive(self) -> Reply:
        """The next frame. Raises ClosedError when there will be none."""
        with trio.fail_after(REPLY_SECONDS):
            header = dict(wire.unpack_header(await self._exactly(wire.HEADER_SIZE)))
            return Reply(header, await self._exactly(header["body_length"]))

    async def request(self, opcode: int, body: bytes = b"", **fields: int) -> Reply:
        await self.send(self.header(opcode, body_length=len(body), **fields) + body)
        reply = await self.receive()
        assert reply.header["opcode"] == opcode | wire.OP_REPLY
        return reply

    async def capability(self, volume_id: int, token: bytes) -> Reply:
        return await self.request(wire.OP_CAPABILITY, token, volume_id=volume_id)

    async def read(self, volume_id: int, chunk: int = 0, offset: int = 0, length: int = 4096, epoch: int = 1) -> Reply:
        return await self.request(
            wire.OP_READ, volume_id=volume_id, chunk_index=chunk, offset=offset, length=length, epoch=epoch
        )

    async def write(
        self, volume_id: int, data: bytes, chunk: int = 0, offset: int = 0, epoch: int = 1, **fields: int
    ) -> Reply:
        body = self.body(volume_id, chunk, offset, data)
        place = {"volume_id": volume_id, "chunk_index": chunk, "offset": offset, "length": len(data), "epoch": epoch}
        return await self.request(wire.OP_WRITE, body, **(place | fields))

    async def write_until_taken(self, volume_id: int, data: bytes, **place: int) -> Reply:
        """As a real client: asks again while the pair is still getting together."""

        async def taken() -> Reply | None:
            reply = await self.write(volume_id, data, **place)
            return None if reply.status == wire.ST_NOT_READY else reply

        reply = await poll_until_async(taken, what="a pair that takes writes")
        assert reply is not None
        return reply

    async def is_closed(self) -> bool:
        """Waits for the SDS to close the connection; True when it does without another frame."""
        try:
            await self.receive()
        except ClosedError:
            return True
        return False

    async def _exactly(self, size: int) -> bytes:
        received = bytearray()
        while len(received) < size:
            try:
                part = await self.stream.receive_some(size - len(received))
            except trio.BrokenResourceError as error:
                raise ClosedError from error
            if not part:
                raise ClosedError
            received += part
        return bytes(received)
