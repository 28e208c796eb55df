"""Goal: the end of a failure, and of a device's, is a start; one that goes wrong costs nothing, and can be repeated."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from structlog.testing import capture_logs

from datapath import disk, wire
from pfvol.constants import CHUNK_SIZE_BYTES
from pfvol.errors import ConfigError, ConflictError
from pfvol.rpc.session import Session
from pfvol.sds import acceptor
from tests.integration.test_sds_daemon import SDC, SDS_ID, VOLUME, Environment, Mdm, client, place, serves, until
from tests.support.sdspair import Volume

__all__ = ["place"]


class Orders(Mdm):
    """An MDM that orders failures and their ends, and ends the session after, as the real one does."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = trio.Event()
        self.gate.set()

    async def handle(self, session: Session, method: str, params: dict[str, Any]) -> Any:
        answer = await super().handle(session, method, params)
        if method == "sds.register":
            await self.gate.wait()
        return answer

    async def order(self, method: str, **params: Any) -> Any:
        await until(lambda: self.session is not None)
        session = self.session
        assert session is not None
        answer = await session.call(f"sds.{method}", params, timeout=30)
        if method != "inject":
            session.close("begins anew")
        return answer

    async def registers(self, *, failed: bool) -> dict[str, Any]:
        """What it says when it has come back."""
        count = len(self.registrations)
        await until(lambda: len(self.registrations) > count)
        assert self.registrations[-1]["faults"]["failed"] is failed
        return self.registrations[-1]


@asynccontextmanager
async def serving(place: Environment, data_port: int = 0) -> AsyncIterator[tuple[Orders, int]]:
    mdm = Orders()
    try:
        async with mdm.listening(place.mdm_port), place.running(data_port) as port:
            await serves(port)
            yield mdm, port
    finally:
        disk.clear()


def unwritable(place: Environment) -> Path:
    """What is in the way of faults.json, until it is removed."""
    obstacle = place.node_dir / "faults.json.new"
    obstacle.mkdir()
    return obstacle


async def test_an_sds_fails_and_recovers(place: Environment) -> None:
    async with serving(place) as (mdm, port):
        assert (await mdm.order("fail", seconds=None))["failed"]
        assert (await mdm.registers(failed=True))["devices"] == []
        await mdm.order("recover")
        await serves(port)
        with pytest.raises(ConflictError, match="has not failed"):
            await mdm.order("recover")


async def test_a_failure_that_cannot_be_saved_is_none(place: Environment) -> None:
    async with serving(place) as (mdm, port):
        obstacle = unwritable(place)
        with pytest.raises(ConfigError, match=r"faults\.json"):
            await mdm.order("fail", seconds=None)
        await serves(port)
        assert mdm.session is not None
        mdm.session.close("once more")
        assert (await mdm.registers(failed=False))["devices"] != []
        obstacle.rmdir()
        await mdm.order("fail", seconds=None)
        await mdm.registers(failed=True)


async def test_an_end_that_cannot_be_saved_is_none_and_can_be_ordered_again(place: Environment) -> None:
    async with serving(place) as (mdm, port):
        await mdm.order("fail", seconds=None)
        await mdm.registers(failed=True)
        obstacle = unwritable(place)
        with pytest.raises(ConfigError, match=r"faults\.json"):
            await mdm.order("recover")
        obstacle.rmdir()
        await mdm.order("recover")
        await serves(port)


async def test_a_recovery_without_its_port_is_told_to_the_mdm_and_can_be_ordered_again(place: Environment) -> None:
    with trio.socket.socket() as free:
        await free.bind(("127.0.0.1", 0))
        wanted = free.getsockname()[1]
    async with serving(place, wanted) as (mdm, port):
        assert port == wanted
        await mdm.order("fail", seconds=None)
        await mdm.registers(failed=True)
        # Both are bound, as neither listens; then one listens, and the other cannot be bound again.
        taken = await acceptor.bind("127.0.0.1", port)
        taken.listen()
        with pytest.raises(ConfigError, match=f"{port}"):
            await mdm.order("recover")
        assert (await mdm.registers(failed=False))["devices"] == []
        taken.close()
        await mdm.order("recover")
        await serves(port)


async def test_a_failure_that_is_ordered_while_a_recovery_waits_comes_after_it(place: Environment) -> None:
    async with serving(place) as (mdm, port):
        await mdm.order("fail", seconds=None)
        await mdm.registers(failed=True)
        session = mdm.session
        assert session is not None
        mdm.gate, count = trio.Event(), len(mdm.registrations)
        async with trio.open_nursery() as nursery:
            await session.call("sds.admitted")
            await until(lambda: len(mdm.registrations) > count)
            for method, params in (("sds.recover", {}), ("sds.fail", {"seconds": None})):
                nursery.start_soon(session.call, method, params)
                await trio.testing.wait_all_tasks_blocked(0.1)
            mdm.gate.set()
        session.close("begins anew")
        assert (await mdm.registers(failed=True))["devices"] == []
        await mdm.order("recover")
        await serves(port)


async def test_the_end_of_a_failure_by_itself_is_tried_until_it_works(place: Environment) -> None:
    async with serving(place) as (mdm, port):
        await mdm.order("fail", seconds=0.5)
        obstacle = unwritable(place)
        with capture_logs() as lines:
            await until(lambda: any(line["event"].startswith("does not recover") for line in lines))
        assert (await mdm.order("inject", errors=[], delays=[], corrupt=[], clear=False))["failed"]
        obstacle.rmdir()
        await serves(port)


async def lose_device(mdm: Orders, port: int) -> int:
    """The index of a device that the engine has taken out of service."""
    token = mdm.volumes.map(VOLUME, SDC)
    await mdm.order("inject", errors=[["fdatasync", "EIO", 1_000_000]], delays=[], corrupt=[], clear=False)
    async with await client(port) as writer:
        assert (await writer.capability(VOLUME, token)).status == wire.ST_OK
        await writer.write_until_taken(VOLUME, bytes(4096))
        await writer.request(wire.OP_FLUSH, volume_id=VOLUME)
    await until(lambda: mdm.reports and mdm.reports[-1]["failed_devices"])
    ((index, _),) = mdm.reports[-1]["failed_devices"]
    return int(index)


async def test_an_sds_goes_on_without_a_device_that_is_no_better(place: Environment) -> None:
    async with serving(place) as (mdm, port):
        mdm.volumes.volumes[VOLUME] = Volume(CHUNK_SIZE_BYTES, [(1, SDS_ID, 0)])
        index = await lose_device(mdm, port)
        count, incarnation = len(mdm.registrations), mdm.registrations[-1]["incarnation"]
        with pytest.raises(ConflictError, match="err on purpose"):
            await mdm.order("recover")
        await mdm.order("inject", errors=[], delays=[], corrupt=[], clear=True)
        device = place.node_dir / "devices" / f"dev{index}"
        for name in ("away", "empty", "another"):
            device.rename(place.directory / "kept")
            if name != "away":
                device.mkdir()
            if name == "another":
                shutil.copytree(device.with_name(f"dev{1 - index}"), device, dirs_exist_ok=True)
            with pytest.raises(ConflictError, match=rf"device {index}, which is no better: .*dev{index}"):
                await mdm.order("recover")
            if name != "away":
                shutil.rmtree(device)
            (place.directory / "kept").rename(device)
        await serves(port, 2)
        assert len(mdm.registrations) == count
        await mdm.order("recover")
        await until(lambda: mdm.registrations[-1]["incarnation"] > incarnation)
        assert len(mdm.registrations[-1]["devices"]) == 2
        await serves(port, 3)
        mdm.reports.clear()
        await until(lambda: mdm.reports)
        assert mdm.reports[-1]["failed_devices"] == []
