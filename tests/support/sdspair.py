"""SDSs inside the test's process: real engines, real devices, real sockets; the test plays the MDM.

``async with running_pair(directory) as pair``: two SDSs that replicate to each other, and a ``PlayedMdm`` that holds
volumes and mappings and signs capabilities.
"""

from __future__ import annotations

import struct
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from datapath import wire
from datapath.target import Target
from pfvol.capability import Capability, sign
from pfvol.constants import CHUNK_SIZE_BYTES, SEGMENT_CHUNKS, SEGMENT_ENTRY_FORMAT
from pfvol.errors import NotFoundError, UnreachableError
from pfvol.sds import acceptor
from pfvol.sds.devices import Devices, load_state, parse_specs
from pfvol.sds.peers import Identity
from pfvol.sds.server import Server
from tests.support.dataclient import DataClient
from tests.support.waiting import poll_until_async

SECRET = bytes(range(32))
CLUSTER = bytes(range(1, 17))
KEY = bytes(range(32, 64))
SLOTS = 16
STOP_SECONDS = 20.0


@dataclass
class Volume:
    size_bytes: int
    chunks: list[tuple[int, int, int]]  # epoch, primary, secondary
    commit: bool = False
    mappings: dict[int, tuple[int, bool]] = field(default_factory=dict)


@dataclass
class PlayedMdm:
    """Answers the SDSs' questions from what the test has put into it."""

    volumes: dict[int, Volume] = field(default_factory=dict)
    away: bool = False
    asked: list[str] = field(default_factory=list)
    _mappings: int = 0

    def add_volume(self, volume_id: int, chunks: int = 4, *, size_bytes: int = 0, commit: bool = False) -> None:
        entries = [(1, 1, 2) if chunk % 2 == 0 else (1, 2, 1) for chunk in range(chunks)]
        self.volumes[volume_id] = Volume(size_bytes or chunks * CHUNK_SIZE_BYTES, entries, commit)

    def map(self, volume_id: int, sdc_id: int, *, read_only: bool = False, seconds: float = 3600) -> bytes:
        """Maps, as the MDM does: a new mapping id, and a capability for it."""
        self._mappings += 1
        self.volumes[volume_id].mappings[self._mappings] = (sdc_id, read_only)
        return self.capability(volume_id, sdc_id, self._mappings, read_only=read_only, seconds=seconds)

    def capability(
        self, volume_id: int, sdc_id: int, mapping_id: int, *, read_only: bool = False, seconds: float = 3600
    ) -> bytes:
        return sign(KEY, Capability(sdc_id, volume_id, mapping_id, read_only, int(time.time() + seconds)))

    def info(self, volume_id: int) -> dict[str, Any]:
        volume = self.volumes.get(volume_id)
        if volume is None:
            raise NotFoundError(f"no volume {volume_id}")
        return {
            "size_bytes": volume.size_bytes,
            "thick": False,
            "commit": volume.commit,
            "pool_id": 1,
            "mappings": [[sdc_id, mapping, read_only] for mapping, (sdc_id, read_only) in volume.mappings.items()],
            "segments": -(-len(volume.chunks) // SEGMENT_CHUNKS),
        }

    def segment(self, volume_id: int, segment: int) -> bytes:
        if volume_id not in self.volumes:
            raise NotFoundError(f"no volume {volume_id}")
        chunks = self.volumes[volume_id].chunks[segment * SEGMENT_CHUNKS : (segment + 1) * SEGMENT_CHUNKS]
        entries = b"".join(struct.pack(SEGMENT_ENTRY_FORMAT, *chunk, 0, 0) for chunk in chunks)
        return entries.ljust(SEGMENT_CHUNKS * struct.calcsize(SEGMENT_ENTRY_FORMAT), b"\0")

    @property
    def connected(self) -> bool:
        return not self.away

    async def call(self, method: str, params: dict[str, Any] | None = None, *, timeout: float = 0.0) -> Any:  # noqa: ASYNC109
        assert params is not None
        self.asked.append(method)
        await trio.lowlevel.checkpoint()
        if self.away:
            raise UnreachableError("the MDM is away")
        if method == "sds.leave_out":
            return {"left": 0, "dead": False, "version": 1}
        if method == "map.volume":
            return self.info(params["volume_id"])
        assert method == "map.segment"
        return {"version": 1, "entries": self.segment(params["volume_id"], params["segment"])}


@dataclass
class RunningSds:
    """One SDS: its server, and how to reach it."""

    sds_id: int
    port: int
    server: Server
    target: Target
    devices: Devices

    async def client(self, sdc_id: int, incarnation: int = 1, **changes: Any) -> DataClient:
        identity: dict[str, Any] = {"secret": SECRET, "cluster_id": CLUSTER, "sds_id": self.sds_id}
        return await DataClient.connect(
            self.port, **{**identity, "node_id": sdc_id, "incarnation": incarnation, **changes}
        )

    def peer(self) -> dict[str, Any]:
        incarnation = self.devices.incarnation
        return {
            "sds_id": self.sds_id,
            "data_address": ["127.0.0.1", self.port],
            "incarnation": incarnation,
            "up": True,
        }


@dataclass
class Pair:
    mdm: PlayedMdm
    one: RunningSds
    two: RunningSds

    async def client(self, sdc_id: int, incarnation: int = 1) -> DataClient:
        """Of SDS 1: primary of the even chunks of every volume."""
        return await self.one.client(sdc_id, incarnation)

    async def mapped_client(self, volume_id: int, sdc_id: int, incarnation: int = 1, **mapping: Any) -> DataClient:
        """A client of SDS 1 whose capability for the volume has been accepted."""
        client = await self.client(sdc_id, incarnation)
        reply = await client.capability(volume_id, self.mdm.map(volume_id, sdc_id, **mapping))
        assert reply.status == wire.ST_OK
        return client


@asynccontextmanager
async def running_sds(
    directory: Path, sds_id: int, mdm: PlayedMdm, *, slots: int = SLOTS, device_count: int = 2
) -> AsyncIterator[RunningSds]:
    """An SDS on the devices in ``directory`` (made when there are none), without peers until it is told of them."""
    devices = Devices(directory, load_state(directory))
    devices.adopt(CLUSTER, sds_id)
    await devices.open()
    told = parse_specs(directory, [{"index": index, "path": None, "slots": slots} for index in range(device_count)])
    await devices.make(devices.missing(told))
    assert devices.failed == {}
    sock = await acceptor.bind("127.0.0.1", 0)
    target = Target(sds_id, devices.incarnation, devices.durable_incarnation)
    for _, device in sorted(devices.opened.items()):
        target.add_device(device)
    identity = Identity(SECRET, CLUSTER, sds_id, devices.incarnation, devices.durable_incarnation)
    await trio.to_thread.run_sync(target.start)
    try:
        server = Server(target, sock, identity, mdm)
        reply = {
            "capability_key": KEY,
            "reserved_slots": 0,
            "peers": [],
            "purge": [],
            "volumes": [],
            "learning": [],
            "map_version": 1,
            "resync": {},
        }
        server.registered(reply)
        async with trio.open_nursery() as nursery:
            await nursery.start(server.run)
            server.registered(reply)  # once more, now that it serves
            yield RunningSds(sds_id, sock.getsockname()[1], server, target, devices)
            nursery.cancel_scope.cancel()
    finally:
        with trio.move_on_after(STOP_SECONDS, shield=True):
            await trio.to_thread.run_sync(target.stop)
            await devices.close()


@asynccontextmanager
async def running_pair(directory: Path, mdm: PlayedMdm | None = None, **shape: int) -> AsyncIterator[Pair]:
    """``shape``: see ``running_sds``."""
    mdm = mdm or PlayedMdm()
    async with (
        running_sds(directory / "one", 1, mdm, **shape) as one,
        running_sds(directory / "two", 2, mdm, **shape) as two,
    ):
        for sds in (one, two):
            sds.server.set_peers([one.peer(), two.peer()])

        async def connected() -> bool:
            return all(sds.target.stats()["peers"] == 2 for sds in (one, two))

        await poll_until_async(connected, what="two connections between the SDSs")
        yield Pair(mdm, one, two)
