"""Goal: the cache of volumes never believes an answer that a change has overtaken, and never floods the MDM."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing

from pfvol.capability import Capability
from pfvol.errors import DeniedError, NotFoundError, ProtocolError, UnreachableError
from pfvol.sds.volumes import SEGMENT_BYTES, Volumes, check_mapping, parse_info
from tests.support.waiting import pass_time

GIB = 1024**3


def info(size_bytes: int = GIB, mappings: tuple[tuple[int, int, bool], ...] = ((7, 11, False),)) -> dict[str, Any]:
    return {
        "size_bytes": size_bytes,
        "thick": False,
        "commit": False,
        "pool_id": 3,
        "mappings": [list(one) for one in mappings],
        "segments": 1,
    }


class Mdm:
    """Answers ``map.volume`` when the test lets it."""

    def __init__(self) -> None:
        self.answers: list[Any] = []
        self.asked = 0
        self.gate = trio.Event()

    async def call(self, method: str, params: dict[str, Any]) -> Any:
        assert method == "map.volume"
        self.asked += 1
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        await self.gate.wait()
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def mdm() -> Mdm:
    return Mdm()


async def test_many_who_ask_at_once_make_one_question(mdm: Mdm, autojump_clock: trio.testing.MockClock) -> None:
    mdm.answers = [info()]
    volumes = Volumes(mdm.call)
    async with trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(volumes.refresh, 1)
        await trio.testing.wait_all_tasks_blocked()
        mdm.gate.set()
    assert mdm.asked == 1
    assert volumes.get(1) == parse_info(info())


async def test_a_revocation_overtakes_the_answer_that_is_on_its_way(mdm: Mdm) -> None:
    mdm.answers = [info(), info(mappings=())]
    volumes = Volumes(mdm.call)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(volumes.refresh, 1)
        await trio.testing.wait_all_tasks_blocked()
        volumes.revoke(1, 7)
        mdm.gate.set()
    got = volumes.get(1)
    assert got is not None
    assert got.mappings == {}
    assert mdm.asked == 2


async def test_a_revocation_takes_out_that_sdc_alone(mdm: Mdm) -> None:
    volumes = Volumes(mdm.call)
    volumes.put(1, parse_info(info(mappings=((7, 11, False), (8, 12, True), (7, 13, True)))))
    volumes.revoke(1, 7)
    got = volumes.get(1)
    assert got is not None
    assert got.mappings == {12: (8, True)}


async def test_an_mdm_that_is_away_is_waited_for(mdm: Mdm, autojump_clock: trio.testing.MockClock) -> None:
    mdm.answers = [UnreachableError("away")] * 20 + [info()]
    mdm.gate.set()
    assert await Volumes(mdm.call).refresh(1) == parse_info(info())
    assert mdm.asked == 21


async def test_a_volume_that_is_gone_is_forgotten_by_all_who_asked(mdm: Mdm) -> None:
    mdm.answers = [NotFoundError("gone")]
    volumes = Volumes(mdm.call)
    volumes.put(1, parse_info(info()))
    refused = 0

    async def ask() -> None:
        nonlocal refused
        try:
            await volumes.refresh(1)
        except NotFoundError:
            refused += 1

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        mdm.gate.set()
    assert refused == 5
    assert mdm.asked == 1
    assert 1 not in volumes


def shown(mapping_id: int) -> Capability:
    return Capability(7, 1, mapping_id, False, 0)


async def test_what_the_mdm_has_told_or_denied_once_decides_until_its_word_is_doubted() -> None:
    volumes = Volumes(Mdm().call)
    assert not volumes.decides(shown(11))
    volumes.put(1, parse_info(info()))
    assert volumes.decides(shown(11))
    assert not volumes.decides(shown(10))
    volumes.settle(shown(15))
    assert volumes.decides(shown(10))
    assert volumes.decides(shown(15))
    assert not volumes.decides(shown(16))
    volumes.doubt()
    assert volumes.decides(shown(11))
    assert not volumes.decides(shown(15))


async def test_questions_in_vain_are_a_second_apart(autojump_clock: trio.testing.MockClock) -> None:
    volumes = Volumes(Mdm().call)
    volumes.put(1, parse_info(info()))
    volumes.settle(shown(11))
    assert volumes.may_ask(1)
    volumes.settle(shown(12))
    assert not volumes.may_ask(1)
    assert volumes.may_ask(2)
    await pass_time(1.0)
    assert volumes.may_ask(1)


@pytest.mark.parametrize(
    "body",
    [
        None,
        [],
        {},
        info(size_bytes=0),
        info(size_bytes=-1),
        info(size_bytes=2**60),
        {**info(), "mappings": [[1, 2]]},
        {**info(), "mappings": 5},
        {**info(), "size_bytes": "much"},
    ],
)
async def test_nonsense_from_the_mdm_is_refused(body: Any, mdm: Mdm) -> None:
    with pytest.raises(ProtocolError):
        parse_info(body)
    mdm.answers = [body]
    mdm.gate.set()
    volumes = Volumes(mdm.call)
    with pytest.raises(ProtocolError):
        await volumes.refresh(1)
    assert 1 not in volumes


def test_a_mapping_gives_what_both_it_and_the_capability_allow() -> None:
    volume = parse_info(info(mappings=((7, 11, False), (7, 12, True))))
    for mapping_id, read_only, write in ((11, False, True), (11, True, False), (12, False, False), (12, True, False)):
        assert check_mapping(volume, Capability(7, 1, mapping_id, read_only, 0)) is write
    for sdc_id, mapping_id in ((8, 11), (7, 13)):
        with pytest.raises(DeniedError):
            check_mapping(volume, Capability(sdc_id, 1, mapping_id, False, 0))


@pytest.mark.parametrize(
    ("size_bytes", "segments"), [(1, 1), (SEGMENT_BYTES, 1), (SEGMENT_BYTES + 1, 2), (1024**4, 256)]
)
def test_a_size_has_that_many_segments(size_bytes: int, segments: int) -> None:
    assert parse_info(info(size_bytes=size_bytes)).segments == segments
