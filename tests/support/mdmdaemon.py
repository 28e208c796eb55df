"""The real MDM role in this process, and nodes that speak to it over the real control RPC but store nothing."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from mdm.commands import AddSds, Command, CreatePool, CreateProtectionDomain
from mdm.control import Control
from mdm.daemon import run_role
from mdm.manager import Manager
from mdm.membership import Membership
from mdm.model import State
from mdm.orchestrator import Orchestrator
from pfvol.client import AsyncClient, Endpoint
from pfvol.config import Address, Config, MdmConfig, NodeConfig
from pfvol.constants import SEGMENT_ENTRY_FORMAT
from pfvol.log import get_logger
from pfvol.node import Node
from pfvol.rpc import auth
from pfvol.rpc.client import Session, connect
from pfvol.rpc.server import Server
from tests.support.waiting import poll_until_async

GIB = 1024**3
ENTRY = struct.Struct(SEGMENT_ENTRY_FORMAT)


@dataclass
class Mdm:
    client: AsyncClient
    control: Address
    secret: bytes
    directory: Path

    async def state_of(self, sds: str) -> str:
        return str((await self.client.get(f"/sds/{sds}"))["state"])

    async def wait_state(self, sds: str, state: str) -> None:
        async def reached() -> bool:
            return await self.state_of(sds) == state

        await poll_until_async(reached, what=f"{sds} is {state}")


@asynccontextmanager
async def running_mdm(directory: Path) -> AsyncIterator[Mdm]:
    """The MDM on a data directory; again on the same directory is a restart."""
    if not (directory / "secret").exists():
        auth.create_secret(directory / "secret")
    config = Config(NodeConfig("m1", ("mdm",), directory), mdm=MdmConfig(0, 0))
    config.node_dir.mkdir(exist_ok=True)
    node = Node(config, get_logger("mdm"))
    async with trio.open_nursery() as nursery:

        async def run(*, task_status: Any) -> None:
            await run_role(node, task_status=task_status)

        info = await nursery.start(run)
        token = (config.node_dir / "token").read_text().strip()
        host, port = info["control_address"]
        async with AsyncClient(Endpoint(info["api"], token)) as client:
            yield Mdm(client, (host, port), node.secret(), directory)
        node.stopping.set()


@dataclass
class Core:
    """An MDM without its API, which a test commands directly."""

    orchestrator: Orchestrator
    control: Address
    secret: bytes

    async def run(self, command: Command) -> Any:
        return (await self.orchestrator.execute(command)).result

    @property
    def state(self) -> State:
        return self.orchestrator.manager.state


@dataclass
class FakeSds:
    """An SDS that remembers what it was asked and told, and keeps the maps that it is sent as an engine does: entry by
    entry, only where the epoch is newer. ``answers`` overrides what it says."""

    mdm: Mdm | Core
    name: str
    session: Session
    port: int
    devices: list[dict[str, Any]] = field(default_factory=list)
    incarnation: int = 1
    sds_id: int | None = None
    admission: dict[str, Any] = field(default_factory=dict)
    got: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    answers: dict[str, Callable[[dict[str, Any]], Any]] = field(default_factory=dict)
    maps: dict[tuple[int, int], bytes] = field(default_factory=dict)
    version: int = 0
    pushing: int = 0

    async def handle(self, method: str, params: dict[str, Any]) -> Any:
        self.got.append((method, params))
        answer: Any = None
        self.pushing += method == "map.changed"
        assert self.pushing <= 1, "maps are sent one message at a time"
        if method in self.answers:
            answer = self.answers[method](params)
            answer = await answer if hasattr(answer, "__await__") else answer
        if method == "map.changed":
            self._take(params)
            self.pushing -= 1
        return answer

    def _take(self, params: dict[str, Any]) -> None:
        assert params["version"] >= self.version
        for volume_id, index, entries in params["segments"]:
            old = self.maps.get((volume_id, index), bytes(len(entries)))
            rows = zip(ENTRY.iter_unpack(old), ENTRY.iter_unpack(entries), strict=True)
            self.maps[volume_id, index] = b"".join(ENTRY.pack(*(new if new[0] > was[0] else was)) for was, new in rows)
        self.version = params["version"]

    async def fetch(self, volume_id: int, segment: int = 0) -> list[tuple[int, ...]]:
        """The entries of a segment as the MDM has them now."""
        answer = await self.session.call("map.segment", {"volume_id": volume_id, "segment": segment})
        self.maps[volume_id, segment] = answer["entries"]
        return self.entries(volume_id, segment)

    def entries(self, volume_id: int, segment: int = 0) -> list[tuple[int, ...]]:
        """The entries as it knows them."""
        return [row for row in ENTRY.iter_unpack(self.maps[volume_id, segment]) if row[0]]

    async def leave_out(self, peer: FakeSds, **changes: Any) -> dict[str, Any]:
        params = {"peer": peer.sds_id, "as_primary": True, "as_secondary": True, "except": [], "chunks": None}
        answer: dict[str, Any] = await self.session.call("sds.leave_out", params | changes)
        return answer

    async def learned(self, learner: FakeSds, chunks: list[list[int]]) -> dict[str, Any]:
        params = {"learner": learner.sds_id, "chunks": chunks, "resync_bytes": 0}
        answer: dict[str, Any] = await self.session.call("sds.learned", params)
        return answer

    def told(self, method: str) -> list[dict[str, Any]]:
        return [params for name, params in self.got if name == method]

    async def wait_told(self, method: str, count: int = 1) -> list[dict[str, Any]]:
        async def enough() -> bool:
            return len(self.told(method)) >= count

        await poll_until_async(enough, what=f"{self.name} is told {method}")
        return self.told(method)

    async def register(self, **changes: Any) -> dict[str, Any]:
        params = {
            "node": self.name,
            "data_address": ["127.0.0.1", self.port],
            "http_address": None,
            "sds_id": self.sds_id,
            "cluster_id": None,
            "incarnation": self.incarnation,
            "durable_incarnation": self.incarnation,
            "version": "0",
            "devices": self.devices,
        }
        self.admission = await self.session.call("sds.register", params | changes)
        self.version = max(self.version, self.admission.get("map_version", 0))
        return self.admission

    async def serve(self) -> None:
        """Registers, makes the devices that it is told of, registers with them."""
        admission = await self.register()
        assert admission["admitted"]
        self.sds_id = admission["sds_id"]
        self.devices = [
            {"index": item["index"], "slots": item["slots"], "device_id": f"{self.port:x}-{item['index']}"}
            for item in admission["devices"]
        ]
        await self.register()

    async def report(self, purged: list[int] | None = None, **stats: Any) -> None:
        await self.session.notify("sds.report", {"stats": stats, "failed_devices": [], "purged": purged or []})


class Nodes:
    """Opens fake nodes in one nursery."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._port = 20000
        self.sdc_got: list[tuple[str, dict[str, Any]]] = []
        """What all SDCs were asked and told."""

    async def sds(self, mdm: Mdm | Core, name: str, **kept: Any) -> FakeSds:
        self._port += 1
        made: list[FakeSds] = []

        async def handle(method: str, params: dict[str, Any]) -> Any:
            return await made[0].handle(method, params)

        session = await connect(mdm.control, secret=mdm.secret, role="sds", name=name, handler=handle)
        made.append(FakeSds(mdm, name, session, self._port, **kept))
        await self._nursery.start(session.run)
        return made[0]

    async def sdc(self, mdm: Mdm | Core, name: str) -> tuple[Session, list[str]]:
        told: list[str] = []

        async def handle(method: str, params: dict[str, Any]) -> Any:
            told.append(method)
            self.sdc_got.append((method, params))

        session = await connect(mdm.control, secret=mdm.secret, role="sdc", name=name, handler=handle)
        await self._nursery.start(session.run)
        return session, told


@asynccontextmanager
async def nodes() -> AsyncIterator[Nodes]:
    async with trio.open_nursery() as nursery:
        yield Nodes(nursery)
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def cluster(directory: Path, sds: int = 3) -> AsyncIterator[tuple[Mdm, Nodes, list[FakeSds]]]:
    """An MDM, pd ``pd``, pool ``pool`` and SDSs ``s1``.. that serve."""
    async with AsyncExitStack() as stack:
        made = await stack.enter_async_context(nodes())  # They are there longer than the MDM: it restarts, they stay.
        mdm = await stack.enter_async_context(running_mdm(directory))
        await mdm.client.post("/pd/create", name="pd")
        all_sds = []
        for index in range(1, sds + 1):
            await mdm.client.post("/sds/add", pd_id="pd", name=f"s{index}", capacity="4GiB")
            one = await made.sds(mdm, f"s{index}")
            await one.serve()
            all_sds.append(one)
        await mdm.client.post("/pool/create", pd_id="pd", name="pool", capacity="4GiB", spare_percent=0)
        yield mdm, made, all_sds


@asynccontextmanager
async def running_core(directory: Path) -> AsyncIterator[tuple[Core, Nodes]]:
    """Again on the same directory is a restart."""
    secret = bytes(32)
    async with Manager.open(directory / "mdm.sqlite") as manager, trio.open_nursery() as nursery:
        orchestrator = Orchestrator(manager, Membership())
        server = Server(Control(orchestrator), secret=secret, cluster_id=manager.state.cluster.cluster_id)
        await nursery.start(orchestrator.run)
        control = await nursery.start(server.run, "127.0.0.1", 0)
        yield Core(orchestrator, control, secret), Nodes(nursery)
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def core_cluster(directory: Path, sds: int = 3) -> AsyncIterator[tuple[Core, Nodes, list[FakeSds]]]:
    """As ``cluster``, with pool 1 and SDSs 1.., and no API."""
    async with running_core(directory) as (core, made):
        pd_id = await core.run(CreateProtectionDomain(name="pd"))
        await core.run(CreatePool(pd_id=pd_id, name="pool", capacity_bytes=1024 * GIB, spare_percent=0))
        all_sds = []
        for index in range(1, sds + 1):
            await core.run(AddSds(pd_id=pd_id, name=f"s{index}", capacity_bytes=4 * GIB))
            one = await made.sds(core, f"s{index}")
            await one.serve()
            all_sds.append(one)
        yield core, made, all_sds


def chunks_of(entries: list[tuple[int, ...]], primary: FakeSds, secondary: FakeSds | None) -> list[int]:
    members = (primary.sds_id, secondary.sds_id if secondary else 0)
    return [chunk for chunk, entry in enumerate(entries) if entry[1:3] == members]


async def until(condition: Callable[[], bool], what: str) -> None:
    async def holds() -> bool:
        return condition()

    await poll_until_async(holds, what=what)


async def never(_: Any) -> None:
    await trio.sleep_forever()


async def back(made: Nodes, mdm: Mdm | Core, old: FakeSds, incarnation: int = 2) -> FakeSds:
    again = await made.sds(mdm, old.name, sds_id=old.sds_id, devices=old.devices, incarnation=incarnation)
    await again.register()
    return again
