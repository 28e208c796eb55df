"""The data plane's frames, as Python sees them (see wire.pxd for the protocol)."""

from typing import TypedDict

class HeaderFields(TypedDict):
    opcode: int
    status: int
    flags: int
    request_id: int
    volume_id: int
    chunk_index: int
    offset: int
    length: int
    body_length: int
    epoch: int
    node_id: int
    seq: int
    op_id: int
    incarnation: int

class BadFrameError(ValueError):
    code: int

def pack_header(
    opcode: int,
    *,
    status: int = 0,
    flags: int = 0,
    request_id: int = 0,
    volume_id: int = 0,
    chunk_index: int = 0,
    offset: int = 0,
    length: int = 0,
    body_length: int = 0,
    epoch: int = 0,
    node_id: int = 0,
    seq: int = 0,
    op_id: int = 0,
    incarnation: int = 0,
) -> bytes: ...
def unpack_header(data: bytes) -> HeaderFields: ...
def bench_headers(count: int) -> int: ...

WIRE: dict[str, int]
WIRE_VERSION: int
HEADER_SIZE: int
IO_SIZE_MAX: int
BODY_SIZE_MAX: int
CONTROL_BODY_MAX: int
OP_HELLO: int
OP_CHALLENGE: int
OP_PROOF: int
OP_WELCOME: int
OP_CAPABILITY: int
OP_READ: int
OP_WRITE: int
OP_DISCARD: int
OP_FLUSH: int
OP_SEEK: int
OP_REPLICATE: int
OP_REPLICATE_DISCARD: int
OP_DIRTY: int
OP_TAGS: int
OP_PULL: int
OP_PUSH: int
OP_PING: int
OP_REPLY: int
FLAG_ZEROS: int
FLAG_ABSENT: int
FLAG_COMMIT: int
FLAG_RESYNC: int
FLAG_REPLY_MORE: int
ST_OK: int
ST_BAD_REQUEST: int
ST_NOT_AUTHORIZED: int
ST_READ_ONLY: int
ST_STALE_MAP: int
ST_NOT_MEMBER: int
ST_NOT_READY: int
ST_NO_SPACE: int
ST_IO_ERROR: int
ST_CHECKSUM: int
ST_PAYLOAD: int
ST_NO_VOLUME: int
ST_RANGE: int
ST_SHUTTING_DOWN: int
ST_OLD_SESSION: int
ST_BUSY: int
ROLE_SDC: int
ROLE_SDS: int
