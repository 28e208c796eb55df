"""What the MDM decides when SDSs lose each other, and how everybody hears of it: the real daemon and control RPC."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio

from mdm.witness import PING_SECONDS_MAX, SILENT_AFTER_SECONDS
from pfvol.errors import ConflictError, DeniedError, InvalidError, NotFoundError
from tests.support.mdmdaemon import FakeSds, Mdm, Nodes, back, chunks_of, cluster, never, nodes, running_mdm, until
from tests.support.waiting import poll_until_async


async def make_volume(mdm: Mdm, name: str = "v", size: str = "1GiB") -> int:
    made = await mdm.client.post("/vol/create", pool_id="pool", name=name, size=size)
    return int(made["id"][-8:], 16)


# -- leaving out


async def test_a_killed_sds_is_left_out_at_once_and_known_to_be_dead(tmp_path: Path) -> None:
    async with cluster(tmp_path) as (mdm, _made, (s1, s2, s3)):
        volume_id = await make_volume(mdm)
        entries = await s1.fetch(volume_id)
        await s3.fetch(volume_id)
        shared = chunks_of(entries, s1, s2) + chunks_of(entries, s2, s1)
        s2.session.close("killed")
        answer = await s1.leave_out(s2)
        assert (answer["left"], answer["version"]) == (len(shared), 2)
        await until(lambda: s1.version == 2, "s1 has the map")
        assert sorted(chunks_of(s1.entries(volume_id), s1, None)) == sorted(shared)
        await until(lambda: s3.version == 2, "the others have it")
        assert s3.entries(volume_id) == s1.entries(volume_id)
        assert (await s1.leave_out(s2)) == {"left": 0, "dead": True, "version": 2}
        await mdm.wait_state("s2", "DOWN")
        volume = await mdm.client.get("/vol/v")
        assert (volume["state"], volume["health"]) == ("DEGRADED", "DEGRADED")
        types = [event["type"] for event in await mdm.client.get("/event/list")]
        assert types.count("CHUNKS_LEFT_OUT") == 1


async def test_whoever_speaks_again_is_not_dead(tmp_path: Path) -> None:
    async with cluster(tmp_path) as (mdm, made, (s1, s2, _s3)):
        await make_volume(mdm)
        s2.session.close("killed")
        await mdm.wait_state("s2", "DOWN")
        assert (await s1.leave_out(s2))["dead"] is True
        await back(made, mdm, s2)
        assert (await s1.leave_out(s2))["dead"] is False


async def test_an_sds_that_the_mdm_gave_up_is_not_dead(tmp_path: Path) -> None:
    async with cluster(tmp_path) as (mdm, _made, (s1, s2, _s3)):
        await make_volume(mdm)

        def refuse(_: Any) -> None:
            raise ConflictError("not now")

        s2.answers["map.changed"] = refuse
        await s1.leave_out(s2)
        with trio.fail_after(10):
            await s2.session.closed.wait()
        await mdm.wait_state("s2", "DOWN")
        assert (await s1.leave_out(s2))["dead"] is False


async def test_what_was_asked_in_vain_is_done_when_there_is_something_to_do(tmp_path: Path) -> None:
    async with cluster(tmp_path) as (mdm, _made, (s1, s2, _s3)):
        for name in ("v", "w"):
            assert [(await s1.leave_out(s2, as_secondary=False))["left"] for _ in range(2)] == [0, 0]
            led = chunks_of(await s1.fetch(await make_volume(mdm, name)), s1, s2)
            assert (await s1.leave_out(s2, as_secondary=False))["left"] == len(led) > 0


async def test_two_that_lost_each_other_keep_what_they_lead(tmp_path: Path) -> None:
    async with cluster(tmp_path) as (mdm, _made, (s1, s2, _s3)):
        volume_id = await make_volume(mdm)
        entries = await s1.fetch(volume_id)
        answers: dict[str, int] = {}

        async def ask(one: FakeSds, other: FakeSds) -> None:
            answers[one.name] = (await one.leave_out(other))["left"]

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, s1, s2)
            nursery.start_soon(ask, s2, s1)
        first, second = chunks_of(entries, s1, s2), chunks_of(entries, s2, s1)
        assert answers == {"s1": len(first), "s2": len(second)}
        now = await s1.fetch(volume_id)
        assert (chunks_of(now, s1, None), chunks_of(now, s2, None)) == (first, second)


async def test_a_frozen_one_is_replaced_where_it_leads_after_a_ping(tmp_path: Path) -> None:
    async with cluster(tmp_path) as (mdm, _made, (s1, s2, _s3)):
        volume_id = await make_volume(mdm)
        entries = await s1.fetch(volume_id)
        s2.answers["ping"] = never
        started = trio.current_time()
        answer = await s1.leave_out(s2)
        assert trio.current_time() - started < PING_SECONDS_MAX + 1
        assert answer["left"] == len(chunks_of(entries, s1, s2) + chunks_of(entries, s2, s1))
        assert answer["dead"] is False


async def test_one_that_answers_but_says_nothing_of_the_trouble_is_replaced_later(tmp_path: Path) -> None:
    async with cluster(tmp_path) as (mdm, _made, (s1, s2, _s3)):
        volume_id = await make_volume(mdm)
        entries = await s1.fetch(volume_id)
        started = trio.current_time()
        assert (await s1.leave_out(s2))["left"] == len(chunks_of(entries, s1, s2))
        answers: list[int] = []

        async def left_out() -> bool:
            answers.append((await s1.leave_out(s2))["left"])
            return answers[-1] > 0

        await poll_until_async(left_out)
        assert trio.current_time() - started >= SILENT_AFTER_SECONDS
        assert answers[-1] == len(chunks_of(entries, s2, s1))


async def test_one_that_says_a_word_of_the_trouble_is_not_replaced(tmp_path: Path) -> None:
    """It may only lack the agreement that it needs to leave the other one out itself."""
    async with cluster(tmp_path) as (mdm, _made, (s1, s2, _s3)):
        await make_volume(mdm)
        ends = trio.current_time() + SILENT_AFTER_SECONDS + 0.5

        async def long_enough() -> bool:
            assert (await s2.leave_out(s1, as_primary=False))["left"] == 0
            assert (await s1.leave_out(s2, as_primary=False))["left"] == 0
            return trio.current_time() >= ends

        await poll_until_async(long_enough)


async def test_chunks_that_are_excepted_or_named(tmp_path: Path) -> None:
    async with cluster(tmp_path) as (mdm, _made, (s1, s2, _s3)):
        volume_id = await make_volume(mdm)
        led = chunks_of(await s1.fetch(volume_id), s1, s2)
        names = [[volume_id, chunk] for chunk in led]
        answer = await s1.leave_out(s2, as_secondary=False, **{"except": names[1:]})
        assert answer["left"] == 1
        assert (await s1.leave_out(s2, as_secondary=False, chunks=names[:3]))["left"] == 1 + 2


async def test_who_cannot_keep_its_copies_leaves_them_to_who_is_there(tmp_path: Path) -> None:
    async with cluster(tmp_path) as (mdm, _made, (s1, s2, _s3)):
        volume_id = await make_volume(mdm)
        led = chunks_of(await s1.fetch(volume_id), s1, s2)
        given = {"peer": s2.sds_id, "incarnation": s2.incarnation, "chunks": [[volume_id, chunk] for chunk in led]}
        with pytest.raises(ConflictError):
            await s1.session.call("sds.withdraw", given | {"incarnation": s2.incarnation + 1})
        assert await s1.session.call("sds.withdraw", given) == {"left": len(led), "version": 2}
        await s2.fetch(volume_id)
        assert set(chunks_of(s2.entries(volume_id), s2, None)) == set(led)
        for bad in ({"chunks": None}, {"incarnation": "x"}, {"peer": -1}):
            with pytest.raises(InvalidError):
                await s1.session.call("sds.withdraw", given | bad)
        s2.session.close("killed")
        await mdm.wait_state("s2", "DOWN")
        with pytest.raises(ConflictError):
            await s1.session.call("sds.withdraw", given)


async def test_who_does_not_serve_changes_nothing(tmp_path: Path) -> None:
    async with cluster(tmp_path) as (mdm, made, (s1, s2, s3)):
        await make_volume(mdm)
        stranger = await made.sds(mdm, "s9")
        with pytest.raises(DeniedError):
            await stranger.leave_out(s2)
        await s3.register(devices=[])
        with pytest.raises(ConflictError):
            await s3.leave_out(s2)
        s2.answers["ping"] = never
        await s1.leave_out(s2)
        assert (await s2.leave_out(s1))["left"] == 0
        with pytest.raises(InvalidError):
            await s1.leave_out(s1)
        for bad in ({"peer": 77}, {"as_primary": 1}, {"chunks": [[1]]}, {"except": [[1, -1]]}, {"chunks": "all"}):
            with pytest.raises((InvalidError, NotFoundError)):
                await s1.session.call("sds.leave_out", {"peer": s2.sds_id} | bad)


async def test_after_a_restart_of_the_mdm_who_has_not_come_does_not_answer_but_is_not_dead(tmp_path: Path) -> None:
    async with cluster(tmp_path) as (mdm, _made, (old1, old2, _s3)):
        volume_id = await make_volume(mdm)
        entries = await old1.fetch(volume_id)
    async with running_mdm(tmp_path) as mdm, nodes() as made:
        s1 = await back(made, mdm, old1, incarnation=1)
        answer = await s1.leave_out(old2)
        shared = chunks_of(entries, s1, old2) + chunks_of(entries, old2, s1)
        assert answer == {"left": len(shared), "dead": False, "version": 2}


async def test_when_the_last_copy_is_away_the_volume_says_for_whom_it_waits(tmp_path: Path) -> None:
    async with cluster(tmp_path) as (mdm, made, (s1, s2, _s3)):
        await make_volume(mdm)
        s2.session.close("stopped")
        await mdm.wait_state("s2", "DOWN")
        await s1.leave_out(s2)
        s1.session.close("stopped")
        await mdm.wait_state("s1", "DOWN")
        await back(made, mdm, s2)
        volume = await mdm.client.get("/vol/v")
        assert volume["health"] == "FAILED"
        assert "waiting for SDS s1 (if it is gone for good: pfvol sds promote s2" in volume["reasons"][0]
        await back(made, mdm, s1)
        assert (await mdm.client.get("/vol/v"))["health"] == "DEGRADED"


async def test_who_is_promoted_has_looked_whether_those_whom_it_concerns_are_dead(tmp_path: Path) -> None:
    async with cluster(tmp_path) as (mdm, _made, (s1, s2, s3)):
        volume_id = await make_volume(mdm)
        shared = await s2.fetch(volume_id)
        for gone in (s1, s3):
            gone.session.close("stopped")
            await mdm.wait_state(gone.name, "DOWN")
        await s2.leave_out(s3)
        alive = {s1.sds_id}
        s2.answers["listens"] = lambda params: params["peer"] in alive
        with pytest.raises(ConflictError, match="s1 is DOWN, but something still takes connections"):
            await mdm.client.post("/sds/s2/promote", accept_data_loss=True)
        alive = {s3.sds_id}
        forced = await mdm.client.post("/sds/s2/promote", accept_data_loss=True)
        count = len(chunks_of(shared, s1, s2) + chunks_of(shared, s2, s1))
        assert (forced["chunks"], forced["member_chunks"]) == (count, count)
        assert [params["peer"] for params in s2.told("listens")] == [s1.sds_id] * 2


async def test_a_chunk_with_one_copy_is_shown_and_verified_as_such(tmp_path: Path) -> None:
    async with cluster(tmp_path) as (mdm, _made, (s1, s2, s3)):
        volume_id = await make_volume(mdm)
        entries = await s1.fetch(volume_id)
        alone = chunks_of(entries, s1, s2)
        await s1.leave_out(s2, as_secondary=False)
        shown = await mdm.client.get("/vol/v/chunks")
        assert [chunk["index"] for chunk in shown if chunk["is_degraded"]] == alone
        copies = [
            (copy["sds_name"], copy["is_available"], copy["is_rebuilding"]) for copy in shown[alone[0]]["replicas"]
        ]
        assert copies == [("s1", True, False), ("s2", False, True)]
        for sds in (s1, s2, s3):
            sds.answers["verify"] = lambda params: [[False, None, None]] * params["count"]
        report = await mdm.client.post("/vol/v/verify")
        assert {problem["problem"] for problem in report["problems"]} == {"one copy"}
        assert report["problem_count"] == len(alone)


# -- learners


async def degraded(mdm: Mdm, made: Nodes, s1: FakeSds, s2: FakeSds) -> tuple[int, list[int], FakeSds]:
    """A volume whose chunks of s1 and s2 s1 has alone, s2 back as their learner."""
    volume_id = await make_volume(mdm)
    s2.session.close("killed")
    await mdm.wait_state("s2", "DOWN")
    await s1.leave_out(s2)
    await until(lambda: s1.version == 2, "s1 has the map")
    again = await back(made, mdm, s2)
    return volume_id, chunks_of(await s1.fetch(volume_id), s1, None), again


async def test_learners_join_and_all_is_well_again(tmp_path: Path) -> None:
    async with cluster(tmp_path) as (mdm, made, (s1, s2, s3)):
        volume_id, alone, again = await degraded(mdm, made, s1, s2)
        assert again.admission["map_version"] == 2
        entries = s1.entries(volume_id)
        whole = [[volume_id, chunk, entries[chunk][0]] for chunk in alone]
        stale = [[volume_id, alone[0], 1], [99, 0, 2]]
        assert (await s1.learned(again, stale))["joined"] == 0
        assert await s1.learned(again, whole) == {"joined": len(whole), "version": 3}
        for sds in (s1, again, s3):
            await until(lambda sds=sds: sds.version == 3, "everybody has the map")  # type: ignore[misc]
        assert chunks_of(s1.entries(volume_id), s1, None) == []
        assert (await mdm.client.get("/vol/v"))["health"] == "OK"


async def test_a_learner_that_is_not_there_does_not_join(tmp_path: Path) -> None:
    async with cluster(tmp_path) as (mdm, made, (s1, s2, _s3)):
        volume_id, alone, again = await degraded(mdm, made, s1, s2)
        again.session.close("killed again")
        await mdm.wait_state("s2", "DOWN")
        with pytest.raises(ConflictError):
            await s1.learned(again, [[volume_id, alone[0], 2]])
