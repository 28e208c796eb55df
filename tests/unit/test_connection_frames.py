"""Goal: a connection delivers frames whole, in order and intact however the bytes come, and ends at the first bad one."""

import errno
import os
import socket
import struct

import pytest

from datapath import wire
from datapath.connection import TestConnection as Connection
from tests.support.frames import BLOCK, MIB, header

MORE, IDLE, CLOSED = 1, 0, -1
BUF_SMALL, BUF_MEDIUM, BUF_LARGE = 8192, 262144, 1118208
DIRECT_BODY_MIN = 65536


@pytest.fixture
def pair():
    """Our end, as a plain socket, and the product's connection at the other."""
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * MIB)
    theirs.setblocking(False)
    connection = Connection(theirs.detach())
    yield ours, connection
    ours.close()


def write_frame(length, request_id=1, offset=0):
    data = (struct.pack("<I", request_id) * (length // 4 + 1))[:length]
    body = bytes(4 * ((offset + length + BLOCK - 1) // BLOCK - offset // BLOCK)) + data
    return wire.pack_header(
        wire.OP_WRITE, request_id=request_id, offset=offset, length=length, body_length=len(body)
    ) + body  # fmt: skip


def flush_frame(request_id=1):
    return wire.pack_header(wire.OP_FLUSH, request_id=request_id)


def received(connection):
    return [head + body for head, body in connection.frames]


def drained(connection):
    while connection.receive() == MORE:
        pass
    return received(connection)


def feed(ours, connection, data, step=65536):
    """Sends it all, however small the socket is."""
    for start in range(0, len(data), step):
        ours.sendall(data[start : start + step])
        drained(connection)


MIXED = [flush_frame(1), write_frame(1, 2, 5), write_frame(4096, 3), flush_frame(4), write_frame(4097, 5, 4095)]


def test_a_stream_cut_at_every_byte_is_the_same_frames(pair):
    ours, connection = pair
    stream = b"".join(MIXED)
    for cut in range(len(stream) + 1):
        connection.frames.clear()
        ours.sendall(stream[:cut])
        assert connection.receive() == IDLE
        assert received(connection) == [f for i, f in enumerate(MIXED) if len(b"".join(MIXED[: i + 1])) <= cut]
        ours.sendall(stream[cut:])
        assert drained(connection) == MIXED


def test_a_stream_that_comes_byte_by_byte(pair):
    ours, connection = pair
    feed(ours, connection, b"".join(MIXED), step=1)
    assert received(connection) == MIXED


SIZES = [DIRECT_BODY_MIN - 4 * 16 - 1, DIRECT_BODY_MIN - 4 * 16, DIRECT_BODY_MIN, BUF_MEDIUM - 200, BUF_MEDIUM, MIB]


@pytest.mark.parametrize("length", SIZES)
@pytest.mark.parametrize("have", [0, 1, 79, 80, 81, 4096])
def test_large_bodies_arrive_whole_wherever_they_are_cut(pair, length, have):
    ours, connection = pair
    frame = write_frame(length, 9)
    stream = flush_frame(8) + frame + flush_frame(10)
    cut = wire.HEADER_SIZE + have
    ours.sendall(stream[:cut])
    drained(connection)
    feed(ours, connection, stream[cut:])
    assert received(connection) == [flush_frame(8), frame, flush_frame(10)]


def test_frames_of_all_sizes_back_to_back(pair):
    ours, connection = pair
    frames = [
        write_frame(length, 100 + length, offset) for length in (1, 511, 4096, 65000, 300_001) for offset in (0, 7)
    ]
    frames = [frame for frame in frames for _ in range(3)]
    feed(ours, connection, b"".join(frames), step=100_003)
    assert received(connection) == frames


def test_bodies_that_the_engine_keeps_are_not_overwritten():
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    connection = Connection(theirs.detach(), retain=True)
    frames = [write_frame(30_000, number) for number in range(60)]
    with ours:
        feed(ours, connection, b"".join(frames), step=40_000)
        assert received(connection) == frames
        connection.release()
        feed(ours, connection, b"".join(frames))
        assert received(connection) == frames * 2


def test_one_connection_cannot_keep_the_thread(pair):
    """A call reads a bounded amount, says that there may be more, and later calls deliver the rest."""
    ours, connection = pair
    frames = [write_frame(200_000, number) for number in range(19)]
    ours.setblocking(False)
    stream = memoryview(b"".join(frames))
    results = []
    while stream or results[-1] == MORE:
        try:
            stream = stream[ours.send(stream) :] if stream else stream
        except BlockingIOError:
            pass
        results.append(connection.receive())
    assert received(connection) == frames
    assert CLOSED not in results


@pytest.mark.parametrize(
    ("code", "bad"),
    [
        (1, header(17, length=BLOCK, magic=b"HTTP")),
        (2, header(17, length=BLOCK, version=9)),
        (3, header(17, length=BLOCK, crc=1)),
        (4, header(99)),
        (5, header(17, length=BLOCK, status=2)),
        (6, header(17, length=BLOCK, flags=64)),
        (7, header(17, offset=4 * MIB, length=BLOCK)),
        (8, header(17)),
        (9, header(18, length=BLOCK, body_length=2**32 - 1)),
        (10, header(17, offset=1, length=BLOCK)),
        (11, header(34 | 128, body_length=1)),
    ],
)
def test_a_bad_frame_ends_the_connection_after_the_good_ones_before_it(pair, code, bad):
    ours, connection = pair
    ours.sendall(MIXED[1] + MIXED[2] + bad + MIXED[0])
    assert connection.receive() == CLOSED
    assert received(connection) == MIXED[1:3]
    assert connection.error == -code
    assert connection.receive() == CLOSED
    assert connection.send(b"answer") < 0
    assert connection.flush() < 0


def test_a_bad_header_is_refused_before_its_body_has_come(pair):
    ours, connection = pair
    ours.sendall(header(18, length=BLOCK, body_length=wire.BODY_SIZE_MAX))
    assert connection.receive() == CLOSED
    assert connection.error == -9


@pytest.mark.parametrize("cut", [0, 1, 79, 80, 81, 5000, 70_000])
def test_the_peer_goes_in_the_middle_of_a_frame(pair, cut):
    ours, connection = pair
    ours.sendall(MIXED[2] + write_frame(100_000)[:cut])
    ours.close()
    while (result := connection.receive()) >= 0:
        assert result in (IDLE, MORE)
    assert received(connection) == [MIXED[2]]
    assert connection.error == errno.ECONNRESET


def test_what_was_received_is_given_back(pair):
    ours, connection = pair
    feed(ours, connection, write_frame(MIB) * 3 + write_frame(100) * 50)
    assert connection.bytes_out == BUF_MEDIUM  # its input buffer, and no body


# -- sending


def take(ours, size):
    taken = bytearray()
    while len(taken) < size:
        part = ours.recv(size - len(taken))
        assert part
        taken += part
    return bytes(taken)


def test_output_goes_out_in_order_copied_or_by_reference(pair):
    ours, connection = pair
    parts = [os.urandom(size) for size in (1, 80, 8192, 30_000, 5, 100_000, 7)]
    for number, part in enumerate(parts):
        assert connection.send(part, by_reference=bool(number % 2)) == 0
    while connection.flush() == 1:
        take(ours, 1)
    assert take(ours, len(b"".join(parts))) == b"".join(parts)
    assert connection.flush() == 0


def test_a_full_socket_is_said_so_and_nothing_is_lost_or_sent_twice(pair):
    ours, connection = pair
    parts = [struct.pack("<I", number) * 5000 for number in range(400)]
    for number, part in enumerate(parts):
        assert connection.send(part, by_reference=number % 3 == 0) == 0
    expected, got = b"".join(parts), bytearray()
    assert connection.flush() == 1
    assert connection.flush() == 1
    ours.setblocking(False)
    while len(got) < len(expected):
        try:
            got += ours.recv(33_333)
        except BlockingIOError:
            assert connection.flush() in (0, 1)
    assert got == expected
    assert connection.flush() == 0


def test_buffers_are_given_back_when_the_kernel_has_taken_them(pair):
    ours, connection = pair
    for _ in range(20):
        connection.send(bytes(50_000), by_reference=True)
    held = connection.bytes_out
    assert held >= 20 * 50_000
    while connection.flush() == 1:
        take(ours, 100_000)
    assert connection.bytes_out == 0


def test_many_small_answers_grow_the_queue_up_to_its_end(pair):
    """Answers by reference cannot be joined: the queue doubles to its limit, then says no and keeps what it has."""
    _, connection = pair
    results = [connection.send(b"x" * 100, by_reference=True) for _ in range(65536)]
    assert set(results) == {0}
    assert connection.send(b"x" * 100, by_reference=True) == -errno.ENOBUFS


@pytest.mark.parametrize("by_reference", [False, True])
def test_the_peer_goes_while_we_send(pair, by_reference):
    ours, connection = pair
    for _ in range(100):
        connection.send(bytes(100_000), by_reference=by_reference)
    assert connection.flush() == 1
    ours.close()
    assert connection.flush() == CLOSED
    assert connection.error in (errno.EPIPE, errno.ECONNRESET)
    assert connection.flush() == CLOSED
    assert connection.send(b"more", by_reference=by_reference) < 0
    assert connection.receive() == CLOSED


def test_a_reservation_larger_than_a_buffer_is_refused(pair):
    _, connection = pair
    assert connection.send(bytes(BUF_MEDIUM)) == 0
    assert connection.send(bytes(BUF_MEDIUM + 1)) == -errno.ENOMEM


def test_the_socket_is_closed_with_the_connection():
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    with ours:
        connection = Connection(theirs.detach())
        connection.send(bytes(1000), by_reference=True)
        del connection
        assert ours.recv(1) == b""
