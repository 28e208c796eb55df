"""The rebuild as SDSs see it: the real MDM, and fakes that learn when a test says so."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mdm.commands import CreateVolume
from mdm.orchestrator import Orchestrator
from mdm.rebuilder import Rebuilder
from pfvol.constants import SEGMENT_CHUNKS, SEGMENT_ENTRY_FORMAT
from pfvol.errors import CapacityError, NotFoundError
from tests.support.mdmdaemon import FakeSds, Mdm, Nodes, back, cluster, core_cluster, nodes, running_mdm
from tests.support.waiting import poll_until_async

CHUNK = 4 * 1024**2
LIMIT_MBPS = 100
MB = 1_000_000


@dataclass
class Learning:
    """The SDSs of a cluster, with the map as it was pushed to any of them: what engines do about learners."""

    mdm: Mdm
    sds: list[FakeSds]
    map: dict[tuple[int, int], tuple[int, int, int, int, int]] = field(default_factory=dict)
    copied: Counter[int] = field(default_factory=Counter)

    def listen(self, sds: FakeSds) -> None:
        sds.answers["map.changed"] = self._changed

    def _changed(self, params: dict[str, Any]) -> None:
        for volume_id, index, entries in params["segments"]:
            for at, entry in enumerate(struct.iter_unpack(SEGMENT_ENTRY_FORMAT, entries)):
                key = volume_id, index * SEGMENT_CHUNKS + at
                if entry[0] > self.map.get(key, (0,))[0]:
                    self.map[key] = entry

    def by_id(self, sds_id: int) -> FakeSds:
        return next(sds for sds in self.sds if sds.sds_id == sds_id)

    def gone(self, sds: FakeSds) -> bool:
        return sds.session.closed.is_set()

    async def lose(self, lost: FakeSds) -> None:
        """It dies; the others have it left out of everything."""
        lost.session.close("it died")
        await self.mdm.wait_state(lost.name, "DOWN")
        for sds in self.sds:
            if not self.gone(sds):
                params = {"peer": lost.sds_id, "as_primary": True, "as_secondary": True, "except": [], "chunks": None}
                await sds.session.call("sds.leave_out", params)

    async def learn(self) -> int:
        """All learners that the map names become whole, those whose SDS is here; how many."""
        found: dict[tuple[int, int], list[list[int]]] = {}
        for (volume_id, chunk), (epoch, primary, _, learner, _) in self.map.items():
            if learner and not self.gone(self.by_id(learner)) and not self.gone(self.by_id(primary)):
                found.setdefault((primary, learner), []).append([volume_id, chunk, epoch])
        joined = 0
        for (primary, learner), chunks in found.items():
            sds = self.by_id(primary)
            copied = self.copied[primary] + len(chunks) * CHUNK
            params = {"learner": learner, "chunks": chunks, "resync_bytes": copied}
            answer = await sds.session.call("sds.learned", params)
            joined += answer["joined"]
            self.copied[primary] = copied
        for sds in self.sds:
            if not self.gone(sds) and sds.sds_id is not None:
                await sds.report(resync_bytes=self.copied[sds.sds_id], resync_left=0)
        return joined

    async def status(self) -> dict[str, Any]:
        status: dict[str, Any] = await self.mdm.client.get("/rebuild/status/pool")
        return status

    async def until(self, done: Callable[[dict[str, Any]], bool], *, learn: bool = True) -> list[dict[str, Any]]:
        """Learns what there is until the status is as wanted; all statuses on the way."""
        seen: list[dict[str, Any]] = []

        async def reached() -> bool:
            if learn:
                await self.learn()
            seen.append(await self.status())
            return done(seen[-1])

        await poll_until_async(reached, what="the rebuild's status")
        return seen

    async def until_state(self, state: str, *, learn: bool = True) -> list[dict[str, Any]]:
        return await self.until(lambda status: status["state"] == state, learn=learn)

    def rates(self) -> dict[str, int]:
        """What each SDS may copy of the only pool, as it was last told."""
        told = {sds.name: sds.told("resync") for sds in self.sds if not self.gone(sds)}
        return {name: sum(calls[-1]["pools"].values()) for name, calls in told.items() if calls}


@asynccontextmanager
async def learning(path: Path, *, sds: int = 3, **pool: Any) -> AsyncIterator[tuple[Learning, Nodes]]:
    """A thick volume of 100 chunks on SDSs of 1024 slots."""
    async with cluster(path, sds=sds) as (mdm, made, servers):
        world = Learning(mdm, servers)
        for server in servers:
            world.listen(server)
            await server.report(resync_bytes=0, resync_left=0)
        await mdm.client.patch("/pool/pool", **({"rebuild_delay_seconds": 0} | pool))
        await mdm.client.post("/vol/create", pool_id="pool", name="vol", size_bytes=100 * CHUNK, provisioning="thick")
        yield world, made


async def events_of(mdm: Mdm, prefix: str = "REBUILD_") -> list[str]:
    return [event["type"] for event in await mdm.client.get("/event/list") if event["type"].startswith(prefix)]


async def test_lost_copies_are_made_again(tmp_path: Path) -> None:
    """Goal: after an SDS is lost all chunks have two copies on the others; the status says how far it is."""
    async with learning(tmp_path) as (world, _):
        await world.lose(world.sds[0])
        lost = (await world.mdm.client.get("/pool/pool"))["degraded_chunk_count"]
        assert lost > 50
        await world.until(lambda status: status["state"] == "IN_PROGRESS", learn=False)
        seen = await world.until_state("COMPLETED")
        percents = [status["progress_percent"] for status in seen]
        assert percents == sorted(percents)
        assert (percents[-1], seen[-1]["degraded_chunks"]) == (100.0, 0)
        assert seen[-1]["bytes_rebuilt"] == seen[-1]["total_bytes"] == lost * CHUNK  # at once, not by the next report
        pool = await world.mdm.client.get("/pool/pool")
        assert (pool["health"], pool["rebuild_state"], pool["rebuild_progress_percent"]) == ("OK", "COMPLETED", 100.0)
        kinds = await events_of(world.mdm)
        assert (kinds[0], kinds[-1]) == ("REBUILD_START", "REBUILD_COMPLETE")


async def test_what_is_promised_is_reserved_where_it_is_rebuilt(tmp_path: Path) -> None:
    """Goal: an SDS keeps slots free for copies of thick volumes before it is told to learn them."""
    async with learning(tmp_path) as (world, _):
        await world.lose(world.sds[0])
        await world.until_state("COMPLETED")
        for sds in world.sds[1:]:
            names = [method for method, _ in sds.got]
            assert sds.told("reserved")[-1] == {"slots": 100}
            first_learner = next(
                at for at, (method, params) in enumerate(sds.got) if method == "map.changed" and names_learner(params)
            )
            assert "reserved" in names[:first_learner]


def names_learner(params: dict[str, Any]) -> bool:
    return any(
        entry[3] and entry[3] != entry[4]
        for _, _, entries in params["segments"]
        for entry in struct.iter_unpack(SEGMENT_ENTRY_FORMAT, entries)
    )


async def test_an_sds_is_given_the_delay_and_an_operator_may_end_it(tmp_path: Path) -> None:
    """Goal: nothing is assigned while the SDS may come back; `rebuild start` does not wait; the status says why."""
    async with learning(tmp_path, rebuild_delay_seconds=3600) as (world, _):
        await world.lose(world.sds[0])
        status = (await world.until(lambda status: status["reason"] is not None))[-1]
        assert (status["state"], status["degraded_chunks"] > 50) == ("IDLE", True)
        assert "wait for an SDS" in status["reason"]
        await world.mdm.client.post("/rebuild/start/pool")
        await world.until_state("COMPLETED")


async def test_the_limit_is_shared_and_changes_while_it_runs(tmp_path: Path) -> None:
    """Goal: all SDSs together may copy what the pool allows, also after it was changed; nothing when it is done."""
    async with learning(tmp_path, rebuild_rate_limit_mbps=LIMIT_MBPS) as (world, _):
        await world.lose(world.sds[0])

        async def shared(limit_mbps: int) -> bool:
            rates = world.rates()
            return len(rates) == 2 and 0.9 * limit_mbps * MB <= sum(rates.values()) <= limit_mbps * MB

        await poll_until_async(lambda: shared(LIMIT_MBPS), what="the limit is shared")
        assert all(world.rates().values()), "both lead chunks that have to be copied"
        await world.mdm.client.patch("/pool/pool", rebuild_rate_limit_mbps=20)
        await poll_until_async(lambda: shared(20), what="the new limit is shared")
        await world.until_state("COMPLETED")

        async def quiet() -> bool:
            return not any(world.rates().values())

        await poll_until_async(quiet, what="nothing may be copied any more")


async def test_cancelled_until_it_is_started_also_over_a_restart(tmp_path: Path) -> None:
    """Goal: a cancelled pool copies nothing, whatever happens to the MDM, and goes on when it is started."""
    async with learning(tmp_path, rebuild_delay_seconds=3600) as (world, _):
        await world.lose(world.sds[0])
        status = await world.mdm.client.post("/rebuild/cancel/pool")
        assert status["state"] == "CANCELLED"
        await world.mdm.client.patch("/pool/pool", rebuild_delay_seconds=0)
        assert await events_of(world.mdm) == ["REBUILD_CANCELLED"]
        await world.until(lambda status: status["reason"] == "it was cancelled: start it again")
        health = await world.mdm.client.get("/pool/pool/health")
        assert any("CANCELLED" in reason for reason in health["reasons"]), health
    async with running_mdm(tmp_path) as mdm, nodes() as made:
        assert (await mdm.client.get("/rebuild/status/pool"))["state"] == "CANCELLED"
        world.mdm = mdm
        world.sds[1:] = [await again(made, mdm, sds) for sds in world.sds[1:]]
        for sds in world.sds[1:]:
            world.listen(sds)
        started = await mdm.client.post("/rebuild/start/pool")
        assert (started["state"], started["reason"]) == ("IN_PROGRESS", None)  # at once: who waits for its end, waits
        await world.until_state("COMPLETED")


async def test_what_was_copied_before_the_mdm_was_started_is_not_counted_again(tmp_path: Path) -> None:
    async with core_cluster(tmp_path) as (mdm, made, (s1, s2, s3)):
        await mdm.run(CreateVolume(pool_id=1, name="v", size_bytes=100 * CHUNK))
        await s1.leave_out(s2, as_secondary=False)
        await s3.leave_out(s2, as_secondary=False)
        servers, started_again = (
            mdm.orchestrator.membership.sds,
            Rebuilder(Orchestrator(mdm.orchestrator.manager, mdm.orchestrator.membership)),
        )
        for copied, news in ((10**12, 0), (10**12 + 5, 5)):
            servers[s3.sds_id or 0].has_copied(copied)
            assert started_again._newly_copied(mdm.state) == {1: news}
        await back(made, mdm, s1)  # in a new incarnation: all that it has copied is news
        servers[s1.sds_id or 0].has_copied(7)
        assert started_again._newly_copied(mdm.state) == {1: 7}


async def again(made: Nodes, mdm: Mdm, sds: FakeSds) -> FakeSds:
    """The same SDS, connected to an MDM that was started again."""
    back = await made.sds(mdm, sds.name, devices=sds.devices, sds_id=sds.sds_id, incarnation=sds.incarnation)
    await back.register()
    return back


async def test_a_rebuild_without_a_place_stalls_and_goes_on_when_there_is_one(tmp_path: Path) -> None:
    """Goal: STALLED says why; a new SDS ends it, without anybody asking."""
    async with learning(tmp_path, sds=2) as (world, made):
        await world.lose(world.sds[1])
        status = (await world.until_state("STALLED"))[-1]
        assert status["reason"] == "there is no other SDS that is UP"
        assert "REBUILD_STALLED" in await events_of(world.mdm)
        await world.mdm.client.post("/sds/add", pd_id="pd", name="s9", capacity="4GiB")
        more = await made.sds(world.mdm, "s9")
        world.sds.append(more)
        world.listen(more)
        await more.serve()
        await world.until_state("COMPLETED")
        assert (await world.mdm.client.get("/pool/pool"))["health"] == "OK"


async def test_a_removed_sds_is_emptied_and_goes(tmp_path: Path) -> None:
    """Goal: its copies move, the data stays protected all the time, then it is told to stop and is gone."""
    async with learning(tmp_path, sds=3) as (world, _):
        answer = await world.mdm.client.delete("/sds/s1")
        assert answer["deleted"] is False
        shown = await world.mdm.client.get("/sds/s1")
        assert (shown["removing"], shown["state"]) == (True, "UP")

        async def gone() -> bool:
            await world.learn()
            assert (await world.mdm.client.get("/pool/pool"))["health"] == "OK"
            try:
                await world.mdm.client.get("/sds/s1")
            except NotFoundError:
                return True
            return False

        await poll_until_async(gone, what="s1 is gone")
        await world.sds[0].wait_told("stop")
        assert await events_of(world.mdm, "SDS_REMOVE") == ["SDS_REMOVE_START", "SDS_REMOVE"]


async def test_an_sds_that_has_no_room_to_go_to_is_refused(tmp_path: Path) -> None:
    async with learning(tmp_path, sds=3) as (world, _):
        await world.mdm.client.patch("/pool/pool", capacity="8GiB")
        await world.mdm.client.post("/vol/create", pool_id="pool", name="big", size="5GiB", provisioning="thick")
        with pytest.raises(CapacityError, match="cannot be emptied"):
            await world.mdm.client.delete("/sds/s1")


async def test_an_added_sds_gets_its_share(tmp_path: Path) -> None:
    """Goal: copies are moved to a new SDS until all have as many; no chunk is degraded by it."""
    async with learning(tmp_path, sds=3) as (world, made):
        await world.mdm.client.post("/sds/add", pd_id="pd", name="s4", capacity="4GiB")
        more = await made.sds(world.mdm, "s4")
        world.sds.append(more)
        world.listen(more)
        await more.serve()

        async def even() -> bool:
            await world.learn()
            assert (await world.mdm.client.get("/pool/pool"))["health"] == "OK"
            counts = [row["chunk_count"] for row in await world.mdm.client.get("/sds/list")]
            return max(counts) - min(counts) <= 4

        await poll_until_async(even, what="all SDSs have as many copies")
        await world.until_state("COMPLETED")
