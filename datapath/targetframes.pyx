"""Frames at the SDS: who may, what is asked, what is answered at once (see targetframes.pxd)."""

from libc.stdint cimport int64_t
from libc.string cimport memcpy, memset
from datapath.device cimport device_offset
from datapath.disk cimport disk_pread
from datapath.checksum cimport check_range, verify_range
from datapath.chunkstore cimport chunk_fd, chunk_find, chunk_forget, chunk_get, chunk_missing, chunk_tags
from datapath.connection cimport buf_get, buf_put, buf_ref
from datapath.ondisk cimport SLOT_NONE, TAG_UNKNOWN, Tag
from datapath.ring cimport Message
from datapath.tags cimport tag_check, tag_good_hole
from datapath.targetdurability cimport flush_next
from datapath.targetengine cimport (EV_CAPABILITY, conn_by_id, emit, map_miss, op_asked, op_enter, op_finish, op_new,
                                    reply_head, reply_to, send_body, send_head, send_ref)
from datapath.targetlease cimport lease_asked, peer_get
from datapath.targetlost cimport device_lost, lost_status
from datapath.targetmembers cimport entry_of, members_ready
from datapath.targetops cimport ops_forget, ops_tell, ops_tell_all, ops_told
from datapath.targetpair cimport PULL_BLOCKS_MAX, agreed, secondary_answer
from datapath.targetread cimport read_answer
from datapath.targetrepair cimport repair_asked, repair_want, verify_start
from datapath.targetstate cimport *
from datapath.targetunsure cimport missing_status
from datapath.volumemap cimport MapEntry, MapVolume, map_lookup, map_volume_find
from datapath.wire cimport *

cdef enum:
    DIRTY_PER_FRAME = 4096


# ------------------------------------------------------------------------------------------------------------- clients

cdef uint32_t grant_status(Engine* e, Conn* c, uint64_t volume_id, bint write) noexcept nogil:
    cdef Session* s = <Session*>c.user
    cdef uint32_t i
    for i in range(s.grant_count):
        if s.grants[i].volume_id == volume_id:
            if s.grants[i].expires_ns < e.now_ns:
                return ST_NOT_AUTHORIZED
            return ST_READ_ONLY if write and not s.grants[i].write else ST_OK
    return ST_NOT_AUTHORIZED


cdef void grant(Engine* e, const Message* m, uint32_t status) noexcept nogil:
    cdef Conn* c = conn_by_id(e, m.a)
    cdef Session* s
    cdef Header h
    cdef uint32_t i
    if c == NULL or c.kind != CONN_CLIENT:
        return
    s = <Session*>c.user
    s.capabilities_asked -= 1
    memset(&h, 0, sizeof(h))
    h.opcode = OP_CAPABILITY
    h.request_id = m.b
    h.volume_id = m.c
    if status == ST_OK:
        for i in range(s.grant_count):
            if s.grants[i].volume_id == m.c:
                break
        else:
            i = s.grant_count
            if i == GRANTS_MAX:
                i = s.grant_next                           # the oldest makes room; its owner presents it again
                s.grant_next = (i + 1) % GRANTS_MAX
            else:
                s.grant_count += 1
        s.grants[i].volume_id = m.c
        s.grants[i].expires_ns = m.d
        s.grants[i].write = m.size == 2
    reply_to(e, c.id, &h, status, 0)


cdef void revoke(Engine* e, uint64_t volume_id, uint32_t sdc_id) noexcept nogil:
    cdef uint32_t i, j
    cdef Session* s
    for i in range(CONNS_MAX):
        if e.conns[i] == NULL or e.conns[i].kind != CONN_CLIENT:
            continue
        s = <Session*>e.conns[i].user
        if s.node_id != sdc_id:
            continue
        for j in range(s.grant_count):
            if s.grants[j].volume_id == volume_id:
                s.grants[j].expires_ns = 0


cdef uint32_t admit(Engine* e, Conn* c, Header* h, bint write, Chunk** found) noexcept nogil:
    """Whether this SDS serves the request now: authority, size, map, the pair's agreement. Finds the chunk."""
    cdef MapVolume* v
    cdef TargetVolume* tv
    cdef const MapEntry* entry
    cdef Chunk* chunk
    cdef uint64_t size
    cdef uint32_t status = grant_status(e, c, h.volume_id, write)
    if status != ST_OK:
        return status
    v = map_volume_find(&e.map, h.volume_id)
    tv = NULL if v == NULL else <TargetVolume*>v.user
    if tv == NULL or not tv.known:
        return ST_NOT_READY
    if tv.dropped:
        return ST_NO_VOLUME
    size = (tv.size + BLOCK_SIZE - 1) & ~<uint64_t>(BLOCK_SIZE - 1)
    if (<uint64_t>h.chunk_index << CHUNK_SHIFT) + h.offset + h.length > size:
        return ST_RANGE
    entry = map_lookup(v, h.chunk_index)
    if entry == NULL:
        map_miss(e, h.volume_id, h.chunk_index >> 10)
        return ST_NOT_READY
    if entry.epoch != h.epoch:
        if h.epoch > entry.epoch:
            map_miss(e, h.volume_id, h.chunk_index >> 10)
            return ST_NOT_READY
        return ST_STALE_MAP
    found[0] = chunk = chunk_find(e, h.volume_id, h.chunk_index)
    if entry.primary != e.sds_id and (write or entry.secondary != e.sds_id):
        return ST_NOT_MEMBER
    if chunk_missing(e, chunk):
        return missing_status(e, h.volume_id, h.chunk_index, entry)
    if (chunk != NULL and chunk.unsynced) or not members_ready(e, entry, h.volume_id, h.chunk_index, chunk):
        return ST_NOT_READY
    return ST_OK


cdef void seek_answer(Engine* e, Conn* c, Header* h, Chunk* chunk) noexcept nogil:
    cdef Header r
    cdef unsigned char bits[128]
    cdef Tag* tags
    cdef uint32_t i
    if chunk != NULL and chunk.slot != SLOT_NONE and e.devices[chunk.device].d.failed:
        reply_to(e, c.id, h, lost_status(e, chunk), 0)
        return
    memset(bits, 0, sizeof(bits))
    reply_head(e, &r, h, ST_OK)
    if chunk == NULL or chunk.slot == SLOT_NONE:
        r.flags = FLAG_ABSENT
    else:
        r.body_length = 128
        tags = chunk_tags(e, chunk)
        for i in range(CHUNK_BLOCKS):
            if not tag_good_hole(&tags[i], h.volume_id, h.chunk_index, i):
                bits[i >> 3] |= 1 << (i & 7)
    send_head(e, c, &r)
    if r.body_length:
        send_body(e, c, bits, 128)


cdef void capability_shown(Engine* e, Conn* c, Header* h, char* body) noexcept nogil:
    """Passes it on to be judged. How many wait there is bounded, because the mailbox itself is not."""
    cdef Session* s = <Session*>c.user
    if h.body_length != CAPABILITY_SIZE:
        reply_to(e, c.id, h, ST_NOT_AUTHORIZED, 0)
    elif s.capabilities_asked == CAPABILITIES_ASKED_MAX:
        reply_to(e, c.id, h, ST_BUSY, 0)
    else:
        s.capabilities_asked += 1
        emit(e, EV_CAPABILITY, c.id, h.request_id, h.volume_id, 0, body, h.body_length)


cdef int client_frame(Engine* e, Conn* c, Header* h, char* body, Buf* owner) noexcept nogil:
    cdef uint32_t status
    cdef Chunk* chunk = NULL
    cdef Op* op
    cdef bint write = h.opcode == OP_WRITE or h.opcode == OP_DISCARD
    if h.opcode == OP_CAPABILITY:
        capability_shown(e, c, h, body)
        return 0
    if h.opcode == OP_FLUSH:
        status = grant_status(e, c, h.volume_id, False)
    elif write or h.opcode == OP_READ or h.opcode == OP_SEEK:
        status = admit(e, c, h, write, &chunk)
    else:
        return BAD_OPCODE
    if status == ST_OK and h.opcode == OP_WRITE and verify_range(
            h.volume_id, h.chunk_index, h.offset, h.length, body + 4 * blocks_touched(h.offset, h.length),
            <uint32_t*>body) >= 0:
        status = ST_PAYLOAD
    if status != ST_OK:
        reply_to(e, c.id, h, status, 0)
        return 0
    if h.opcode == OP_READ:
        if chunk != NULL and h.flags & FLAG_RESYNC:
            repair_want(e, chunk, h.offset >> BLOCK_SHIFT, h.length >> BLOCK_SHIFT)
        read_answer(e, c, h, chunk)                        # after that, if we lead
        return 0
    if h.opcode == OP_SEEK:
        seek_answer(e, c, h, chunk)
        return 0
    if write and chunk == NULL:
        chunk = chunk_get(e, h.volume_id, h.chunk_index)
    op = NULL if write and chunk == NULL else op_new(e)
    if op == NULL:
        reply_to(e, c.id, h, ST_BUSY, 0)
        return 0
    op.conn_id = c.id
    op.h = h[0]
    op.h.node_id = (<Session*>c.user).node_id              # whatever it says: its operations are its own
    op.started_ns = e.now_ns
    op.admitted = True
    if h.opcode == OP_FLUSH:
        op.kind = KIND_FLUSH
        op.pending = PENDING_SYNC
        flush_next(e, op)
        return 0
    if h.opcode == OP_WRITE:
        op.kind = KIND_WRITE
        op.owner = buf_ref(owner)
        op.checks = <uint32_t*>body
        op.data = body + 4 * blocks_touched(h.offset, h.length)
    else:
        op.kind = KIND_DISCARD
        e.counters.discard_ops += 1
    op_enter(e, op, chunk, h.offset, h.length)
    return 0


# ------------------------------------------------------------------------------------------------- from a primary to us

cdef void tags_answer(Engine* e, Conn* c, Header* h) noexcept nogil:
    cdef Chunk* chunk = chunk_find(e, h.volume_id, h.chunk_index)
    cdef const MapEntry* entry = entry_of(e, h.volume_id, h.chunk_index)
    cdef Header r
    if entry == NULL:                                      # it went while the question waited
        reply_to(e, c.id, h, ST_NOT_READY, 0)
        return
    if chunk != NULL and device_lost(e, chunk):            # see read_plan
        reply_to(e, c.id, h, ST_IO_ERROR, 0)
        return
    if chunk != NULL and h.flags & FLAG_RESYNC:
        ops_forget(e, chunk)                               # what is here is made what the primary has
    elif chunk != NULL and not chunk.doubtful:
        ops_tell(e, c, chunk)
    reply_head(e, &r, h, ST_OK)
    if chunk == NULL or chunk.slot == SLOT_NONE:
        r.flags = FLAG_ABSENT
        if chunk_missing(e, chunk) and entry.secondary == e.sds_id:
            r.flags |= FLAG_RESYNC                         # which says nothing about what was written
            missing_status(e, h.volume_id, h.chunk_index, entry)
    else:
        r.body_length = CHUNK_BLOCKS * 16
    send_head(e, c, &r)
    if r.body_length:
        send_body(e, c, chunk_tags(e, chunk), r.body_length)


cdef void dirty_answer(Engine* e, Conn* c, Header* h) noexcept nogil:
    """What of ours may differ, from place `offset` of the table on.

    Whole places at a time: chunks that agree with a third SDS between two frames must not shift the rest past the
    asker.
    """
    cdef Header r
    cdef Chunk* chunk
    cdef uint32_t at = h.offset, told = 0, here
    cdef Buf* list = buf_get(&e.pool, DIRTY_PER_FRAME * 16)
    if list == NULL:
        reply_to(e, c.id, h, ST_BUSY, 0)
        return
    memset(list.data, 0, DIRTY_PER_FRAME * 16)
    while at < e.table_capacity:
        here = told
        chunk = e.table[at]
        while chunk != NULL and here <= DIRTY_PER_FRAME:
            if chunk.unsynced:
                if here < DIRTY_PER_FRAME:
                    memcpy(list.data + here * 16, &chunk.volume_id, 8)
                    memcpy(list.data + here * 16 + 8, &chunk.index, 4)
                    list.data[here * 16 + 12] = chunk.doubtful
                here += 1
            chunk = chunk.hash_next
        if here > DIRTY_PER_FRAME:
            break
        told = here
        at += 1
    if told == 0 and at < e.table_capacity:                # a frame full in one place: some 10^8 chunks that may differ
        buf_put(&e.pool, list)
        reply_to(e, c.id, h, ST_BUSY, 0)
        return
    reply_head(e, &r, h, ST_OK)
    if at < e.table_capacity:
        r.flags = FLAG_REPLY_MORE
    r.offset = at
    r.body_length = told * 16
    send_head(e, c, &r)
    send_body(e, c, list.data, told * 16)
    buf_put(&e.pool, list)


cdef void pull_answer(Engine* e, Conn* c, Header* h) noexcept nogil:
    cdef Chunk* chunk = chunk_find(e, h.volume_id, h.chunk_index)
    cdef uint32_t first = h.offset >> BLOCK_SHIFT, count = h.length >> BLOCK_SHIFT, i
    cdef Header r
    cdef Tag* tags
    cdef Buf* b
    if (chunk == NULL or chunk.slot == SLOT_NONE or e.devices[chunk.device].d.failed
            or h.length > PULL_BLOCKS_MAX * BLOCK_SIZE):
        reply_to(e, c.id, h, ST_IO_ERROR, 0)
        return
    b = buf_get(&e.pool, 20 * count + h.length)
    if b == NULL:
        reply_to(e, c.id, h, ST_BUSY, 0)
        return
    tags = chunk_tags(e, chunk) + first
    if disk_pread(chunk_fd(e, chunk), b.data + 20 * count, h.length,
                  <int64_t>device_offset(chunk.slot) + h.offset) != h.length:
        buf_put(&e.pool, b)
        reply_to(e, c.id, h, ST_IO_ERROR, 0)
        return
    memcpy(b.data + 4 * count, tags, 16 * count)
    check_range(h.volume_id, h.chunk_index, h.offset, h.length, b.data + 20 * count, <uint32_t*>b.data)
    for i in range(count):
        if (<uint32_t*>b.data)[i] != tag_check(&tags[i]):
            (<Tag*>(b.data + 4 * count))[i].seq |= TAG_UNKNOWN
    reply_head(e, &r, h, ST_OK)
    r.body_length = 20 * count + h.length
    send_head(e, c, &r)
    send_ref(e, c, b, b.data, r.body_length)
    buf_put(&e.pool, b)


cdef void look_later(Engine* e, Conn* c, Header* h) noexcept nogil:
    """TAGS, VERIFY and PULL: behind all that came before them, so that the answer is of a copy that has it."""
    cdef Chunk* chunk = chunk_find(e, h.volume_id, h.chunk_index)
    cdef Op* op
    if chunk == NULL and h.opcode == OP_TAGS:              # nothing has come; most chunks of a large volume
        tags_answer(e, c, h)
        return
    if chunk == NULL:
        reply_to(e, c.id, h, ST_BUSY, 0)
        return
    op = op_asked(e, c, h, KIND_LOOK)
    if op == NULL:
        return
    if h.opcode == OP_TAGS:
        op_enter(e, op, chunk, 0, CHUNK_SIZE)
    else:
        op_enter(e, op, chunk, h.offset, h.length)


cdef void look_answer(Engine* e, Op* op) noexcept nogil:
    cdef Conn* c = conn_by_id(e, op.conn_id)
    if op.h.opcode == OP_VERIFY:
        verify_start(e, op)
        return
    if c != NULL and op.h.opcode == OP_TAGS:
        tags_answer(e, c, &op.h)
    elif c != NULL:
        pull_answer(e, c, &op.h)
    op_finish(e, op)


cdef void pinged(Engine* e, Conn* c, Header* h) noexcept nogil:
    cdef Peer* p
    if h.volume_id:
        if h.flags & FLAG_RESYNC:
            opened_there(e, h)
    elif h.flags & FLAG_RESYNC:
        (<Session*>c.user).ready = True
        p = peer_get(e, (<Session*>c.user).node_id)
        if p != NULL:
            p.agreed_as_secondary = True
    elif h.flags & FLAG_COMMIT:
        flush_for(e, c, h)
        return
    elif h.op_id:
        lease_asked(e, c, h)
        return
    reply_to(e, c.id, h, ST_OK, 0)


cdef void opened_there(Engine* e, const Header* h) noexcept nogil:
    """The primary says that the two agree on the chunk, and that whoever left before this epoch serves no more."""
    cdef const MapEntry* entry = entry_of(e, h.volume_id, h.chunk_index)
    cdef Chunk* chunk = chunk_get(e, h.volume_id, h.chunk_index)
    if chunk == NULL:
        return
    chunk.open_epoch = max(chunk.open_epoch, h.epoch)
    if entry == NULL or (h.epoch < entry.epoch and entry.left):
        return                                             # somebody has left since
    if not h.flags & FLAG_ABSENT and (chunk.doubtful or chunk_missing(e, chunk)):
        return                                             # it says so of the gate only: the two have not compared
    agreed(e, chunk)
    chunk.retry_ns = 0
    if h.epoch <= entry.epoch:                             # else the map that it is of is still to come
        chunk_forget(e, chunk)


cdef void flush_for(Engine* e, Conn* c, Header* h) noexcept nogil:
    """A primary wants all that it has sent on our disks."""
    cdef Op* op = op_asked(e, c, h, KIND_FLUSH)
    if op != NULL:
        op.pending = PENDING_SYNC
        flush_next(e, op)


cdef uint32_t place_status(Engine* e, Conn* c, Header* h) noexcept nogil:
    """Whether the map makes the SDS on this connection the chunk's primary, and us one of its other copies."""
    cdef MapVolume* v = map_volume_find(&e.map, h.volume_id)
    cdef const MapEntry* entry = map_lookup(v, h.chunk_index) if v != NULL else NULL
    if v != NULL and v.user != NULL and (<TargetVolume*>v.user).dropped:
        return ST_NO_VOLUME
    if entry == NULL or h.epoch > entry.epoch:
        map_miss(e, h.volume_id, h.chunk_index >> 10)
    if entry == NULL:
        return ST_NOT_READY
    # Of any epoch: its connection is its newest and keeps its order, and as long as it leads it has dropped nothing.
    if entry.primary != (<Session*>c.user).node_id or (entry.secondary != e.sds_id and entry.learner != e.sds_id):
        return ST_NOT_MEMBER
    return ST_OK


cdef int primary_frame(Engine* e, Conn* c, Header* h, char* body, Buf* owner) noexcept nogil:
    cdef uint32_t count = h.length >> BLOCK_SHIFT
    cdef uint32_t head = count * (20 if h.opcode == OP_PUSH else 4)
    cdef const MapEntry* entry
    cdef Chunk* chunk
    cdef Op* op
    cdef uint32_t status = ST_OK
    if not OP_REPLICATE <= h.opcode <= OP_REPAIR:
        return BAD_OPCODE
    if h.opcode == OP_REPAIR:
        repair_asked(e, c, h)
        return 0
    if h.opcode != OP_DIRTY and (h.opcode != OP_PING or h.volume_id):
        status = place_status(e, c, h)
    if h.opcode == OP_PING and h.volume_id and h.op_id:
        if status == ST_OK or status == ST_NOT_READY:
            ops_told(e, h)
    elif status != ST_OK:
        reply_to(e, c.id, h, status, 0)
    elif h.opcode == OP_PING:
        pinged(e, c, h)
    elif h.opcode == OP_DIRTY:
        if h.offset == 0:
            ops_tell_all(e, c)                             # it may have restarted; it knows them before it serves
        dirty_answer(e, c, h)
    elif h.opcode == OP_TAGS or h.opcode == OP_PULL or h.opcode == OP_VERIFY:
        look_later(e, c, h)
    else:
        if h.opcode != OP_REPLICATE_DISCARD and verify_range(h.volume_id, h.chunk_index, h.offset, h.length,
                                                             body + head, <uint32_t*>body) >= 0:
            reply_to(e, c.id, h, ST_PAYLOAD, 0)
            return 0
        chunk = chunk_get(e, h.volume_id, h.chunk_index)
        entry = entry_of(e, h.volume_id, h.chunk_index)
        if (chunk != NULL and chunk_missing(e, chunk) and entry.secondary == e.sds_id
                and not (h.opcode == OP_PUSH and chunk.doubtful)):
            reply_to(e, c.id, h, missing_status(e, h.volume_id, h.chunk_index, entry), 0)
            return 0
        op = NULL if chunk == NULL else op_new(e)
        if op == NULL:
            reply_to(e, c.id, h, ST_BUSY, 0)
            return 0
        op.conn_id = c.id
        op.h = h[0]
        op.started_ns = e.now_ns
        op.admitted = True
        op.kind = KIND_REPLICATE if h.opcode == OP_REPLICATE else (
            KIND_PUSH if h.opcode == OP_PUSH else KIND_REPLICATE_DISCARD)
        if h.opcode != OP_REPLICATE_DISCARD:
            op.owner = buf_ref(owner)
            op.checks = <uint32_t*>body
            op.push_tags = <Tag*>(body + 4 * count)
            op.data = body + head
        e.counters.replicate_ops += 1
        e.counters.replicate_bytes += h.length
        op_enter(e, op, chunk, h.offset, h.length)
    return 0


cdef int on_frame(void* context, Conn* c, Header* h, char* body, Buf* owner) noexcept nogil:
    cdef Engine* e = <Engine*>context
    if c.kind == CONN_CLIENT:
        return client_frame(e, c, h, body, owner)
    if c.kind == CONN_PEER_IN:
        return primary_frame(e, c, h, body, owner)
    return secondary_answer(e, c, h, body)
