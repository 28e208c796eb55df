"""Read repair and the scrubber (see targetrepair.pxd).

Both are one operation of the primary, KIND_CHECK, alone in its range on both sides: it reads its own blocks, has the
secondary verify its own, and gives each block to the side that lacks it, under the tag that it has. Nothing that is
under way can be overtaken: what came before has ended, what comes after is behind it in the pair's stream. Promises: a
block is replaced only by bytes that match their tag, of a member in sync; what no copy has stays as it is, which no
reader takes, until it is written anew.
"""

from libc.stdint cimport int64_t
from libc.string cimport memcmp, memcpy, memset
from datapath.checksum cimport block_seed, crc32c, verify_range
from datapath.chunkstore cimport (
    chunk_count_live, chunk_discard, chunk_fd, chunk_find, chunk_missing, chunk_put, chunk_tags)
from datapath.connection cimport buf_get
from datapath.device cimport device_offset
from datapath.disk cimport disk_pread
from datapath.iopool cimport Job, iopool_submit
from datapath.ondisk cimport SEQ_MASK, SLOT_NONE, TAG_UNKNOWN, Tag
from datapath.ratelimit cimport rate_set, rate_spend, rate_wait_ns
from datapath.tags cimport tag_check, tag_good_hole, tag_is_hole, tag_is_unknown, tag_newer
from datapath.targetengine cimport (EV_REPAIRED, EV_SCRUBBED, conn_by_id, emit, op_enter, op_finish, op_new,
                                    op_settle, replication_id, reply_head, reply_to, send_body, send_head, send_ref)
from datapath.targetmembers cimport entry_of, opened
from datapath.targetpair cimport ask, peer_ready, push_head
from datapath.targetstate cimport *
from datapath.targetunsure cimport missing_there
from datapath.volumemap cimport MapEntry
from datapath.wire cimport *

cdef enum:
    CHECKS_MAX = 32                  # at a time; who asks for more asks again
    HOPELESS_NS = 1000000000
    SCRUB_PAUSE_NS = 3600000000000   # between two passes
    SCRUB_AGAIN_NS = 10000000000     # after a pass that found nothing to do
    SCRUB_WAIT_NS = 50000000         # a step that finds no memory


# ------------------------------------------------------------------------------------------------------- what is wanted

cdef bint repair_hopeless(Engine* e, const Chunk* chunk, uint32_t first, uint32_t count) noexcept nogil:
    cdef uint32_t i
    cdef Hopeless* bad
    for i in range(HOPELESS_MAX):
        bad = &e.hopeless[i]
        if (bad.until_ns > e.now_ns and bad.volume_id == chunk.volume_id and bad.index == chunk.index
                and bad.first < first + count and first < bad.first + bad.count):
            return True
    return False


cdef bint under_way(const Chunk* chunk, uint32_t first, uint32_t count) noexcept nogil:
    cdef const Op* op = chunk.ops
    while op != NULL:
        if op.kind == KIND_CHECK and op.first <= first and first + count <= op.first + op.count:
            return True
        op = op.next
    return False


cdef Op* check_enter(Engine* e, Chunk* chunk, uint32_t first, uint32_t count, bint scrub) noexcept nogil:
    cdef Op* op = op_new(e)
    if op == NULL:
        return NULL
    op.kind = KIND_CHECK
    op.started_ns = e.now_ns
    op.scrub = scrub
    e.checks += 1
    op_enter(e, op, chunk, first << BLOCK_SHIFT, count << BLOCK_SHIFT)
    return op


cdef void repair_want(Engine* e, Chunk* chunk, uint32_t first, uint32_t count) noexcept nogil:
    cdef const MapEntry* entry = entry_of(e, chunk.volume_id, chunk.index)
    cdef uint32_t part
    cdef Peer* p
    if entry == NULL or chunk.unsynced or repair_hopeless(e, chunk, first, count):
        return
    if entry.primary != e.sds_id:
        p = e.peers[entry.primary]
        if entry.secondary == e.sds_id and p != NULL and peer_ready(p.out):
            ask(e, p.out, OP_REPAIR, chunk.volume_id, chunk.index, first << BLOCK_SHIFT, count << BLOCK_SHIFT, 0)
        return
    while count and e.checks < CHECKS_MAX:
        part = min(count, <uint32_t>VERIFY_BLOCKS_MAX)
        if not under_way(chunk, first, part) and check_enter(e, chunk, first, part, False) == NULL:
            return
        first += part
        count -= part


cdef void repair_asked(Engine* e, Conn* c, Header* h) noexcept nogil:
    cdef const MapEntry* entry = entry_of(e, h.volume_id, h.chunk_index)
    cdef Chunk* chunk = chunk_find(e, h.volume_id, h.chunk_index)
    cdef Peer* p
    reply_to(e, c.id, h, ST_OK, 0)
    if entry == NULL or entry.primary != e.sds_id or entry.secondary != (<Session*>c.user).node_id:
        return
    if h.length == CHUNK_SIZE and h.flags & FLAG_ABSENT:
        missing_there(e, h.volume_id, h.chunk_index)
    elif h.length == CHUNK_SIZE:                           # whether the copies agree: it has not heard
        p = e.peers[entry.secondary]
        if (p != NULL and peer_ready(p.out) and not chunk_missing(e, chunk) and (chunk == NULL or not chunk.unsynced)
                and opened(e, entry, chunk)):
            ask(e, p.out, OP_PING, h.volume_id, h.chunk_index, 0, 0, FLAG_RESYNC | FLAG_ABSENT)
    elif chunk != NULL:
        repair_want(e, chunk, h.offset >> BLOCK_SHIFT, h.length >> BLOCK_SHIFT)


# ------------------------------------------------------------------------------------------- reading, on a pool thread

cdef bint read_begin(Engine* e, Op* op) noexcept nogil:
    """Has a pool thread compare the blocks with their tags, which do not change while the range is held. False: there
    is no memory."""
    op.owner = buf_get(&e.pool, (20 + BLOCK_SIZE) * op.count)
    if op.owner == NULL:
        return False
    op.push_tags = <Tag*>op.owner.data
    op.checks = <uint32_t*>(op.owner.data + 16 * op.count)
    op.data = op.owner.data + 20 * op.count
    memcpy(op.push_tags, chunk_tags(e, op.chunk) + op.first, sizeof(Tag) * op.count)
    op.fd = chunk_fd(e, op.chunk)
    op.offset = device_offset(op.chunk.slot) + (<uint64_t>op.first << BLOCK_SHIFT)
    op.h.volume_id = op.chunk.volume_id
    op.h.chunk_index = op.chunk.index
    op.job.run = read_blocks
    op.job.kind = KIND_CHECK
    iopool_submit(&e.io, &op.job, False)
    return True


cdef void read_blocks(Job* job) noexcept nogil:
    """Pool thread. One by one: what the disk cannot read is bad, its neighbours are not."""
    cdef Op* op = <Op*>job.owner
    cdef uint32_t i
    cdef char* at
    op.bad = 0
    for i in range(op.count):
        at = op.data + (<size_t>i << BLOCK_SHIFT)
        op.checks[i] = tag_check(op.push_tags + i)
        if (disk_pread(op.fd, at, BLOCK_SIZE, <int64_t>op.offset + (<int64_t>i << BLOCK_SHIFT)) != BLOCK_SIZE
                or tag_is_unknown(op.push_tags + i)
                or crc32c(block_seed(op.h.volume_id, op.h.chunk_index, op.first + i), at, BLOCK_SIZE) != op.checks[i]):
            op.bad |= <uint64_t>1 << i


cdef void check_read(Engine* e, Op* op) noexcept nogil:
    if op.kind == KIND_LOOK:
        verify_answer(e, op)
    else:
        compare_begin(e, op)


# --------------------------------------------------------------------------------------------------------- a secondary

cdef void verify_start(Engine* e, Op* op) noexcept nogil:
    cdef Conn* c = conn_by_id(e, op.conn_id)
    cdef Header r
    if c != NULL and op.chunk.slot == SLOT_NONE:
        reply_head(e, &r, &op.h, ST_OK)
        r.flags = FLAG_ABSENT
        send_head(e, c, &r)
    elif c != NULL and e.devices[op.chunk.device].d.failed:
        reply_to(e, c.id, &op.h, ST_IO_ERROR, 0)
    elif c != NULL and read_begin(e, op):
        return
    else:
        reply_to(e, op.conn_id, &op.h, ST_BUSY, 0)
    op_finish(e, op)


cdef void verify_answer(Engine* e, Op* op) noexcept nogil:
    cdef Conn* c = conn_by_id(e, op.conn_id)
    cdef Header r
    cdef uint32_t i
    for i in range(op.count):
        if op.bad >> i & 1:
            op.push_tags[i].seq |= TAG_UNKNOWN
            e.counters.checksum_errors += 1
    if c != NULL:
        reply_head(e, &r, &op.h, ST_OK)
        r.body_length = 16 * op.count
        send_head(e, c, &r)
        send_body(e, c, op.push_tags, r.body_length)
    op_finish(e, op)


# ----------------------------------------------------------------------------------------------------------- a primary

cdef bint leads(Engine* e, Chunk* chunk) noexcept nogil:
    """Whether our copy of the chunk counts, and is here."""
    cdef const MapEntry* entry = entry_of(e, chunk.volume_id, chunk.index)
    return (entry != NULL and entry.primary == e.sds_id and not chunk.unsynced and chunk.slot != SLOT_NONE
            and e.devices[chunk.device].d.failed == 0)


cdef void check_start(Engine* e, Op* op) noexcept nogil:
    if not leads(e, op.chunk) or not read_begin(e, op):
        op_finish(e, op)


cdef void compare_begin(Engine* e, Op* op) noexcept nogil:
    """Our blocks are read. The other copy says of each of its own which it is, and whether it is good."""
    cdef const MapEntry* entry = entry_of(e, op.chunk.volume_id, op.chunk.index)
    cdef Peer* p
    cdef uint32_t i
    for i in range(op.count):
        e.counters.checksum_errors += op.bad >> i & 1
    if not leads(e, op.chunk):
        op_finish(e, op)
        return
    if entry.secondary == 0:
        for i in range(op.count):
            op.lost += op.bad >> i & 1
        op_finish(e, op)
        return
    p = e.peers[entry.secondary]
    if p == NULL or not peer_ready(p.out):
        op_finish(e, op)                                   # who finds it bad again asks again
        return
    op.pending = PENDING_REMOTE
    op.remote_id = entry.secondary
    op.outstanding = 1
    request(e, p.out, op, OP_VERIFY, op.first, op.count)


cdef void request(Engine* e, Conn* c, Op* op, int opcode, uint32_t first, uint32_t count) noexcept nogil:
    cdef Header h
    memset(&h, 0, sizeof(h))
    h.opcode = opcode
    h.request_id = replication_id(op)
    h.volume_id = op.chunk.volume_id
    h.chunk_index = op.chunk.index
    h.offset = first << BLOCK_SHIFT
    h.length = count << BLOCK_SHIFT
    h.epoch = entry_of(e, op.chunk.volume_id, op.chunk.index).epoch
    h.incarnation = e.incarnation
    send_head(e, c, &h)


cdef enum Move:
    MOVE_NONE = 0
    MOVE_PUSH = 1
    MOVE_PULL = 2
    MOVE_LOST = 3
    MOVE_HOLE = 4                    # nothing was written, here and there; yet there are bytes here


cdef int move_of(const Op* op, uint32_t i, const Tag* theirs) noexcept nogil:
    """What is to be done about a block. Two good ones that differ: nobody wrote here meanwhile, so one was lost. That
    nothing is there at all (`theirs` NULL) is no word against what was written here and is bad."""
    cdef const Tag* mine = op.push_tags + i
    cdef bint bad = op.bad >> i & 1
    cdef bint hole = tag_good_hole(mine, op.h.volume_id, op.h.chunk_index, op.first + i)
    if theirs == NULL:
        return (MOVE_HOLE if hole else MOVE_LOST) if bad else (MOVE_NONE if hole else MOVE_PUSH)
    if tag_is_unknown(theirs + i):
        return MOVE_LOST if bad else MOVE_PUSH
    if bad:
        return MOVE_PULL
    if memcmp(mine, theirs + i, sizeof(Tag)) == 0 or (hole and tag_is_hole(theirs + i)):
        return MOVE_NONE
    return MOVE_PULL if tag_newer(theirs[i].epoch, theirs[i].seq, mine) else MOVE_PUSH


cdef void compare(Engine* e, Conn* c, Op* op, const Tag* theirs) noexcept nogil:
    cdef uint32_t i = 0, count
    cdef const Tag* mine
    cdef int move
    while i < op.count:
        mine = op.push_tags + i
        move = move_of(op, i, theirs)
        count = 1
        while move != MOVE_HOLE and i + count < op.count and move_of(op, i + count, theirs) == move:
            count += 1
        if move == MOVE_LOST:
            op.lost += count
        elif move == MOVE_PUSH:
            push(e, c, op, i, count)
        elif move == MOVE_HOLE:
            op.repaired += chunk_discard(e, op.chunk, op.first + i, 1, mine.epoch, mine.seq & SEQ_MASK) == 0
        elif move == MOVE_PULL:
            op.outstanding += 1
            request(e, c, op, OP_PULL, op.first + i, count)
        i += count


cdef void push(Engine* e, Conn* c, Op* op, uint32_t at, uint32_t count) noexcept nogil:
    op.outstanding += 1
    push_head(e, c, replication_id(op), op.chunk, op.first + at, count, op.push_tags + at)
    send_body(e, c, op.checks + at, 4 * count)
    send_body(e, c, op.push_tags + at, 16 * count)
    send_ref(e, c, op.owner, op.data + (<size_t>at << BLOCK_SHIFT), count << BLOCK_SHIFT)


cdef void pulled(Engine* e, Op* op, const Header* h, char* body) noexcept nogil:
    """Takes the other copy's blocks, as far as they are good."""
    cdef uint32_t first = h.offset >> BLOCK_SHIFT, count = h.length >> BLOCK_SHIFT, i
    cdef const Tag* names = <const Tag*>(body + 4 * count)
    cdef char* bytes = body + 20 * count
    cdef int error
    if (h.flags & (FLAG_ZEROS | FLAG_ABSENT) or first < op.first or first + count > op.first + op.count
            or not leads(e, op.chunk)
            or verify_range(h.volume_id, h.chunk_index, h.offset, h.length, bytes, <uint32_t*>body) >= 0):
        return
    for i in range(count):
        if tag_is_unknown(names + i) or tag_check(names + i) != (<uint32_t*>body)[i]:
            op.lost += op.bad >> (first + i - op.first) & 1
            continue
        if tag_is_hole(names + i):
            error = chunk_discard(e, op.chunk, first + i, 1, names[i].epoch, names[i].seq & SEQ_MASK)
        else:
            error = chunk_put(e, op.chunk, first + i, 1, bytes + (<size_t>i << BLOCK_SHIFT), names + i)
        op.repaired += error == 0


cdef int check_answer(Engine* e, Conn* c, Header* h, char* body) noexcept nogil:
    cdef uint32_t at = <uint32_t>h.request_id
    cdef Op* op
    if at >= e.op_count or replication_id(e.ops[at]) != h.request_id or e.ops[at].kind != KIND_CHECK:
        return 0                                           # it has ended: the map has changed
    op = e.ops[at]
    if (op.chunk == NULL or op.pending != PENDING_REMOTE or op.remote_id != (<Session*>c.user).node_id
            or h.volume_id != op.h.volume_id or h.chunk_index != op.h.chunk_index):
        return BAD_OPCODE
    op.outstanding -= 1
    if h.status != ST_OK or not leads(e, op.chunk):
        pass
    elif h.opcode == (OP_VERIFY | OP_REPLY):
        if h.offset != op.first << BLOCK_SHIFT or h.length != op.count << BLOCK_SHIFT:
            return BAD_OPCODE
        compare(e, c, op, NULL if h.flags & FLAG_ABSENT else <Tag*>body)
    elif h.opcode == (OP_PULL | OP_REPLY):
        pulled(e, op, h, body)
    else:
        op.repaired += h.length >> BLOCK_SHIFT
    if op.outstanding == 0:
        op_settle(e, op, PENDING_REMOTE, ST_OK)
    return 0


cdef void check_ended(Engine* e, Op* op) noexcept nogil:
    """Whatever came of it: its chunk is still known, its range is still held."""
    cdef Hopeless* bad
    e.checks -= 1
    if op.repaired:
        chunk_count_live(e, op.chunk)
    if op.lost:
        bad = &e.hopeless[e.hopeless_next]
        e.hopeless_next = (e.hopeless_next + 1) % HOPELESS_MAX
        bad.volume_id = op.chunk.volume_id
        bad.index = op.chunk.index
        bad.first = op.first
        bad.count = op.count
        bad.until_ns = e.now_ns + HOPELESS_NS
    if op.repaired or op.lost:
        e.counters.blocks_repaired += op.repaired
        e.counters.blocks_unrepairable += op.lost
        emit(e, EV_REPAIRED, op.chunk.index, op.chunk.volume_id, <uint64_t>op.first << 32 | op.repaired, op.lost,
             NULL, 0)
    if op.scrub:
        e.scrub.running = False
        e.counters.scrub_bytes += <uint64_t>op.count << BLOCK_SHIFT
        e.counters.scrub_errors += op.repaired + op.lost


# --------------------------------------------------------------------------------------------------------- the scrubber

cdef void scrub_rate(Engine* e, uint64_t bytes_per_second) noexcept nogil:
    """A pass begins, if none is under way."""
    e.scrub.bytes_per_second = bytes_per_second
    e.scrub.next_ns = 0
    rate_set(&e.scrub.limit, bytes_per_second, e.now_ns)


cdef Chunk* scrub_chunk(Engine* e) noexcept nogil:
    """The chunk at the scrubber's place. (One that comes or goes beside it moves its neighbours: these are met twice,
    or in the next pass.)"""
    cdef Chunk* chunk = e.table[e.scrub.place]
    cdef uint32_t _i
    for _i in range(e.scrub.nth):
        if chunk != NULL:
            chunk = chunk.hash_next
    return chunk


cdef void scrub_tick(Engine* e) noexcept nogil:
    cdef Scrub* s = &e.scrub
    cdef Chunk* chunk
    cdef uint64_t wait_ns
    if s.bytes_per_second == 0 or s.running or e.now_ns < s.next_ns:
        return
    wait_ns = rate_wait_ns(&s.limit, e.now_ns)
    if wait_ns:
        e.wait_ms = min(e.wait_ms, <int>(wait_ns // 1000000) + 1)
        return
    while s.place < e.table_capacity:
        chunk = scrub_chunk(e)
        if chunk == NULL:
            s.place += 1
            s.nth = 0
        elif s.block == CHUNK_BLOCKS or not leads(e, chunk):
            e.counters.scrub_chunks += s.block == CHUNK_BLOCKS
            s.block = 0
            s.nth += 1
        else:
            s.running = True
            if check_enter(e, chunk, s.block, VERIFY_BLOCKS_MAX, True) == NULL:
                s.running = False
                s.next_ns = e.now_ns + SCRUB_WAIT_NS
                return
            s.block += VERIFY_BLOCKS_MAX
            rate_spend(&s.limit, VERIFY_BLOCKS_MAX * BLOCK_SIZE)
            return
    s.place = 0
    s.next_ns = e.now_ns + SCRUB_AGAIN_NS
    if s.bytes_before == e.counters.scrub_bytes:           # there is nothing, or nobody has told yet that we lead it
        return
    s.next_ns = e.now_ns + SCRUB_PAUSE_NS
    s.bytes_before = e.counters.scrub_bytes
    e.counters.scrub_passes += 1
    emit(e, EV_SCRUBBED, 0, e.counters.scrub_chunks, e.counters.scrub_bytes, e.counters.scrub_errors, NULL, 0)
