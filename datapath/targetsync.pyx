"""Frames in, and the agreement of a pair (see targetsync.pxd).

A pair agrees block by block: the newer tag whose bytes are good wins, whichever side holds it; a block that neither side can
vouch for is adopted from the primary under a new name. The primary drives it, one chunk at a time per peer.
"""

from libc.stdint cimport int64_t, uint16_t
from libc.string cimport memcmp, memcpy, memset
from datapath.blockfile cimport device_offset
from datapath.checksum cimport block_seed, crc32c, verify_range
from datapath.chunkstore cimport (chunk_allocate, chunk_discard, chunk_fd, chunk_find, chunk_get, chunk_intent,
                                  chunk_tags, chunk_trim, chunk_write)
from datapath.connection cimport buf_get, buf_put, buf_ref, conn_append, conn_append_ref
from datapath.ondisk cimport SEQ_COUNTER_BITS, SEQ_MASK, SLOT_NONE, TAG_HOLE, Tag
from datapath.tags cimport tag_check, tag_is_hole, tag_is_unknown, tag_newer, tag_set, tag_set_never
from datapath.targetengine cimport (EV_CAPABILITY, EV_PEER_SYNCED, apply, checkpoint_start, conn_by_id, emit,
                                    flush_next, map_miss, mark_dirty, op_enter, op_new, op_settle, peer_conn,
                                    read_answer, reply_head, reply_to)
from datapath.targetstate cimport *
from datapath.volumemap cimport MapEntry, MapVolume, map_lookup, map_volume_find
from datapath.wire cimport *

cdef extern from "<unistd.h>" nogil:
    ssize_t pread(int fd, void* data, size_t size, int64_t offset)

cdef enum:
    PUSH_BLOCKS = 64                 # per frame: 256 KiB
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


cdef uint32_t admit(Engine* e, Conn* c, Header* h, bint write) noexcept nogil:
    """Whether this SDS serves the request now: authority, size, map, the pair's agreement."""
    cdef MapVolume* v
    cdef TargetVolume* tv
    cdef const MapEntry* entry
    cdef Conn* peer
    cdef Chunk* chunk
    cdef uint32_t status = grant_status(e, c, h.volume_id, write)
    if status != ST_OK:
        return status
    v = map_volume_find(&e.map, h.volume_id)
    tv = NULL if v == NULL else <TargetVolume*>v.user
    if tv == NULL or not tv.known:
        return ST_NOT_READY
    if tv.dropped:
        return ST_NO_VOLUME
    if (<uint64_t>h.chunk_index << CHUNK_SHIFT) + h.offset + h.length > ((tv.size + BLOCK_SIZE - 1)
                                                                       & ~<uint64_t>(BLOCK_SIZE - 1)):
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
    chunk = chunk_find(e, h.volume_id, h.chunk_index)
    if entry.primary == e.sds_id:
        if entry.secondary:
            peer = peer_conn(e, entry.secondary, CONN_PEER_OUT)
            if peer == NULL or not (<Session*>peer.user).ready:
                return ST_NOT_READY
    elif write:
        return ST_NOT_MEMBER
    elif entry.secondary == e.sds_id:
        peer = peer_conn(e, entry.primary, CONN_PEER_IN)
        if peer == NULL or not (<Session*>peer.user).ready:
            return ST_NOT_READY
    else:
        return ST_NOT_MEMBER
    return ST_NOT_READY if chunk != NULL and chunk.unsynced else ST_OK


cdef void seek_answer(Engine* e, Conn* c, Header* h, Chunk* chunk) noexcept nogil:
    cdef Header r
    cdef unsigned char bits[128]
    cdef Tag* tags
    cdef uint32_t i
    memset(bits, 0, sizeof(bits))
    reply_head(e, &r, h, ST_OK)
    if chunk == NULL or chunk.slot == SLOT_NONE:
        r.flags = FLAG_ABSENT
    else:
        r.body_length = 128
        tags = chunk_tags(e, chunk)
        for i in range(CHUNK_BLOCKS):
            if not tag_is_hole(&tags[i]):
                bits[i >> 3] |= 1 << (i & 7)
    header_seal(&r)
    conn_append(c, &e.pool, &r, HEADER_SIZE)
    if r.body_length:
        conn_append(c, &e.pool, bits, 128)
    mark_dirty(e, c)


cdef int client_frame(Engine* e, Conn* c, Header* h, char* body, Buf* owner) noexcept nogil:
    cdef uint32_t status
    cdef Chunk* chunk
    cdef Op* op
    cdef bint write = h.opcode == OP_WRITE or h.opcode == OP_DISCARD
    if h.opcode == OP_CAPABILITY:
        emit(e, EV_CAPABILITY, c.id, h.request_id, h.volume_id, 0, body, h.body_length)
        return 0
    if h.opcode == OP_FLUSH:
        status = grant_status(e, c, h.volume_id, False)
    elif write or h.opcode == OP_READ or h.opcode == OP_SEEK:
        status = admit(e, c, h, write)
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
        read_answer(e, c, h, chunk_find(e, h.volume_id, h.chunk_index))
        return 0
    if h.opcode == OP_SEEK:
        seek_answer(e, c, h, chunk_find(e, h.volume_id, h.chunk_index))
        return 0
    op = op_new(e)
    if op == NULL:
        reply_to(e, c.id, h, ST_BUSY, 0)
        return 0
    op.conn_id = c.id
    op.h = h[0]
    op.started_ns = e.now_ns
    if h.opcode == OP_FLUSH:
        op.kind = KIND_FLUSH
        op.pending = PENDING_SYNC
        flush_next(e, op)
        return 0
    chunk = chunk_get(e, h.volume_id, h.chunk_index)
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
    cdef Header r
    reply_head(e, &r, h, ST_OK)
    if chunk == NULL or chunk.slot == SLOT_NONE:
        r.flags = FLAG_ABSENT
    else:
        r.body_length = CHUNK_BLOCKS * 16
    header_seal(&r)
    conn_append(c, &e.pool, &r, HEADER_SIZE)
    if r.body_length:
        conn_append(c, &e.pool, chunk_tags(e, chunk), r.body_length)
    mark_dirty(e, c)


cdef void dirty_answer(Engine* e, Conn* c, Header* h) noexcept nogil:
    """What of ours may differ, from number `offset` on."""
    cdef Header r
    cdef unsigned char entry[16]
    cdef Chunk* chunk
    cdef uint32_t i, seen = 0, told = 0
    cdef Buf* list = buf_get(&e.pool, DIRTY_PER_FRAME * 16)
    if list == NULL:
        reply_to(e, c.id, h, ST_BUSY, 0)
        return
    reply_head(e, &r, h, ST_OK)
    memset(entry, 0, 16)
    for i in range(e.table_capacity):
        chunk = e.table[i]
        while chunk != NULL:
            if chunk.unsynced:
                if seen >= h.offset and told < DIRTY_PER_FRAME - 1:
                    memcpy(entry, &chunk.volume_id, 8)
                    memcpy(entry + 8, &chunk.index, 4)
                    memcpy(list.data + told * 16, entry, 16)
                    told += 1
                seen += 1
            chunk = chunk.hash_next
    if h.offset + told < seen:
        r.flags = FLAG_REPLY_MORE
    r.offset = h.offset + told
    r.body_length = told * 16
    header_seal(&r)
    conn_append(c, &e.pool, &r, HEADER_SIZE)
    conn_append(c, &e.pool, list.data, told * 16)
    buf_put(&e.pool, list)
    mark_dirty(e, c)


cdef void pull_answer(Engine* e, Conn* c, Header* h) noexcept nogil:
    cdef Chunk* chunk = chunk_find(e, h.volume_id, h.chunk_index)
    cdef uint32_t first = h.offset >> BLOCK_SHIFT, count = h.length >> BLOCK_SHIFT, i
    cdef Header r
    cdef Tag* tags
    cdef Buf* b
    if chunk == NULL or chunk.slot == SLOT_NONE or h.length > PUSH_BLOCKS * BLOCK_SIZE:
        reply_to(e, c.id, h, ST_IO_ERROR, 0)
        return
    b = buf_get(&e.pool, 20 * count + h.length)
    if b == NULL:
        reply_to(e, c.id, h, ST_BUSY, 0)
        return
    tags = chunk_tags(e, chunk) + first
    for i in range(count):
        (<uint32_t*>b.data)[i] = tag_check(&tags[i])
    memcpy(b.data + 4 * count, tags, 16 * count)
    if pread(chunk_fd(e, chunk), b.data + 20 * count, h.length, <int64_t>device_offset(chunk.slot) + h.offset) != h.length:
        buf_put(&e.pool, b)
        reply_to(e, c.id, h, ST_IO_ERROR, 0)
        return
    reply_head(e, &r, h, ST_OK)
    r.body_length = 20 * count + h.length
    header_seal(&r)
    conn_append(c, &e.pool, &r, HEADER_SIZE)
    conn_append_ref(c, &e.pool, b, b.data, r.body_length)
    buf_put(&e.pool, b)
    mark_dirty(e, c)


cdef int primary_frame(Engine* e, Conn* c, Header* h, char* body, Buf* owner) noexcept nogil:
    cdef uint32_t count = h.length >> BLOCK_SHIFT
    cdef uint32_t head = count * (20 if h.opcode == OP_PUSH else 4)
    cdef Chunk* chunk
    cdef Op* op
    if h.opcode == OP_PING:
        if h.flags & FLAG_RESYNC and h.volume_id:
            chunk = chunk_find(e, h.volume_id, h.chunk_index)
            if chunk != NULL and chunk.unsynced:
                chunk.unsynced = False
                e.unsynced_count -= 1
        elif h.flags & FLAG_RESYNC:
            (<Session*>c.user).ready = True
        reply_to(e, c.id, h, ST_OK, 0)
    elif h.opcode == OP_TAGS:
        tags_answer(e, c, h)
    elif h.opcode == OP_DIRTY:
        dirty_answer(e, c, h)
    elif h.opcode == OP_PULL:
        pull_answer(e, c, h)
    elif h.opcode == OP_REPLICATE or h.opcode == OP_PUSH or h.opcode == OP_REPLICATE_DISCARD:
        if h.opcode != OP_REPLICATE_DISCARD and verify_range(h.volume_id, h.chunk_index, h.offset, h.length,
                                                             body + head, <uint32_t*>body) >= 0:
            reply_to(e, c.id, h, ST_PAYLOAD, 0)
            return 0
        chunk = chunk_get(e, h.volume_id, h.chunk_index)
        op = op_new(e)
        if op == NULL or chunk == NULL:
            reply_to(e, c.id, h, ST_BUSY, 0)
            return 0
        op.conn_id = c.id
        op.h = h[0]
        op.started_ns = e.now_ns
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
    else:
        return BAD_OPCODE
    return 0


# ---------------------------------------------------------------------------------------------- a pair comes to agree

cdef void unsync(Engine* e, Chunk* c) noexcept nogil:
    if not c.unsynced:
        c.unsynced = True
        e.unsynced_count += 1


cdef void ask(Engine* e, Conn* c, int opcode, uint64_t volume_id, uint32_t index, uint32_t offset, uint32_t length,
              uint32_t flags) noexcept nogil:
    cdef Header h
    memset(&h, 0, sizeof(h))
    h.opcode = opcode
    h.volume_id = volume_id
    h.chunk_index = index
    h.offset = offset
    h.length = length
    h.flags = flags
    h.incarnation = e.incarnation
    header_seal(&h)
    conn_append(c, &e.pool, &h, HEADER_SIZE)
    mark_dirty(e, c)


cdef void sync_begin(Engine* e, Conn* c) noexcept nogil:
    memset(&e.syncs[c.id & (CONNS_MAX - 1)], 0, sizeof(Sync))
    ask(e, c, OP_DIRTY, 0, 0, 0, 0, 0)


cdef void peer_lost(Engine* e, Conn* c) noexcept nogil:
    """Writes not confirmed stay; those not yet applied are sent back to the client."""
    cdef uint32_t i
    cdef Op* op
    cdef MapVolume* v
    cdef const MapEntry* entry
    for i in range(e.op_count):
        op = e.ops[i]
        if op.chunk == NULL or not op.pending & PENDING_REMOTE:
            continue
        v = map_volume_find(&e.map, op.h.volume_id)
        entry = map_lookup(v, op.chunk.index) if v != NULL else NULL
        if entry == NULL or entry.secondary != (<Session*>c.user).node_id:
            continue
        unsync(e, op.chunk)
        if op.state == STATE_REMOTE_FIRST:
            op_settle(e, op, PENDING_REMOTE | PENDING_LOCAL, ST_NOT_READY)


cdef void sync_continue(Engine* e) noexcept nogil:
    cdef uint32_t i
    cdef Chunk* chunk
    cdef MapVolume* v
    cdef const MapEntry* entry
    cdef Conn* c
    cdef Sync* s
    if e.unsynced_count == 0:
        return
    for i in range(e.table_capacity):
        chunk = e.table[i]
        while chunk != NULL:
            if chunk.unsynced:
                v = map_volume_find(&e.map, chunk.volume_id)
                entry = map_lookup(v, chunk.index) if v != NULL else NULL
                if entry == NULL:
                    map_miss(e, chunk.volume_id, chunk.index >> 10)
                elif entry.primary == e.sds_id:
                    c = peer_conn(e, entry.secondary, CONN_PEER_OUT) if entry.secondary else NULL
                    if c != NULL and (<Session*>c.user).ready:
                        s = &e.syncs[c.id & (CONNS_MAX - 1)]
                        if s.chunk == NULL:
                            s.chunk = chunk
                            s.outstanding = 1
                            ask(e, c, OP_TAGS, chunk.volume_id, chunk.index, 0, 0, 0)
            chunk = chunk.hash_next


cdef bint local_good(Engine* e, Chunk* chunk, Tag* tag, uint32_t block, char* bytes) noexcept nogil:
    """Reads the block; whether it is what its tag says."""
    if tag_is_unknown(tag):
        return False
    if chunk.slot == SLOT_NONE:
        memset(bytes, 0, BLOCK_SIZE)
        return True
    if pread(chunk_fd(e, chunk), bytes, BLOCK_SIZE,
             <int64_t>device_offset(chunk.slot) + (<int64_t>block << BLOCK_SHIFT)) != BLOCK_SIZE:
        return False
    return crc32c(block_seed(chunk.volume_id, chunk.index, block), bytes, BLOCK_SIZE) == tag_check(tag)


cdef void push_block(Engine* e, Conn* c, Sync* s, Chunk* chunk, uint32_t block, Tag* tag, char* bytes) noexcept nogil:
    cdef Header h
    cdef uint32_t check = tag_check(tag)
    memset(&h, 0, sizeof(h))
    h.opcode = OP_PUSH
    h.volume_id = chunk.volume_id
    h.chunk_index = chunk.index
    h.offset = block << BLOCK_SHIFT
    h.length = BLOCK_SIZE
    h.flags = FLAG_RESYNC
    h.body_length = 20 + BLOCK_SIZE
    h.epoch = tag.epoch
    h.seq = tag.seq
    h.incarnation = e.incarnation
    header_seal(&h)
    conn_append(c, &e.pool, &h, HEADER_SIZE)
    conn_append(c, &e.pool, &check, 4)
    conn_append(c, &e.pool, tag, 16)
    conn_append(c, &e.pool, bytes, BLOCK_SIZE)
    s.outstanding += 1
    s.pushed += 1
    mark_dirty(e, c)


cdef void compare(Engine* e, Conn* c, Sync* s, Chunk* chunk, Tag* theirs) noexcept nogil:
    """Tag by tag: pushes what is newer here, pulls what is newer there, adopts what nobody can vouch for."""
    cdef Tag never[2]
    cdef Tag adopted
    cdef Tag* mine
    cdef Tag* other
    cdef uint32_t block, check
    cdef char* bytes = e.scratch
    cdef bint good
    for block in range(CHUNK_BLOCKS):
        tag_set_never(&never[0], chunk.volume_id, chunk.index, block)
        mine = &never[0] if chunk.slot == SLOT_NONE else chunk_tags(e, chunk) + block
        other = &never[0] if theirs == NULL else theirs + block
        if memcmp(mine, other, 16) == 0 and not tag_is_unknown(mine):
            continue
        good = local_good(e, chunk, mine, block, bytes)
        if good and (tag_is_unknown(other) or tag_newer(mine.epoch, mine.seq, other)
                     or not tag_newer(other.epoch, other.seq, mine)):
            push_block(e, c, s, chunk, block, mine, bytes)
        elif not tag_is_unknown(other) and theirs != NULL:
            ask(e, c, OP_PULL, chunk.volume_id, chunk.index, block << BLOCK_SHIFT, BLOCK_SIZE, 0)
            s.outstanding += 1
            s.pulled += 1
        elif chunk.slot != SLOT_NONE:
            if pread(chunk_fd(e, chunk), bytes, BLOCK_SIZE,
                     <int64_t>device_offset(chunk.slot) + (<int64_t>block << BLOCK_SHIFT)) != BLOCK_SIZE:
                continue
            e.counter += 1
            check = crc32c(block_seed(chunk.volume_id, chunk.index, block), bytes, BLOCK_SIZE)
            tag_set(&adopted, check, mine.epoch, (e.incarnation << SEQ_COUNTER_BITS) | e.counter)
            if chunk_write(e, chunk, block, 1, bytes, &check, adopted.epoch, adopted.seq) == 0:
                push_block(e, c, s, chunk, block, &adopted, bytes)


cdef void pulled(Engine* e, Chunk* chunk, Header* h, char* body) noexcept nogil:
    cdef Tag* tag = <Tag*>(body + 4)
    cdef uint32_t block = h.offset >> BLOCK_SHIFT
    if h.status != ST_OK or h.length != BLOCK_SIZE or h.flags & (FLAG_ZEROS | FLAG_ABSENT):
        return
    if verify_range(h.volume_id, h.chunk_index, h.offset, h.length, body + 20, <uint32_t*>body) >= 0:
        return
    if chunk_allocate(e, chunk, tag.epoch) < 0 or chunk_intent(e, chunk) < 0:
        return
    if tag_is_hole(tag):
        chunk_discard(e, chunk, block, 1, tag.epoch, tag.seq & SEQ_MASK)
    else:
        chunk_write(e, chunk, block, 1, body + 20, <uint32_t*>body, tag.epoch, tag.seq & SEQ_MASK)


cdef void sync_step(Engine* e, Conn* c, Sync* s) noexcept nogil:
    """One answer less to wait for; when there is none, the chunk agrees."""
    cdef Chunk* chunk = s.chunk
    cdef Op* op
    cdef Op* following
    s.outstanding -= 1
    if s.outstanding:
        return
    s.chunk = NULL
    s.chunks += 1
    chunk.unsynced = False
    e.unsynced_count -= 1
    ask(e, c, OP_PING, chunk.volume_id, chunk.index, 0, 0, FLAG_RESYNC)
    op = chunk.ops
    while op != NULL:
        following = op.next
        if op.pending & PENDING_REMOTE and op.state == STATE_RUNNING:
            op_settle(e, op, PENDING_REMOTE, 0)
            following = chunk.ops                          # the list may have changed: from the start
        op = following
    chunk_trim(e, chunk)
    sync_continue(e)
    if s.chunk == NULL:
        emit(e, EV_PEER_SYNCED, (<Session*>c.user).node_id, s.chunks, s.pulled, s.pushed, NULL, 0)


cdef void dirty_list(Engine* e, Conn* c, Header* h, char* body) noexcept nogil:
    cdef uint64_t volume_id
    cdef uint32_t index, i
    cdef Chunk* chunk
    for i in range(h.body_length // 16):
        memcpy(&volume_id, body + 16 * i, 8)
        memcpy(&index, body + 16 * i + 8, 4)
        chunk = chunk_get(e, volume_id, index)
        if chunk != NULL:
            unsync(e, chunk)
    if h.flags & FLAG_REPLY_MORE:
        ask(e, c, OP_DIRTY, 0, 0, h.offset, 0, 0)
        return
    (<Session*>c.user).ready = True
    ask(e, c, OP_PING, 0, 0, 0, 0, FLAG_RESYNC)
    sync_continue(e)


cdef int secondary_answer(Engine* e, Conn* c, Header* h, char* body) noexcept nogil:
    cdef Sync* s = &e.syncs[c.id & (CONNS_MAX - 1)]
    cdef uint32_t at
    cdef Op* op
    if h.opcode == (OP_REPLICATE | OP_REPLY) or h.opcode == (OP_REPLICATE_DISCARD | OP_REPLY):
        at = <uint32_t>h.request_id
        if at >= e.op_count or e.ops[at].serial != <uint32_t>(h.request_id >> 32):
            return 0                                       # settled meanwhile by the pair's agreement
        op = e.ops[at]
        if op.chunk == NULL or not op.pending & PENDING_REMOTE:
            return 0
        if op.state == STATE_REMOTE_FIRST:
            if h.status != ST_OK:
                op_settle(e, op, PENDING_REMOTE | PENDING_LOCAL, h.status)
                return 0
            op.pending &= ~<uint32_t>PENDING_REMOTE
            apply(e, op)
            return 0
        if h.status != ST_OK:
            unsync(e, op.chunk)                            # applied here, not there
        op_settle(e, op, PENDING_REMOTE, h.status)
        return 0
    if h.opcode == (OP_DIRTY | OP_REPLY):
        if h.status == ST_OK:
            dirty_list(e, c, h, body)
        return 0
    if h.opcode == (OP_PING | OP_REPLY):
        return 0
    if s.chunk == NULL or h.volume_id != s.chunk.volume_id or h.chunk_index != s.chunk.index:
        return BAD_OPCODE
    if h.opcode == (OP_TAGS | OP_REPLY) and h.status == ST_OK:
        compare(e, c, s, s.chunk, NULL if h.flags & FLAG_ABSENT else <Tag*>body)
    elif h.opcode == (OP_PULL | OP_REPLY):
        pulled(e, s.chunk, h, body)
    elif h.opcode != (OP_PUSH | OP_REPLY):
        return BAD_OPCODE
    sync_step(e, c, s)
    return 0


cdef int on_frame(void* context, Conn* c, Header* h, char* body, Buf* owner) noexcept nogil:
    cdef Engine* e = <Engine*>context
    if c.kind == CONN_CLIENT:
        return client_frame(e, c, h, body, owner)
    if c.kind == CONN_PEER_IN:
        return primary_frame(e, c, h, body, owner)
    return secondary_answer(e, c, h, body)
