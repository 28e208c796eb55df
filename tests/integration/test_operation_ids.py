"""Goal: a write that a client sends again is carried out once, wherever it goes, and answered when all have it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import trio

from datapath import wire
from tests.integration.test_resync import BLOCK, CHUNK, PlayedSecondary, join, learned
from tests.support.dataclient import DataClient, Reply
from tests.support.engines import AGAIN, Engines, running_engines
from tests.support.waiting import poll_until_async

VOLUME, OWNER, OTHER = 5, 7, 8
ONE, TWO, PLAYED = 1, 2, 3
OURS, THEIRS = b"o" * BLOCK, b"t" * BLOCK
OPERATION = {"op_id": (4 << 42) + 100, "seq": 3}  # and its place


async def send(engines: Engines, client: DataClient, data: bytes = OURS, flags: int = 0, **operation: int) -> Reply:
    """Until it is taken, as an SDC does."""

    async def answer() -> Reply | None:
        fields = {"flags": flags} | (operation or OPERATION)
        reply = await client.write(VOLUME, data, epoch=engines.epoch(VOLUME, 0), **fields)
        return None if reply.status in AGAIN else reply

    reply = await poll_until_async(answer, what="an answer to the write")
    assert reply is not None
    return reply


async def begin(engines: Engines, sds_id: int = ONE) -> None:
    """One client writes and does not hear the answer, another overwrites."""
    client = await engines[sds_id].client(VOLUME, OWNER)
    assert (await send(engines, client)).status == wire.ST_OK
    await engines.write(await engines[sds_id].client(VOLUME, OTHER), VOLUME, THEIRS)


async def promote(engines: Engines, sds_id: int, dead: int) -> None:
    """The other member has died."""
    await engines.stop(dead)
    target = engines[sds_id].target
    asked = len(engines[sds_id].told("leaving"))
    target.leave(dead)
    await engines[sds_id].hears("leaving", asked + 1)
    target.peer_dead(dead, engines[dead].incarnation)
    engines.change(VOLUME, 0, sds_id, 0, dead, left=dead)
    target.stay(dead)


async def assert_known(engines: Engines, sds_id: int) -> None:
    """The first client sends its write again: it is told that it is done, and the other's stays."""
    client = await engines[sds_id].client(VOLUME, OWNER, 2)
    assert (await send(engines, client)).status == wire.ST_OK
    assert await engines.read(client, VOLUME, 0, 0, BLOCK) == THEIRS
    assert engines[sds_id].target.stats()["ops_known"] == 1
    assert (await send(engines, client, op_id=OPERATION["op_id"] + 1, seq=3)).status == wire.ST_OK
    assert await engines.read(client, VOLUME, 0, 0, BLOCK) == OURS, "the next one of that place is carried out"


async def test_sent_again_to_the_same_server(tmp_path: Path) -> None:
    async with running_engines(tmp_path, 2) as engines:
        engines.place(VOLUME, [(ONE, TWO, 0)])
        await begin(engines)
        await assert_known(engines, ONE)
        await engines.equal(VOLUME, 0, ONE, TWO)


async def test_sent_again_to_the_secondary_that_has_taken_over(tmp_path: Path) -> None:
    async with running_engines(tmp_path, 2) as engines:
        engines.place(VOLUME, [(ONE, TWO, 0)])
        await begin(engines)
        await promote(engines, TWO, ONE)
        await assert_known(engines, TWO)


async def test_a_discard_sent_again(tmp_path: Path) -> None:
    async with running_engines(tmp_path, 2) as engines:
        engines.place(VOLUME, [(ONE, TWO, 0)])
        client = await engines[ONE].client(VOLUME, OWNER)
        await engines.write(client, VOLUME, OURS)
        place = {"volume_id": VOLUME, "offset": 0, "length": CHUNK, "epoch": 1}
        for data in (THEIRS, OURS):
            assert (await client.request(wire.OP_DISCARD, **place, **OPERATION)).status == wire.ST_OK
            await engines.write(client, VOLUME, data)
        assert engines[ONE].target.stats()["ops_known"] == 1
        assert (await client.request(wire.OP_DISCARD, **place, **OPERATION)).status == wire.ST_OK
        assert await engines.read(client, VOLUME, 0, 0, BLOCK) == OURS


async def test_sent_again_while_the_first_waits_for_the_other_copy(tmp_path: Path) -> None:
    async with running_engines(tmp_path, 1) as engines, trio.open_nursery() as nursery:
        engines.place(VOLUME, [(ONE, PLAYED, 0)])
        played = PlayedSecondary(engines, PLAYED)
        nursery.start_soon(played.run)
        first = await engines[ONE].client(VOLUME, OWNER)
        asks_again = trio.CancelScope()

        async def ask() -> None:
            with asks_again:
                await send(engines, first)

        nursery.start_soon(ask)
        await poll_until_async(lambda: played.writes, what="the write at the secondary")
        asks_again.cancel()
        second = await engines[ONE].client(VOLUME, OWNER, 2)
        answers: list[Reply] = []

        async def again() -> None:
            answers.append(await send(engines, second))

        nursery.start_soon(again)
        await poll_until_async(lambda: engines[ONE].target.stats()["queue_depth"] == 2, what="both in the queue")
        assert not answers
        await played.answer(played.writes[0])
        await poll_until_async(lambda: answers, what="the answer")
        assert answers[0].status == wire.ST_OK
        assert len(played.writes) == 1
        assert {name: played.writes[0].header[name] for name in ("node_id", "op_id")} == {
            "node_id": OWNER,
            "op_id": OPERATION["op_id"],
        }
        nursery.cancel_scope.cancel()
        await trio.aclose_forcefully(played.link.stream)


async def test_sent_again_to_be_on_the_disks_it_is(tmp_path: Path) -> None:
    async with running_engines(tmp_path, 2) as engines:
        engines.place(VOLUME, [(ONE, TWO, 0)])
        await begin(engines)
        flushes = engines[TWO].target.stats()["flush_ops"]
        client = await engines[ONE].client(VOLUME, OWNER)
        reply = await send(engines, client, flags=wire.FLAG_COMMIT)
        assert (reply.status, engines[TWO].target.stats()["flush_ops"]) == (wire.ST_OK, flushes + 1)
        assert await engines.read(client, VOLUME, 0, 0, BLOCK) == THEIRS


async def test_a_learner_that_takes_over_knows_what_was_written_before_it_came(tmp_path: Path) -> None:
    async with running_engines(tmp_path, 2) as engines:
        engines.place(VOLUME, [(ONE, 0, 0)])
        await begin(engines)
        engines.set_rate(100_000_000)
        engines.change(VOLUME, 0, ONE, 0, TWO)
        await learned(engines)
        join(engines)
        await engines.equal(VOLUME, 0, ONE, TWO)
        await promote(engines, TWO, ONE)
        await assert_known(engines, TWO)


@pytest.mark.parametrize("clean", [True, False])
async def test_a_restarted_secondary_is_told(tmp_path: Path, *, clean: bool) -> None:
    async with running_engines(tmp_path, 2) as engines:
        engines.place(VOLUME, [(ONE, TWO, 0)])
        await begin(engines)
        await engines.stop(TWO, checkpoint=clean)
        engines.start(TWO)
        await engines.write(await engines[ONE].client(VOLUME, OTHER), VOLUME, THEIRS)
        await promote(engines, TWO, ONE)
        await assert_known(engines, TWO)


@pytest.mark.parametrize("clean", [True, False])
async def test_a_restarted_primary_is_told(tmp_path: Path, *, clean: bool) -> None:
    async with running_engines(tmp_path, 2) as engines:
        engines.place(VOLUME, [(ONE, TWO, 0)])
        await begin(engines)
        await engines.stop(ONE, checkpoint=clean)
        engines.start(ONE)
        await assert_known(engines, ONE)
        await engines.equal(VOLUME, 0, ONE, TWO)


async def test_what_is_lost_with_the_copy_that_was_replaced_is_not_known(tmp_path: Path) -> None:
    """A primary is left out with a write that nobody else has: its copy is made as the others' is."""
    async with running_engines(tmp_path, 2) as engines, trio.open_nursery() as nursery:
        engines.place(VOLUME, [(ONE, PLAYED, 0)])
        engines.set_rate(100_000_000)
        played = PlayedSecondary(engines, PLAYED)
        nursery.start_soon(played.run)
        client = await engines[ONE].client(VOLUME, OWNER)
        for number, write in enumerate(
            (partial(engines.write, client, VOLUME, THEIRS), partial(send, engines, client))
        ):
            scope = trio.CancelScope()

            async def ask(write: partial[object] = write, scope: trio.CancelScope = scope) -> None:
                with scope:
                    await write()

            nursery.start_soon(ask)
            await poll_until_async(lambda number=number: len(played.writes) > number, what="a write at the secondary")
            if number == 0:
                await played.answer(played.writes[0])
                await poll_until_async(lambda: engines[ONE].target.stats()["queue_depth"] == 0, what="the first write")
            scope.cancel()
        engines.change(VOLUME, 0, TWO, 0, ONE)
        await learned(engines, primary=TWO)
        join(engines, primary=TWO, learner=ONE)
        await promote(engines, ONE, TWO)
        again = await engines[ONE].client(VOLUME, OWNER, 2)
        assert await engines.read(again, VOLUME, 0, 0, BLOCK) == bytes(BLOCK)
        assert (await send(engines, again)).status == wire.ST_OK
        assert await engines.read(again, VOLUME, 0, 0, BLOCK) == OURS
        nursery.cancel_scope.cancel()
        await trio.aclose_forcefully(played.link.stream)


async def test_what_its_own_client_has_finished_is_refused(tmp_path: Path) -> None:
    """It was on its way, of an earlier session maybe, while the SDC has gone on."""
    async with running_engines(tmp_path, 2) as engines:
        engines.place(VOLUME, [(ONE, TWO, 0)])
        await begin(engines)
        client = await engines[ONE].client(VOLUME, OWNER)
        assert (await send(engines, client, op_id=OPERATION["op_id"] - 1, seq=3)).status == wire.ST_OLD_SESSION
        assert await engines.read(client, VOLUME, 0, 0, BLOCK) == THEIRS


async def test_nobody_takes_anothers_operation_away(tmp_path: Path) -> None:
    """An SDC that writes under the number of another one."""
    async with running_engines(tmp_path, 2) as engines:
        engines.place(VOLUME, [(ONE, TWO, 0)])
        liar = await engines[ONE].client(VOLUME, OTHER)
        assert (await send(engines, liar, THEIRS, node_id=OWNER, **OPERATION)).status == wire.ST_OK
        client = await engines[ONE].client(VOLUME, OWNER)
        assert (await send(engines, client)).status == wire.ST_OK
        assert await engines.read(client, VOLUME, 0, 0, BLOCK) == OURS
