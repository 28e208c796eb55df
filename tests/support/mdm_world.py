"""A world for tests of the MDM's pure core: a state, and a clock that a test moves."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

from mdm import invariants
from mdm.commands import AddSds, Command, CreateFaultSet, CreatePool, CreateProtectionDomain, CreateVolume, RegisterSds
from mdm.events import Event, EventType
from mdm.model import Cluster, Device, State
from mdm.segments import count_holders
from mdm.store.base import Store
from mdm.transition import apply

START = datetime(2026, 1, 1, tzinfo=UTC)
CHUNK = 4 * 1024**2
GIB = 1024**3


def new_cluster() -> Cluster:
    return Cluster(
        cluster_id=bytes(range(16)),
        salt=b"\xab\xcd\xef",
        capability_key=bytes(32),
        api_token="token",
        created_at=START,
    )


class World:
    """Runs commands one after the other, and commits them to a store if it has one. Every state on the way has to keep
    the invariants."""

    def __init__(self, store: Store | None = None) -> None:
        self.store = store
        self.state = State(cluster=new_cluster())
        self.now = START
        self.events: list[Event] = []

    def run(self, command: Command) -> Any:
        self.now += timedelta(seconds=1)
        done = apply(self.state, command, self.now)
        assert invariants.check(done.state) == []
        if self.store is not None and done.state is not self.state:
            self.store.commit(done.state, done.changes, done.events)
        self.state = done.state
        self.events += done.events
        return done.result

    def types(self) -> list[EventType]:
        return [event.type for event in self.events]

    def pd(self, name: str = "default") -> int:
        return int(self.run(CreateProtectionDomain(name=name)))

    def pool(self, pd_id: int, name: str = "default", capacity_bytes: int = 100 * GIB, **fields: Any) -> int:
        return int(self.run(CreatePool(pd_id=pd_id, name=name, capacity_bytes=capacity_bytes, **fields)))

    def fault_set(self, pd_id: int, name: str) -> int:
        return int(self.run(CreateFaultSet(pd_id=pd_id, name=name)))

    def sds(
        self,
        pd_id: int,
        name: str,
        *,
        slots: int = 1280,
        fault_set_id: int | None = None,
        up: bool = True,
    ) -> int:
        added = AddSds(pd_id=pd_id, name=name, capacity_bytes=slots * CHUNK, fault_set_id=fault_set_id)
        sds_id = int(self.run(added))
        if up:
            self.register(sds_id)
        return sds_id

    def register(self, sds_id: int, **fields: Any) -> None:
        self.run(registration(self.state, sds_id, **fields))

    def volume(self, pool_id: int, name: str = "vol1", size_bytes: int = GIB, **fields: Any) -> int:
        return int(self.run(CreateVolume(pool_id=pool_id, name=name, size_bytes=size_bytes, **fields)))

    def copies(self, volume_id: int) -> Counter[int]:
        """Copies per SDS, from the map itself."""
        found: Counter[int] = Counter()
        for holders, count in count_holders(self.state.maps[volume_id]).items():
            for sds_id in holders.all:
                found[sds_id] += count
        return found


def registration(state: State, sds_id: int, *, incarnation: int = 1, **fields: Any) -> RegisterSds:
    """What the SDS says when it comes with the devices that were planned for it."""
    sds = state.sds[sds_id]
    devices = tuple(
        Device(index=device.index, slots=device.slots, device_id=f"{sds_id:016x}{device.index:016x}")
        for device in sds.devices
    )
    given: dict[str, Any] = {
        "node": sds.node,
        "data_address": ("127.0.0.1", 8020 + sds_id),
        "http_address": None,
        "devices": devices,
    }
    return RegisterSds(sds_id=sds_id, incarnation=incarnation, **(given | fields))


def small_world(*, sds: int = 3, slots: int = 1280, capacity_bytes: int = 100 * GIB) -> tuple[World, int, int]:
    """One protection domain, one pool, SDSs that are UP: (world, pd, pool)."""
    world = World()
    pd_id = world.pd()
    pool_id = world.pool(pd_id, capacity_bytes=capacity_bytes)
    for number in range(1, sds + 1):
        world.sds(pd_id, f"sds{number}", slots=slots)
    return world, pd_id, pool_id
