"""Reads at the SDS: from the page cache on the shard's thread, else by a pool thread (see targetread.pxd).

Promises: a read never passes a write it overlaps, and never answers a block that its tag does not vouch for; the check
values go with the bytes, so that whoever asked verifies them.
"""

from libc.errno cimport EIO, errno
from libc.stdint cimport int64_t
from libc.string cimport memcpy
from datapath.device cimport device_offset
from datapath.disk cimport disk_pread, disk_pread_cached
from datapath.chunkstore cimport chunk_fd, chunk_tags
from datapath.connection cimport buf_get, buf_put, conn_reserve, conn_unreserve
from datapath.histogram cimport hist_record
from datapath.iopool cimport Job, iopool_submit
from datapath.ondisk cimport SLOT_NONE, Tag
from datapath.tags cimport tag_check, tag_good_hole, tag_is_unknown
from datapath.targetengine cimport (conn_by_id, mark_dirty, op_asked, op_enter, op_finish, reply_head, reply_to,
                                    send_head, send_ref, still_status)
from datapath.targetlost cimport block_lost, lost_status
from datapath.targetrepair cimport repair_want
from datapath.targetstate cimport *
from datapath.wire cimport *

cdef uint32_t read_plan(Engine* e, Chunk* chunk, uint32_t first, uint32_t count, uint32_t* checks) noexcept nogil:
    """Fills the check values. ST_OK, ST_CHECKSUM for an unknown block, or ST_COUNT when all of it reads as zeros.

    A failed device answers nothing: the kernel may have dropped both a block and its tag that it could not write, and
    what is read again is then the block before it, with a tag that vouches for it.
    """
    cdef Tag* tags
    cdef uint32_t i
    cdef bint holes = True
    if chunk == NULL or chunk.slot == SLOT_NONE:
        return ST_COUNT
    if e.devices[chunk.device].d.failed:
        return lost_status(e, chunk)
    tags = chunk_tags(e, chunk) + first
    for i in range(count):
        if tag_is_unknown(&tags[i]):
            return ST_CHECKSUM
        holes = holes and tag_good_hole(&tags[i], chunk.volume_id, chunk.index, first + i)
        checks[i] = tag_check(&tags[i])
    return ST_COUNT if holes else ST_OK


cdef bint busy(Chunk* chunk, uint32_t first, uint32_t count) noexcept nogil:
    cdef Op* op = chunk.ops
    while op != NULL:
        if op.first < first + count and first < op.first + op.count:
            return True
        op = op.next
    return False


cdef void read_later(Engine* e, Conn* c, Header* h, Chunk* chunk) noexcept nogil:
    """In its turn behind what it overlaps, by a pool thread."""
    cdef Op* op = op_asked(e, c, h, KIND_READ)
    if op != NULL:
        op_enter(e, op, chunk, h.offset, h.length)


cdef void read_answer(Engine* e, Conn* c, Header* h, Chunk* chunk) noexcept nogil:
    """Answers from the page cache where it can, else through the pool."""
    cdef Header r
    cdef uint32_t count = h.length >> BLOCK_SHIFT
    cdef uint32_t first = h.offset >> BLOCK_SHIFT
    cdef uint32_t status
    cdef uint32_t head = HEADER_SIZE + count * 4
    cdef char* room
    cdef Buf* large = NULL
    cdef ssize_t got
    if chunk != NULL and chunk.ops != NULL and busy(chunk, first, count):
        read_later(e, c, h, chunk)
        return
    if h.length <= 65536:
        room = conn_reserve(c, &e.pool, head + h.length)
    else:
        large = buf_get(&e.pool, head + h.length)
        room = NULL if large == NULL else large.data
    if room == NULL:
        reply_to(e, c.id, h, ST_BUSY, 0)
        return
    status = read_plan(e, chunk, first, count, <uint32_t*>(room + HEADER_SIZE))
    if status == ST_OK:
        got = disk_pread_cached(chunk_fd(e, chunk), room + head, h.length,
                                <int64_t>device_offset(chunk.slot) + h.offset)
        if got == h.length:
            reply_head(e, &r, h, ST_OK)
            r.body_length = count * 4 + h.length
            header_seal(&r)
            memcpy(room, &r, HEADER_SIZE)
            if large != NULL:
                send_ref(e, c, large, room, head + h.length)
                buf_put(&e.pool, large)
            mark_dirty(e, c)
            e.counters.reads_inline += 1
            e.counters.read_ops += 1
            e.counters.read_bytes += h.length
            hist_record(&e.read_histogram, 0)
            return
    if large != NULL:
        buf_put(&e.pool, large)
    else:
        conn_unreserve(c, head + h.length)
    if status == ST_OK:
        read_later(e, c, h, chunk)
        return
    read_refuse(e, c.id, h, chunk, status)


cdef void read_refuse(Engine* e, uint32_t conn_id, Header* h, Chunk* chunk, uint32_t status) noexcept nogil:
    cdef Conn* c = conn_by_id(e, conn_id)
    cdef Header r
    if status != ST_COUNT:
        reply_to(e, conn_id, h, status, 0)
        if status == ST_CHECKSUM:
            e.counters.checksum_errors += 1
            repair_want(e, chunk, h.offset >> BLOCK_SHIFT, h.length >> BLOCK_SHIFT)
        return
    if c == NULL:
        return
    reply_head(e, &r, h, ST_OK)
    r.flags = FLAG_ZEROS
    send_head(e, c, &r)
    e.counters.read_ops += 1
    e.counters.read_bytes += h.length


cdef void read_start(Engine* e, Op* op) noexcept nogil:
    """A read that had to wait, or that the page cache does not hold: it keeps its range while a pool thread reads."""
    cdef uint32_t status
    op.owner = buf_get(&e.pool, op.h.length + op.count * 4)
    status = ST_BUSY if op.owner == NULL else still_status(e, op)
    if status == ST_OK:
        op.checks = <uint32_t*>op.owner.data
        op.data = op.owner.data + op.count * 4
        status = read_plan(e, op.chunk, op.first, op.count, op.checks)
    if status != ST_OK:
        read_refuse(e, op.conn_id, &op.h, op.chunk, status)
        op_finish(e, op)
        return
    op.fd = chunk_fd(e, op.chunk)
    op.offset = device_offset(op.chunk.slot) + op.h.offset
    op.job.run = read_run
    op.job.kind = KIND_READ
    e.counters.reads_pooled += 1
    iopool_submit(&e.io, &op.job, True)


cdef void read_run(Job* job) noexcept nogil:
    """Pool thread."""
    cdef Op* op = <Op*>job.owner
    cdef ssize_t got = disk_pread(op.fd, op.data, op.h.length, op.offset)
    job.result = 0 if got == op.h.length else (-errno if got < 0 else -EIO)


cdef void read_done(Engine* e, Op* op) noexcept nogil:
    cdef Conn* c = conn_by_id(e, op.conn_id)
    cdef Header r
    if c != NULL:
        reply_head(e, &r, &op.h, ST_OK if op.job.result == 0 else block_lost(e, op.chunk))
        if op.job.result == 0:
            r.body_length = op.count * 4 + op.h.length
        send_head(e, c, &r)
        if op.job.result == 0:
            send_ref(e, c, op.owner, op.owner.data, r.body_length)
        e.counters.read_ops += 1
        e.counters.read_bytes += op.h.length
        e.counters.read_ns += e.now_ns - op.started_ns
        hist_record(&e.read_histogram, e.now_ns - op.started_ns)
    op_finish(e, op)
