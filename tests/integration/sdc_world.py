"""What an SDC talks to: an MDM and SDSs that are fakes a test can bend, behind the real RPC and real handshakes."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import trio

from datapath import wire
from pfvol import handshake
from pfvol.rpc.server import Server
from pfvol.sdc import daemon
from pfvol.sdc.options import parse_options
from tests.support.waiting import poll_until_async
from tests.unit.sdcengine_fakes import FakeSds, segment

MIB = 1024**2
SECRET = bytes(range(32))
CLUSTER_ID = b"c" * 16
SDC_ID = 3
POOL = {"total_bytes": 100 * MIB, "free_bytes": 60 * MIB}


class FakeMdm:
    """Answers an SDC from ``volumes``; counts what it is asked."""

    def __init__(self) -> None:
        self.volumes: dict[int, dict[str, Any]] = {}
        self.peers: list[dict[str, Any]] = []
        self.sessions: list[Any] = []
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.reports: list[dict[str, Any]] = []
        self.incarnation = 0
        self.renewals = 0
        self.before_segment: Callable[[dict[str, Any]], Awaitable[None]] | None = None
        """What happens between a question for the map and its answer."""

    def opened(self, session: Any) -> None:
        self.sessions.append(session)

    def closed(self, session: Any) -> None:
        self.sessions.remove(session)

    async def handle(self, session: Any, method: str, params: dict[str, Any]) -> Any:
        self.asked.append((method, params))
        match method:
            case "sdc.register":
                self.incarnation += 1
                return {
                    "cluster_id": CLUSTER_ID,
                    "sdc_id": SDC_ID,
                    "name": params["name"],
                    "incarnation": self.incarnation,
                    "volumes": self.list(),
                    "peers": self.peers,
                }
            case "sdc.volumes":
                return {"volumes": self.list()}
            case "map.segment":
                if self.before_segment is not None:
                    await self.before_segment(params)
                return segment((1, 1, 2))
            case "sdc.report":
                self.reports.append(params["stats"])
        return None

    def count(self, method: str) -> int:
        return sum(asked == method for asked, _ in self.asked)

    def list(self) -> list[dict[str, Any]]:
        self.renewals += 1
        expiry = self.renewals.to_bytes(8, "little")
        return [volume | {"capability": volume["capability"] + expiry + bytes(32)} for volume in self.volumes.values()]

    def map(self, volume_id: int, size_bytes: int, *, read_only: bool = False) -> None:
        self.volumes[volume_id] = {
            "volume_id": volume_id,
            "name": f"vol{volume_id}",
            "size_bytes": size_bytes,
            "read_only": read_only,
            "thick": False,
            "capability": bytes(16) + os.urandom(8),
            "iops_limit": None,
            "bandwidth_limit_mbps": None,
            "created_at": 1e9,
            "used_bytes": 0,
            "used_blocks_bytes": 0,
            "pool": POOL,
        }

    async def tell(self, method: str, **params: Any) -> None:
        for session in self.sessions:
            await session.notify(method, params)


class World:
    """A mount at ``path`` and everything that it talks to."""

    def __init__(self, path: Path, nursery: trio.Nursery) -> None:
        self.path = path
        self.mdm = FakeMdm()
        self.chunks: dict[tuple[int, int], bytearray] = {}
        self.sds = {number: FakeSds(number, self.chunks) for number in (1, 2)}
        self.clients: list[handshake.Peer] = []
        self.stopping = trio.Event()
        self.ended = trio.Event()
        self.nursery = nursery
        self._mdm_scope = trio.CancelScope()
        self.address = ("127.0.0.1", 0)

    async def start_mdm(self) -> None:
        """(Again,) at the same address."""
        self._mdm_scope = trio.CancelScope()

        async def run(*, task_status: Any) -> None:
            with self._mdm_scope:
                server = Server(self.mdm, secret=SECRET, cluster_id=CLUSTER_ID)
                await server.run(*self.address, task_status=task_status)

        self.address = await self.nursery.start(run)

    async def stop_mdm(self) -> None:
        self._mdm_scope.cancel()
        await poll_until_async(lambda: value(not self.mdm.sessions), what="the MDM gone")

    async def start_sds(self, number: int) -> None:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")

        async def accept(stream: trio.SocketStream) -> None:
            fd, peer = await handshake.accept(
                stream,
                secret=SECRET,
                cluster_id=CLUSTER_ID,
                sds_id=number,
                incarnation=1,
                durable_incarnation=1,
                admit=lambda _peer: wire.ST_OK,
            )
            self.clients.append(peer)
            sock = socket.socket(fileno=fd)
            sock.setblocking(True)
            sds = self.sds[number]
            sds._socket = sock
            threading.Thread(target=sds._serve, args=(sock,), daemon=True).start()

        self.nursery.start_soon(trio.serve_listeners, accept, listeners)
        address = listeners[0].socket.getsockname()[:2]
        self.mdm.peers.append({"sds_id": number, "data_address": list(address), "incarnation": 1, "up": True})

    async def serve(self, options: str = "") -> None:
        secret_file = self.path.with_name("secret")
        secret_file.write_bytes(SECRET)
        secret_file.chmod(0o600)
        spec = daemon.MountSpec(str(self.path), "me", self.address, secret_file, parse_options(options), "pfvol:test")

        async def run(*, task_status: Any) -> None:
            await daemon.serve(spec, self.stopping, task_status=task_status)
            self.ended.set()

        await self.nursery.start(run)

    def file(self, volume_id: int) -> Path:
        return self.path / f"vol{volume_id}"

    async def shows(self, condition: Callable[[], Any], what: str) -> None:
        """Waits; the condition looks at files and so may not run in trio's thread."""
        await poll_until_async(lambda: trio.to_thread.run_sync(condition), what=what)


async def value(value: Any) -> Any:
    return value
