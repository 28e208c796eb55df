"""How SDSs and SDCs hear of changes of the map: the MDM without its API, the real control RPC."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import trio

from mdm.commands import CreateVolume, MapVolume, SetLearners
from mdm.pushes import PUSH_SEGMENTS_MAX, REPLACED_FIRST_SECONDS_MAX
from mdm.witness import PING_SECONDS_MAX
from pfvol.rpc.session import IN_FLIGHT_MAX
from tests.support.mdmdaemon import Core, FakeSds, back, chunks_of, core_cluster, never, running_core, until
from tests.support.waiting import poll_until_async

GIB = 1024**3


async def make_volume(mdm: Core, name: str = "v", size_bytes: int = GIB) -> int:
    return int(await mdm.run(CreateVolume(pool_id=1, name=name, size_bytes=size_bytes)))


# -- moves


async def moving(mdm: Core, s1: FakeSds, s2: FakeSds, s3: FakeSds) -> tuple[int, int]:
    """A volume with s3 as the learner of a chunk of s1 and s2: (volume, chunk)."""
    volume_id = await make_volume(mdm)
    chunk = chunks_of(await s1.fetch(volume_id), s1, s2)[0]
    await mdm.run(SetLearners(choices={volume_id: [(chunk, 1, s3.sds_id or 0)]}))
    await until(lambda: s1.version == s2.version == s3.version == 2, "everybody has the map")
    return volume_id, chunk


def after(gate: trio.Event) -> Callable[[Any], Any]:
    async def wait(_: Any) -> None:
        await gate.wait()

    return wait


async def test_who_was_replaced_hears_of_it_first(tmp_path: Path) -> None:
    async with core_cluster(tmp_path) as (mdm, _made, (s1, s2, s3)):
        volume_id, chunk = await moving(mdm, s1, s2, s3)
        order: list[str] = []
        gate = trio.Event()

        def slow(name: str) -> Callable[[Any], Any]:
            async def take(_: Any) -> None:
                order.append(name)
                await gate.wait()

            return take

        for sds in (s1, s2, s3):
            sds.answers["map.changed"] = slow(sds.name)
        assert await s1.learned(s3, [[volume_id, chunk, 2]]) == {"joined": 1, "version": 3}
        await until(lambda: len(order) > 0, "one is told")
        gate.set()
        await until(lambda: s1.version == s2.version == s3.version == 3, "everybody has the map")
        (entry,) = {sds.entries(volume_id)[chunk] for sds in (s1, s2, s3)}
        names = {sds.sds_id: sds.name for sds in (s1, s2, s3)}
        assert order[0] == names[entry[4]]


async def test_who_was_replaced_and_does_not_confirm_holds_the_others_up_only_briefly(tmp_path: Path) -> None:
    async with core_cluster(tmp_path) as (mdm, _made, (s1, s2, s3)):
        volume_id, chunk = await moving(mdm, s1, s2, s3)
        for sds in (s1, s2):
            sds.answers["map.changed"] = never
        started = trio.current_time()
        await s1.learned(s3, [[volume_id, chunk, 2]])
        await until(lambda: s3.version == 3, "the learner has the map")
        assert trio.current_time() - started < REPLACED_FIRST_SECONDS_MAX + 1


async def test_nobody_is_left_out_of_a_chunk_whose_move_nobody_has_confirmed(tmp_path: Path) -> None:
    """The two old members may still serve each other by the old map."""
    async with core_cluster(tmp_path) as (mdm, _made, (s1, s2, s3)):
        volume_id, chunk = await moving(mdm, s1, s2, s3)
        gate = trio.Event()
        for sds in (s1, s2):
            sds.answers["map.changed"] = after(gate)
            sds.answers["ping"] = never
        await s1.learned(s3, [[volume_id, chunk, 2]])
        await until(lambda: s3.version == 3, "the learner has the map")
        stays = s1 if s3.entries(volume_id)[chunk][1] == s1.sds_id else s2
        named = [[volume_id, chunk]]
        assert (await s3.leave_out(stays, chunks=named))["left"] == 0
        assert (await stays.leave_out(s3, chunks=named))["left"] == 0
        gate.set()
        await until(lambda: s1.version == s2.version == 3, "they have confirmed")
        assert (await s3.leave_out(stays, chunks=named))["left"] == 1


async def test_a_move_is_settled_too_when_a_member_has_registered_again_and_confirmed(tmp_path: Path) -> None:
    async with core_cluster(tmp_path) as (mdm, made, (s1, s2, s3)):
        volume_id, chunk = await moving(mdm, s1, s2, s3)
        for sds in (s1, s2):
            sds.answers["map.changed"] = never
        await s1.learned(s3, [[volume_id, chunk, 2]])
        await until(lambda: s3.version == 3, "the learner has the map")
        stays = s1 if s3.entries(volume_id)[chunk][1] == s1.sds_id else s2
        again = await back(made, mdm, stays)
        assert again.admission["map_version"] == 3
        assert await again.wait_told("map.changed") == [{"version": 3, "made": 3, "segments": []}]

        async def left_out() -> bool:
            return bool((await again.leave_out(s3, as_secondary=False))["left"])

        await poll_until_async(left_out)


async def test_a_move_that_nobody_has_confirmed_stays_unsettled_when_the_mdm_is_started_again(tmp_path: Path) -> None:
    """The newcomer, who knows of it, must not take over from those who may still serve each other."""
    async with core_cluster(tmp_path) as (mdm, _made, (s1, s2, old3)):
        volume_id, chunk = await moving(mdm, s1, s2, old3)
        for sds in (s1, s2):
            sds.answers["map.changed"] = never
        await s1.learned(old3, [[volume_id, chunk, 2]])
        await until(lambda: old3.version == 3, "the learner has the map")
        _, primary, secondary, _, left = old3.entries(volume_id)[chunk]
        assert (secondary, {primary, left}) == (old3.sds_id, {s1.sds_id, s2.sds_id})
    for _ in range(2):  # It stays so.
        async with running_core(tmp_path) as (mdm, made):
            s3 = await back(made, mdm, old3, incarnation=1)
            stays, other = (s1, s2) if primary == s1.sds_id else (s2, s1)
            answer = await s3.leave_out(stays, chunks=[[volume_id, chunk]])
            assert answer == {"left": 0, "dead": False, "version": 3}
            assert mdm.state.moved_version == 3
    async with running_core(tmp_path) as (mdm, made):
        s3 = await back(made, mdm, old3, incarnation=1)
        await back(made, mdm, other, incarnation=1)
        await until(lambda: mdm.state.moved_version == 0, "it is known that the move is settled")
        assert (await s3.leave_out(stays, chunks=[[volume_id, chunk]]))["left"] == 1
    async with running_core(tmp_path) as (mdm, made):  # What is settled holds nobody up.
        assert mdm.orchestrator.pushes.inherited() == frozenset()


# -- pushes


async def test_changes_that_come_faster_than_they_are_confirmed_become_one(tmp_path: Path) -> None:
    async with core_cluster(tmp_path) as (mdm, _made, (s1, s2, s3)):
        volume_id, chunk = await moving(mdm, s1, s2, s3)
        gate = trio.Event()
        s3.answers["map.changed"] = after(gate)
        for epoch in range(2, 12):
            learner = 0 if epoch % 2 == 0 else s3.sds_id
            await mdm.run(SetLearners(choices={volume_id: [(chunk, epoch, learner or 0)]}))
        await until(lambda: s1.version == 12, "the others do not wait")
        gate.set()
        await until(lambda: s3.version == 12, "it has the newest map")
        assert len(s3.told("map.changed")) == 1 + 2
        assert s3.entries(volume_id) == s1.entries(volume_id)


async def test_a_large_change_is_sent_in_parts_and_the_version_with_the_last(tmp_path: Path) -> None:
    async with core_cluster(tmp_path) as (mdm, _made, (s1, s2, s3)):
        await make_volume(mdm, "large", 1024 * GIB)
        s2.answers["ping"] = never
        started = trio.current_time()
        await s1.leave_out(s2)
        assert trio.current_time() - started < PING_SECONDS_MAX + 2
        s2.answers["ping"] = lambda _: None
        await until(lambda: s1.version == s3.version == mdm.state.map_version, "everybody has the map")
        sent = s3.told("map.changed")
        assert all(len(params["segments"]) <= PUSH_SEGMENTS_MAX for params in sent)
        changed = {key for params in sent for key in (row[1] for row in params["segments"])}
        assert len(changed) > PUSH_SEGMENTS_MAX / 2
        assert sorted({params["version"] for params in sent})[-1] == s3.version


async def test_an_sds_that_registers_again_starts_from_its_answer(tmp_path: Path) -> None:
    async with core_cluster(tmp_path) as (mdm, made, (s1, s2, s3)):
        volume_id, chunk = await moving(mdm, s1, s2, s3)
        s2.session.close("restarted")
        await until(lambda: mdm.state.sds[2].state == "DOWN", "it is DOWN")
        await mdm.run(SetLearners(choices={volume_id: [(chunk, 2, 0)]}))
        again = await back(made, mdm, s2)
        assert again.admission["map_version"] == 3
        await mdm.run(SetLearners(choices={volume_id: [(chunk, 3, s3.sds_id or 0)]}))
        (params,) = await again.wait_told("map.changed")
        assert (params["version"], len(params["segments"])) == (4, 1)


async def test_many_volumes_that_are_verified_at_once_hold_no_map_up(tmp_path: Path) -> None:
    async with core_cluster(tmp_path) as (mdm, _made, (s1, s2, s3)):
        volume_id = await make_volume(mdm)
        for sds in (s1, s2, s3):
            sds.answers["verify"] = never
        async with trio.open_nursery() as nursery:
            for _ in range(IN_FLIGHT_MAX):
                nursery.start_soon(mdm.orchestrator.verify_volume, volume_id)
            await s3.wait_told("verify")
            await s1.leave_out(s2)
            await until(lambda: s1.version == s2.version == s3.version == 2, "everybody has the map")
            nursery.cancel_scope.cancel()
        assert not any(sds.session.closed.is_set() for sds in (s1, s2, s3))


async def test_an_sdc_hears_which_segments_of_its_volumes_have_changed(tmp_path: Path) -> None:
    async with core_cluster(tmp_path) as (mdm, made, (s1, s2, _s3)):
        volume_id = await make_volume(mdm, "mapped")
        await make_volume(mdm, "other")
        sdc, _ = await made.sdc(mdm, "c1")
        await sdc.call("sdc.register", {"name": "c1", "version": "0"})
        await mdm.run(MapVolume(volume_id=volume_id, sdc_id=1))
        await s1.leave_out(s2)
        await until(lambda: "map.changed" in dict(made.sdc_got), "the SDC is told")
        expected = {"volume_id": volume_id, "segments": [0]}
        assert dict(made.sdc_got)["map.changed"] == expected
