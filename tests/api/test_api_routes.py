"""The REST API over a real MDM: every route, its objects, and what it refuses."""

from __future__ import annotations

import struct
from datetime import datetime
from typing import Any

import pytest

from mdm.commands import SetSdsState
from mdm.membership import SdsRuntime
from pfvol.constants import CHUNK_SIZE_BYTES
from pfvol.errors import CapacityError, ConflictError, InvalidError, NotFoundError
from tests.support.api import GIB, Api

MB = 1_000_000
# The fields that the contract promises (CONTRACT.md, "Objects").
CONTRACT = {
    "pool": "id name pd_id policy total_capacity_bytes used_capacity_bytes reserved_capacity_bytes free_capacity_bytes "
    "health rebuild_state rebuild_progress_percent rebuild_rate_limit_mbps",
    "sds": "id name pd_id fault_set_id state data_address total_capacity_bytes used_capacity_bytes",
    "volume": "id name pool_id provisioning size_bytes used_capacity_bytes state health mapping_count mappings",
    "mapping": "sdc_id sdc_name access_mode iops_limit bandwidth_limit_mbps",
    "chunk": "index epoch is_degraded replicas",
    "replica": "sds_id role is_available is_rebuilding",
    "event": "id time type message pool_id volume_id sds_id sdc_id details",
}


def check_contract(kind: str, row: dict[str, Any]) -> None:
    missing = set(CONTRACT[kind].split()) - set(row)
    assert not missing, f"{kind} lacks {missing}"
    for key, value in row.items():
        if key.endswith("_bytes"):
            assert row[f"{key[:-6]}_gb"] == value / 1e9


async def test_objects_are_the_contracts(api: Api) -> None:
    await api.make_pool()
    await api.client.post("/sdc/add", name="host")
    volume = await api.client.post("/vol/create", pool_id="pool", name="v", size="1GiB", provisioning="thick")
    check_contract("volume", volume)
    volume = await api.client.post("/vol/map", volume_id="v", sdc_id="host", access_mode="readOnly", iops_limit=50)
    check_contract("volume", volume)
    check_contract("mapping", volume["mappings"][0])
    (pool,) = await api.client.get("/pool/list")
    check_contract("pool", pool)
    for sds in await api.client.get("/sds/list"):
        check_contract("sds", sds)
    chunks = await api.client.get("/vol/v/chunks")
    check_contract("chunk", chunks[0])
    check_contract("replica", chunks[0]["replicas"][0])
    for event in await api.client.get("/event/list"):
        check_contract("event", event)


async def test_times_are_utc(api: Api) -> None:
    row = await api.client.post("/pd/create", name="pd")
    offset = datetime.fromisoformat(row["created_at"]).utcoffset()
    assert offset is not None
    assert offset.total_seconds() == 0


async def test_names_and_ids_are_interchangeable(api: Api) -> None:
    """Goal: in paths, queries and bodies, and an id in either case."""
    await api.make_pool()
    pd = await api.client.get("/pd/pd")
    pool = await api.client.get("/pool/pool")
    sdc = await api.client.post("/sdc/add", name="host")
    assert await api.client.get(f"/pd/{pd['id']}") == pd
    assert await api.client.get(f"/pool/{pool['id'].upper()}") == pool
    volume = await api.client.post("/vol/create", pool_id=pool["id"], name="v", size_gb=1)
    assert await api.client.get(f"/vol/{volume['id']}") == await api.client.get("/vol/v") == volume
    mapped = await api.client.post("/vol/map", volume_id=volume["id"], sdc_id=sdc["id"])
    assert mapped["mappings"][0]["sdc_id"] == sdc["id"]
    assert (await api.client.post("/vol/unmap", volume="v", sdc="host"))["mapping_count"] == 0
    for pd_id in (pd["id"], "pd"):
        assert await api.client.get("/pool/list", pd_id=pd_id) == [await api.client.get("/pool/pool")]
    assert len({pd["id"], pool["id"], sdc["id"], volume["id"]}) == 4


async def test_an_id_of_another_kind_is_not_found(api: Api) -> None:
    await api.make_pool()
    pool = await api.client.get("/pool/pool")
    for path in (f"/vol/{pool['id']}", f"/pd/{pool['id']}", "/vol/06ffffff00000001"):
        with pytest.raises(NotFoundError):
            await api.client.get(path)


async def test_protection_domain(api: Api) -> None:
    created = await api.client.post("/pd/create", name="pd", description="of the tests")
    assert created["description"] == "of the tests"
    assert await api.client.get("/pd/list") == [created]
    with pytest.raises(ConflictError):
        await api.client.post("/pd/create", name="pd")
    await api.client.post("/fault-set/create", pd_id="pd", name="rack1")
    shown = await api.client.get("/pd/pd")
    assert [item["name"] for item in shown["fault_sets"]] == ["rack1"]
    with pytest.raises(ConflictError):
        await api.client.delete("/pd/pd", cascade=False)
    deleted = await api.client.delete("/pd/pd")
    assert deleted == {"id": created["id"], "name": "pd", "deleted": True}
    assert await api.client.get("/pd/list") == await api.client.get("/fault-set/list") == []


async def test_cascade_stops_at_a_mapped_volume(api: Api) -> None:
    await api.make_pool()
    await api.client.post("/sdc/add", name="host")
    await api.client.post("/vol/create", pool_id="pool", name="v", size_gb=1)
    await api.client.post("/vol/map", volume_id="v", sdc_id="host")
    with pytest.raises(ConflictError):
        await api.client.delete("/pd/pd")
    assert (await api.client.get("/vol/v"))["state"] == "IN_USE"


async def test_fault_set(api: Api) -> None:
    await api.client.post("/pd/create", name="pd")
    created = await api.client.post("/fault-set/create", pd_id="pd", name="rack1")
    sds = await api.client.post("/sds/add", pd_id="pd", name="s1", capacity_gb=1, fault_set_id="rack1")
    assert (sds["fault_set_id"], sds["fault_set_name"]) == (created["id"], "rack1")
    shown = await api.client.get("/fault-set/rack1")
    assert [item["name"] for item in shown["sds"]] == ["s1"]
    with pytest.raises(ConflictError):
        await api.client.delete("/fault-set/rack1")
    await api.client.delete("/sds/s1")
    await api.client.delete("/fault-set/rack1")
    assert await api.client.get("/fault-set/list", pd_id="pd") == []


async def test_pool(api: Api) -> None:
    await api.make_pool()
    pool = await api.client.get("/pool/pool")
    assert pool["total_capacity_bytes"] == 2 * GIB
    assert (pool["policy"], pool["durability"], pool["health"]) == ("two_copies", "flush", "OK")
    assert (pool["rebuild_state"], pool["rebuild_progress_percent"]) == ("IDLE", 0)
    changed = await api.client.patch(
        "/pool/pool", name="renamed", rebuild_rate_limit_mbps=50, rebuild_delay_seconds=0, durability="commit"
    )
    assert changed["id"] == pool["id"]
    assert changed["rebuild_rate_limit_mbps"] == 50
    assert changed["rebuild_delay_seconds"] == 0
    assert changed["durability"] == "commit"
    assert changed["total_capacity_bytes"] == 2 * GIB
    with pytest.raises(NotFoundError):
        await api.client.get("/pool/pool")
    await api.client.delete("/pool/renamed")
    assert await api.client.get("/pool/list") == []


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/pool/create", {"pd_id": "pd", "name": "p", "capacity_gb": 1, "policy": "three_copies"}),
        ("/pool/create", {"pd_id": "pd", "name": "p", "capacity_gb": 1, "durability": "maybe"}),
        ("/pool/create", {"pd_id": "pd", "name": "p", "capacity_gb": 1, "spare_percent": 101}),
        ("/pool/create", {"pd_id": "pd", "name": "p", "capacity_gb": 0}),
        ("/pool/create", {"pd_id": "pd", "name": "p"}),
        ("/pool/create", {"pd_id": "pd", "name": "list", "capacity_gb": 1}),
        ("/pd/create", {"name": ""}),
        ("/pd/create", {"name": "a b"}),
        ("/pd/create", {"name": ".hidden"}),
        ("/pd/create", {"name": "x" * 32}),
        ("/pd/create", {"name": "0123456789abcdef"}),
        ("/pd/create", {"name": "list"}),
        ("/vol/create", {"pool_id": "pool", "name": "v", "size_gb": 1, "provisioning": "fat"}),
        ("/vol/create", {"pool_id": "pool", "name": "v", "size": "1XiB"}),
        ("/vol/create", {"pool_id": "pool", "name": "v", "size_gb": 1, "size_bytes": 5}),
        ("/vol/create", {"pool_id": "pool", "name": "v", "size_bytes": 0}),
        ("/vol/extend", {"volume_id": "v0"}),
        ("/vol/extend", {"volume_id": "v0", "additional_gb": 1, "new_size_gb": 2}),
        ("/vol/extend", {"volume_id": "v0", "additional_gb": 0}),
    ],
)
async def test_bad_input(api: Api, route: str, body: dict[str, Any]) -> None:
    """Goal: 400 with a reason, and nothing made."""
    await api.make_pool()
    await api.client.post("/vol/create", pool_id="pool", name="v0", size_gb=1)
    before = api.manager.state
    response = await api.request("POST", route, json=body)
    assert response.status_code == 400, response.text
    assert response.json()["code"] == "invalid"
    assert response.json()["detail"]
    assert api.manager.state is before


@pytest.mark.parametrize(
    ("body", "at"),
    [
        ({"pool_id": "pool"}, "name"),
        ({"name": "v", "size_gb": 1}, "pool_id"),
        ({"pool_id": "pool", "name": "v", "size_gb": "much"}, "size_gb"),
        ({"pool_id": "pool", "name": "v", "size_gb": -1}, "size_gb"),
        ({"pool_id": "pool", "name": "v", "size_bytes": 1.5}, "size_bytes"),
        ({"pool_id": "pool", "name": "v", "size_bytes": 2**80}, "size_bytes"),
        ({"pool_id": "pool", "name": "v", "size_gb": 1, "colour": "red"}, "colour"),
        ({"pool_id": 5, "name": "v", "size_gb": 1}, "pool_id"),
        ({"pool_id": "pool", "name": ["v"], "size_gb": 1}, "name"),
        ([], "body"),
        ("v", "body"),
    ],
)
async def test_schema_errors(api: Api, body: Any, at: str) -> None:
    """Goal: 422, naming the field."""
    response = await api.request("POST", "/vol/create", json=body)
    assert response.status_code == 422, response.text
    problem = response.json()
    assert problem["code"] == "invalid"
    assert at in {item["at"] for item in problem["details"]["errors"]}
    assert problem["detail"].startswith(f"{at}: ")


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b'{"name": NaN', b"[" * 5000])
async def test_bodies_that_are_not_json(api: Api, content: bytes) -> None:
    """Goal: 400, as for any bad input; 422 is for JSON that does not fit the schema."""
    headers = {"Content-Type": "application/json"}
    response = await api.request("POST", "/pd/create", content=content, headers=headers)
    assert response.status_code == 400, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["code"] == "invalid"
    assert (await api.client.get("/health"))["status"] == "ok"


async def test_not_a_number(api: Api) -> None:
    content = b'{"pool_id": "pool", "name": "v", "size_gb": NaN}'
    response = await api.request("POST", "/vol/create", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code in (400, 422)


async def test_sizes_in_all_three_ways(api: Api) -> None:
    await api.make_pool()
    sizes = [{"size_bytes": 800 * MB}, {"size_gb": 0.8}, {"size": "800MB"}]
    rows = [
        await api.client.post("/vol/create", pool_id="pool", name=f"v{index}", **size)
        for index, size in enumerate(sizes)
    ]
    assert {row["size_bytes"] for row in rows} == {rows[0]["size_bytes"]}
    assert 800 * MB <= rows[0]["size_bytes"] < 800 * MB + CHUNK_SIZE_BYTES


async def test_sds(api: Api) -> None:
    await api.client.post("/pd/create", name="pd")
    sds = await api.client.post("/sds/add", pd_id="pd", name="s1", capacity="2GiB", ip="10.0.0.1")
    assert sds["state"] == "DOWN"
    assert sds["data_address"] is None
    assert sds["total_capacity_bytes"] == 2 * GIB
    await api.bring_up("s1")
    sds = await api.client.get("/sds/s1")
    assert sds["state"] == "UP"
    assert sds["data_address"] == "127.0.0.1:20001"
    assert await api.client.get("/sds/list", pd_id="pd") == [sds]
    with pytest.raises(ConflictError):
        await api.client.post("/sds/add", pd_id="pd", name="s1", capacity="2GiB")
    assert (await api.client.delete("/sds/s1"))["deleted"]
    with pytest.raises(NotFoundError):
        await api.client.delete("/sds/s1")


async def test_sds_that_holds_copies_is_emptied_first(api: Api) -> None:
    await api.make_pool()
    await api.client.post("/vol/create", pool_id="pool", name="v", size_gb=1)
    assert (await api.client.delete("/sds/s1"))["deleted"] is False
    assert (await api.client.get("/sds/s1"))["removing"] is True
    with pytest.raises(ConflictError):
        await api.client.delete("/sds/s2")
    assert (await api.client.post("/sds/s1/keep"))["removing"] is False


async def test_rebuild(api: Api) -> None:
    """Goal: the contract's fields; there is nothing to cancel where nothing is to be done; cancelled until started."""
    await api.make_pool()
    await api.client.post("/vol/create", pool_id="pool", name="v", size_gb=1)
    pool = await api.client.get("/pool/pool")
    status = await api.client.get("/rebuild/status/pool")
    assert status == {
        "pool_id": pool["id"],
        "pool_name": "pool",
        "state": "IDLE",
        "reason": None,
        "progress_percent": 0.0,
        "bytes_rebuilt": 0,
        "total_bytes": 0,
        "total_gb": 0.0,
        "rate_mbps": 0.0,
        "rebuild_rate_limit_mbps": 100,
        "estimated_time_remaining_seconds": None,
        "degraded_chunks": 0,
    }
    with pytest.raises(ConflictError, match="nothing to cancel"):
        await api.client.post("/rebuild/cancel/pool")
    s1 = next(sds for sds in api.manager.state.sds.values() if sds.name == "s1")
    await api.manager.execute(SetSdsState(sds_id=s1.sds_id, state="DOWN"))
    status = await api.client.post(f"/rebuild/cancel/{pool['id']}")
    assert (status["state"], status["degraded_chunks"]) == ("CANCELLED", s1.copies)
    assert (await api.client.get("/pool/pool"))["rebuild_state"] == "CANCELLED"
    assert (await api.client.post("/rebuild/start/pool"))["state"] == "IDLE"
    with pytest.raises(NotFoundError):
        await api.client.get("/rebuild/status/none")


async def test_sdc(api: Api) -> None:
    await api.make_pool()
    sdc = await api.client.post("/sdc/add", name="host", ip="10.0.0.9")
    assert sdc["connected"] is False
    await api.client.post("/vol/create", pool_id="pool", name="v", size="1GiB")
    await api.client.post("/vol/map", volume_id="v", sdc_id="host", access_mode="readOnly")
    sdc = await api.client.get("/sdc/host")
    assert [(row["volume_name"], row["access_mode"]) for row in sdc["mappings"]] == [("v", "readOnly")]
    with pytest.raises(ConflictError):
        await api.client.delete("/sdc/host")
    await api.client.post("/vol/unmap", volume_id="v", sdc_id="host")
    await api.client.delete("/sdc/host")
    assert await api.client.get("/sdc/list") == []


async def test_volume_life(api: Api) -> None:
    await api.make_pool()
    await api.client.post("/sdc/add", name="host")
    volume = await api.client.post("/vol/create", pool_id="pool", name="v", size_bytes=GIB)
    assert (volume["state"], volume["provisioning"], volume["size_bytes"]) == ("AVAILABLE", "thin", GIB)
    assert volume["used_capacity_bytes"] == 0
    mapped = await api.client.post("/vol/map", volume_id="v", sdc_id="host", bandwidth_limit_mbps=7)
    assert (mapped["state"], mapped["mapping_count"]) == ("IN_USE", 1)
    assert mapped["mappings"][0]["access_mode"] == "readWrite"
    assert mapped["mappings"][0]["bandwidth_limit_mbps"] == 7
    with pytest.raises(ConflictError):
        await api.client.delete("/vol/v")
    extended = await api.client.post("/vol/extend", volume_id="v", additional_bytes=GIB)
    assert extended["size_bytes"] == 2 * GIB
    extended = await api.client.post("/vol/extend", volume_id="v", new_size="3GiB")
    assert extended["size_bytes"] == 3 * GIB
    with pytest.raises((InvalidError, ConflictError)):
        await api.client.post("/vol/extend", volume_id="v", new_size="1GiB")
    unmapped = await api.client.post("/vol/unmap", volume_id="v", sdc_id="host")
    assert unmapped["state"] == "AVAILABLE"
    with pytest.raises((ConflictError, NotFoundError)):
        await api.client.post("/vol/unmap", volume_id="v", sdc_id="host")
    await api.client.delete("/vol/v")
    assert await api.client.get("/vol/list") == []


async def test_extend_in_gb(api: Api) -> None:
    """Goal: the plan's fields, decimal."""
    await api.make_pool()
    await api.client.post("/vol/create", pool_id="pool", name="v", size_gb=1.024)
    assert (await api.client.post("/vol/extend", volume_id="v", additional_gb=1.024))["size_gb"] == 2.048
    assert (await api.client.post("/vol/extend", volume_id="v", new_size_gb=4.096))["size_gb"] == 4.096


async def test_capacity(api: Api) -> None:
    """Goal: the plan's scenario D, refused with the reason, and nothing made."""
    await api.make_pool(sds=2, sds_capacity="1536MiB", capacity="2GB")
    for name in ("v1", "v2"):
        await api.client.post("/vol/create", pool_id="pool", name=name, size="800MB", provisioning="thick")
    with pytest.raises(CapacityError) as caught:
        await api.client.post("/vol/create", pool_id="pool", name="v3", size="800MB", provisioning="thick")
    assert "pool" in caught.value.message
    assert caught.value.details["pool"] == "pool"
    assert caught.value.details["needed_bytes"] > caught.value.details["free_bytes"]
    pool = await api.client.get("/pool/pool")
    assert 1600 * MB <= pool["used_capacity_bytes"] < 1601 * MB
    assert pool["reserved_capacity_bytes"] == pool["used_capacity_bytes"]
    assert pool["free_capacity_bytes"] == pool["total_capacity_bytes"] - pool["used_capacity_bytes"]
    assert [row["name"] for row in await api.client.get("/vol/list", pool_id="pool")] == ["v1", "v2"]


async def test_chunks(api: Api) -> None:
    """Goal: every chunk once, in pages, two copies on different servers."""
    await api.make_pool()
    volume = await api.client.post("/vol/create", pool_id="pool", name="v", size="1GiB")
    assert volume["chunk_count"] == GIB // CHUNK_SIZE_BYTES
    chunks = await api.client.get("/vol/v/chunks")
    assert [chunk["index"] for chunk in chunks] == list(range(volume["chunk_count"]))
    for chunk in chunks:
        assert [replica["role"] for replica in chunk["replicas"]] == ["primary", "secondary"]
        assert len({replica["sds_id"] for replica in chunk["replicas"]}) == 2
        assert not chunk["is_degraded"]
        assert all(replica["is_available"] and not replica["is_rebuilding"] for replica in chunk["replicas"])
    assert await api.client.get("/vol/v/chunks", first=10, count=5) == chunks[10:15]
    assert await api.client.get("/vol/v/chunks", first=250, count=100) == chunks[250:]
    assert await api.client.get("/vol/v/chunks", first=10_000) == []
    for page in ({"first": -1}, {"count": 0}, {"count": 10_000_000}, {"first": "x"}):
        with pytest.raises(InvalidError):
            await api.client.get("/vol/v/chunks", **page)


async def test_health_follows_the_servers(api: Api) -> None:
    """Goal: one server down degrades what it held, both copies down fail it, and coming back heals it."""
    await api.make_pool(sds=2)
    await api.client.post("/vol/create", pool_id="pool", name="v", size="1GiB")
    assert (await api.client.get("/system/status"))["health"] == "OK"

    async def set_state(number: int, state: str) -> None:
        await api.manager.execute(SetSdsState(sds_id=number, state=state))

    await set_state(1, "DOWN")
    assert (await api.client.get("/vol/v"))["state"] == "DEGRADED"
    assert (await api.client.get("/pool/pool"))["health"] == "DEGRADED"
    health = await api.client.get("/pool/pool/health")
    assert (health["sds_up"], health["sds_down"], health["degraded_chunk_count"]) == (1, 1, 256)
    assert health["reasons"] == ["pool pool: 256 chunks have one copy that serves"]
    status = await api.client.get("/system/status")
    assert (status["health"], status["sds_down"], status["pools_degraded"]) == ("DEGRADED", 1, 1)
    assert "SDS s1 is DOWN" in status["reasons"]
    (first, *_) = await api.client.get("/vol/v/chunks")
    assert first["is_degraded"]
    assert {replica["sds_name"]: replica["is_available"] for replica in first["replicas"]} == {"s1": False, "s2": True}
    await set_state(2, "DOWN")
    assert (await api.client.get("/vol/v"))["state"] == "FAILED"
    assert (await api.client.get("/system/status"))["health"] == "FAILED"
    await set_state(1, "UP")
    await set_state(2, "UP")
    assert (await api.client.get("/vol/v"))["state"] == "AVAILABLE"
    assert (await api.client.get("/system/status"))["reasons"] == []


async def test_nobody_is_promoted_who_cannot_look_whether_the_others_are_dead(api: Api) -> None:
    """As just after a start of the MDM: what is UP has not registered yet."""
    await api.make_pool(sds=2)
    await api.client.post("/vol/create", pool_id="pool", name="v", size="64MiB")
    await api.manager.execute(SetSdsState(sds_id=1, state="DOWN"))
    with pytest.raises(ConflictError, match="s2 is not connected to the MDM now"):
        await api.client.post("/sds/s2/promote", accept_data_loss=True)
    with pytest.raises(ConflictError, match="16 chunks of volume v with every acknowledged write"):
        await api.client.post("/sds/s2/promote")
    with pytest.raises(ConflictError, match="s1 is DOWN: start it"):
        await api.client.post("/sds/s1/promote", accept_data_loss=True)


async def test_used_capacity_is_what_servers_report(api: Api) -> None:
    """Goal: net bytes, counted where the primary copy is."""
    await api.make_pool(sds=2)
    volume = await api.client.post("/vol/create", pool_id="pool", name="v", size="1GiB")
    number = struct.unpack(">I", bytes.fromhex(volume["id"][8:]))[0]
    for sds_id, primary_blocks in ((1, 100), (2, 28)):
        api.membership.sds[sds_id] = SdsRuntime(
            session=None,  # type: ignore[arg-type]
            reported_at=0.0,
            serving=True,
            failed_devices=[(4, "gone")] if sds_id == 1 else [],
        )
        api.membership.sds_stats[sds_id] = {"slots_used": 3, "volumes": {number: (3, 128, 2, primary_blocks)}}
    assert (await api.client.get("/vol/v"))["used_capacity_bytes"] == 128 * 4096
    assert (await api.client.get("/pool/pool"))["used_capacity_bytes"] == 128 * 4096
    sds = await api.client.get("/sds/s1")
    assert sds["used_capacity_bytes"] == 3 * CHUNK_SIZE_BYTES
    assert (sds["failed_devices"], sds["serving"]) == ([{"index": 4, "message": "gone"}], True)
    # One that is gone still holds what it held: nothing becomes free by that.
    del api.membership.sds[1]
    assert (await api.client.get("/vol/v"))["used_capacity_bytes"] == 128 * 4096
    sds = await api.client.get("/sds/s1")
    assert (sds["used_capacity_bytes"], sds["serving"]) == (3 * CHUNK_SIZE_BYTES, False)


async def test_events(api: Api) -> None:
    await api.make_pool()
    volume = await api.client.post("/vol/create", pool_id="pool", name="v", size="1GiB")
    events = await api.client.get("/event/list")
    assert [event["id"] for event in events] == sorted({event["id"] for event in events})
    (created,) = await api.client.get("/event/list", type="VOLUME_CREATE")
    assert created["volume_id"] == volume["id"]
    assert created in events
    assert await api.client.get("/event/list", since=created["time"]) == [
        event for event in events if event["time"] >= created["time"]
    ]
    assert await api.client.get("/event/list", since="2999-01-01T00:00:00Z") == []
    assert await api.client.get("/event/list", limit=2) == events[-2:]
    with pytest.raises(InvalidError, match="VOLUME_CREATE"):
        await api.client.get("/event/list", type="NONSENSE")
    with pytest.raises(InvalidError):
        await api.client.get("/event/list", since="yesterday-ish")
