"""The codec: what we send arrives as it was, and nothing that arrives can do more than be refused."""

from __future__ import annotations

import contextlib
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pfvol.constants import RPC_MESSAGE_BYTES_MAX
from pfvol.errors import Error, InvalidError, NotFoundError, ProtocolError
from pfvol.rpc import codec
from pfvol.rpc.messages import METHOD_LENGTH_MAX, Answer, Notification, Request, from_value, to_value

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=20)
    | st.binary(max_size=40)
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8) | st.integers(0, 99), inner, max_size=4)
    ),
    max_leaves=20,
)
params = st.dictionaries(st.text(max_size=8), values, max_size=4)
methods = st.text(min_size=1, max_size=METHOD_LENGTH_MAX)
ids = st.integers(0, 2**63 - 1)
messages = (
    st.builds(Request, ids, methods, params)
    | st.builds(Notification, methods, params)
    | st.builds(Answer, ids, st.none(), values)
    | st.builds(Answer, ids, st.just(NotFoundError("gone", what="x").to_wire()), st.none())
)


def body_of(frame: bytes) -> bytes:
    assert codec.body_length(frame[:4]) == len(frame) - 4
    return frame[4:]


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@given(messages)
def test_a_message_arrives_as_it_was_sent(message: Any) -> None:
    assert from_value(codec.decode(body_of(codec.encode(to_value(message))))) == message


@given(st.binary(max_size=200))
def test_random_bytes_decode_or_are_refused(body: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        from_value(codec.decode(body))


@given(messages, st.data())
def test_a_message_with_a_flipped_byte_decodes_or_is_refused(message: Any, data: st.DataObject) -> None:
    body = bytearray(body_of(codec.encode(to_value(message))))
    body[data.draw(st.integers(0, len(body) - 1))] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(ProtocolError):
        from_value(codec.decode(bytes(body)))


@given(messages, st.data())
def test_a_cut_or_lengthened_message_is_refused(message: Any, data: st.DataObject) -> None:
    body = body_of(codec.encode(to_value(message)))
    with pytest.raises(ProtocolError):
        codec.decode(body[: data.draw(st.integers(0, len(body) - 1))])
    with pytest.raises(ProtocolError):
        codec.decode(body + b"\x01")


@pytest.mark.parametrize(
    "body",
    [
        msgpack.packb({b"bytes": 1}),
        msgpack.packb({1.5: 1}),
        msgpack.packb({None: 1}),
        msgpack.packb({True: 1}),
        b"\x81\x91\x01\x01",  # a list as a key
        msgpack.packb(msgpack.ExtType(5, b"x")),
        msgpack.packb(msgpack.Timestamp(1, 1)),
        b"\xc7\x00\x05",  # an extension of no bytes
        msgpack.packb(nested(codec.DEPTH_MAX + 1)),
        b"\x91" * 5000 + b"\x01",
        b"\x91" * 200_000 + b"\x01",
        b"\xdd\xff\xff\xff\xff",  # an array said to be of 4 G items
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\xa2\xff\xfe",  # no UTF-8
        b"\xc1",
        b"",
    ],
)
def test_a_hostile_body_is_refused(body: bytes) -> None:
    with pytest.raises(ProtocolError):
        codec.decode(body)


@pytest.mark.parametrize(
    "value",
    [
        None,
        7,
        [],
        [3, 1, "m", {}],
        [0, 1, "m"],
        [0, 1, "m", []],
        [0, 1, "m", None],
        [0, 1, "", {}],
        [0, 1, "m" * (METHOD_LENGTH_MAX + 1), {}],
        [0, -1, "m", {}],
        [0, True, "m", {}],
        [0, "1", "m", {}],
        [False, 1, "m", {}],
        [1, 1, "error", None],
        [1, 1, {"code": "x"}, 5],
        [1, 1],
        [2, "m", 1],
        [2, 5, {}],
        [2, "m", {}, 1],
    ],
)
def test_a_value_that_is_no_message_is_refused(value: Any) -> None:
    with pytest.raises(ProtocolError):
        from_value(value)


@pytest.mark.parametrize(
    "value",
    [{b"x": 1}, {1.5: 2}, nested(codec.DEPTH_MAX + 1), {"x": object()}, 2**64, {"x": "\ud800"}],
)
def test_what_the_other_side_would_refuse_is_not_sent(value: Any) -> None:
    with pytest.raises(InvalidError):
        codec.encode(value)


def test_a_message_may_be_as_large_as_the_limit_and_no_larger() -> None:
    overhead = len(codec.encode(b"x" * 100_000)) - 4 - 100_000
    largest = codec.encode(b"x" * (RPC_MESSAGE_BYTES_MAX - overhead))
    assert codec.body_length(largest[:4]) == RPC_MESSAGE_BYTES_MAX
    with pytest.raises(InvalidError):
        codec.encode(b"x" * (RPC_MESSAGE_BYTES_MAX - overhead + 1))


@pytest.mark.parametrize("length", [0, RPC_MESSAGE_BYTES_MAX + 1, 2**32 - 1])
def test_a_length_beyond_the_limit_is_refused_before_the_body(length: int) -> None:
    with pytest.raises(ProtocolError):
        codec.body_length(codec.LENGTH.pack(length))


def test_an_error_comes_back_as_the_same_class() -> None:
    sent = NotFoundError("no volume v", volume="v")
    got = Error.from_wire(codec.decode(body_of(codec.encode(sent.to_wire()))))
    assert type(got) is NotFoundError
    assert (got.message, got.details) == (sent.message, sent.details)
