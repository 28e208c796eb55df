"""Values to frames and back: u32 little-endian length, then one msgpack value. Pure.

What is received is hostile until it has passed ``decode``; what we send passes the same limits, so that a mistake shows
at the sender. Keys of maps are texts or numbers; there are no extension types; depth, lengths and the whole message are
limited.
"""

from __future__ import annotations

import struct
from typing import Any

import msgpack

from pfvol.constants import RPC_MESSAGE_BYTES_MAX
from pfvol.errors import InvalidError, ProtocolError

DEPTH_MAX = 16
ARRAY_LENGTH_MAX = 1_000_000
MAP_LENGTH_MAX = 100_000
HELLO_BYTES_MAX = 4096

LENGTH = struct.Struct("<I")

assert HELLO_BYTES_MAX < RPC_MESSAGE_BYTES_MAX < 2**32


def encode(value: Any) -> bytes:
    """One frame. Raises ``InvalidError`` for a value that the other side would refuse."""
    try:
        _check(value, DEPTH_MAX)
        body = msgpack.packb(value, use_bin_type=True)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidError(f"a value that cannot be sent: {error}") from error
    if len(body) > RPC_MESSAGE_BYTES_MAX:
        raise InvalidError(f"a message of {len(body)} bytes cannot be sent: the limit is {RPC_MESSAGE_BYTES_MAX}")
    return LENGTH.pack(len(body)) + bytes(body)


def body_length(header: bytes, limit: int = RPC_MESSAGE_BYTES_MAX) -> int:
    """The length of the body that follows a header; raises ``ProtocolError`` above the limit or for an empty one."""
    (length,) = LENGTH.unpack(header)
    if not 0 < length <= limit:
        raise ProtocolError(f"a message of {length} bytes; the limit is {limit}")
    return int(length)


def decode(body: bytes) -> Any:
    """The value in a frame's body; raises ``ProtocolError`` for anything but exactly one value within the limits."""
    size = len(body)
    try:
        value = msgpack.unpackb(
            body,
            raw=False,
            strict_map_key=False,  # numbers are keys too (counters per volume); _check refuses the rest
            max_str_len=size,
            max_bin_len=size,
            max_array_len=min(size, ARRAY_LENGTH_MAX),
            max_map_len=min(size, MAP_LENGTH_MAX),
            max_ext_len=0,
            ext_hook=_no_extension,
        )
        _check(value, DEPTH_MAX)
    except (ValueError, TypeError, RecursionError, msgpack.exceptions.UnpackException) as error:
        raise ProtocolError(f"a message that does not decode: {error}") from error
    return value


def _no_extension(code: int, _: bytes) -> Any:
    raise ValueError(f"extension type {code}")


def _check(value: Any, depth: int) -> None:
    """Raises ``ValueError`` for a value that is nested too deeply or has keys that are neither texts nor numbers."""
    if isinstance(value, dict):
        if depth == 0:
            raise ValueError("nested too deeply")
        for key, item in value.items():
            if not isinstance(key, str) and type(key) is not int:
                raise ValueError(f"a key that is neither text nor number: {key!r}"[:80])
            if isinstance(item, dict | list | tuple):
                _check(item, depth - 1)
    elif isinstance(value, list | tuple):
        if depth == 0:
            raise ValueError("nested too deeply")
        for item in value:
            if isinstance(item, dict | list | tuple):
                _check(item, depth - 1)
