"""Goal: the judge of ``make soak`` is worth something: it excuses nothing wrong, and accuses nothing that is right."""

from __future__ import annotations

import random
from collections.abc import Iterable
from functools import cache
from itertools import count
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tools.soak.history import NEVER, Operation, judge, last_value, problems

INITIAL = 0


def write(value: int, begin: float, end: float = NEVER) -> Operation:
    return Operation(begin, end, value, True)


def read(value: int, begin: float, end: float) -> Operation:
    return Operation(begin, end, value, False)


GOOD = {
    "nothing": [],
    "one after the other": [write(1, 0, 1), read(1, 2, 3), write(2, 4, 5), read(2, 6, 7)],
    "what was there before": [read(INITIAL, 0, 1), write(1, 2, 3), read(1, 4, 5)],
    "while it is written both may be read": [write(1, 0, 10), read(INITIAL, 1, 2), read(1, 3, 4), read(1, 5, 6)],
    "two writes at once, in either order": [write(1, 0, 10), write(2, 0, 10), read(2, 11, 12)],
    "two writes at once, both seen": [write(1, 0, 10), write(2, 0, 10), read(2, 2, 3), read(1, 4, 5), read(1, 11, 12)],
    "never answered and never happened": [write(1, 0, 1), write(2, 2), read(1, 3, 4), read(1, 50, 51)],
    "never answered and happened late": [write(1, 0, 1), write(2, 2), read(1, 30, 31), read(2, 50, 51)],
    "an old value of two writes that overlap": [write(1, 0, 1), write(2, 2, 9), read(1, 3, 8), read(2, 4, 5)],
    "an end and a beginning at the same instant": [write(1, 0, 1), read(INITIAL, 1, 2), read(1, 3, 4)],
}
BAD = {
    "a stale read": [write(1, 0, 1), write(2, 2, 3), read(1, 4, 5)],
    "a stale read of what was there before": [write(1, 0, 1), read(INITIAL, 2, 3)],
    "a lost write": [write(1, 0, 1), read(1, 2, 3), read(INITIAL, 4, 5)],
    "a lost write that nobody had read": [write(1, 0, 1), write(2, 2, 3), read(1, 4, 5), read(1, 6, 7)],
    "a resurrected write": [write(1, 0, 1), write(2, 2, 3), read(2, 4, 5), read(1, 6, 7)],
    "applied twice, as readers see": [write(1, 0, 20), write(2, 1, 20), read(1, 2, 3), read(2, 4, 5), read(1, 6, 7)],
    "applied twice, never answered": [write(1, 0), write(2, 1, 2), read(1, 3, 4), read(2, 5, 6), read(1, 7, 8)],
    "there and gone again while it is written": [write(1, 0, 20), read(1, 2, 3), read(INITIAL, 4, 5)],
    "two readers disagree on the order": [write(1, 0, 1), write(2, 0, 1), read(1, 2, 3), read(2, 4, 5)],
    "read before it was written": [read(1, 0, 1), write(1, 2, 3)],
    "nobody wrote it": [write(1, 0, 1), read(7, 2, 3)],
}


@pytest.mark.parametrize("name", GOOD)
def test_right_histories_pass(name: str) -> None:
    assert problems(GOOD[name], INITIAL) == []


@pytest.mark.parametrize("name", BAD)
def test_wrong_histories_are_caught(name: str) -> None:
    found = problems(BAD[name], INITIAL)
    assert found
    assert all(" of 0x" in sentence for sentence in found)


def test_a_value_is_written_once() -> None:
    with pytest.raises(ValueError, match="0x1"):
        problems([write(1, 0, 1), write(1, 2, 3)], INITIAL)


def test_the_newest_read_says_what_is_there() -> None:
    assert last_value([], 5) == 5
    assert last_value([write(1, 0, 1), read(1, 2, 3), write(2, 4, 5), read(2, 6, 7)], INITIAL) == 2


def of_a_register(seed: int, clients: int, operations: int) -> list[Operation]:
    """What clients saw of a real register: each works on it at an instant between invocation and response, and some
    writes get no answer, of which some happen much later and some never."""
    rng = random.Random(seed)
    values = count(1)
    steps: list[tuple[float, float, float, int]] = []  # the instant, invocation, response, value (0: a read)
    for _ in range(clients):
        now = 0.0
        for _ in range(operations):
            begin = now + rng.expovariate(1)
            instant = begin + rng.expovariate(1)
            now = instant + rng.expovariate(1)
            kind = rng.random()
            if kind < 0.5:
                steps.append((instant, begin, now, 0))
            elif kind < 0.9:
                steps.append((instant, begin, now, next(values)))
            else:
                late = rng.choice([instant, instant + rng.expovariate(0.1), NEVER])
                steps.append((late, begin, NEVER, next(values)))
    register, history = INITIAL, []
    for instant, begin, end, value in sorted(steps):
        register = value or register if instant < NEVER else register
        history.append(write(value, begin, end) if value else read(register, begin, end))
    rng.shuffle(history)
    return history


@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(1, 30))
def test_what_a_register_did_passes(seed: int, clients: int, operations: int) -> None:
    assert problems(of_a_register(seed, clients, operations), INITIAL) == []


@given(st.integers(0, 2**32), st.integers(2, 5), st.integers(3, 30))
def test_one_read_of_an_overwritten_value_is_caught(seed: int, clients: int, operations: int) -> None:
    """Of all reads that could see something older than they may, one does."""
    history = of_a_register(seed, clients, operations)
    writes = [one for one in history if one.is_write and one.end < NEVER]
    stale = [
        (index, old.value)
        for index, one in enumerate(history)
        if not one.is_write
        for old in writes
        for newer in writes
        if old.end < newer.begin and newer.end < one.begin
    ]
    if stale:
        index, value = random.Random(seed).choice(stale)
        history[index] = history[index]._replace(value=value)
        assert problems(history, INITIAL)


def has_an_order(history: Iterable[Operation], register: int) -> bool:
    """By trying: the slow way to know, for short histories."""

    @cache
    def order(operations: frozenset[tuple[int, Operation]], register: int) -> bool:
        if all(one.end == NEVER for _, one in operations):
            return True
        for number, one in operations:
            if any(other.end < one.begin for _, other in operations):
                continue
            rest = operations - {(number, one)}
            if one.is_write and (order(rest, one.value) or (one.end == NEVER and order(rest, register))):
                return True
            if not one.is_write and one.value == register and order(rest, register):
                return True
        return False

    return order(frozenset(enumerate(history)), register)


short_times = st.tuples(st.integers(0, 8), st.integers(0, 8)).map(sorted)


histories = st.tuples(
    st.lists(st.tuples(short_times, st.booleans()), max_size=3),
    st.lists(st.tuples(short_times, st.integers(0, 3)), max_size=5),
)


def of_times(writes: list[tuple[list[int], bool]], reads: list[tuple[list[int], int]]) -> list[Operation]:
    history = [
        write(number, begin, end if answered else NEVER) for number, ((begin, end), answered) in enumerate(writes, 1)
    ]
    return history + [read(value, begin, end) for (begin, end), value in reads]


@settings(max_examples=500)
@given(histories)
def test_the_verdict_is_that_of_trying_every_order(drawn: tuple[list[Any], list[Any]]) -> None:
    history = of_times(*drawn)
    assert (problems(history, INITIAL) == []) == has_an_order(history, INITIAL)


@settings(max_examples=500)
@given(histories, st.sets(st.integers(1, 3)))
def test_writes_that_may_happen_again_are_excused_for_that_alone(
    drawn: tuple[list[Any], list[Any]], may_again: set[int]
) -> None:
    history = of_times(*drawn)
    again = [write(one.value, one.begin) for one in history if one.is_write and one.value in may_again]
    verdict = judge(history, INITIAL, may_again)
    assert (verdict.problems == []) == has_an_order(history + again, INITIAL)
    if not may_again or has_an_order(history, INITIAL):
        assert verdict.again == []


def test_what_was_carried_out_again_is_named() -> None:
    history = BAD["applied twice, as readers see"]
    assert judge(history, INITIAL, {1}) == ([], [1])
    assert judge(history, INITIAL, {2}).problems
    assert judge(BAD["a lost write"], INITIAL, {1}).problems
