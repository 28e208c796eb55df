"""Goal: after a change of its set a chunk is served again everywhere and by nobody too early.

Real engines; the test plays the MDM.
"""

from __future__ import annotations

import os
from pathlib import Path

import trio

from datapath import wire
from tests.integration.test_disk_failures import replace
from tests.support.engines import Engines, running_engines
from tests.support.waiting import pass_time, poll_until_async

VOLUME, OWNER = 5, 7
MIB = 1 << 20
ONE, TWO, THREE = 1, 2, 3


def tell(engines: Engines, *sds_ids: int) -> None:
    for sds_id in sds_ids:
        engines._tell(engines[sds_id], VOLUME)


async def test_chunks_that_were_never_written_cost_no_journal_when_sets_change(tmp_path: Path) -> None:
    """There may be far more of them than a device has room for intents: it would be taken out of service."""
    chunks = 300
    async with running_engines(tmp_path, 2, slots=4, devices=1) as engines:
        engines.place(VOLUME, [(ONE, TWO, 0)] * chunks)
        engines.change_all(VOLUME, dict.fromkeys(range(chunks), (ONE, TWO, 0)), left=THREE)
        for sds_id in (ONE, TWO):
            engines[sds_id].target.checkpoint()
            await engines[sds_id].hears("checkpoint")
        engines.cut(ONE, TWO)
        engines.connect(ONE, TWO)  # what waits is told of, and compared
        await pass_time(0.3)
        for sds_id in (ONE, TWO):
            engines[sds_id].target.checkpoint()
            await engines[sds_id].hears("checkpoint", 2)
            assert engines[sds_id].told("device_failed") == []

        def forgotten() -> bool:
            return all(engines[sds_id].target.stats()["known_chunks"] == 0 for sds_id in (ONE, TWO))

        await poll_until_async(forgotten, what="chunks that are nowhere are forgotten")


async def test_a_secondary_that_hears_of_its_map_after_its_primary_is_there_serves(tmp_path: Path) -> None:
    """The entry still says who left once. Nothing else will happen to make it serve."""
    async with running_engines(tmp_path, 2) as engines:
        engines.place(VOLUME, [(ONE, TWO, 0)])
        client = await engines[ONE].client(VOLUME, OWNER)
        engines.change(VOLUME, 0, ONE, TWO, left=THREE)
        data = os.urandom(MIB)
        await engines.write(client, VOLUME, data)
        await engines.stop(TWO, checkpoint=True)
        known = dict(engines.volumes)
        engines.volumes.clear()
        engines.start(TWO)
        await pass_time(0.3)
        engines.volumes.update(known)
        tell(engines, TWO)
        other = await engines[TWO].client(VOLUME, OWNER)
        assert await engines.read(other, VOLUME, 0, 0, MIB) == data


async def test_a_new_secondary_serves_no_earlier_than_its_primary(tmp_path: Path) -> None:
    """The one that left may still show what was there before."""
    async with running_engines(tmp_path, 3) as engines:
        engines.place(VOLUME, [(THREE, ONE, TWO)])
        clients = {sds_id: await engines[sds_id].client(VOLUME, OWNER) for sds_id in (ONE, TWO, THREE)}
        await engines.write(clients[THREE], VOLUME, os.urandom(MIB))
        await engines[THREE].hears("learned")
        engines.volumes[VOLUME][0] = (2, ONE, TWO, 0, THREE)
        engines.version += 1
        tell(engines, ONE, TWO)

        async def serves() -> bool:
            return (await clients[TWO].read(VOLUME, 0, 0, 4096, 2)).status == wire.ST_OK

        await poll_until_async(serves, what="the new secondary serves")
        assert (await clients[THREE].read(VOLUME, 0, 0, 4096, 1)).status != wire.ST_OK
        assert (await clients[ONE].read(VOLUME, 0, 0, 4096, 2)).status == wire.ST_OK


async def test_a_learner_that_was_killed_while_it_learned_is_a_member_like_any_other(tmp_path: Path) -> None:
    """What it had of the chunk may have been in doubt. It was given everything since."""
    async with running_engines(tmp_path, 2) as engines:
        engines.set_rate(MIB)
        engines.place(VOLUME, [(ONE, 0, 0)])
        client = await engines[ONE].client(VOLUME, OWNER)
        data = os.urandom(MIB)
        await engines.write(client, VOLUME, data)
        engines.change(VOLUME, 0, ONE, 0, TWO, left=THREE)
        await poll_until_async(lambda: engines[TWO].target.stats()["slots_used"], what="a part of the copy")
        await engines.stop(TWO)
        engines.start(TWO)
        engines.set_rate(100 * MIB)
        await engines[ONE].hears("learned")
        engines.change(VOLUME, 0, ONE, TWO, left=THREE)
        other = await engines[TWO].client(VOLUME, OWNER)
        with trio.fail_after(3):
            assert await engines.read(other, VOLUME, 0, 0, MIB) == data
        engines[TWO].target.leave(ONE)
        assert (await engines[TWO].hears("leaving"))[-1][-1] == []


async def test_a_learner_is_not_kept_from_joining_by_a_disk_that_others_chunks_were_on(tmp_path: Path) -> None:
    async with running_engines(tmp_path, 3) as engines:
        engines.place(VOLUME, [(ONE, 0, 0), (THREE, TWO, 0)])
        client, other = await engines[ONE].client(VOLUME, OWNER), await engines[THREE].client(VOLUME, OWNER)
        await engines.write(client, VOLUME, os.urandom(MIB))
        await engines.write(other, VOLUME, os.urandom(4096), 1)
        first = engines[TWO].paths[0] / "blocks"
        replace(first, first, os.O_RDONLY)
        with trio.move_on_after(0.5):
            await engines.write(other, VOLUME, os.urandom(4096), 1)
        await engines[TWO].hears("device_failed")
        await engines.stop(THREE)
        engines.change(VOLUME, 0, ONE, 0, TWO)
        await engines[ONE].hears("learned")
