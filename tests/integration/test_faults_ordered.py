"""Goal: what the MDM makes of orders to have an SDS fail or suffer: checked, carried out, shown, and told as events."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio

from mdm import faults
from mdm.commands import CreateProtectionDomain
from pfvol.errors import ConflictError, Error, InvalidError, NotFoundError
from tests.support.mdmdaemon import FakeSds, Mdm, back, cluster, core_cluster
from tests.support.waiting import poll_until_async


class Suffering:
    """An SDS's part: what it was ordered, and what it says is in force."""

    def __init__(self, sds: FakeSds) -> None:
        self.status: dict[str, Any] = {
            "revision": 0,
            "failed": False,
            "until_unix": None,
            "rules": [],
            "errors_injected": 0,
            "delays_injected": 0,
            "blocks_corrupted": 0,
        }
        self.sds = sds
        for order in ("fail", "recover", "inject"):
            sds.answers[f"sds.{order}"] = getattr(self, order)

    def _now(self, **changes: Any) -> dict[str, Any]:
        self.status |= {"revision": self.status["revision"] + 1, **changes}
        return self.status

    def fail(self, params: dict[str, Any]) -> dict[str, Any]:
        return self._now(failed=True, until_unix=None if params["seconds"] is None else 2_000_000_000.5)

    def recover(self, _: dict[str, Any]) -> dict[str, Any]:
        return self._now(failed=False, until_unix=None)

    def inject(self, params: dict[str, Any]) -> dict[str, Any]:
        rules = [f"{call}={error}@{share // 10000}%" for call, error, share in params["errors"]]
        return self._now(rules=rules, blocks_corrupted=self.status["blocks_corrupted"] + len(params["corrupt"]))


async def events(mdm: Mdm, kind: str) -> list[dict[str, Any]]:
    return [event for event in await mdm.client.get("/event/list") if event["type"] == kind]


async def refused(mdm: Mdm, path: str, error: type[Error], **body: Any) -> str:
    with pytest.raises(error) as caught:
        await mdm.client.post(path, **body)
    return caught.value.message


async def test_an_sds_fails_and_recovers(tmp_path: Path) -> None:
    async with cluster(tmp_path) as (mdm, made, sds):
        one = Suffering(sds[0])
        await sds[0].register(faults=one.status)
        row = await mdm.client.post("/sds/s1/fail", duration=30)
        assert (row["state"], row["faults"]["failed"]) == ("DOWN", True)
        assert row["faults"]["until"] == "2033-05-18T03:33:20.500000Z"
        assert sds[0].told("sds.fail") == [{"seconds": 30.0}]
        await sds[0].session.closed.wait()
        assert "not reachable" in await refused(mdm, "/sds/s1/fail", ConflictError)
        # It comes back to be told of the end, without its devices and without an incarnation.
        again = await made.sds(mdm, "s1", sds_id=sds[0].sds_id, incarnation=0)
        one.__init__(again)  # type: ignore[misc]
        one._now(failed=True)
        await again.register(faults=one.status)
        assert await mdm.state_of("s1") == "DOWN"
        assert "on purpose: `pfvol sds recover s1`" in str((await mdm.client.get("/system/status"))["reasons"])

        async def answers_when_it_is_back() -> None:
            await again.session.closed.wait()
            sds[0] = await back(made, mdm, sds[0])

        made._nursery.start_soon(answers_when_it_is_back)
        row = await mdm.client.post("/sds/s1/recover")
        assert (row["state"], row["faults"]["failed"]) == ("UP", False)
        assert [event["message"] for event in await events(mdm, "SDS_FAILED")] == [
            "SDS s1 fails on purpose until 2033-05-18T03:33:20.500000+00:00",
            "SDS s1 fails on purpose until it is recovered",
        ]
        assert len(await events(mdm, "SDS_RECOVERED")) == 1


async def test_a_failure_that_ends_by_itself_is_told_when_the_sds_registers(tmp_path: Path) -> None:
    async with cluster(tmp_path) as (mdm, made, sds):
        one = Suffering(sds[0])
        await sds[0].register(faults=one.status)
        await mdm.client.post("/sds/s1/fail", duration=1)
        await mdm.wait_state("s1", "DOWN")
        one._now(failed=False, until_unix=None)
        again = await made.sds(mdm, "s1", sds_id=sds[0].sds_id, devices=sds[0].devices, incarnation=2)
        await again.register(faults=one.status)
        assert await mdm.state_of("s1") == "UP"
        assert len(await events(mdm, "SDS_RECOVERED")) == 1


async def test_who_is_back_before_its_failure_is_noted_stays_up(tmp_path: Path) -> None:
    async with core_cluster(tmp_path) as (core, made, sds):
        one = Suffering(sds[0])
        await sds[0].register(faults=one.status)

        async def comes_back() -> None:
            sds[0] = await back(made, core, sds[0])

        async with trio.open_nursery() as nursery:

            async def fail_shortly(params: dict[str, Any]) -> dict[str, Any]:
                for number in range(100):  # What is to be noted waits behind these.
                    nursery.start_soon(core.run, CreateProtectionDomain(name=f"busy{number}"))
                nursery.start_soon(comes_back)
                return one.fail(params)

            sds[0].answers["sds.fail"] = fail_shortly
            assert sds[0].sds_id is not None
            await faults.fail(core.orchestrator, sds[0].sds_id, 0.01)
        assert core.state.sds[sds[0].sds_id].state == "UP"


async def test_faults_of_disks(tmp_path: Path) -> None:
    async with cluster(tmp_path) as (mdm, _, sds):
        one = Suffering(sds[0])
        await sds[0].register(faults=one.status)
        await mdm.client.post("/vol/create", pool_id="pool", name="v", size="64MiB")
        rows = await mdm.client.get("/vol/v/chunks")
        here = next(row["index"] for row in rows if any(copy["sds_name"] == "s1" for copy in row["replicas"]))
        there = next(row["index"] for row in rows if all(copy["sds_name"] != "s1" for copy in row["replicas"]))
        row = await mdm.client.post("/sds/s1/inject", errors=["pread=EIO@1%"], delays=["pwrite=20ms"], full=True)
        assert row["faults"]["rules"] == ["pread=EIO@1%", "pwrite=ENOSPC@100%", "fallocate=ENOSPC@100%"]
        volume_id = int((await mdm.client.get("/vol/v"))["id"][-8:], 16)
        await mdm.client.post("/sds/s1/inject", corrupt=[f"v/{here}:7", f"{here}:8"], clear=True)
        (first, second) = sds[0].told("sds.inject")
        assert first["delays"] == [["pwrite", 20000]]
        assert not first["clear"]
        assert second["corrupt"] == [[volume_id, here, 7], [volume_id, here, 8]]
        assert second["clear"]
        assert [event["message"] for event in await events(mdm, "SDS_FAULTS_INJECTED")] == [
            "SDS s1 has disks with faults on purpose: pread=EIO@1%, pwrite=ENOSPC@100%, fallocate=ENOSPC@100%",
            "SDS s1 has no faults of its disks on purpose any more",
            "SDS s1 has corrupted 2 blocks of its own on purpose",
        ]
        path = "/sds/s1/inject"
        assert "has no copy of chunk" in await refused(mdm, path, ConflictError, corrupt=[f"v/{there}:0"])
        assert "has chunks 0 to 15" in await refused(mdm, path, NotFoundError, corrupt=["v/16:0"])
        assert "no volume" in await refused(mdm, path, NotFoundError, corrupt=["w/0:0"])
        assert "nothing to inject" in await refused(mdm, path, InvalidError)
        assert "no call of a disk" in await refused(mdm, path, InvalidError, errors=["read=EIO@1%"])
        assert "no SDS" in await refused(mdm, "/sds/nobody/inject", NotFoundError, clear=True)
        await mdm.client.post("/vol/create", pool_id="pool", name="w", size="64MiB")
        assert "name the volume: VOLUME/3:1 (on SDS s1: v, w)" in await refused(
            mdm, path, InvalidError, corrupt=["3:1"]
        )
        assert len(sds[0].told("sds.inject")) == 2


async def test_what_an_sds_refuses_is_said_and_overtaken_words_are_ignored(tmp_path: Path) -> None:
    async with cluster(tmp_path) as (mdm, _, sds):
        one = Suffering(sds[0])
        await sds[0].register(faults=one.status)

        def refuse(_: Any) -> None:
            raise ConflictError("SDS s1 has not failed, and all its devices are in service")

        sds[0].answers["sds.recover"] = refuse
        assert "has not failed" in await refused(mdm, "/sds/s1/recover", ConflictError)
        old = dict(one.status)
        await mdm.client.post("/sds/s1/inject", errors=["pread=EIO@1%"])
        for told in (old, one.status | {"errors_injected": 5}):
            await sds[0].session.notify("sds.report", {"stats": {}, "failed_devices": [], "purged": [], "faults": told})

        async def counted() -> bool:
            return bool((await mdm.client.get("/sds/s1"))["faults"]["errors_injected"] == 5)

        await poll_until_async(counted, what="its report is shown")
        assert len(await events(mdm, "SDS_FAULTS_INJECTED")) == 1
        corrupted = one.status | {"blocks_corrupted": 3}
        for told in (corrupted, one.status, corrupted | {"errors_injected": 6}):  # Corrupting raises no revision.
            await sds[0].session.notify("sds.report", {"stats": {}, "failed_devices": [], "purged": [], "faults": told})

        async def counted_again() -> bool:
            return bool((await mdm.client.get("/sds/s1"))["faults"]["errors_injected"] == 6)

        await poll_until_async(counted_again, what="its report is shown")
        assert len(await events(mdm, "SDS_FAULTS_INJECTED")) == 2
        await sds[0].session.notify(
            "sds.report", {"stats": {}, "failed_devices": [], "purged": [], "faults": {"failed": "yes"}}
        )
        assert (await mdm.client.get("/sds/s1"))["faults"]["rules"] == ["pread=EIO@1%"]
