"""The SDC engine's frames on their way out.

Owns nothing: frames are built in the connection's buffers. The engine's thread runs every function. Promises that
check values are computed from the very bytes that are sent, each time they are sent.
"""

from libc.string cimport memcpy, memset
from datapath.checksum cimport check_range
from datapath.connection cimport conn_append, conn_append_ref, conn_reserve, conn_unreserve
from datapath.sdcstate cimport *
from datapath.wire cimport (FLAG_COMMIT, FLAG_RESYNC, HEADER_SIZE, OP_CAPABILITY, OP_DISCARD, OP_READ, OP_WRITE, Header,
                            blocks_touched, header_seal)

cdef enum:
    INLINE_PAYLOAD_MAX = 32768       # copied behind its header: one piece for the kernel instead of two


cdef void send_queue(Engine* e, Sds* s) noexcept nogil:
    if not s.queued:
        s.queued = True
        e.to_flush[e.to_flush_count] = s
        e.to_flush_count += 1


cdef void _header(Engine* e, Part* p, Header* h) noexcept nogil:
    memset(h, 0, HEADER_SIZE)
    h.opcode = p.opcode
    h.request_id = part_request_id(p)
    h.volume_id = p.volume.id
    h.chunk_index = p.chunk
    h.offset = p.offset
    h.length = p.length
    h.epoch = p.epoch
    h.node_id = e.sdc_id
    h.op_id = p.op_id
    if p.opcode == OP_WRITE or p.opcode == OP_DISCARD:
        h.seq = p.op_place
    h.flags = FLAG_COMMIT if p.opcode == OP_WRITE and p.request.commit else (FLAG_RESYNC if p.again else 0)
    h.incarnation = e.incarnation


cdef int send_part(Engine* e, Part* p, Sds* s) noexcept nogil:
    """Queues the part's frame on the connection. 0, or <0 when memory is short."""
    cdef Header h
    cdef int result
    _header(e, p, &h)
    if p.opcode == OP_WRITE:
        result = _queue_write(e, p, s, &h)
    else:
        header_seal(&h)
        result = conn_append(&s.conn, &e.pool, &h, HEADER_SIZE)
    if result < 0:
        return result
    send_queue(e, s)
    if p.sends:
        e.resent += 1
    p.sends += 1
    p.sds = s
    p.sent_ns = e.now_ns
    p.state = PART_SENT
    list_append(&s.in_flight, &p.link)
    s.in_flight_count += 1
    return 0


cdef int _queue_write(Engine* e, Part* p, Sds* s, Header* h) noexcept nogil:
    cdef uint32_t blocks = blocks_touched(p.offset, p.length)
    cdef uint32_t head = HEADER_SIZE + 4 * blocks
    # A write of zeros (the edge of a discard) has no data of its own.
    cdef bint zeros = p.request.kind == REQ_DISCARD
    cdef char* data = e.zeros if zeros else p.request.data + p.position
    cdef bint copied = zeros or p.length <= INLINE_PAYLOAD_MAX
    cdef char* room = conn_reserve(&s.conn, &e.pool, head + p.length if copied else head)
    if room == NULL:
        return -1
    if not copied and conn_append_ref(&s.conn, &e.pool, p.request.buffer, data, p.length) < 0:
        conn_unreserve(&s.conn, head)
        return -1
    h.body_length = 4 * blocks + p.length
    header_seal(h)
    memcpy(room, h, HEADER_SIZE)
    check_range(p.volume.id, p.chunk, p.offset, p.length, data, <uint32_t*>(room + HEADER_SIZE))
    if copied:
        memcpy(room + head, data, p.length)
    return 0


cdef int send_capability(Engine* e, Volume* v, Sds* s) noexcept nogil:
    cdef Part* p
    cdef Header h
    cdef char* room
    p = part_new(e)
    if p == NULL:
        return -1
    p.opcode = OP_CAPABILITY
    p.volume = v
    p.capability_version = v.capability_version
    _header(e, p, &h)
    h.body_length = v.capability_size
    header_seal(&h)
    room = conn_reserve(&s.conn, &e.pool, HEADER_SIZE + v.capability_size)
    if room == NULL:
        part_free(e, p)
        return -1
    memcpy(room, &h, HEADER_SIZE)
    memcpy(room + HEADER_SIZE, v.capability, v.capability_size)
    send_queue(e, s)
    p.sds = s
    p.state = PART_SENT
    p.sent_ns = e.now_ns
    list_append(&s.in_flight, &p.link)
    s.in_flight_count += 1
    return 0


cdef void send_doubt(Engine* e, Part* p, Sds* s) noexcept nogil:
    """The SDS serves what it does not verify: it is asked once more with that said, and nobody waits for the answer."""
    cdef Part* q = part_new(e)
    if q == NULL:
        return
    q.opcode = OP_READ
    q.volume = p.volume
    q.chunk = p.chunk
    q.offset = p.offset
    q.length = p.length
    q.epoch = p.epoch
    q.again = True
    q.abandoned = True
    if send_part(e, q, s) < 0:
        part_free(e, q)
