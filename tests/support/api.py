"""A real MDM without network peers: manager on a database, orchestrator, and the API served on a port of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest
import trio

from mdm.api.app import serve
from mdm.commands import RegisterSds
from mdm.manager import Manager
from mdm.membership import Membership
from mdm.model import Device
from mdm.orchestrator import Orchestrator
from pfvol.client import AsyncClient, Endpoint

TOKEN = "the-token-of-the-tests"
GIB = 1024**3


@dataclass
class Api:
    """The server, and a client that has the token."""

    client: AsyncClient
    http: httpx2.AsyncClient
    endpoint: Endpoint
    manager: Manager
    membership: Membership
    orchestrator: Orchestrator

    async def make_pool(self, *, sds: int = 3, sds_capacity: str = "2GiB", capacity: str = "2GiB") -> None:
        """Protection domain ``pd``, pool ``pool``, and SDSs ``s1``.. that are UP."""
        await self.client.post("/pd/create", name="pd")
        for index in range(sds):
            await self.client.post("/sds/add", pd_id="pd", name=f"s{index + 1}", capacity=sds_capacity)
            await self.bring_up(f"s{index + 1}")
        await self.client.post("/pool/create", pd_id="pd", name="pool", capacity=capacity, spare_percent=0)

    async def bring_up(self, name: str) -> None:
        """As the control connection does when the SDS registers."""
        sds = next(sds for sds in self.manager.state.sds.values() if sds.name == name)
        await self.manager.execute(
            RegisterSds(
                sds_id=sds.sds_id,
                node=sds.node,
                data_address=("127.0.0.1", 20000 + sds.sds_id),
                http_address=None,
                incarnation=sds.incarnation + 1,
                devices=tuple(
                    Device(index=device.index, slots=device.slots, path=device.path, device_id=f"{device.index:032x}")
                    for device in sds.devices
                ),
            )
        )

    async def request(self, method: str, path: str, **options: Any) -> Any:
        """A bare request: the response as it is."""
        headers = {"Authorization": f"Bearer {TOKEN}"} | options.pop("headers", {})
        return await self.http.request(method, path, headers=headers, **options)


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    async with Manager.open(tmp_path / "mdm.db", cluster_id=bytes(range(16))) as manager:
        membership = Membership()
        orchestrator = Orchestrator(manager, membership)
        async with trio.open_nursery() as inner:
            host, port = await inner.start(partial(serve, orchestrator, host="127.0.0.1", port=0, token=TOKEN))
            endpoint = Endpoint(url := f"http://{host}:{port}", TOKEN)
            async with AsyncClient(endpoint) as client, httpx2.AsyncClient(base_url=url, trust_env=False) as http:
                yield Api(client, http, endpoint, manager, membership, orchestrator)
            inner.cancel_scope.cancel()
