"""The invariants notice each kind of broken state: what the property tests rely on."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Any

import pytest

from mdm import invariants
from mdm.commands import MapVolume, RegisterSdc
from mdm.model import State
from pfvol.constants import SEGMENT_ENTRY_FORMAT
from tests.support.mdm_world import CHUNK, small_world


def good_state() -> State:
    world, _, pool_id = small_world()
    world.volume(pool_id, size_bytes=3 * CHUNK, provisioning="thick")
    world.run(MapVolume(volume_id=1, sdc_id=world.run(RegisterSdc(name="host")).sdc_id))
    return world.state


def with_entry(state: State, *fields: int) -> State:
    """The state with chunk 1 of volume 1 mapped like that."""
    segment = state.maps[1][0]
    return replace(state, maps={1: (segment[:12] + struct.pack(SEGMENT_ENTRY_FORMAT, *fields) + segment[24:],)})


def with_volume(state: State, **fields: Any) -> State:
    return replace(state, volumes={1: replace(state.volumes[1], **fields)})


def test_a_good_state_has_no_violation() -> None:
    assert invariants.check(good_state()) == []


@pytest.mark.parametrize("fields", [(1, 2, 2, 0, 0), (1, 1, 2, 2, 0), (1, 1, 2, 1, 0)])
def test_two_copies_on_one_sds(fields: tuple[int, ...]) -> None:
    problems = invariants.check(with_entry(good_state(), *fields))
    assert f"volume vol1 has two copies of a chunk on one SDS: {fields[1:4]}" in problems


@pytest.mark.parametrize(
    "fields", [(1, 2, 9, 0, 0), (1, 9, 0, 0, 0), (1, 1, 2, 9, 0), (1, 0, 2, 0, 0), (1, 0, 0, 2, 0)]
)
def test_a_copy_on_an_sds_that_does_not_exist(fields: tuple[int, ...]) -> None:
    problems = invariants.check(with_entry(good_state(), *fields))
    assert any("not all are in its domain" in text for text in problems)


def test_a_member_that_was_left_out() -> None:
    assert any("was left out" in text for text in invariants.check(with_entry(good_state(), 2, 1, 2, 0, 2)))


@pytest.mark.parametrize("fields", [(2, 1, 0, 0, 2), (2, 1, 0, 2, 2), (2, 1, 2, 3, 3), (2, 1, 2, 0, 77)])
def test_entries_of_degraded_and_healed_chunks_are_good(fields: tuple[int, ...]) -> None:
    problems = invariants.check(with_entry(good_state(), *fields))
    assert all(text.startswith("counts in") for text in problems)


def test_a_chunk_without_an_epoch() -> None:
    assert any("without an epoch" in text for text in invariants.check(with_entry(good_state(), 0, 1, 2, 0, 0)))


def test_a_map_of_another_length_than_the_volume() -> None:
    assert any("has 4 chunks" in text for text in invariants.check(with_volume(good_state(), size_bytes=4 * CHUNK)))


@pytest.mark.parametrize("count", ["copies", "primaries", "thick_slots"])
def test_counts_that_are_not_what_the_map_says(count: str) -> None:
    state = good_state()
    sds = replace(state.sds[1], **{count: getattr(state.sds[1], count) + 1})
    assert "counts in sds are not what the maps and objects say" in invariants.check(
        replace(state, sds={**state.sds, 1: sds})
    )


def test_thick_sums_and_quotas() -> None:
    state = good_state()
    lied = replace(state, pools={1: replace(state.pools[1], thick_bytes=0)})
    assert any("counts in pools" in text for text in invariants.check(lied))
    small = replace(state, pools={1: replace(state.pools[1], capacity_bytes=1)})
    assert any("has promised" in text for text in invariants.check(small))


def test_numbers_and_names_and_mappings() -> None:
    state = good_state()
    assert any("has not been given out" in text for text in invariants.check(replace(state, counters={})))
    assert any("counts in names" in text for text in invariants.check(replace(state, names={})))
    twice = with_volume(state, mappings=state.volumes[1].mappings * 2)
    assert any("mapped twice" in text for text in invariants.check(twice))
    assert any("given out twice" in text for text in invariants.check(twice))
