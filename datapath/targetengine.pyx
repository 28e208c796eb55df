"""The SDS engine's operations: their order, their two copies, and when they are answered (see targetengine.pxd).

Owns operations from frame to answer. Promises: an acknowledged write is applied here and confirmed by the other copy;
of two overlapping operations the later one waits; a chunk that may differ from its other copy serves nothing until
both agree.
"""

from libc.errno cimport EAGAIN, EIO, ENOMEM, ENOSPC
from libc.stdint cimport int64_t, uint16_t
from libc.stdlib cimport calloc, malloc, realloc
from libc.string cimport memcpy, memset
from datapath.device cimport device_offset
from datapath.disk cimport disk_pread
from datapath.checksum cimport block_seed, check_range, crc32c
from datapath.chunkstore cimport (chunk_allocate, chunk_discard, chunk_durable, chunk_fd, chunk_intent, chunk_put,
                                  chunk_tags, chunk_trim, chunk_write)
from datapath.connection cimport buf_get, buf_put, conn_append, conn_append_ref, conn_flush
from datapath.histogram cimport hist_record
from datapath.ondisk cimport SEQ_COUNTER_BITS, SEQ_MASK, SLOT_NONE, TAG_HOLE, Tag
from datapath.ring cimport Message, ring_push
from datapath.tags cimport tag_check, tag_good_hole, tag_is_hole, tag_is_unknown, tag_newer, tag_set
from datapath.targetdurability cimport checkpoint_start, commit_start, device_failed, sync_wait, writeback_note
from datapath.targetframes cimport grant_status, look_answer
from datapath.targetlearn cimport copy_start, learn_stop
from datapath.targetlost cimport block_lost, device_lost, lost_status
from datapath.targetmembers cimport entry_of, members_ready
from datapath.targetops cimport op_known, op_note
from datapath.targetpair cimport epoch_of, peer_ready, unsync
from datapath.targetread cimport read_start
from datapath.targetrepair cimport check_ended, check_start, repair_hopeless, repair_want
from datapath.targetstate cimport *
from datapath.volumemap cimport MapEntry, MapVolume, map_volume_find
from datapath.wire cimport *

cdef enum:
    EARLY_BYTES = 65536              # from this size on the other copy gets a write before it is applied here


cdef void emit(Engine* e, uint32_t kind, uint32_t a, uint64_t b, uint64_t c, uint64_t d, const void* data,
               uint64_t size) noexcept nogil:
    cdef Message m
    memset(&m, 0, sizeof(m))
    m.kind = kind
    m.a = a
    m.b = b
    m.c = c
    m.d = d
    if size:
        m.data = <char*>malloc(size)
        if m.data == NULL:
            return
        memcpy(m.data, data, size)
        m.size = size
    ring_push(&e.events, &m)


cdef void map_miss(Engine* e, uint64_t volume_id, uint32_t segment) noexcept nogil:
    cdef uint32_t i
    for i in range(e.miss_count):
        if e.miss_volume[i] == volume_id and e.miss_segment[i] == segment:
            return
    if e.miss_count == MISSES_MAX:
        return
    e.miss_volume[e.miss_count] = volume_id
    e.miss_segment[e.miss_count] = segment
    e.miss_count += 1
    emit(e, EV_MAP_MISS, segment, volume_id, 0, 0, NULL, 0)


cdef Conn* conn_by_id(Engine* e, uint32_t id) noexcept nogil:
    cdef Conn* c = e.conns[id & (CONNS_MAX - 1)]
    return c if c != NULL and c.id == id and not c.closing else NULL


cdef void mark_dirty(Engine* e, Conn* c) noexcept nogil:
    cdef uint32_t place = c.id & (CONNS_MAX - 1)
    if not e.dirty_place[place]:
        e.dirty_place[place] = True
        e.dirty_places[e.dirty_count] = place
        e.dirty_count += 1


cdef void reply_head(Engine* e, Header* r, const Header* request, uint32_t status) noexcept nogil:
    r[0] = request[0]
    r.opcode = request.opcode | OP_REPLY
    r.status = <uint16_t>status
    r.flags = 0
    r.body_length = 0
    r.incarnation = e.durable_incarnation


cdef void send_head(Engine* e, Conn* c, Header* h) noexcept nogil:
    header_seal(h)
    send_body(e, c, h, HEADER_SIZE)
    mark_dirty(e, c)


cdef void send_body(Engine* e, Conn* c, const void* data, uint32_t size) noexcept nogil:
    if conn_append(c, &e.pool, data, size) < 0:
        cut_off(c)


cdef void send_ref(Engine* e, Conn* c, Buf* owner, const char* data, uint32_t size) noexcept nogil:
    if conn_append_ref(c, &e.pool, owner, data, size) < 0:
        cut_off(c)


cdef void cut_off(Conn* c) noexcept nogil:
    """Short of memory: after a frame without its end nothing on the connection would be understood."""
    if not c.closing:
        c.error = ENOMEM
        c.closing = True


cdef void reply_to(Engine* e, uint32_t conn_id, const Header* request, uint32_t status, uint64_t seq) noexcept nogil:
    cdef Conn* c = conn_by_id(e, conn_id)
    cdef Header r
    if c == NULL:
        return
    reply_head(e, &r, request, status)
    r.seq = seq
    send_head(e, c, &r)


cdef uint32_t status_of(int error) noexcept nogil:
    return ST_NO_SPACE if error == -ENOSPC else (ST_BUSY if error == -EAGAIN else ST_IO_ERROR)


# ----------------------------------------------------------------------------------------------------------- operations

cdef Op* op_new(Engine* e) noexcept nogil:
    cdef Op* op = e.free_ops
    cdef Op** grown
    cdef uint32_t at, serial
    if op == NULL:
        if e.op_count % 256 == 0:
            grown = <Op**>realloc(e.ops, (e.op_count + 256) * sizeof(Op*))
            if grown == NULL:
                return NULL
            e.ops = grown
        op = <Op*>calloc(1, sizeof(Op))
        if op == NULL:
            return NULL
        op.slot_of_op = e.op_count
        e.ops[e.op_count] = op
        e.op_count += 1
    else:
        e.free_ops = op.wait_next
    at = op.slot_of_op
    serial = op.serial + 1
    memset(op, 0, sizeof(Op))
    op.slot_of_op = at
    op.serial = serial
    op.job.owner = op
    e.counters.queue_depth += 1
    return op


cdef Op* op_asked(Engine* e, Conn* c, const Header* h, int kind) noexcept nogil:
    cdef Op* op = op_new(e)
    if op == NULL:
        reply_to(e, c.id, h, ST_BUSY, 0)
        return NULL
    op.kind = kind
    op.conn_id = c.id
    op.h = h[0]
    op.started_ns = e.now_ns
    return op


cdef void op_unlink(Op* op) noexcept nogil:
    cdef Op** at = &op.chunk.ops
    while at[0] != NULL:
        if at[0] == op:
            at[0] = op.next
            return
        at = &at[0].next


cdef void op_finish(Engine* e, Op* op) noexcept nogil:
    """Answers, lets go of everything, lets whoever waited go on."""
    cdef Chunk* chunk = op.chunk
    cdef bint refused = op.status == ST_NO_SPACE
    cdef uint64_t ns = e.now_ns - op.started_ns
    if op.kind == KIND_WRITE or op.kind == KIND_DISCARD:
        if op.status == ST_IO_ERROR or (op.full == 1 and lost_status(e, chunk) == ST_NOT_READY):
            op.status = lost_status(e, chunk)              # one disk is no reason to fail: if that lasts it goes out
    if op.kind == KIND_CHECK:
        check_ended(e, op)
    elif op.kind != KIND_READ and op.kind != KIND_LOOK and op.kind != KIND_COPY:
        reply_to(e, op.conn_id, &op.h, op.status, op.seq)
    if op.kind == KIND_WRITE:
        e.counters.write_ops += 1
        e.counters.write_bytes += op.h.length
        e.counters.write_ns += ns
        hist_record(&e.write_histogram, ns)
    elif op.kind == KIND_FLUSH:
        e.counters.flush_ops += 1
        e.counters.flush_ns += ns
    if op.owner != NULL:
        buf_put(&e.pool, op.owner)
    op.owner = NULL
    op.serial += 1
    e.counters.queue_depth -= 1
    if chunk != NULL:
        op_unlink(op)
    op.chunk = NULL
    op.wait_next = e.free_ops
    e.free_ops = op
    if chunk != NULL:
        chunk_continue(e, chunk)
        if chunk.ops == NULL and chunk.live_blocks == 0:
            chunk_trim(e, chunk, refused)


cdef void op_settle(Engine* e, Op* op, uint32_t bit, uint32_t status) noexcept nogil:
    op.pending &= ~bit
    if status and not op.status:
        op.status = status
    if op.pending == 0:
        op_finish(e, op)


cdef bint overlaps_earlier(Op* op) noexcept nogil:
    cdef Op* other = op.chunk.ops
    while other != op:
        if other.first < op.first + op.count and op.first < other.first + other.count:
            return True
        other = other.next
    return False


cdef void op_enter(Engine* e, Op* op, Chunk* chunk, uint32_t offset, uint32_t length) noexcept nogil:
    cdef Op** at = &chunk.ops
    op.chunk = chunk
    op.first = offset >> BLOCK_SHIFT
    op.count = blocks_touched(offset, length)
    while at[0] != NULL:
        at = &at[0].next
    at[0] = op
    op.next = NULL
    if overlaps_earlier(op):
        op.admitted = False
    else:
        op_start(e, op)


cdef void chunk_continue(Engine* e, Chunk* chunk) noexcept nogil:
    """Starts what is no longer behind anything. Starting may finish an operation, so the list is read anew."""
    cdef Op* op = chunk.ops
    while op != NULL:
        if op.state == STATE_QUEUED and not overlaps_earlier(op):
            op_start(e, op)
            op = chunk.ops
            while op != NULL and not (op.state == STATE_QUEUED and not overlaps_earlier(op)):
                op = op.next
        else:
            op = op.next


cdef uint32_t still_status(Engine* e, Op* op) noexcept nogil:
    cdef Conn* c = conn_by_id(e, op.conn_id)
    cdef const MapEntry* entry
    cdef bint write = op.kind != KIND_READ
    if c == NULL:
        return ST_NOT_AUTHORIZED
    entry = entry_of(e, op.chunk.volume_id, op.chunk.index)
    if op.kind >= KIND_REPLICATE:                          # of who led before us: what was compared since lacks it
        return ST_NOT_MEMBER if entry != NULL and entry.primary == e.sds_id else ST_OK
    if grant_status(e, c, op.h.volume_id, write) != ST_OK:
        return ST_NOT_AUTHORIZED
    if entry == NULL or (entry.primary != e.sds_id and (write or entry.secondary != e.sds_id)):
        return ST_STALE_MAP
    if op.chunk.unsynced or not members_ready(e, entry, op.chunk.volume_id, op.chunk.index, op.chunk):
        return ST_NOT_READY
    return ST_OK


cdef void op_start(Engine* e, Op* op) noexcept nogil:
    cdef Chunk* chunk = op.chunk
    cdef bint fresh = chunk.slot == SLOT_NONE
    cdef uint32_t status
    cdef int error
    cdef DeviceState* ds
    op.state = STATE_RUNNING
    op.pending = PENDING_LOCAL
    if op.kind == KIND_READ:
        read_start(e, op)
        return
    if op.kind == KIND_LOOK:
        look_answer(e, op)
        return
    if op.kind == KIND_COPY:
        copy_start(e, op)
        return
    if op.kind == KIND_CHECK:
        check_start(e, op)
        return
    status = ST_OK if op.admitted else still_status(e, op)
    op.admitted = status == ST_OK
    if status != ST_OK:
        op_settle(e, op, PENDING_LOCAL, status)
        return
    if (op.kind == KIND_WRITE or op.kind == KIND_DISCARD) and op_known(e, op):
        return
    if fresh and (op.kind == KIND_DISCARD or op.kind == KIND_REPLICATE_DISCARD):
        apply(e, op)                                       # nothing here to discard, but the other copy may hold a slot
        return
    error = chunk_allocate(e, chunk, epoch_of(e, chunk)) if fresh else 0
    if error == 0:
        error = chunk_intent(e, chunk)
    if error < 0:
        if device_lost(e, chunk):
            error = -EIO
            e.lost = True
        elif error == -EAGAIN or (error == -ENOSPC and not fresh):
            checkpoint_start(e)
            error = -EAGAIN
        elif error == -ENOSPC:
            emit(e, EV_NO_SPACE, chunk.index, chunk.volume_id, 0, 0, NULL, 0)
        op_settle(e, op, PENDING_LOCAL, status_of(error))
        return
    if chunk_durable(e, chunk):
        journaled(e, op)
        return
    ds = &e.devices[chunk.device]
    op.admitted = False
    op.wait_next = NULL
    op.state = STATE_JOURNAL
    if ds.journal_head == NULL:
        ds.journal_head = op
    else:
        ds.journal_tail.wait_next = op
    ds.journal_tail = op
    commit_start(e, ds)


cdef void journaled(Engine* e, Op* op) noexcept nogil:
    """The intent is on disk. Meanwhile whoever sent it may have gone, or the chunk have other members."""
    cdef uint32_t status = ST_OK if op.admitted else still_status(e, op)
    if status != ST_OK:
        op_settle(e, op, PENDING_LOCAL, status)
        return
    if op.kind == KIND_WRITE and op.chunk.live_blocks == 0:
        # The other copy may have no slot for the chunk yet, and find none: it is asked before anything is applied here.
        op.state = STATE_REMOTE_FIRST
        if op.chunk.unsynced:
            op_settle(e, op, PENDING_LOCAL, ST_NOT_READY)
            return
        if not prepare_write(e, op):
            return
        if replicate(e, op):
            if op.chunk.unsynced:                          # there was nobody to send it to; nothing is applied yet
                op_settle(e, op, PENDING_REMOTE | PENDING_LOCAL, ST_NOT_READY)
            return                                         # applied when the other copy has answered
    apply(e, op)


cdef bint prepare_write(Engine* e, Op* op) noexcept nogil:
    """Names the write and merges unaligned edges with what is there. False when the operation has ended."""
    cdef uint32_t span = op.count << BLOCK_SHIFT
    cdef Buf* whole
    cdef Tag* tags
    cdef char* at
    cdef uint32_t edge, block, i
    if op.seq:
        return True
    e.counter += 1
    op.seq = (e.incarnation << SEQ_COUNTER_BITS) | e.counter
    op.h.epoch = max(op.h.epoch, entry_of(e, op.chunk.volume_id, op.chunk.index).epoch)
    if op.kind != KIND_WRITE or ((op.h.offset | op.h.length) & (BLOCK_SIZE - 1)) == 0:
        return True
    whole = buf_get(&e.pool, span + IO_BLOCKS_MAX * 4)
    if whole == NULL:
        op_settle(e, op, PENDING_LOCAL, ST_BUSY)
        return False
    tags = chunk_tags(e, op.chunk)
    at = whole.data + IO_BLOCKS_MAX * 4
    for i in range(2):
        edge = 0 if i == 0 else op.count - 1
        block = op.first + edge
        if i == 1 and edge == 0:
            break
        if tag_good_hole(&tags[block], op.chunk.volume_id, op.chunk.index, block):
            memset(at + (edge << BLOCK_SHIFT), 0, BLOCK_SIZE)
            continue
        if disk_pread(chunk_fd(e, op.chunk), at + (edge << BLOCK_SHIFT), BLOCK_SIZE,
                      <int64_t>device_offset(op.chunk.slot) + (<int64_t>block << BLOCK_SHIFT)) != BLOCK_SIZE:
            buf_put(&e.pool, whole)
            op_settle(e, op, PENDING_LOCAL, block_lost(e, op.chunk))
            return False
        if (tag_is_unknown(&tags[block])
                or crc32c(block_seed(op.chunk.volume_id, op.chunk.index, block), at + (edge << BLOCK_SHIFT), BLOCK_SIZE)
                != tag_check(&tags[block])):
            buf_put(&e.pool, whole)
            edge_bad(e, op, block)
            return False
    memcpy(at + (op.h.offset & (BLOCK_SIZE - 1)), op.data, op.h.length)
    buf_put(&e.pool, op.owner)
    op.owner = whole
    op.data = at
    op.checks = <uint32_t*>whole.data
    check_range(op.chunk.volume_id, op.chunk.index, op.first << BLOCK_SHIFT, span, at, op.checks)
    return True


cdef void edge_bad(Engine* e, Op* op, uint32_t block) noexcept nogil:
    """The write is sent again, after the repair; if that was in vain, it fails."""
    cdef uint32_t status = ST_CHECKSUM
    e.counters.checksum_errors += 1
    if not repair_hopeless(e, op.chunk, block, 1):
        status = ST_NOT_READY
        emit(e, EV_REPAIR, op.chunk.index, op.chunk.volume_id, block, 0, NULL, 0)
        repair_want(e, op.chunk, block, 1)
    op_settle(e, op, PENDING_LOCAL, status)


cdef bint replicate(Engine* e, Op* op) noexcept nogil:
    """Sends the write to the other copy; False when there is none. The pair's session was seen ready; if it is gone,
    the chunk is marked, and the agreement or a new map settles the operation."""
    cdef const MapEntry* entry = entry_of(e, op.chunk.volume_id, op.chunk.index)
    if entry.secondary:
        op.pending |= PENDING_REMOTE
        op.remote_id = entry.secondary
        if not send_copy(e, op, entry.secondary):
            unsync(e, op.chunk)
    return entry.secondary != 0


cdef void forward(Engine* e, Op* op) noexcept nogil:
    """Sends to a learner what is applied here now: when it compares tags it has either seen them or gets this."""
    cdef const MapEntry* entry
    if op.chunk.learn == LEARN_NOT:
        return
    entry = entry_of(e, op.chunk.volume_id, op.chunk.index)
    if entry == NULL or entry.learner == 0:
        return
    op.pending |= PENDING_LEARNER
    op.learner_id = entry.learner
    if op.chunk.learn != LEARN_LOST:
        send_copy(e, op, entry.learner)                    # it cannot be lost without the chunk hearing of it


cdef bint send_copy(Engine* e, Op* op, uint32_t sds_id) noexcept nogil:
    cdef Peer* p = e.peers[sds_id]
    cdef Conn* c = NULL if p == NULL else p.out
    cdef Header r
    if not peer_ready(c):
        return False
    if op.known:
        memset(&r, 0, sizeof(r))
        r.opcode = OP_PING
        r.flags = FLAG_COMMIT
        r.request_id = replication_id(op)
        r.incarnation = e.incarnation
        send_head(e, c, &r)
        return True
    r = op.h
    r.status = 0
    r.opcode = OP_REPLICATE if op.kind == KIND_WRITE else OP_REPLICATE_DISCARD
    r.flags = op.h.flags & FLAG_COMMIT
    if volume_commit(e, op.h.volume_id):
        r.flags |= FLAG_COMMIT
    r.request_id = replication_id(op)
    r.offset = op.first << BLOCK_SHIFT
    r.length = op.count << BLOCK_SHIFT
    r.body_length = op.count * 4 + r.length if op.kind == KIND_WRITE else 0
    r.seq = op.seq
    r.incarnation = op.h.seq                               # the operation's place at its SDC
    send_head(e, c, &r)
    if op.kind == KIND_WRITE:
        send_body(e, c, op.checks, op.count * 4)
        if r.length <= 8192:
            send_body(e, c, op.data, r.length)
        else:
            send_ref(e, c, op.owner, op.data, r.length)
    if r.length >= EARLY_BYTES or e.counters.queue_depth == 1:
        conn_flush(c, &e.pool)                             # an error shows again when the loop flushes
    return True


cdef bint volume_commit(Engine* e, uint64_t volume_id) noexcept nogil:
    cdef MapVolume* v = map_volume_find(&e.map, volume_id)
    return v != NULL and v.user != NULL and (<TargetVolume*>v.user).commit


cdef inline void named(const Op* op, uint32_t i, Tag* name) noexcept nogil:
    """What a primary's block `i` is to be called, as a tag."""
    cdef uint32_t epoch = op.push_tags[i].epoch if op.kind == KIND_PUSH else op.h.epoch
    cdef uint64_t seq = op.push_tags[i].seq if op.kind == KIND_PUSH else op.h.seq
    if op.kind == KIND_REPLICATE_DISCARD:
        seq |= TAG_HOLE
    tag_set(name, 0 if seq & TAG_HOLE else op.checks[i], epoch, seq & (SEQ_MASK | TAG_HOLE))


cdef int apply_tagged(Engine* e, Op* op) noexcept nogil:
    """A primary's blocks: each is applied only if it is newer than what is here, or what is here cannot be trusted.
    Those that stand together are written together; holes only of one name."""
    cdef Tag* mine = chunk_tags(e, op.chunk) + op.first
    cdef Tag names[1024]
    cdef uint32_t i = 0, count
    cdef int error = 0
    cdef bint resync = (op.h.flags & FLAG_RESYNC) != 0
    while i < op.count and error == 0:
        count = 0
        while i + count < op.count:
            named(op, i + count, &names[count])
            if not (resync or tag_is_unknown(mine + i + count)
                    or tag_newer(names[count].epoch, names[count].seq, mine + i + count)):
                break
            if count and tag_is_hole(&names[0]) != tag_is_hole(&names[count]):
                break
            if count and tag_is_hole(&names[0]) and (names[0].epoch != names[count].epoch
                                                     or names[0].seq != names[count].seq):
                break
            count += 1
        if count == 0:
            i += 1
        elif tag_is_hole(&names[0]):
            error = chunk_discard(e, op.chunk, op.first + i, count, names[0].epoch, names[0].seq & SEQ_MASK)
        else:
            error = chunk_put(e, op.chunk, op.first + i, count, op.data + (<size_t>i << BLOCK_SHIFT), names)
        i += count
    return error


cdef void apply(Engine* e, Op* op) noexcept nogil:
    cdef Tag* tags
    cdef uint32_t i
    cdef int error = 0
    cdef bint newer = True
    if op.kind == KIND_WRITE or op.kind == KIND_DISCARD:
        if op.state != STATE_REMOTE_FIRST:
            if op.chunk.unsynced:
                op_settle(e, op, PENDING_LOCAL, ST_NOT_READY)
                return
            if not prepare_write(e, op):
                return
            replicate(e, op)
        forward(e, op)
        op.state = STATE_RUNNING
        if op.kind == KIND_WRITE:
            error = chunk_write(e, op.chunk, op.first, op.count, op.data, op.checks, op.h.epoch, op.seq)
        elif op.chunk.slot != SLOT_NONE:
            error = chunk_discard(e, op.chunk, op.first, op.count, op.h.epoch, op.seq)
    elif op.chunk.slot != SLOT_NONE:
        op.seq = op.h.seq
        tags = chunk_tags(e, op.chunk)
        for i in range(op.count):
            newer = newer and tag_newer(op.h.epoch, op.h.seq, &tags[op.first + i])
        if op.kind == KIND_REPLICATE and newer:
            error = chunk_write(e, op.chunk, op.first, op.count, op.data, op.checks, op.h.epoch, op.h.seq)
        elif op.kind == KIND_REPLICATE_DISCARD and newer:
            error = chunk_discard(e, op.chunk, op.first, op.count, op.h.epoch, op.h.seq)
        else:
            error = apply_tagged(e, op)
    if error == 0:
        op_note(e, op)
    # Who is whole, and may be a member by now, has the last copy when ours is lost.
    if error < 0 and op.chunk.learn != LEARN_NOT and not (op.chunk.learn == LEARN_TOLD and device_lost(e, op.chunk)):
        learn_stop(e, op.chunk)                            # it may have been sent what is not here
    if error < 0 and e.devices[op.chunk.device].d.failed:  # for whatever reason
        error = -EIO
    if error == -ENOSPC:                                   # the host's file system is full: the copies may differ now
        if op.kind == KIND_WRITE or op.kind == KIND_DISCARD:
            unsync(e, op.chunk)
            op.chunk.full = True
            op.full += 1
    elif error < 0:
        device_failed(e, &e.devices[op.chunk.device])
    elif op.kind == KIND_WRITE or op.kind == KIND_REPLICATE or op.kind == KIND_PUSH:
        writeback_note(e, &e.devices[op.chunk.device], op.h.length)
    if error == 0 and (op.h.flags & FLAG_COMMIT or volume_commit(e, op.h.volume_id)):
        op.pending |= PENDING_SYNC
        sync_wait(e, op)
    op_settle(e, op, PENDING_LOCAL, status_of(error) if error < 0 else 0)
