"""Goal: the SDS role comes to serve, stays serving, and stops, whatever state its data and its MDM are in."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from datapath import wire
from pfvol import config as configuration
from pfvol.errors import ConfigError, ConflictError, DeviceError, NotFoundError, VersionError
from pfvol.log import get_logger
from pfvol.node import STOP_SECONDS, Node
from pfvol.rpc.server import Server
from pfvol.rpc.session import Session
from pfvol.sds.daemon import advertised, run_role
from tests.support.dataclient import DataClient
from tests.support.sdspair import CLUSTER, KEY, SECRET, SLOTS, PlayedMdm
from tests.support.waiting import poll_until_async

SDS_ID = 3
VOLUME, SDC = 5, 7


@dataclass
class Mdm:
    """Speaks the real control RPC; what it says is the test's."""

    volumes: PlayedMdm = field(default_factory=PlayedMdm)
    admitted: bool = True
    cluster_id: bytes = CLUSTER
    sds_id: int = SDS_ID
    devices: int = 2
    refuse: Exception | None = None
    purge: list[int] = field(default_factory=list)
    registrations: list[dict[str, Any]] = field(default_factory=list)
    reports: list[dict[str, Any]] = field(default_factory=list)
    session: Session | None = None

    def opened(self, session: Session) -> None:
        self.session = session

    def closed(self, session: Session) -> None:
        self.session = None

    async def handle(self, session: Session, method: str, params: dict[str, Any]) -> Any:
        if method == "sds.register":
            self.registrations.append(params)
            return self._register()
        if method == "sds.report":
            self.reports.append(params)
            return None
        return await self.volumes.call(method, params)

    def _register(self) -> dict[str, Any]:
        if self.refuse:
            raise self.refuse
        if not self.admitted:
            return {"admitted": False, "cluster_id": self.cluster_id}
        return {
            "admitted": True,
            "cluster_id": self.cluster_id,
            "sds_id": self.sds_id,
            "name": "sds1",
            "capability_key": KEY,
            "devices": [{"index": index, "path": None, "slots": SLOTS} for index in range(self.devices)],
            "reserved_slots": 0,
            "map_version": 0,
            "resync": {},
            "peers": [],
            "purge": self.purge,
            "volumes": [],
            "learning": [],
        }

    @asynccontextmanager
    async def listening(self, port: int) -> AsyncIterator[None]:
        async with trio.open_nursery() as nursery:
            await nursery.start(Server(self, secret=SECRET, cluster_id=self.cluster_id).run, "127.0.0.1", port)
            yield
            nursery.cancel_scope.cancel()


@dataclass
class Environment:
    """A data directory and an MDM's address."""

    directory: Path
    mdm_port: int

    @property
    def node_dir(self) -> Path:
        return self.directory / "sds1"

    def node(self, data_port: int = 0) -> Node:
        document = {
            "node": {"name": "sds1", "capabilities": ["sds"], "data_dir": str(self.directory)},
            "cluster": {"mdm": f"127.0.0.1:{self.mdm_port}"},
            "sds": {"data_port": data_port},
        }
        return Node(configuration.parse(document, {}, source="test"), get_logger("test"))

    @asynccontextmanager
    async def running(self, data_port: int = 0) -> AsyncIterator[int]:
        """The role as a node runs it; gives its data port. Stopped clean, within the time that a node allows."""
        node = self.node(data_port)
        ended = trio.Event()

        async def run(*, task_status: trio.TaskStatus[dict[str, Any]]) -> None:
            await run_role(node, task_status=task_status)
            ended.set()

        async with trio.open_nursery() as nursery:
            info = await nursery.start(run)
            yield info["data_address"][1]
            node.stopping.set()
            with trio.fail_after(STOP_SECONDS):
                await ended.wait()


@pytest.fixture
def place(tmp_path: Path) -> Environment:
    secret = tmp_path / "secret"
    secret.write_bytes(SECRET)
    secret.chmod(0o600)
    (tmp_path / "sds1").mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return Environment(tmp_path, port)


until = partial(poll_until_async, timeout_seconds=10)


async def client(port: int, incarnation: int = 1) -> DataClient:
    return await DataClient.connect(
        port, secret=SECRET, cluster_id=CLUSTER, sds_id=SDS_ID, node_id=SDC, incarnation=incarnation
    )


async def serves(port: int, incarnation: int = 1) -> None:
    """Until a client gets in."""

    async def connected() -> bool:
        try:
            async with await client(port, incarnation):
                return True
        except Exception:
            return False

    await poll_until_async(connected, timeout_seconds=10)


async def test_a_new_sds_makes_its_devices_as_told_and_serves(place: Environment) -> None:
    mdm = Mdm()
    async with mdm.listening(place.mdm_port), place.running() as port:
        await serves(port)
        first, *_, last = mdm.registrations
        assert (first["devices"], first["sds_id"], first["incarnation"]) == ([], None, 0)
        assert [(one["index"], one["slots"]) for one in last["devices"]] == [(0, SLOTS), (1, SLOTS)]
        assert last["incarnation"] >= last["durable_incarnation"] > 0
        assert last["data_address"] == ["127.0.0.1", port]
        await until(lambda: mdm.reports and mdm.reports[-1]["stats"].get("slots_total") == 2 * SLOTS)
        assert mdm.reports[-1]["failed_devices"] == []
    assert json.loads((place.node_dir / "sds.json").read_text())["sds_id"] == SDS_ID


async def test_it_comes_back_with_its_port_its_devices_and_a_higher_incarnation(place: Environment) -> None:
    mdm = Mdm()
    async with mdm.listening(place.mdm_port):
        async with place.running() as port:
            await serves(port)
        before = mdm.registrations[-1]
        async with place.running() as again:
            await serves(again)
            assert again == port
            after = mdm.registrations[-1]
            assert after["incarnation"] > before["incarnation"]
            assert after["durable_incarnation"] == before["durable_incarnation"]
            assert after["devices"] == before["devices"]


async def test_an_sds_that_is_not_admitted_refuses_clients_until_it_is(place: Environment) -> None:
    mdm = Mdm(admitted=False)
    async with mdm.listening(place.mdm_port), place.running() as port:
        await until(lambda: mdm.registrations)
        with pytest.raises(OSError, match=r"refused|all attempts"):
            await trio.open_tcp_stream("127.0.0.1", port)
        assert not (place.node_dir / "devices").exists()
        mdm.admitted = True
        assert mdm.session is not None
        await mdm.session.call("sds.admitted")
        await serves(port)


async def test_an_admission_that_fails_is_tried_again(place: Environment) -> None:
    """Its MDM could not write just then: the SDS must not stay connected and unregistered for good."""
    mdm = Mdm(admitted=False)
    async with mdm.listening(place.mdm_port), place.running() as port:
        await until(lambda: mdm.registrations)
        mdm.admitted, mdm.refuse = True, DeviceError("no space left on device")
        first = mdm.session
        assert first is not None
        await first.call("sds.admitted")
        await until(first.closed.is_set)
        mdm.refuse = None
        await serves(port)


async def test_a_start_while_the_mdm_is_away_waits_for_it(place: Environment) -> None:
    mdm = Mdm()
    async with mdm.listening(place.mdm_port), place.running() as port:
        await serves(port)
    async with place.running() as port:
        with pytest.raises(OSError, match=r"refused|all attempts"):
            await trio.open_tcp_stream("127.0.0.1", port)
        async with mdm.listening(place.mdm_port):
            await serves(port)


async def test_what_is_known_goes_on_without_the_mdm_and_it_registers_again(place: Environment) -> None:
    mdm = Mdm()
    mdm.volumes.add_volume(VOLUME)
    async with place.running() as port:
        async with mdm.listening(place.mdm_port):
            await serves(port)
            token = mdm.volumes.map(VOLUME, SDC)
            async with await client(port) as first:
                assert (await first.capability(VOLUME, token)).status == wire.ST_OK
        async with await client(port) as second:
            assert (await second.capability(VOLUME, token)).status == wire.ST_OK
        count = len(mdm.registrations)
        async with mdm.listening(place.mdm_port):
            await until(lambda: len(mdm.registrations) > count)
            assert mdm.registrations[-1]["sds_id"] == SDS_ID


@pytest.mark.parametrize("damage", ["missing", "superblock", "locked"])
async def test_an_sds_with_a_bad_device_stays_up_serves_nothing_and_says_so(place: Environment, damage: str) -> None:
    mdm = Mdm()
    device = place.node_dir / "devices" / "dev1"
    async with mdm.listening(place.mdm_port):
        async with place.running() as port:
            await serves(port)
        holder = None
        if damage == "missing":
            shutil.rmtree(device)
        elif damage == "superblock":
            for name in ("superblock", "superblock.new"):  # the one before, which is taken when the other has rotted
                data = bytearray((device / name).read_bytes())
                data[40] ^= 1
                (device / name).write_bytes(data)
        else:
            from datapath.blockfile import BlockDevice

            holder = BlockDevice.open(device)
        mdm.reports.clear()
        async with place.running() as port:
            await until(lambda: mdm.reports)
            assert mdm.registrations[-1]["devices"] == []
            ((index, message),) = mdm.reports[-1]["failed_devices"]
            assert index == 1
            assert str(device) in message
            with pytest.raises(OSError, match=r"refused|all attempts"):
                await trio.open_tcp_stream("127.0.0.1", port)
            assert mdm.session is not None
            with pytest.raises(ConflictError):
                await mdm.session.call("verify", {"volume_id": 1, "first_chunk": 0, "count": 1})
        if holder is not None:
            holder.close()


@pytest.mark.parametrize("other", [{"cluster_id": bytes(15) + b"x"}, {"sds_id": 4}])
async def test_the_data_of_another_cluster_or_sds_is_not_served(place: Environment, other: dict[str, Any]) -> None:
    mdm = Mdm()
    async with mdm.listening(place.mdm_port), place.running() as port:
        await serves(port)
    stranger = Mdm(**other)
    async with stranger.listening(place.mdm_port), place.running() as port:
        await until(lambda: stranger.registrations)
        await trio.testing.wait_all_tasks_blocked(0.1)
        with pytest.raises(OSError, match=r"refused|all attempts"):
            await trio.open_tcp_stream("127.0.0.1", port)


async def test_the_mdm_can_ask_for_everything_that_it_may(place: Environment) -> None:
    mdm = Mdm(purge=[77])
    mdm.volumes.add_volume(VOLUME)
    async with mdm.listening(place.mdm_port), place.running() as port:
        await serves(port)
        assert mdm.session is not None
        call = mdm.session.call
        await until(lambda: any(77 in report["purged"] for report in mdm.reports))
        answer = await call("verify", {"volume_id": VOLUME, "first_chunk": 0, "count": 3})
        assert answer == [[False, None, None]] * 3
        await call("peers", {"peers": []})
        await call("reserved", {"slots": 4})
        await call("volume.changed", {"volume_id": VOLUME, "info": mdm.volumes.info(VOLUME)})
        await call("volume.revoked", {"volume_id": VOLUME, "sdc_id": SDC})
        await call("volume.deleted", {"volume_id": VOLUME})
        await until(lambda: any(VOLUME in report["purged"] for report in mdm.reports))
        with pytest.raises(NotFoundError):
            await call("no.such", {})
        for method in ("verify", "volume.changed", "volume.deleted", "volume.revoked", "peers", "reserved"):
            with pytest.raises(Exception, match=r"parameters"):
                await call(method, {})
        async with await client(port, 2):
            pass


async def test_stop_ends_the_role(place: Environment) -> None:
    mdm = Mdm()
    ended = trio.Event()

    async def run(*, task_status: trio.TaskStatus[dict[str, Any]]) -> None:
        await run_role(place.node(), task_status=task_status)
        ended.set()

    async with mdm.listening(place.mdm_port), trio.open_nursery() as nursery:
        info = await nursery.start(run)
        await serves(info["data_address"][1])
        assert mdm.session is not None
        await mdm.session.notify("stop", {})
        with trio.fail_after(20):
            await ended.wait()


async def test_a_port_that_is_taken_is_said_and_one_that_we_chose_is_replaced(place: Environment) -> None:
    mdm = Mdm()
    async with mdm.listening(place.mdm_port):
        async with place.running() as chosen:
            await serves(chosen)
        with socket.socket() as taken:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taken.bind(("127.0.0.1", chosen))
            taken.listen()
            with pytest.raises(ConfigError, match=f"{chosen}"):
                await run_role(place.node(data_port=chosen))
            async with place.running() as other:
                assert other != chosen
                await serves(other)


@pytest.mark.parametrize(
    ("text", "error"), [("{", ConfigError), ('{"format": 99}', VersionError), ('{"format": 1}', ConfigError)]
)
async def test_a_damaged_state_file_ends_the_start_and_is_named(
    place: Environment, text: str, error: type[Exception]
) -> None:
    (place.node_dir / "sds.json").write_text(text)
    with pytest.raises(error, match=r"sds\.json"):
        await run_role(place.node())


def test_the_address_to_tell_is_one_that_others_can_reach() -> None:
    assert advertised("192.0.2.7", ("127.0.0.1", 1)) == "192.0.2.7"
    assert advertised("0.0.0.0", ("127.0.0.1", 1)) == "127.0.0.1"
