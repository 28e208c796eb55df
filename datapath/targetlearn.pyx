"""Learners (see targetlearn.pxd; the rules: docs/internals/protocol.md and failover.md, "Learners").

A chunk that learns is walked once: the learner's tags say which blocks it lacks, and these are sent in steps, each an
operation of the chunk, so that it is alone in its range. From the first moment every write is forwarded when it is
applied here, so what is applied is either in the tags that are compared or on its way. Promises: a learner is told of
as whole only when every block is on its disks under the tag that it has here; an answer counts only for the round of
learning that asked for it; what is copied stays within the rate of its pool, a few steps at a time.
"""

from libc.errno cimport EIO, errno
from libc.stdint cimport int64_t, uint16_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy, memset
from datapath.checksum cimport verify_range
from datapath.chunkstore cimport chunk_fd, chunk_find, chunk_get, chunk_missing, chunk_tags
from datapath.connection cimport buf_get
from datapath.device cimport device_offset
from datapath.disk cimport disk_pread, disk_pread_cached
from datapath.iopool cimport Job, iopool_submit
from datapath.ondisk cimport SEQ_COUNTER_BITS, SLOT_NONE, TAG_HOLE, Tag
from datapath.ratelimit cimport rate_set, rate_spend, rate_wait_ns
from datapath.tags cimport tag_check, tag_is_unknown
from datapath.targetengine cimport (EV_LEARNED, EV_LEARNER_LOST, EV_REPAIR, emit, op_enter, op_finish, op_new,
                                    op_settle, send_head, send_ref)
from datapath.targetmembers cimport entry_of, members_ready
from datapath.targetops cimport ops_tell
from datapath.targetpair cimport peer_ready, push_head
from datapath.targetrepair cimport repair_want
from datapath.targetstate cimport *
from datapath.volumemap cimport MAP_SEGMENT_CHUNKS, MapEntry, MapVolume
from datapath.wire cimport *

cdef enum:
    STEP_BLOCKS = 8                  # a step holds up the threads on both sides: 32 KiB take less than a tenth of a ms
    STEPS_MAX = 4                    # to one learner at a time: its thread may find all of them at once
    HERE_MAX = 8                     # chunks with data that learn at a time, per learner
    TOLD_MAX = 16384                 # chunks that wait for the MDM's word: each is kept here until it comes
    CHUNKS_MAX = 64                  # chunks that learn at a time, per learner: most of a large volume is nowhere
    RATE_DEFAULT = 100000000
    LEARNED_NOW = 64                 # so many whole chunks are synced at once, fewer after
    LEARNED_NS = 200000000
    SOON_NS = 200000000              # the learner was not ready
    RETRY_NS = 1000000000            # it had no room, or its disk failed
    BAD_NS = 10000000000             # a block is not good here
    LOOK_TURN = 4096                 # map entries that one turn of the loop may look at
    LOOK_NS = 1000000                # from one such turn to the next, however busy the loop is
    LOOK_ROUNDS = 2                  # where the first begins is chance
    LOOK_TICK = 262144
    LOOK_COST = 16                   # an entry with a learner counts as so many
    PAIRS = 512


# --------------------------------------------------------------------------------------------------------------- rates

cdef LearnRate* rate_of(Engine* e, uint32_t pool_id) noexcept nogil:
    """Pools past the table's end share what its last one may."""
    cdef uint32_t i
    cdef LearnRate* r
    for i in range(e.learn_rate_count):
        if e.learn_rates[i].pool_id == pool_id:
            return &e.learn_rates[i]
    if e.learn_rate_count == RATES_MAX:
        return &e.learn_rates[RATES_MAX - 1]
    r = &e.learn_rates[e.learn_rate_count]
    e.learn_rate_count += 1
    r.pool_id = pool_id
    r.bytes_per_second = RATE_DEFAULT
    rate_set(&r.limit, RATE_DEFAULT, e.now_ns)
    return r


cdef void learn_rate(Engine* e, uint32_t pool_id, uint64_t bytes_per_second) noexcept nogil:
    cdef LearnRate* r = rate_of(e, pool_id)
    cdef int64_t tokens
    rate_wait_ns(&r.limit, e.now_ns)
    tokens = r.limit.nano_tokens
    r.bytes_per_second = bytes_per_second
    rate_set(&r.limit, bytes_per_second, e.now_ns)
    r.limit.nano_tokens = min(tokens, r.limit.nano_tokens_max)  # as full as it was: shares change all the time


# --------------------------------------------------------------------------------------------- chunks that are to learn

cdef bint learns(Engine* e, const Learner* learner, MapVolume* v, uint32_t index, const MapEntry* entry) noexcept nogil:
    """Looks at an entry that names a learner of ours, which is here. Whether the chunk may begin now."""
    cdef Chunk* chunk = chunk_find(e, v.volume_id, index)
    cdef Op* op
    if chunk != NULL and chunk.learn >= LEARN_WHOLE:
        return False
    e.learn_left += 1
    if chunk_missing(e, chunk):                            # what we do not have is not what it should have
        return False
    if (chunk != NULL and (chunk.learn != LEARN_NOT or chunk.unsynced or chunk.learn_retry_ns > e.now_ns)
            or learner != NULL and learner.retry_ns > e.now_ns
            or e.learn_told >= TOLD_MAX
            or rate_of(e, (<TargetVolume*>v.user).pool_id).bytes_per_second == 0
            or not members_ready(e, entry, v.volume_id, index, chunk)):
        return False
    e.learn_single = e.learn_single or entry.secondary == 0
    if entry.secondary and not e.learn_all:
        return False
    if learner != NULL and (learner.count == CHUNKS_MAX or learner.count + learner.whole_count >= LEARNED_MAX or (
            learner.here == HERE_MAX and chunk != NULL and chunk.slot != SLOT_NONE)):
        return False
    op = NULL if chunk == NULL else chunk.ops
    while op != NULL:
        if op.pending & PENDING_LEARNER:                   # of an earlier time, and soon settled
            return False
        op = op.next
    return True


cdef bint look(Engine* e, int64_t budget) noexcept nogil:
    """Goes on through the map, letting chunks begin. True at the end of a round. A round that has found chunks with
    one copy is followed by one for these only."""
    cdef MapVolume* v
    cdef TargetVolume* tv
    cdef MapEntry* entries
    cdef const MapEntry* entry
    cdef Peer* p
    while budget > 0:
        budget -= 1
        if e.learn_volume >= e.map.capacity:
            e.counters.resync_left = e.learn_left
            e.learn_all = not e.learn_single
            e.learn_single = False
            e.learn_left = e.learn_volume = e.learn_chunk = 0
            return True
        v = e.map.table[e.learn_volume]
        tv = NULL if v == NULL else <TargetVolume*>v.user
        if tv == NULL or not tv.known or tv.dropped or e.learn_chunk // MAP_SEGMENT_CHUNKS >= v.segment_count:
            e.learn_volume += 1
            e.learn_chunk = 0
            continue
        entries = v.segments[e.learn_chunk // MAP_SEGMENT_CHUNKS]
        if entries == NULL:
            e.learn_chunk = (e.learn_chunk // MAP_SEGMENT_CHUNKS + 1) * MAP_SEGMENT_CHUNKS
            continue
        entry = entries + e.learn_chunk % MAP_SEGMENT_CHUNKS
        if entry.learner and entry.primary == e.sds_id:
            p = e.peers[entry.learner]
            if p != NULL and peer_ready(p.out):
                budget -= LOOK_COST
                if learns(e, p.learner, v, e.learn_chunk, entry):
                    begin(e, p, v, e.learn_chunk, entry)
        e.learn_chunk += 1
    return False


cdef void begin(Engine* e, Peer* p, MapVolume* v, uint32_t index, const MapEntry* entry) noexcept nogil:
    cdef Chunk* chunk = chunk_get(e, v.volume_id, index)
    cdef Learning* g = <Learning*>calloc(1, sizeof(Learning))
    cdef Learning** at
    if p.learner == NULL:
        p.learner = <Learner*>calloc(1, sizeof(Learner))
    if chunk == NULL or g == NULL or p.learner == NULL:
        free(g)
        return
    e.learn_serial += 1
    g.serial = chunk.learn_serial = e.learn_serial
    g.chunk = chunk
    g.epoch = entry.epoch
    g.pool_id = (<TargetVolume*>v.user).pool_id
    g.here = chunk.slot != SLOT_NONE
    chunk.learn = LEARN_COPYING
    p.learner.count += 1
    p.learner.here += g.here
    at = &p.learner.first
    while at[0] != NULL:
        at = &at[0].next
    at[0] = g
    request(e, p, g, OP_TAGS, 0, 0)


cdef void learn_begin(Engine* e) noexcept nogil:
    cdef bint all = e.learn_all
    if look(e, LOOK_TICK) and e.learn_all and not all:
        look(e, LOOK_TICK)


# ------------------------------------------------------------------------------------------------------ one that learns

cdef void request(Engine* e, Peer* p, Learning* g, int opcode, uint32_t length, uint64_t seq) noexcept nogil:
    """Of the whole chunk, without a body."""
    cdef Header h
    memset(&h, 0, sizeof(h))
    h.opcode = opcode
    h.request_id = g.serial | LEARN_REQUEST
    h.volume_id = g.chunk.volume_id
    h.chunk_index = g.chunk.index
    h.length = length
    h.flags = FLAG_RESYNC
    h.epoch = g.epoch
    h.seq = seq
    h.incarnation = e.incarnation
    send_head(e, p.out, &h)


cdef Learning* find(const Peer* p, uint64_t request_id) noexcept nogil:
    cdef Learning* g = NULL if p.learner == NULL else p.learner.first
    while g != NULL and (g.serial | LEARN_REQUEST) != request_id:
        g = g.next
    return g


cdef void end(Engine* e, Peer* p, Learning* g) noexcept nogil:
    """The chunk does not copy any more; its state is the caller's."""
    cdef Learning** at = &p.learner.first
    while at[0] != g:
        at = &at[0].next
    at[0] = g.next
    p.learner.count -= 1
    p.learner.here -= g.here
    e.learn_room = LOOK_ROUNDS
    free(g)


cdef void learn_forget(Engine* e, Chunk* chunk) noexcept nogil:
    cdef Peer* p = e.peer_list
    cdef Learning* g
    while chunk.learn == LEARN_COPYING and p != NULL:
        g = find(p, chunk.learn_serial | LEARN_REQUEST)
        if g != NULL:
            end(e, p, g)
            break
        p = p.next
    e.learn_told -= chunk.learn >= LEARN_TOLD
    chunk.learn = LEARN_NOT


cdef void retry(Engine* e, Chunk* chunk, uint64_t after_ns) noexcept nogil:
    """Anew, after a while. A learner that counts as a member already is given up first, which the MDM has to do."""
    cdef const MapEntry* entry = entry_of(e, chunk.volume_id, chunk.index)
    cdef uint64_t pair[2]
    if chunk.learn == LEARN_TOLD and entry != NULL:
        chunk.learn = LEARN_LOST
        pair[0] = chunk.volume_id
        pair[1] = chunk.index
        emit(e, EV_LEARNER_LOST, entry.learner, 0, 0, 0, pair, sizeof(pair))
    elif chunk.learn != LEARN_LOST:
        learn_forget(e, chunk)
        chunk.learn_retry_ns = e.now_ns + after_ns
        e.gated = True                                     # writes that wait for the learner wait no longer


cdef void learn_stop(Engine* e, Chunk* chunk) noexcept nogil:
    retry(e, chunk, RETRY_NS)


cdef void refused(Engine* e, Peer* p, Learning* g, uint32_t status) noexcept nogil:
    if status == ST_NO_SPACE or status == ST_IO_ERROR:
        p.learner.retry_ns = e.now_ns + RETRY_NS
        retry(e, g.chunk, RETRY_NS)
    else:
        retry(e, g.chunk, SOON_NS)


cdef void bad_block(Engine* e, Chunk* chunk, uint32_t block) noexcept nogil:
    e.counters.checksum_errors += 1
    emit(e, EV_REPAIR, chunk.index, chunk.volume_id, block, 0, NULL, 0)
    repair_want(e, chunk, block, 1)
    retry(e, chunk, BAD_NS)


cdef void compare(Engine* e, Learning* g, const Tag* theirs) noexcept nogil:
    """Notes which blocks the learner has otherwise (NULL: it has nothing of the chunk)."""
    cdef Chunk* chunk = g.chunk
    cdef const Tag* mine
    cdef uint32_t block
    cdef bint other
    g.compared = True
    g.at = g.left = 0
    g.discard = chunk.slot == SLOT_NONE
    if g.discard:
        g.left = theirs != NULL
        return
    if e.devices[chunk.device].d.failed:
        retry(e, chunk, BAD_NS)
        return
    memset(g.differs, 0, sizeof(g.differs))
    for block in range(CHUNK_BLOCKS):
        mine = chunk_tags(e, chunk) + block
        if tag_is_unknown(mine):
            bad_block(e, chunk, block)
            return
        if theirs == NULL:
            other = mine.epoch != 0 or mine.seq != TAG_HOLE
        else:
            other = memcmp(mine, theirs + block, sizeof(Tag)) != 0
        if other:
            g.differs[block >> 3] |= 1 << (block & 7)
            g.left += 1


cdef void advance(Engine* e, Peer* p, Learning* g) noexcept nogil:
    """After something of this chunk has come to its end."""
    cdef Learned* w
    if g.steps or g.pushes or not g.compared:
        return
    if g.again:
        g.again = g.compared = False
        request(e, p, g, OP_TAGS, 0, 0)
    elif g.left == 0:
        g.chunk.learn = LEARN_WHOLE
        ops_tell(e, p.out, g.chunk)
        if p.learner.whole_count == 0:
            p.learner.since_ns = e.now_ns
        w = &p.learner.whole[p.learner.whole_count]
        p.learner.whole_count += 1
        w.volume_id = g.chunk.volume_id
        w.index = g.chunk.index
        w.epoch = g.epoch
        w.serial = g.serial
        end(e, p, g)


# --------------------------------------------------------------------------------------------------------------- steps

cdef inline bint differs(const Learning* g, uint32_t block) noexcept nogil:
    return g.differs[block >> 3] >> (block & 7) & 1


cdef bint step(Engine* e, Peer* p) noexcept nogil:
    """Enters the next operation that copies to this learner. False when there is none now."""
    cdef Learner* learner = p.learner
    cdef Learning* g
    cdef LearnRate* r
    cdef uint64_t wait_ns
    if learner == NULL or e.learn_reads or learner.steps + learner.pushes >= STEPS_MAX or not peer_ready(p.out):
        return False                                       # a disk that has to be read is read for one step at a time
    g = learner.first
    while g != NULL:
        if g.left and not g.again:
            r = rate_of(e, g.pool_id)
            wait_ns = rate_wait_ns(&r.limit, e.now_ns)
            if wait_ns:
                e.wait_ms = min(e.wait_ms, <int>(wait_ns // 1000000) + 1)
            elif r.bytes_per_second and enter(e, p, g, r):
                return True
        g = g.next
    return False


cdef bint enter(Engine* e, Peer* p, Learning* g, LearnRate* r) noexcept nogil:
    cdef Op* op = op_new(e)
    cdef uint32_t count = 1
    if op == NULL:
        return False
    if g.discard:
        count = CHUNK_BLOCKS
        g.left = 0
    else:
        while not differs(g, g.at):
            g.at += 1
        while count < STEP_BLOCKS and g.at + count < CHUNK_BLOCKS and differs(g, g.at + count):
            count += 1
        g.left -= count
        rate_spend(&r.limit, <uint64_t>count << BLOCK_SHIFT)
    op.kind = KIND_COPY
    op.learner_id = <uint16_t>p.sds_id
    op.h.request_id = g.serial | LEARN_REQUEST
    op.started_ns = e.now_ns
    g.steps += 1
    p.learner.steps += 1
    g.at += count
    op_enter(e, op, g.chunk, (g.at - count) << BLOCK_SHIFT, count << BLOCK_SHIFT)
    return True


cdef void copy_start(Engine* e, Op* op) noexcept nogil:
    cdef Peer* p = e.peers[op.learner_id]
    cdef Learning* g = find(p, op.h.request_id)
    cdef Chunk* chunk = op.chunk
    cdef uint32_t i, size = op.count << BLOCK_SHIFT
    if g == NULL:
        copy_end(e, op)
        return
    if g.discard != (chunk.slot == SLOT_NONE):             # there is another slot to compare with, or none any more
        g.again = True
        copy_end(e, op)
        return
    if g.discard:
        e.counter += 1
        request(e, p, g, OP_REPLICATE_DISCARD, CHUNK_SIZE, (e.incarnation << SEQ_COUNTER_BITS) | e.counter)
        g.pushes += 1
        p.learner.pushes += 1
        copy_end(e, op)
        return
    op.owner = buf_get(&e.pool, 20 * op.count + size)
    if op.owner == NULL or e.devices[chunk.device].d.failed:
        retry(e, chunk, RETRY_NS)
        copy_end(e, op)
        return
    op.checks = <uint32_t*>op.owner.data
    op.push_tags = <Tag*>(op.owner.data + 4 * op.count)
    op.data = op.owner.data + 20 * op.count
    memcpy(op.push_tags, chunk_tags(e, chunk) + op.first, sizeof(Tag) * op.count)
    for i in range(op.count):
        op.checks[i] = tag_check(op.push_tags + i)
    op.fd = chunk_fd(e, chunk)
    op.offset = device_offset(chunk.slot) + (<uint64_t>op.first << BLOCK_SHIFT)
    if disk_pread_cached(op.fd, op.data, size, <int64_t>op.offset) == <ssize_t>size:
        copy_send(e, op, p, g)
        copy_end(e, op)
        return
    op.job.run = copy_run
    op.job.kind = KIND_COPY
    e.learn_reads += 1
    e.counters.reads_pooled += 1
    iopool_submit(&e.io, &op.job, False)


cdef void copy_run(Job* job) noexcept nogil:
    """Pool thread."""
    cdef Op* op = <Op*>job.owner
    cdef ssize_t size = <ssize_t>op.count << BLOCK_SHIFT
    cdef ssize_t got = disk_pread(op.fd, op.data, size, <int64_t>op.offset)
    job.result = 0 if got == size else (-errno if got < 0 else -EIO)


cdef void copy_read(Engine* e, Op* op) noexcept nogil:
    cdef Peer* p = e.peers[op.learner_id]
    cdef Learning* g = find(p, op.h.request_id)
    e.learn_reads -= 1
    if g != NULL and op.job.result < 0:
        bad_block(e, op.chunk, op.first)
    elif g != NULL:
        copy_send(e, op, p, g)
    copy_end(e, op)


cdef void copy_send(Engine* e, Op* op, Peer* p, Learning* g) noexcept nogil:
    cdef uint32_t i, size = op.count << BLOCK_SHIFT
    cdef int bad
    for i in range(op.count):
        if tag_is_unknown(op.push_tags + i):
            bad_block(e, op.chunk, op.first + i)
            return
    bad = verify_range(op.chunk.volume_id, op.chunk.index, op.first << BLOCK_SHIFT, size, op.data, op.checks)
    if bad >= 0:
        bad_block(e, op.chunk, op.first + <uint32_t>bad)
        return
    push_head(e, p.out, g.serial | LEARN_REQUEST, op.chunk, op.first, op.count, op.push_tags)
    send_ref(e, p.out, op.owner, op.owner.data, 20 * op.count + size)
    g.pushes += 1
    p.learner.pushes += 1
    e.counters.resync_bytes += size


cdef void copy_end(Engine* e, Op* op) noexcept nogil:
    """Others in the chunk may go on, and end the learning too."""
    cdef Peer* p = e.peers[op.learner_id]
    cdef uint64_t request_id = op.h.request_id
    cdef Learning* g = find(p, request_id)
    p.learner.steps -= 1
    if g != NULL:
        g.steps -= 1
    op_finish(e, op)
    g = find(p, request_id)
    if g != NULL:
        advance(e, p, g)


cdef void learn_tick(Engine* e) noexcept nogil:
    cdef Peer* p = e.peer_list
    cdef uint32_t count = 0
    e.wait_ms = LEARN_WAIT_MS
    if e.learn_room and e.now_ns >= e.looked_ns + LOOK_NS:  # a turn may find nothing: most may have learned already
        e.looked_ns = e.now_ns
        e.learn_room -= look(e, LOOK_TURN)
    if e.learn_room:
        e.wait_ms = 1
    while p != NULL:
        count += 1
        if p.learner != NULL:
            commit(e, p)
        p = p.next
    while count:                                           # in turn, so that one does not use up what a pool may
        count -= 1
        e.learn_peer = e.peer_list if e.learn_peer == NULL or e.learn_peer.next == NULL else e.learn_peer.next
        if step(e, e.learn_peer):
            e.wait_ms = 0                                  # what clients have sent meanwhile comes before the next one
            return


# ---------------------------------------------------------------------------------------------------------------- whole

cdef void commit(Engine* e, Peer* p) noexcept nogil:
    """Has the learner sync its disks, when chunks wait for that."""
    cdef Learner* learner = p.learner
    cdef Header h
    if learner.syncing_count or learner.whole_count == 0 or not peer_ready(p.out) or (
            learner.whole_count < LEARNED_NOW and e.now_ns < learner.since_ns + LEARNED_NS):
        return
    memcpy(learner.syncing, learner.whole, learner.whole_count * sizeof(Learned))
    learner.syncing_count = learner.whole_count
    learner.whole_count = 0
    e.learn_room = LOOK_ROUNDS
    e.learn_serial += 1
    learner.commit_id = e.learn_serial | LEARN_REQUEST
    memset(&h, 0, sizeof(h))
    h.opcode = OP_PING
    h.request_id = learner.commit_id
    h.flags = FLAG_COMMIT
    h.incarnation = e.incarnation
    send_head(e, p.out, &h)


cdef void committed(Engine* e, Peer* p, uint32_t status) noexcept nogil:
    cdef uint64_t told[3 * LEARNED_MAX]
    cdef uint32_t i, count = 0
    cdef Learner* learner = p.learner
    cdef Learned* w
    cdef Chunk* chunk
    for i in range(learner.syncing_count):
        w = &learner.syncing[i]
        chunk = chunk_find(e, w.volume_id, w.index)
        if chunk == NULL or chunk.learn != LEARN_WHOLE or chunk.learn_serial != w.serial:
            continue
        if status != ST_OK:
            retry(e, chunk, RETRY_NS)
            continue
        chunk.learn = LEARN_TOLD
        e.learn_told += 1
        told[3 * count] = w.volume_id
        told[3 * count + 1] = w.index
        told[3 * count + 2] = w.epoch
        count += 1
    learner.syncing_count = 0
    e.counters.resync_chunks += count
    if status != ST_OK:
        learner.retry_ns = e.now_ns + RETRY_NS
    if count:
        emit(e, EV_LEARNED, p.sds_id, e.counters.resync_bytes, 0, 0, told, 24 * <uint64_t>count)


# ------------------------------------------------------------------------------------------------ what the learner says

cdef int learn_answer(Engine* e, Conn* c, Header* h, char* body) noexcept nogil:
    cdef Peer* p = e.peers[(<Session*>c.user).node_id]
    cdef Learning* g
    if p == NULL or p.out != c or p.learner == NULL:
        return BAD_OPCODE
    if h.opcode == (OP_PING | OP_REPLY):
        if p.learner.syncing_count == 0 or h.request_id != p.learner.commit_id:
            return BAD_OPCODE
        committed(e, p, h.status)
        return 0
    g = find(p, h.request_id)
    if h.opcode == (OP_PUSH | OP_REPLY) or h.opcode == (OP_REPLICATE_DISCARD | OP_REPLY):
        if p.learner.pushes == 0 or (g != NULL and g.pushes == 0):
            return BAD_OPCODE
        p.learner.pushes -= 1
        if g != NULL:
            g.pushes -= 1
    elif h.opcode != (OP_TAGS | OP_REPLY) or (g != NULL and g.compared):
        return BAD_OPCODE
    if g == NULL:
        return 0                                           # it learns no more
    if h.status != ST_OK:
        refused(e, p, g, h.status)
        return 0
    if h.opcode == (OP_TAGS | OP_REPLY):
        compare(e, g, NULL if h.flags & FLAG_ABSENT else <Tag*>body)
        g = find(p, h.request_id)                          # a block of ours may be bad
    if g != NULL:
        advance(e, p, g)
    return 0


cdef void learner_confirmed(Engine* e, Op* op, uint32_t status) noexcept nogil:
    cdef const MapEntry* entry
    if status == ST_OK:
        op_settle(e, op, PENDING_LEARNER, ST_OK)
        return
    entry = entry_of(e, op.chunk.volume_id, op.chunk.index)
    if entry != NULL and entry.learner == op.learner_id and op.chunk.learn != LEARN_NOT:
        learn_stop(e, op.chunk)
    e.gated = True                                         # settled there, if it still only learns


cdef void learn_lost(Engine* e, uint32_t sds_id) noexcept nogil:
    """Chunks that it counts in as a member already stay as they are until the map says otherwise."""
    cdef Peer* p = e.peers[sds_id & (SDS_IDS - 1)]
    cdef uint64_t lost[2 * PAIRS]
    cdef uint32_t i, count = 0
    cdef Chunk* chunk
    cdef const MapEntry* entry
    if p == NULL or p.learner == NULL:
        return
    for i in range(e.table_capacity):
        chunk = e.table[i]
        while chunk != NULL:
            entry = NULL
            if chunk.learn != LEARN_NOT:
                entry = entry_of(e, chunk.volume_id, chunk.index)
            if entry != NULL and entry.learner == sds_id:
                if chunk.learn == LEARN_TOLD:
                    lost[2 * count] = chunk.volume_id
                    lost[2 * count + 1] = chunk.index
                    count += 1
                    chunk.learn = LEARN_LOST
                else:
                    retry(e, chunk, 0)
            if count == PAIRS:
                emit(e, EV_LEARNER_LOST, sds_id, 0, 0, 0, lost, 16 * <uint64_t>count)
                count = 0
            chunk = chunk.hash_next
    if count:
        emit(e, EV_LEARNER_LOST, sds_id, 0, 0, 0, lost, 16 * <uint64_t>count)
    p.learner.pushes = p.learner.whole_count = p.learner.syncing_count = 0
    p.learner.retry_ns = 0


cdef void learn_free(Peer* p) noexcept nogil:
    cdef Learning* g
    while p.learner != NULL and p.learner.first != NULL:
        g = p.learner.first
        p.learner.first = g.next
        free(g)
    free(p.learner)
