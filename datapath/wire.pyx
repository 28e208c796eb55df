"""The data plane's frames: building and checking headers. The protocol itself is in ``wire.pxd``.

Owns nothing. ``header_check`` is the gate that every received header passes: after it, offsets, lengths and body length
fit each other and the chunk, so that engines may index with them.
"""

from libc.string cimport memcpy, memset
from datapath.checksum cimport crc32c


class BadFrameError(ValueError):
    """A header that no pfvol of this version sends; ``code`` is a BadFrame of wire.pxd."""

    def __init__(self, code: int) -> None:
        super().__init__((<bytes>bad_frame_text(code)).decode())
        self.code = code


cdef void header_seal(Header* h) noexcept nogil:
    h.magic = WIRE_MAGIC
    h.version = WIRE_VERSION
    h.header_crc = 0
    h.header_crc = crc32c(0, h, HEADER_SIZE)


cdef inline uint32_t crc_with_field_zeroed(const Header* h) noexcept nogil:
    cdef Header copy
    memcpy(&copy, h, HEADER_SIZE)
    copy.header_crc = 0
    return crc32c(0, &copy, HEADER_SIZE)


cdef inline bint whole_blocks(const Header* h) noexcept nogil:
    return ((h.offset | h.length) & (BLOCK_SIZE - 1)) == 0


cdef int check_request(const Header* h) noexcept nogil:
    cdef uint32_t blocks = blocks_touched(h.offset, h.length)
    cdef uint32_t op = h.opcode
    if h.status != 0 and (op != OP_WELCOME or h.status >= ST_COUNT):     # a WELCOME may be a refusal
        return BAD_STATUS
    if op == OP_WRITE:
        if h.length == 0 or h.length > IO_SIZE_MAX:
            return BAD_LENGTH
        return 0 if h.body_length == 4 * blocks + h.length else BAD_BODY
    if op == OP_REPLICATE or op == OP_PUSH:
        if h.length == 0 or h.length > IO_SIZE_MAX + BLOCK_SIZE:         # an unaligned write's edges, made whole
            return BAD_LENGTH
        if not whole_blocks(h):
            return BAD_ALIGNMENT
        return 0 if h.body_length == (20 if op == OP_PUSH else 4) * blocks + h.length else BAD_BODY
    if op == OP_READ or op == OP_PULL:
        if h.length == 0 or h.length > IO_SIZE_MAX + BLOCK_SIZE:
            return BAD_LENGTH
        if not whole_blocks(h):
            return BAD_ALIGNMENT
        return 0 if h.body_length == 0 else BAD_BODY
    if op == OP_VERIFY and h.length > VERIFY_BLOCKS_MAX * BLOCK_SIZE:
        return BAD_LENGTH
    if op == OP_DISCARD or op == OP_REPLICATE_DISCARD or op == OP_VERIFY or op == OP_REPAIR:
        if h.length == 0:
            return BAD_LENGTH
        if not whole_blocks(h):
            return BAD_ALIGNMENT
        return 0 if h.body_length == 0 else BAD_BODY
    if op == OP_FLUSH or op == OP_SEEK or op == OP_TAGS or op == OP_PING or op == OP_DIRTY:
        return 0 if h.body_length == 0 and h.length == 0 else BAD_BODY
    if op == OP_CAPABILITY or OP_HELLO <= op <= OP_WELCOME:
        return 0 if h.body_length <= CONTROL_BODY_MAX and h.length == 0 else BAD_BODY
    return BAD_OPCODE


cdef int check_reply(const Header* h) noexcept nogil:
    cdef uint32_t blocks = blocks_touched(h.offset, h.length)
    cdef uint32_t op = h.opcode & 127
    if h.status >= ST_COUNT:
        return BAD_STATUS
    if h.status != ST_OK:
        return 0 if h.body_length == 0 else BAD_BODY
    if op == OP_READ or op == OP_PULL:
        if h.length == 0 or h.length > IO_SIZE_MAX + BLOCK_SIZE:
            return BAD_LENGTH
        if not whole_blocks(h):
            return BAD_ALIGNMENT
        if h.flags & (FLAG_ZEROS | FLAG_ABSENT):
            return 0 if h.body_length == 0 else BAD_BODY
        return 0 if h.body_length == (20 if op == OP_PULL else 4) * blocks + h.length else BAD_BODY
    if op == OP_SEEK:
        return 0 if h.body_length == (0 if h.flags & FLAG_ABSENT else CHUNK_BLOCKS // 8) else BAD_BODY
    if op == OP_TAGS:
        return 0 if h.body_length == (0 if h.flags & FLAG_ABSENT else CHUNK_BLOCKS * 16) else BAD_BODY
    if op == OP_VERIFY:
        if not whole_blocks(h):
            return BAD_ALIGNMENT
        return 0 if h.body_length == (0 if h.flags & FLAG_ABSENT else 16 * blocks) else BAD_BODY
    if op == OP_DIRTY:
        return 0 if h.body_length % 16 == 0 and h.body_length <= CONTROL_BODY_MAX else BAD_COUNT
    if (op == OP_WRITE or op == OP_DISCARD or op == OP_FLUSH or op == OP_REPLICATE or op == OP_REPLICATE_DISCARD
            or op == OP_PUSH or op == OP_PING or op == OP_REPAIR or op == OP_CAPABILITY):
        return 0 if h.body_length == 0 else BAD_BODY
    return BAD_OPCODE


cdef int header_check(const Header* h) noexcept nogil:
    if h.magic != WIRE_MAGIC:
        return BAD_MAGIC
    if h.version != WIRE_VERSION:
        return BAD_VERSION
    if h.header_crc != crc_with_field_zeroed(h):
        return BAD_CRC
    if h.flags & ~<uint32_t>(FLAG_ZEROS | FLAG_ABSENT | FLAG_COMMIT | FLAG_RESYNC | FLAG_REPLY_MORE):
        return BAD_FLAGS
    if h.opcode != OP_DIRTY and h.opcode != (OP_DIRTY | OP_REPLY):
        # Both are at most 4 MiB after the first two tests, so their sum cannot wrap.
        if h.offset > CHUNK_SIZE or h.length > CHUNK_SIZE or h.offset + h.length > CHUNK_SIZE:
            return BAD_RANGE
    elif h.length != 0:
        return BAD_RANGE
    if h.opcode & OP_REPLY:
        return check_reply(h)
    return check_request(h)


cdef const char* bad_frame_text(int code) noexcept nogil:
    if code == BAD_MAGIC:
        return "not a pfvol frame (magic)"
    if code == BAD_VERSION:
        return "frame of another protocol version"
    if code == BAD_CRC:
        return "frame header does not match its checksum"
    if code == BAD_OPCODE:
        return "unknown or unexpected opcode"
    if code == BAD_STATUS:
        return "status out of range"
    if code == BAD_FLAGS:
        return "unknown flags"
    if code == BAD_RANGE:
        return "offset and length leave the chunk"
    if code == BAD_LENGTH:
        return "length out of range"
    if code == BAD_BODY:
        return "body length does not fit opcode and length"
    if code == BAD_ALIGNMENT:
        return "whole 4 KiB blocks were due"
    if code == BAD_COUNT:
        return "list of a wrong size"
    return "bad frame"


# -------------------------------------------------------------------------------------------- for trio, tests and tools


def pack_header(int opcode, *, int status=0, uint32_t flags=0, uint64_t request_id=0, uint64_t volume_id=0,
                uint32_t chunk_index=0, uint32_t offset=0, uint32_t length=0, uint32_t body_length=0, uint32_t epoch=0,
                uint32_t node_id=0, uint64_t seq=0, uint64_t op_id=0, uint64_t incarnation=0):
    """80 bytes: a sealed header. Checks nothing: tests build bad ones with it."""
    cdef Header h
    memset(&h, 0, HEADER_SIZE)
    h.opcode = <uint8_t>opcode
    h.status = <uint16_t>status
    h.flags = flags
    h.request_id = request_id
    h.volume_id = volume_id
    h.chunk_index = chunk_index
    h.offset = offset
    h.length = length
    h.body_length = body_length
    h.epoch = epoch
    h.node_id = node_id
    h.seq = seq
    h.op_id = op_id
    h.incarnation = incarnation
    header_seal(&h)
    return (<char*>&h)[:HEADER_SIZE]


def unpack_header(bytes data not None):
    """The fields of a received header as a dict, after every check. Raises BadFrameError."""
    cdef Header h
    if len(data) != HEADER_SIZE:
        raise ValueError(f"a header has {HEADER_SIZE} bytes, not {len(data)}")
    memcpy(&h, <char*>data, HEADER_SIZE)
    cdef int code = header_check(&h)
    if code:
        raise BadFrameError(code)
    return {
        "opcode": h.opcode, "status": h.status, "flags": h.flags, "request_id": h.request_id, "volume_id": h.volume_id,
        "chunk_index": h.chunk_index, "offset": h.offset, "length": h.length, "body_length": h.body_length,
        "epoch": h.epoch, "node_id": h.node_id, "seq": h.seq, "op_id": h.op_id, "incarnation": h.incarnation,
    }


def bench_headers(uint64_t count):
    """Seals and checks `count` headers; returns how many passed (layer benchmark)."""
    cdef Header h
    cdef uint64_t i, good = 0
    memset(&h, 0, HEADER_SIZE)
    h.opcode = OP_READ
    h.length = BLOCK_SIZE
    with nogil:
        for i in range(count):
            h.request_id = i
            h.offset = (i & 1023) << BLOCK_SHIFT
            header_seal(&h)
            good += header_check(&h) == 0
    return good


WIRE = {
    "WIRE_VERSION": WIRE_VERSION, "HEADER_SIZE": HEADER_SIZE, "IO_SIZE_MAX": IO_SIZE_MAX,
    "BODY_SIZE_MAX": BODY_SIZE_MAX, "CONTROL_BODY_MAX": CONTROL_BODY_MAX,
    "OP_HELLO": OP_HELLO, "OP_CHALLENGE": OP_CHALLENGE, "OP_PROOF": OP_PROOF, "OP_WELCOME": OP_WELCOME,
    "OP_CAPABILITY": OP_CAPABILITY, "OP_READ": OP_READ, "OP_WRITE": OP_WRITE, "OP_DISCARD": OP_DISCARD,
    "OP_FLUSH": OP_FLUSH, "OP_SEEK": OP_SEEK, "OP_REPLICATE": OP_REPLICATE,
    "OP_REPLICATE_DISCARD": OP_REPLICATE_DISCARD, "OP_DIRTY": OP_DIRTY, "OP_TAGS": OP_TAGS, "OP_PULL": OP_PULL,
    "OP_PUSH": OP_PUSH, "OP_PING": OP_PING, "OP_VERIFY": OP_VERIFY, "OP_REPAIR": OP_REPAIR, "OP_REPLY": OP_REPLY,
    "FLAG_ZEROS": FLAG_ZEROS, "FLAG_ABSENT": FLAG_ABSENT, "FLAG_COMMIT": FLAG_COMMIT, "FLAG_RESYNC": FLAG_RESYNC,
    "FLAG_REPLY_MORE": FLAG_REPLY_MORE,
    "ST_OK": ST_OK, "ST_BAD_REQUEST": ST_BAD_REQUEST, "ST_NOT_AUTHORIZED": ST_NOT_AUTHORIZED,
    "ST_READ_ONLY": ST_READ_ONLY, "ST_STALE_MAP": ST_STALE_MAP, "ST_NOT_MEMBER": ST_NOT_MEMBER,
    "ST_NOT_READY": ST_NOT_READY, "ST_NO_SPACE": ST_NO_SPACE, "ST_IO_ERROR": ST_IO_ERROR, "ST_CHECKSUM": ST_CHECKSUM,
    "ST_PAYLOAD": ST_PAYLOAD, "ST_NO_VOLUME": ST_NO_VOLUME, "ST_RANGE": ST_RANGE,
    "ST_SHUTTING_DOWN": ST_SHUTTING_DOWN, "ST_OLD_SESSION": ST_OLD_SESSION, "ST_BUSY": ST_BUSY,
    "ROLE_SDC": ROLE_SDC, "ROLE_SDS": ROLE_SDS,
}
globals().update(WIRE)
