"""Goal: the mailbox loses nothing, keeps the order and wakes its reader, whatever the two sides' pace."""

import os
import select
import threading

import pytest

from datapath.ring import TestRing as Ring

DEADLINE_SECONDS = 30


def readable(ring):
    return bool(select.select([ring.event_fd], [], [], 0)[0])


def drain(ring):
    popped = []
    while (message := ring.pop()) is not None:
        popped.append(message)
    return popped


@pytest.mark.parametrize("capacity", [1, 2, 8, 4096])
def test_messages_come_out_as_they_went_in(capacity):
    ring = Ring(capacity)
    assert ring.pop() is None
    sent = [(kind, 2**64 - 1 - kind) for kind in range(capacity)]
    for message in sent:
        assert ring.push(*message) == 0
    assert drain(ring) == sent
    assert ring.pop() is None


def test_what_does_not_fit_waits_in_order_and_later_ones_wait_behind_it():
    ring = Ring(4)
    for number in range(10):
        assert ring.push(1, number) == 0
    assert [b for _, b in drain(ring)] == [0, 1, 2, 3]
    # There is room now, but 4 to 9 were first.
    assert ring.push(1, 10) == 0
    assert ring.pop() is None
    assert ring.retry() == 3
    assert [b for _, b in drain(ring)] == [4, 5, 6, 7]
    assert ring.retry() == 0
    assert [b for _, b in drain(ring)] == [8, 9, 10]
    assert ring.push(1, 11) == 0
    assert ring.pop() == (1, 11)


def test_a_long_overflow_goes_through_whole():
    ring = Ring(2)
    for number in range(1000):
        ring.push(7, number)
    got = drain(ring)
    while ring.retry() or len(got) < 1000:
        got += drain(ring)
    assert got == [(7, number) for number in range(1000)]


def test_the_indices_go_round():
    ring = Ring(2)
    for number in range(100_000):
        ring.push(3, number)
        assert ring.pop() == (3, number)


def test_the_reader_is_woken_by_a_message_also_by_one_that_did_not_fit():
    ring = Ring(1)
    assert not readable(ring)
    ring.push(1, 1)
    assert readable(ring)
    ring.clear()
    assert not readable(ring)
    ring.push(1, 2)
    assert readable(ring)
    ring.clear()
    ring.pop()
    assert ring.retry() == 0
    assert readable(ring)
    assert ring.pop() == (1, 2)


def test_clearing_an_event_that_is_not_set_does_not_block():
    Ring(4).clear()


def test_a_ring_gives_its_descriptor_back():
    ring = Ring(4)
    descriptor = ring.event_fd
    ring.push(1, 1)
    os.fstat(descriptor)
    del ring
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


@pytest.mark.parametrize(("capacity", "count"), [(1, 300), (64, 10_000)])
def test_two_threads_hand_over_everything_once_and_in_order(capacity, count):
    ring, got = Ring(capacity), []

    def produce():
        for number in range(count):
            ring.push(1, number)
            ring.retry()
        while ring.retry():
            select.select([], [], [], 0)  # lets the other thread have the interpreter

    producer = threading.Thread(target=produce)
    producer.start()
    while len(got) < count:
        assert select.select([ring.event_fd], [], [], DEADLINE_SECONDS)[0], "never woken"
        ring.clear()
        got += drain(ring)
    producer.join(DEADLINE_SECONDS)
    assert got == [(1, number) for number in range(count)]
