"""Goal: an SDS gives back all that a deleted volume took, in its devices and in its engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datapath import wire
from tests.support.sdspair import PlayedMdm, RunningSds, running_sds
from tests.support.waiting import poll_until_async

OWNER = 7
VOLUMES = 24
ALONE = [(1, 1, 0)] * 2  # chunks whose only copy is on SDS 1


def holdings(sds: RunningSds) -> dict[str, Any]:
    stats = sds.target.stats()
    return {key: stats[key] for key in ("slots_used", "known_volumes", "known_chunks", "queue_depth")}


async def deleted(sds: RunningSds, mdm: PlayedMdm, volume_id: int) -> None:
    """As the MDM does it; returns when the SDS has told that the slots are free."""
    mdm.volumes.pop(volume_id, None)
    await sds.server.deleted(volume_id)
    await poll_until_async(lambda: volume_id in sds.server.take_purged(), what=f"a purge of volume {volume_id}")


async def test_volumes_that_come_and_go_leave_nothing_behind(tmp_path: Path) -> None:
    mdm = PlayedMdm()
    async with running_sds(tmp_path, 1, mdm) as sds, await sds.client(OWNER) as client:
        before = holdings(sds)
        for volume_id in range(1, VOLUMES + 1):
            mdm.add_volume(volume_id, len(ALONE))
            mdm.volumes[volume_id].chunks = ALONE
            assert (await client.capability(volume_id, mdm.map(volume_id, OWNER))).status == wire.ST_OK
            assert (await client.write_until_taken(volume_id, bytes(4096))).status == wire.ST_OK
            assert (await client.read(volume_id, chunk=1)).status == wire.ST_OK
            if volume_id == 1:
                assert holdings(sds)["known_chunks"] == holdings(sds)["slots_used"] == 1
            await deleted(sds, mdm, volume_id)
        await poll_until_async(lambda: holdings(sds) == before, what="an engine that holds what it held at first")


async def test_a_volume_of_which_the_sds_never_held_anything_is_forgotten_too(tmp_path: Path) -> None:
    mdm = PlayedMdm()
    async with running_sds(tmp_path, 1, mdm) as sds:
        before = holdings(sds)
        for volume_id in range(1, VOLUMES + 1):
            await deleted(sds, mdm, volume_id)
        await poll_until_async(lambda: holdings(sds) == before, what="an engine that holds what it held at first")
