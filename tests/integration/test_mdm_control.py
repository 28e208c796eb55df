"""The MDM as SDSs and SDCs see it: the real daemon, the real control RPC, the real API."""

from __future__ import annotations

import struct
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from mdm.verify import NEVER_WRITTEN, TAG
from pfvol import capability
from pfvol.constants import CHUNK_BLOCKS, SDS_DOWN_AFTER_SECONDS, SEGMENT_CHUNKS, SEGMENT_ENTRY_FORMAT
from pfvol.errors import ConflictError, DeniedError, Error, InvalidError, NotFoundError
from tests.support.mdmdaemon import FakeSds, Mdm, back, cluster, nodes, running_mdm
from tests.support.waiting import poll_until_async

ENTRY = struct.Struct(SEGMENT_ENTRY_FORMAT)


async def make_volume(mdm: Any, name: str = "v", size: str = "1GiB", provisioning: str = "thin") -> int:
    made = await mdm.client.post("/vol/create", pool_id="pool", name=name, size=size, provisioning=provisioning)
    return int(made["id"][-8:], 16)


# -- admission


async def test_a_node_waits_until_its_sds_is_added_and_then_gets_its_devices(tmp_path: Path) -> None:
    async with running_mdm(tmp_path) as mdm, nodes() as made:
        s1 = await made.sds(mdm, "s1")
        assert (await s1.register())["admitted"] is False
        await mdm.client.post("/pd/create", name="pd")
        await mdm.client.post("/sds/add", pd_id="pd", name="s1", capacity="1GiB")
        await s1.wait_told("sds.admitted")
        assert await mdm.state_of("s1") == "DOWN"
        await s1.serve()
        assert await mdm.state_of("s1") == "UP"
        assert sum(device["slots"] for device in s1.admission["devices"]) == 256
        assert len(s1.admission["capability_key"]) == 32
        assert [peer["up"] for peer in s1.admission["peers"]] == [True]


@pytest.mark.parametrize(
    ("free", "added", "ip", "node"),
    [
        (["a", "b", "s1"], "s1", None, "s1"),  # its own name first
        (["b", "a"], "s1", None, "a"),  # else any, by name
        (["b", "a"], "s1", "127.0.0.1", "a"),
        (["b", "a"], "s1", "127.0.0.1:20001", "b"),  # the first one started has this port
        (["a"], "s1", "10.9.9.9", "s1"),  # none at that address: it waits for one of its name
        ([], "s1", None, "s1"),
    ],
)
async def test_which_node_a_new_sds_gets(tmp_path: Path, free: list[str], added: str, ip: str, node: str) -> None:
    async with running_mdm(tmp_path) as mdm, nodes() as made:
        for name in free:
            await (await made.sds(mdm, name)).register()
        await mdm.client.post("/pd/create", name="pd")
        sds = await mdm.client.post("/sds/add", pd_id="pd", name=added, capacity="1GiB", ip=ip)
        assert sds["node"] == node


async def test_two_sds_never_share_a_node(tmp_path: Path) -> None:
    async with running_mdm(tmp_path) as mdm, nodes() as made:
        await (await made.sds(mdm, "a")).register()
        await mdm.client.post("/pd/create", name="pd")
        first = await mdm.client.post("/sds/add", pd_id="pd", name="s1", capacity="1GiB")
        second = await mdm.client.post("/sds/add", pd_id="pd", name="s2", capacity="1GiB")
        assert (first["node"], second["node"]) == ("a", "s2")


async def test_explicit_devices_reach_the_node(tmp_path: Path) -> None:
    async with running_mdm(tmp_path) as mdm, nodes() as made:
        await mdm.client.post("/pd/create", name="pd")
        await mdm.client.post("/sds/add", pd_id="pd", name="s1", capacity="1GiB", devices=["/d/a", "/d/b"])
        s1 = await made.sds(mdm, "s1")
        await s1.serve()
        assert [device["path"] for device in s1.admission["devices"]] == ["/d/a", "/d/b"]


async def test_what_does_not_belong_here_is_refused(tmp_path: Path) -> None:
    async with cluster(tmp_path, 1) as (mdm, _made, (s1,)):
        with pytest.raises(ConflictError, match="another cluster"):
            await s1.register(cluster_id=b"x" * 16)
        with pytest.raises(ConflictError):
            await s1.register(sds_id=99)
        with pytest.raises(DeniedError):
            await s1.register(node="s2")
        await s1.register()
        await mdm.wait_state("s1", "UP")


# -- who is there


async def test_a_lost_connection_is_down_and_a_new_one_up(tmp_path: Path) -> None:
    async with cluster(tmp_path) as (mdm, made, (s1, s2, s3)):
        s1.session.close("gone")
        await mdm.wait_state("s1", "DOWN")
        await s2.wait_told("peers")
        await poll_until_async(lambda: peers_say(s2, s1.sds_id, up=False))
        back = await made.sds(mdm, "s1", sds_id=s1.sds_id, devices=s1.devices, incarnation=2)
        await back.register()
        assert await mdm.state_of("s1") == "UP"
        await poll_until_async(lambda: peers_say(s3, s1.sds_id, up=True))


async def peers_say(sds: FakeSds, sds_id: int | None, *, up: bool) -> bool:
    told = sds.told("peers")
    return bool(told) and any(peer["sds_id"] == sds_id and peer["up"] is up for peer in told[-1]["peers"])


async def test_a_node_that_connects_again_replaces_its_old_connection(tmp_path: Path) -> None:
    async with cluster(tmp_path, 2) as (mdm, made, (s1, _s2)):
        again = await made.sds(mdm, "s1", sds_id=s1.sds_id, devices=s1.devices, incarnation=2)
        await again.register()
        with trio.fail_after(10):
            await s1.session.closed.wait()
        assert await mdm.state_of("s1") == "UP"


async def test_an_sds_without_its_devices_is_not_up(tmp_path: Path) -> None:
    async with cluster(tmp_path, 2) as (mdm, _made, (s1, _s2)):
        await s1.register(devices=[])
        await mdm.wait_state("s1", "DOWN")


async def test_a_failed_device_degrades_the_sds_until_it_is_whole_again(tmp_path: Path) -> None:
    async with cluster(tmp_path, 2) as (mdm, _made, (s1, _s2)):
        await s1.session.notify("sds.report", {"stats": {}, "failed_devices": [[0, "EIO"]], "purged": []})
        await mdm.wait_state("s1", "DEGRADED")
        await s1.report()
        await mdm.wait_state("s1", "UP")


async def test_a_restarted_mdm_gives_everybody_time_to_come_back(tmp_path: Path) -> None:
    async with cluster(tmp_path, 2):
        pass
    started = time.monotonic()
    async with running_mdm(tmp_path) as mdm, nodes() as made:
        assert await mdm.state_of("s1") == "UP"
        s2 = await made.sds(mdm, "s2", incarnation=2)
        await s2.serve()
        assert await mdm.state_of("s1") == "UP"
        await mdm.wait_state("s1", "DOWN")
        assert time.monotonic() - started >= SDS_DOWN_AFTER_SECONDS
        assert await mdm.state_of("s2") == "UP"


# -- volumes


async def test_an_unmap_is_answered_when_every_sds_has_confirmed(tmp_path: Path) -> None:
    async with cluster(tmp_path) as (mdm, _made, all_sds):
        volume_id = await make_volume(mdm)
        await mdm.client.post("/sdc/add", name="c1")
        await mdm.client.post("/vol/map", volume_id="v", sdc_id="c1")
        gate, answered = trio.Event(), trio.Event()
        all_sds[1].answers["volume.revoked"] = lambda params: gate.wait()

        async def unmap() -> None:
            await mdm.client.post("/vol/unmap", volume_id="v", sdc_id="c1")
            answered.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(unmap)
            for sds in all_sds:
                (params,) = await sds.wait_told("volume.revoked")
                assert params["volume_id"] == volume_id
            assert not answered.is_set()
            gate.set()
        for sds in all_sds:
            assert sds.told("volume.changed")[-1]["info"]["mappings"] == []


async def test_an_sds_that_refuses_a_revocation_loses_its_connection(tmp_path: Path) -> None:
    """It would otherwise serve whom it must not; when it registers again it asks for all mappings."""
    async with cluster(tmp_path) as (mdm, _made, all_sds):
        await make_volume(mdm)
        await mdm.client.post("/sdc/add", name="c1")
        await mdm.client.post("/vol/map", volume_id="v", sdc_id="c1")

        def refuse(params: Any) -> None:
            raise ConflictError("not now")

        all_sds[0].answers["volume.revoked"] = refuse
        await mdm.client.post("/vol/unmap", volume_id="v", sdc_id="c1")
        with trio.fail_after(10):
            await all_sds[0].session.closed.wait()
        await mdm.wait_state("s1", "DOWN")


async def test_a_thick_volume_is_answered_when_its_space_is_reserved(tmp_path: Path) -> None:
    async with cluster(tmp_path) as (mdm, _made, all_sds):
        await make_volume(mdm, "thick", "1GiB", "thick")
        assert sum(sds.told("reserved")[-1]["slots"] for sds in all_sds) == 2 * 256
        await mdm.client.post("/vol/extend", volume_id="thick", new_size="2GiB")
        assert sum(sds.told("reserved")[-1]["slots"] for sds in all_sds) == 2 * 512
        await mdm.client.delete("/vol/thick")
        assert sum(sds.told("reserved")[-1]["slots"] for sds in all_sds) == 0


async def test_thin_volumes_reported_use_leaves_less_for_thick_ones(tmp_path: Path) -> None:
    async with cluster(tmp_path) as (mdm, _made, all_sds):
        volume_id = await make_volume(mdm)
        for sds in all_sds:
            await sds.report(slots_used=1000, volumes={volume_id: [1000, 1024000, 500, 512000]})

        async def seen() -> bool:
            return all(sds["used_capacity_bytes"] for sds in await mdm.client.get("/sds/list"))

        await poll_until_async(seen)
        with pytest.raises(Error) as caught:
            await make_volume(mdm, "thick", "2GiB", "thick")
        assert caught.value.code == "capacity"


async def test_a_deleted_volume_is_purged_until_each_sds_has_said_so_also_over_restarts(tmp_path: Path) -> None:
    async with cluster(tmp_path) as (mdm, made, all_sds):
        volume_id = await make_volume(mdm)
        await mdm.client.delete("/vol/v")
        for sds in all_sds:
            assert (await sds.wait_told("volume.deleted"))[0] == {"volume_id": volume_id}
        await all_sds[0].report(purged=[volume_id])

        async def confirmed() -> bool:
            return (await all_sds[0].register())["purge"] == []

        await poll_until_async(confirmed)
        assert (await all_sds[1].register())["purge"] == [volume_id]
    async with running_mdm(tmp_path) as mdm, nodes() as made:
        s1 = await made.sds(mdm, "s1", sds_id=1, devices=all_sds[0].devices)
        s2 = await made.sds(mdm, "s2", sds_id=2, devices=all_sds[1].devices)
        assert (await s1.register())["purge"] == []
        assert (await s2.register())["purge"] == [volume_id]
        assert (await s2.wait_told("volume.deleted"))[0] == {"volume_id": volume_id}
        await s2.report(purged=[volume_id, 12345])

        async def done() -> bool:
            return (await s2.register())["purge"] == []

        await poll_until_async(done)


async def test_maps_are_given_to_those_who_may_have_them(tmp_path: Path) -> None:
    async with cluster(tmp_path) as (mdm, made, all_sds):
        volume_id = await make_volume(mdm)
        sdc, _ = await made.sdc(mdm, "c1")
        with pytest.raises(DeniedError):
            await sdc.call("map.segment", {"volume_id": volume_id, "segment": 0})
        await sdc.call("sdc.register", {"name": "c1", "version": "0"})
        with pytest.raises(NotFoundError):
            await sdc.call("map.segment", {"volume_id": volume_id, "segment": 0})
        await mdm.client.post("/vol/map", volume_id="v", sdc_id="c1")
        segment = await sdc.call("map.segment", {"volume_id": volume_id, "segment": 0})
        assert len(segment) == SEGMENT_CHUNKS * ENTRY.size
        told = await all_sds[0].session.call("map.segment", {"volume_id": volume_id, "segment": 0})
        assert told == {"version": 1, "entries": segment}
        assert all(primary != secondary for _, primary, secondary, _, _ in ENTRY.iter_unpack(segment[: 256 * 12]))
        info = await all_sds[0].session.call("map.volume", {"volume_id": volume_id})
        assert (info["size_bytes"], info["segments"], len(info["mappings"])) == (1024**3, 1, 1)
        for params in ({"volume_id": volume_id, "segment": 1}, {"volume_id": 99, "segment": 0}):
            with pytest.raises(NotFoundError):
                await all_sds[0].session.call("map.segment", params)
        with pytest.raises(NotFoundError):
            await sdc.call("map.volume", {"volume_id": volume_id})


async def test_an_sdc_is_told_of_its_volumes_and_gets_signed_capabilities(tmp_path: Path) -> None:
    async with cluster(tmp_path) as (mdm, made, all_sds):
        volume_id = await make_volume(mdm)
        sdc, told = await made.sdc(mdm, "c1")
        first = await sdc.call("sdc.register", {"name": "c1", "version": "0"})
        assert (first["name"], first["volumes"], len(first["peers"])) == ("c1", [], 3)
        await mdm.client.post("/vol/map", volume_id="v", sdc_id="c1", access_mode="readOnly", iops_limit=7)

        async def told_times(count: int) -> None:
            async def enough() -> bool:
                return told.count("volumes.changed") >= count

            await poll_until_async(enough)

        await told_times(1)
        (volume,) = (await sdc.call("sdc.volumes"))["volumes"]
        assert (volume["name"], volume["read_only"], volume["iops_limit"]) == ("v", True, 7)
        shown = capability.verify(
            all_sds[0].admission["capability_key"],
            volume["capability"],
            sdc_id=first["sdc_id"],
            volume_id=volume_id,
            now_unix=time.time(),
        )
        assert shown.read_only
        await mdm.client.post("/vol/extend", volume_id="v", new_size="2GiB")
        await told_times(2)
        assert (await sdc.call("sdc.volumes"))["volumes"][0]["size_bytes"] == 2 * 1024**3
        for sds in all_sds:
            assert sds.told("volume.changed")[-1]["info"]["size_bytes"] == 2 * 1024**3
        await mdm.client.post("/vol/unmap", volume_id="v", sdc_id="c1")
        await told_times(3)
        assert (await sdc.call("sdc.volumes"))["volumes"] == []


async def test_an_sds_that_is_slow_is_never_told_of_a_volume_as_it_was(tmp_path: Path) -> None:
    """It handles requests concurrently: the second is put when the first is answered, and tells what is true then."""
    async with cluster(tmp_path) as (mdm, _made, all_sds):
        await make_volume(mdm)
        for name in ("c1", "c2"):
            await mdm.client.post("/sdc/add", name=name)
        slow = all_sds[0]
        go_on = trio.Event()
        slow.answers["volume.changed"] = lambda _: go_on.wait()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: mdm.client.post("/vol/map", volume_id="v", sdc_id="c1"))
            await slow.wait_told("volume.changed")
            nursery.start_soon(lambda: mdm.client.post("/vol/unmap", volume_id="v", sdc_id="c1"))
            nursery.start_soon(lambda: mdm.client.post("/vol/map", volume_id="v", sdc_id="c2"))

            async def both_are_durable() -> bool:
                mappings = (await mdm.client.get("/vol/v"))["mappings"]
                return [mapping["sdc_name"] for mapping in mappings] == ["c2"]

            await poll_until_async(both_are_durable)
            assert (len(slow.told("volume.changed")), slow.told("volume.revoked")) == (1, [])
            go_on.set()
        assert len(slow.told("volume.revoked")) == 1
        first, *later = [[sdc for sdc, _, _ in told["info"]["mappings"]] for told in slow.told("volume.changed")]
        assert (first, later) == ([1], [[2], [2]])


async def test_each_session_of_an_sdc_has_a_higher_incarnation_also_over_restarts(tmp_path: Path) -> None:
    incarnations = []
    for _ in range(2):
        async with running_mdm(tmp_path) as mdm, nodes() as made:
            for _ in range(2):
                sdc, _ = await made.sdc(mdm, "c1")
                incarnations.append((await sdc.call("sdc.register", {"name": "c1", "version": "0"}))["incarnation"])
    assert incarnations == sorted(set(incarnations))


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("sds.register", {}),
        ("sds.register", {"node": "s1", "data_address": ["h", 0]}),
        ("sds.register", {"node": "s1", "data_address": ["h", 70000]}),
        ("sds.register", {"node": "s1", "data_address": "h:1"}),
        ("sds.register", {"node": "s1", "data_address": ["h", 1], "devices": {}}),
        ("sds.register", {"node": "s1", "data_address": ["h", 1], "devices": [1]}),
        ("sds.register", {"node": "s1", "data_address": ["h", 1], "devices": [{"index": -1}], "incarnation": 1}),
        ("sds.register", {"node": "s1", "data_address": ["h", 1], "devices": [], "incarnation": "1"}),
        ("sds.register", {"node": "s1", "data_address": ["h", 1], "devices": [], "incarnation": 2**64 - 1}),
        ("sds.report", {}),
        ("sds.report", {"stats": {"volumes": {"1": [1, 2, 3, 4]}}, "failed_devices": [], "purged": []}),
        ("sds.report", {"stats": {"volumes": {1: [1, 2, 3]}}, "failed_devices": [], "purged": []}),
        ("sds.report", {"stats": {"slots_used": "many"}, "failed_devices": [], "purged": []}),
        ("sds.report", {"stats": {}, "failed_devices": [1], "purged": []}),
        ("sds.report", {"stats": {}, "failed_devices": [], "purged": ["1"]}),
        ("map.volume", {"volume_id": "v"}),
        ("map.segment", {"volume_id": 1, "segment": -1}),
    ],
)
async def test_bad_parameters_are_refused_and_change_nothing(tmp_path: Path, method: str, params: Any) -> None:
    async with cluster(tmp_path, 1) as (mdm, _made, (s1,)):
        with pytest.raises(InvalidError):
            await s1.session.call(method, params)
        await s1.report()
        assert await mdm.state_of("s1") == "UP"


async def test_methods_belong_to_roles(tmp_path: Path) -> None:
    async with cluster(tmp_path, 1) as (mdm, made, (s1,)):
        sdc, _ = await made.sdc(mdm, "c1")
        for session, method in ((sdc, "sds.register"), (s1.session, "sdc.register"), (sdc, "nonsense")):
            with pytest.raises(NotFoundError):
                await session.call(method)


async def test_a_repair_is_told_of_once_though_the_mdm_starts_again(tmp_path: Path) -> None:
    async def told(mdm: Mdm) -> list[int]:
        events = await mdm.client.get("/event/list")
        return [event["details"]["unrepairable"] for event in events if event["type"] == "BLOCKS_UNREPAIRABLE"]

    async def until_told(mdm: Mdm, wanted: list[int]) -> None:
        async def are() -> bool:
            return await told(mdm) == wanted

        await poll_until_async(are, what=f"events {wanted}")

    async with cluster(tmp_path, 2) as (mdm, _made, (s1, s2)):
        await s1.report(blocks_unrepairable=3)
        await until_told(mdm, [3])
    async with running_mdm(tmp_path) as mdm, nodes() as made:
        s1 = await back(made, mdm, s1, incarnation=s1.incarnation)
        s2 = await back(made, mdm, s2, incarnation=s2.incarnation + 1)
        await s1.report()  # while it does not serve
        await s1.report(blocks_unrepairable=3)
        await s1.report(blocks_unrepairable=5)
        await until_told(mdm, [3, 2])
        await s2.report(blocks_unrepairable=1)
        await until_told(mdm, [3, 2, 1])


# -- verify

HOLES = TAG.pack(*NEVER_WRITTEN) * CHUNK_BLOCKS
WRITTEN = TAG.pack(1, 1, 1) + HOLES[16:]
OTHER = TAG.pack(2, 1, 2) + HOLES[16:]
CLEAN = bytes(CHUNK_BLOCKS // 8)


def answering(first: Any) -> Any:
    """Chunk 0 as given, the others not there."""

    def answer(params: dict[str, Any]) -> Any:
        rows = [[False, None, None]] * params["count"]
        if params["first_chunk"] == 0:
            rows[0] = first(params) if callable(first) else first
        return rows

    return answer


async def test_verify_finds_nothing_where_copies_agree(tmp_path: Path) -> None:
    async with cluster(tmp_path, 2) as (mdm, _made, all_sds):
        await make_volume(mdm)
        for sds, row in zip(all_sds, ([True, WRITTEN, CLEAN], [True, WRITTEN, CLEAN]), strict=True):
            sds.answers["verify"] = answering(row)
        report = await mdm.client.post("/vol/v/verify")
        assert not report["problems"], report
        assert len(all_sds[0].told("verify")) == 256 // 32
        assert max(params["count"] for params in all_sds[0].told("verify")) == 32
        all_sds[0].answers["verify"] = answering([True, HOLES, CLEAN])
        all_sds[1].answers["verify"] = answering([False, None, None])
        assert not (await mdm.client.post("/vol/v/verify"))["problems"]
        assert (await mdm.client.post("/vol/v/verify", first=255))["chunks_checked"] == 1
        with pytest.raises(InvalidError, match="has chunks 0 to 255"):
            await mdm.client.post("/vol/v/verify", first=256)


async def test_verify_tells_what_differs_but_not_what_is_only_under_way(tmp_path: Path) -> None:
    async with cluster(tmp_path, 2) as (mdm, _made, all_sds):
        await make_volume(mdm)
        asked = 0

        def late(params: Any) -> Any:
            nonlocal asked
            asked += 1
            return [True, WRITTEN if asked > 2 else OTHER, CLEAN]

        all_sds[0].answers["verify"] = answering([True, WRITTEN, CLEAN])
        all_sds[1].answers["verify"] = answering(late)
        assert not (await mdm.client.post("/vol/v/verify"))["problems"]
        assert asked == 3
        all_sds[1].answers["verify"] = answering([True, OTHER, b"\x02" + CLEAN[1:]])
        problems = {(item["chunk"], item["problem"]) for item in (await mdm.client.post("/vol/v/verify"))["problems"]}
        assert problems == {(0, "copies differ"), (0, "bad bytes")}


SHORT = [True, WRITTEN[:-16], CLEAN]


@pytest.mark.parametrize("answer", [None, [], [[1]] * 32, [SHORT] * 32, [[True, None, None]] * 32, "x"])
async def test_verify_says_when_a_copy_cannot_be_asked(tmp_path: Path, answer: Any) -> None:
    async with cluster(tmp_path, 2) as (mdm, _made, all_sds):
        await make_volume(mdm, size="128MiB")
        all_sds[0].answers["verify"] = answering([True, WRITTEN, CLEAN])
        all_sds[1].answers["verify"] = lambda params: answer
        report = await mdm.client.post("/vol/v/verify")
        assert {item["problem"] for item in report["problems"]} == {"copy unavailable"}


async def test_verify_of_a_volume_that_is_deleted_meanwhile(tmp_path: Path) -> None:
    async with cluster(tmp_path, 2) as (mdm, _made, all_sds):
        await make_volume(mdm)

        async def deleted_first(params: dict[str, Any]) -> list[Any]:
            with suppress(NotFoundError):
                await mdm.client.delete("/vol/v")
            return [[False, None, None]] * params["count"]

        all_sds[0].answers["verify"] = deleted_first
        with pytest.raises(NotFoundError):
            await mdm.client.post("/vol/v/verify")
