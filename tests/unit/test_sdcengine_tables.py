"""Goal: the tables under the engines (map, histogram, token bucket) are right for any input, not only the usual one."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datapath import histogram
from datapath.ratelimit import Bucket
from datapath.volumemap import Map

ENTRY = struct.Struct("<IHHHH")


@settings(max_examples=60)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 400)), max_size=600))
def test_map_holds_what_was_added_and_not_removed(steps: list[tuple[bool, int]]) -> None:
    table, expected = Map(), set()
    for add, volume in steps:
        (table.add if add else table.remove)(volume)
        (expected.add if add else expected.discard)(volume)
    assert len(table) == len(expected)
    assert {v for v in range(1, 401) if v in table} == expected


def test_map_lookup_finds_the_entry_of_each_chunk_and_misses_unloaded_segments() -> None:
    table = Map()
    table.add(1)
    assert table.lookup(1, 0) is None
    entries = [(n + 1, n % 7 + 1, n % 5 + 10, 0, 0) for n in range(1024)]
    table.set_segment(1, 3, b"".join(ENTRY.pack(*entry) for entry in entries))
    assert [table.lookup(1, 3 * 1024 + n) for n in range(1024)] == entries
    assert table.lookup(1, 2 * 1024 + 5) is None
    assert table.lookup(1, 4 * 1024) is None
    table.drop_segment(1, 3)
    assert table.lookup(1, 3 * 1024) is None


def test_map_short_segment_leaves_the_other_chunks_without_a_primary() -> None:
    table = Map()
    table.add(1)
    table.set_segment(1, 0, ENTRY.pack(9, 1, 2, 3, 0) * 1024)
    table.set_segment(1, 0, ENTRY.pack(10, 1, 2, 0, 0) * 2)
    assert table.lookup(1, 1) == (10, 1, 2, 0, 0)
    assert table.lookup(1, 2) == (0, 0, 0, 0, 0)


@pytest.mark.parametrize(("segment", "size"), [(0, 13), (0, 12300), (262144, 12), (2**32 - 1, 12)])
def test_map_refuses_a_segment_of_a_wrong_size_or_index(segment: int, size: int) -> None:
    table = Map()
    table.add(1)
    with pytest.raises(ValueError, match="segment"):
        table.set_segment(1, segment, bytes(size))


def test_map_of_an_unknown_volume_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        Map().lookup(5, 0)
    with pytest.raises(KeyError):
        Map().set_segment(5, 0, b"")


@given(st.integers(0, 2**64 - 1))
def test_histogram_bucket_holds_its_latency_within_its_width(ns: int) -> None:
    bucket = histogram.bucket_of(ns)
    top = histogram.upper_bound_ns(bucket)
    bottom = histogram.upper_bound_ns(bucket - 1) if bucket else 0
    assert bottom <= ns < top or (bucket == 447 and ns >= bottom)
    assert bucket < 16 or (top - bottom) * 16 <= top


def test_histogram_quantiles_come_from_the_counts() -> None:
    counts = [0] * 40
    counts[10], counts[20], counts[39] = 50, 49, 1
    assert histogram.quantile_ns(counts, 0.5) == histogram.upper_bound_ns(10)
    assert histogram.quantile_ns(counts, 0.99) == histogram.upper_bound_ns(20)
    assert histogram.quantile_ns(counts, 1.0) == histogram.upper_bound_ns(39)
    assert histogram.quantile_ns([], 0.5) == 0
    assert histogram.count_below(counts, histogram.upper_bound_ns(20)) == 99
    assert histogram.difference([5, 7, 1], [2, 7]) == [3, 0, 1]
    with pytest.raises(ValueError, match="bucket"):
        histogram.upper_bound_ns(448)


@settings(max_examples=80)
@given(
    rate=st.integers(1, 5_000_000_000),
    costs=st.lists(st.integers(1, 2_000_000), min_size=1, max_size=60),
    pauses=st.lists(st.integers(0, 3_000_000_000), min_size=1, max_size=60),
)
def test_bucket_never_lets_more_through_than_rate_burst_and_one_request(
    rate: int, costs: list[int], pauses: list[int]
) -> None:
    bucket, now, spent = Bucket(rate, 0), 0, 0
    for index, cost in enumerate(costs):
        now += pauses[index % len(pauses)]
        wait = bucket.wait_ns(now)
        now += wait
        assert bucket.wait_ns(now) == 0, "the wait it names is enough"
        assert spent <= rate * now / 1e9 + max(rate / 10, 1) + 1
        bucket.spend(cost)
        spent += cost


def test_bucket_without_a_rate_never_waits() -> None:
    bucket = Bucket(0, 0)
    bucket.spend(1 << 40)
    assert bucket.wait_ns(0) == 0


def test_bucket_keeps_a_debt_over_a_long_pause() -> None:
    bucket = Bucket(10, 0)
    bucket.spend(101)
    assert bucket.wait_ns(5_000_000_000) > 4_000_000_000
    assert bucket.wait_ns(11_000_000_000) == 0
