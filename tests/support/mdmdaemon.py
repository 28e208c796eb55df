"""The real MDM role in this process, and nodes that speak to it over the real control RPC but store nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from mdm.daemon import run_role
from pfvol.client import AsyncClient, Endpoint
from pfvol.config import Address, Config, MdmConfig, NodeConfig
from pfvol.log import get_logger
from pfvol.node import Node
from pfvol.rpc import auth
from pfvol.rpc.client import Session, connect
from tests.support.waiting import poll_until_async

GIB = 1024**3


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
class FakeSds:
    """An SDS that remembers what it was asked and told; ``answers`` overrides what it says."""

    mdm: Mdm
    name: str
    session: Session
    port: int
    devices: list[dict[str, Any]] = field(default_factory=list)
    incarnation: int = 1
    sds_id: int | None = None
    admission: dict[str, Any] = field(default_factory=dict)
    got: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    answers: dict[str, Callable[[dict[str, Any]], Any]] = field(default_factory=dict)

    async def handle(self, method: str, params: dict[str, Any]) -> Any:
        self.got.append((method, params))
        if method in self.answers:
            answer = self.answers[method](params)
            return await answer if hasattr(answer, "__await__") else answer
        return None

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

    async def sds(self, mdm: Mdm, name: str, **kept: Any) -> FakeSds:
        self._port += 1
        made: list[FakeSds] = []

        async def handle(method: str, params: dict[str, Any]) -> Any:
            return await made[0].handle(method, params)

        session = await connect(mdm.control, secret=mdm.secret, role="sds", name=name, handler=handle)
        made.append(FakeSds(mdm, name, session, self._port, **kept))
        await self._nursery.start(session.run)
        return made[0]

    async def sdc(self, mdm: Mdm, name: str) -> tuple[Session, list[str]]:
        told: list[str] = []

        async def handle(method: str, params: dict[str, Any]) -> Any:
            told.append(method)

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
