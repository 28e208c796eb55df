"""SDS engines alone, in the test's process: real engines, devices and sockets; the test plays MDM, servers and network.

``async with running_engines(directory, 2) as engines``: engines 1 and 2, connected; ``engines.place`` gives chunks to
them, ``engines.change`` makes a new entry of the map known to all.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import trio

from datapath import wire
from datapath.blockfile import BlockDevice
from datapath.target import Target
from pfvol.constants import CHUNK_SIZE_BYTES, SEGMENT_CHUNKS, SEGMENT_ENTRY_FORMAT
from tests.support.dataclient import DataClient, Reply
from tests.support.waiting import poll_until_async

CLUSTER = bytes(range(1, 17))
POOL = 3
GRANTED_NS = 1 << 62
AGAIN = (wire.ST_NOT_READY, wire.ST_STALE_MAP, wire.ST_NOT_MEMBER, wire.ST_BUSY)


@dataclass
class Verified:
    """What an engine holds of a chunk: no tags when it holds nothing."""

    tags: list[bytes]
    bad: bytes


@dataclass
class RunningEngine:
    sds_id: int
    paths: list[Path]
    incarnation: int = 0
    power_lost: bool = True  # between two starts; else only the process went
    said: list[tuple[Any, ...]] = field(default_factory=list)
    conns: dict[tuple[int, bool], int] = field(default_factory=dict)  # (peer, outgoing) -> connection
    target: Target = field(init=False)
    devices: list[BlockDevice] = field(init=False)
    clients: list[DataClient] = field(default_factory=list)
    _tokens: int = 0

    def open(self) -> None:
        self.incarnation += 1
        self.devices = [BlockDevice.open(path) for path in self.paths]
        self.target = Target(self.sds_id, self.incarnation, self.incarnation if self.power_lost else 0)
        for device in self.devices:
            device.recover()
            self.target.add_device(device)
        self.target.start()

    def close(self, *, checkpoint: bool) -> None:
        self.target.stop(checkpoint=checkpoint)
        for device in self.devices:
            device.close(clean=False)

    async def pump(self, scope: trio.CancelScope) -> None:
        """Keeps what the engine says; lets every client in."""
        with scope:
            while True:
                await trio.lowlevel.wait_readable(self.target.event_fd)
                for event in self.target.events():
                    self.said.append(event)
                    if event[0] == "capability":
                        self.target.grant(*event[1:4], write=True, expires_boot_ns=GRANTED_NS)

    def told(self, kind: str) -> list[tuple[Any, ...]]:
        return [event[1:] for event in self.said if event[0] == kind]

    async def hears(self, kind: str, count: int = 1) -> list[tuple[Any, ...]]:
        """Waits until the engine has said so ``count`` times."""
        return await poll_until_async(
            lambda: self.told(kind) if len(self.told(kind)) >= count else [], what=f"{kind} of SDS {self.sds_id}"
        )

    async def client(self, volume_id: int, sdc_id: int, incarnation: int = 1) -> DataClient:
        ours, theirs = socket.socketpair()
        self.target.add_client(theirs.detach(), sdc_id, incarnation)
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
        client = DataClient(stream, sdc_id, incarnation)
        self.clients.append(client)
        assert (await client.capability(volume_id, bytes(64))).status == wire.ST_OK
        return client

    async def verify(self, volume_id: int, chunk: int) -> Verified:
        self._tokens += 1
        token = self._tokens
        self.target.verify(token, volume_id, chunk)

        def answer() -> tuple[Any, ...] | None:
            return next((event for event in self.told("verified") if event[0] == token), None)

        found = await poll_until_async(answer, what="an answer to verify")
        assert found is not None
        _, present, tags, bad = found
        return Verified([tags[at : at + 16] for at in range(0, len(tags), 16)] if present else [], bad)


@dataclass
class Engines:
    engines: dict[int, RunningEngine]
    nursery: trio.Nursery
    volumes: dict[int, list[tuple[int, int, int, int, int]]] = field(default_factory=dict)
    version: int = 1
    rate: int = 0
    _scopes: dict[int, trio.CancelScope] = field(default_factory=dict)

    def __getitem__(self, sds_id: int) -> RunningEngine:
        return self.engines[sds_id]

    def start(self, sds_id: int) -> None:
        """Starts it (again) on its devices, tells it all maps, connects it with all that run."""
        engine = self.engines[sds_id]
        engine.open()
        self._scopes[sds_id] = trio.CancelScope()
        self.nursery.start_soon(engine.pump, self._scopes[sds_id])
        if self.rate:
            engine.target.set_resync_rate(POOL, self.rate)
        for volume_id in self.volumes:
            self._tell(engine, volume_id)
        for other in self._scopes:
            if other != sds_id:
                self.connect(sds_id, other)

    async def stop(self, sds_id: int, *, checkpoint: bool = False) -> None:
        engine = self.engines[sds_id]
        self._scopes.pop(sds_id).cancel()
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(lambda: engine.close(checkpoint=checkpoint))

    def connect(self, one: int, two: int) -> None:
        for asker, asked in ((one, two), (two, one)):
            ours, theirs = socket.socketpair()
            a, b = self.engines[asker], self.engines[asked]
            a.conns[asked, True] = a.target.add_peer(ours.detach(), asked, b.incarnation, outgoing=True)
            b.conns[asker, False] = b.target.add_peer(theirs.detach(), asker, a.incarnation, outgoing=False)

    def cut(self, one: int, two: int) -> None:
        """Both connections between the two are lost."""
        for asker, asked in ((one, two), (two, one)):
            for outgoing in (True, False):
                self.engines[asker].target.close_conn(self.engines[asker].conns[asked, outgoing])

    def set_rate(self, rate: int) -> None:
        self.rate = rate
        for sds_id in self._scopes:
            self.engines[sds_id].target.set_resync_rate(POOL, rate)

    def place(self, volume_id: int, entries: list[tuple[int, int, int]]) -> None:
        """A volume whose chunks have these primaries, secondaries, learners; epoch 1."""
        self.volumes[volume_id] = [(1, *entry, 0) for entry in entries]
        for sds_id in self._scopes:
            self._tell(self.engines[sds_id], volume_id)

    def change(
        self, volume_id: int, chunk: int, primary: int, secondary: int = 0, learner: int = 0, left: int = 0
    ) -> None:
        """A new entry, known to all that run."""
        self.change_all(volume_id, {chunk: (primary, secondary, learner)}, left)

    def change_all(self, volume_id: int, changes: dict[int, tuple[int, int, int]], left: int = 0) -> None:
        for chunk, entry in changes.items():
            self.volumes[volume_id][chunk] = (self.epoch(volume_id, chunk) + 1, *entry, left)
        self.version += 1
        for sds_id in self._scopes:
            self._tell(self.engines[sds_id], volume_id)

    def epoch(self, volume_id: int, chunk: int) -> int:
        return self.volumes[volume_id][chunk][0]

    def _tell(self, engine: RunningEngine, volume_id: int) -> None:
        entries = self.volumes[volume_id]
        size = len(entries) * CHUNK_SIZE_BYTES
        engine.target.set_volume(volume_id, size, commit=False, thick=False, pool_id=POOL)
        for first in range(0, len(entries), SEGMENT_CHUNKS):
            packed = b"".join(struct.pack(SEGMENT_ENTRY_FORMAT, *e) for e in entries[first : first + SEGMENT_CHUNKS])
            engine.target.set_segment(volume_id, first // SEGMENT_CHUNKS, packed, self.version)
        engine.target.set_map_version(self.version)

    async def leave_out(self, sds_id: int, by: int) -> None:
        """``by`` has lost the other: what the two of them and the MDM do about the chunks that ``by`` leads."""
        engine = self.engines[by]
        asked = len(engine.told("leaving"))
        engine.target.leave(sds_id)
        *_, doubtful = (await engine.hears("leaving", asked + 1))[-1]
        assert doubtful == []
        for volume_id, entries in self.volumes.items():
            out = {chunk: (by, 0, sds_id) for chunk, entry in enumerate(entries) if entry[1:3] == (by, sds_id)}
            if out:
                self.change_all(volume_id, out, left=sds_id)
        engine.target.stay(sds_id)

    # -- what a client does that asks again until it is answered

    async def write(self, client: DataClient, volume_id: int, data: bytes, chunk: int = 0, offset: int = 0) -> None:
        for at in range(0, len(data), wire.IO_SIZE_MAX):
            part = data[at : at + wire.IO_SIZE_MAX]
            await self._asked(partial(client.write, volume_id, part, chunk, offset + at), volume_id, chunk)

    async def discard(self, client: DataClient, volume_id: int, chunk: int, offset: int, length: int) -> None:
        place = {"volume_id": volume_id, "chunk_index": chunk, "offset": offset, "length": length}
        await self._asked(lambda epoch: client.request(wire.OP_DISCARD, **place, epoch=epoch), volume_id, chunk)

    async def read(self, client: DataClient, volume_id: int, chunk: int, offset: int, length: int) -> bytes:
        reply = await self._asked(lambda epoch: client.read(volume_id, chunk, offset, length, epoch), volume_id, chunk)
        return reply.payload

    async def flush(self, client: DataClient, volume_id: int, status: int = wire.ST_OK) -> None:
        """Asks once; ``status`` is the answer that is due."""
        assert (await client.request(wire.OP_FLUSH, volume_id=volume_id)).status == status

    async def _asked(self, ask: Any, volume_id: int, chunk: int) -> Reply:
        async def answer() -> Reply | None:
            reply: Reply = await ask(self.epoch(volume_id, chunk))
            return None if reply.status in AGAIN else reply

        reply = await poll_until_async(answer, what=f"an answer for chunk {chunk}")
        assert reply is not None
        assert reply.status == wire.ST_OK, reply.header
        return reply

    async def equal(self, volume_id: int, chunk: int, *sds_ids: int) -> list[bytes]:
        """Asserts that the copies have the same tags, and bytes that match them; these tags, none without slots."""
        copies = [await self.engines[sds_id].verify(volume_id, chunk) for sds_id in sds_ids]
        for copy in copies:
            assert not any(copy.bad), "a block does not match its tag"
            differing = [at for at, (x, y) in enumerate(zip(copy.tags, copies[0].tags, strict=False)) if x != y]
            assert (len(copy.tags), differing) == (len(copies[0].tags), [])
        return copies[0].tags


@asynccontextmanager
async def running_engines(directory: Path, count: int, *, slots: int = 16, devices: int = 2) -> AsyncIterator[Engines]:
    engines = {}
    for sds_id in range(1, count + 1):
        paths = [directory / f"sds{sds_id}-{index}" for index in range(devices)]
        for index, path in enumerate(paths):
            size = slots * CHUNK_SIZE_BYTES
            BlockDevice.create(path, cluster_id=CLUSTER, sds_id=sds_id, index=index, size_bytes=size)
        engines[sds_id] = RunningEngine(sds_id, paths)
    async with trio.open_nursery() as nursery:
        world = Engines(engines, nursery)
        try:
            for sds_id in engines:
                world.start(sds_id)
            yield world
        finally:
            for engine in engines.values():
                for client in engine.clients:
                    await trio.aclose_forcefully(client.stream)
            for sds_id in list(world._scopes):
                await world.stop(sds_id)
        nursery.cancel_scope.cancel()
