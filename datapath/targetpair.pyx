"""How the two copies of a chunk come to agree (see targetpair.pxd).

A pair agrees block by block: the newer tag whose bytes are good wins, whichever side holds it; a block that neither
side can vouch for is adopted from the primary under a new name, if a crash can have left it so: after a loss of power
anything can be, else both sides have the same bytes of the write that had no tag yet. What has rotted on both sides
stays unknown, which no reader gets. The primary drives it, one chunk at a time per peer.
"""

from libc.stdint cimport int64_t
from libc.string cimport memcmp, memcpy, memset
from datapath.device cimport device_offset
from datapath.disk cimport disk_pread
from datapath.checksum cimport block_seed, crc32c, verify_range
from datapath.chunkstore cimport (chunk_allocate, chunk_discard, chunk_durable, chunk_fd, chunk_find, chunk_forget,
                                  chunk_get, chunk_intent, chunk_missing, chunk_tags, chunk_trim, chunk_write)
from datapath.ondisk cimport SEQ_COUNTER_BITS, SEQ_MASK, SLOT_NONE, Tag
from datapath.tags cimport (
    tag_check, tag_is_hole, tag_is_lost, tag_is_unknown, tag_newer, tag_set, tag_set_lost, tag_set_never)
from datapath.targetdurability cimport checkpoint_start, commit_start
from datapath.targetengine cimport (EV_PEER_SYNCED, EV_REPAIRED, apply, emit, map_miss, op_settle, replication_id,
                                    send_body, send_head, volume_commit)
from datapath.targetlearn cimport LEARN_REQUEST, learn_answer, learn_stop, learner_confirmed
from datapath.targetlease cimport lease_answered, peer_heard
from datapath.targetlost cimport agreement_failed, ask_alone, device_lost
from datapath.targetmembers cimport entry_of, opened
from datapath.targetops cimport op_undo, ops_forget_told, ops_tell, ops_tell_all, ops_told_back
from datapath.targetrepair cimport check_answer
from datapath.targetstate cimport *
from datapath.targetunsure cimport missing_both
from datapath.volumemap cimport MapEntry, MapVolume, map_volume_find
from datapath.wire cimport *

cdef enum:
    ASK_AGAIN_NS = 1000000000
    RETRY_NS = 200000000             # a chunk whose agreement failed (a full or failed disk) is tried again after this
    WORDS_MAX = 4096                 # chunks of which the primary is asked whether they may be served, at a time


cdef void unsync(Engine* e, Chunk* c) noexcept nogil:
    c.told = c.waits = False
    c.doubtful = c.doubtful or chunk_missing(e, c)
    if not c.unsynced:
        c.unsynced = True
        e.unsynced_count += 1
        if c.learn != LEARN_NOT:
            learn_stop(e, c)                               # what it agrees on is not forwarded


cdef void unsync_told(Engine* e, Chunk* c) noexcept nogil:
    if not c.unsynced:
        unsync(e, c)
        c.told = True


cdef void agreed(Engine* e, Chunk* c) noexcept nogil:
    c.doubtful = c.peer_doubtful = c.untold = c.bad = c.alone = c.told = c.waits = False
    c.failures = c.told_by = 0
    c.full = False
    c.gone = False
    c.certain = e.unsure
    if c.unsynced:
        c.unsynced = False
        e.unsynced_count -= 1


cdef void ask(Engine* e, Conn* c, int opcode, uint64_t volume_id, uint32_t index, uint32_t offset, uint32_t length,
              uint32_t flags) noexcept nogil:
    cdef const MapEntry* entry = entry_of(e, volume_id, index)
    cdef Header h
    memset(&h, 0, sizeof(h))
    h.opcode = opcode
    h.volume_id = volume_id
    h.chunk_index = index
    h.offset = offset
    h.length = length
    h.flags = flags
    h.incarnation = e.incarnation
    h.epoch = 0 if entry == NULL else entry.epoch
    send_head(e, c, &h)


cdef void sync_begin(Engine* e, Conn* c) noexcept nogil:
    memset(&e.syncs[c.id & (CONNS_MAX - 1)], 0, sizeof(Sync))
    ops_forget_told(e, c)
    ask(e, c, OP_DIRTY, 0, 0, 0, 0, 0)


cdef void peer_lost(Engine* e, Conn* c) noexcept nogil:
    """Writes that it has not confirmed stay. It may have applied and shown them: those that are not applied here yet
    are, before anybody can go on without it."""
    cdef uint32_t i
    cdef uint32_t sds_id = (<Session*>c.user).node_id
    cdef Op* op
    cdef bint waits
    for i in range(e.op_count):
        op = e.ops[i]
        if op.chunk == NULL:
            continue
        waits = op.pending & PENDING_REMOTE and op.remote_id == sds_id
        if op.kind == KIND_CHECK:
            if waits:
                op_settle(e, op, PENDING_REMOTE, ST_OK)
            continue
        if waits or (op.pending & PENDING_LEARNER and op.learner_id == sds_id and is_secondary(e, op.chunk, sds_id)):
            unsync(e, op.chunk)
        if waits and op.state == STATE_REMOTE_FIRST:
            op.chunk.untold = op.chunk.untold or op.chunk.live_blocks == 0
            apply(e, op)


cdef bint is_secondary(Engine* e, Chunk* chunk, uint32_t sds_id) noexcept nogil:
    cdef const MapEntry* entry = entry_of(e, chunk.volume_id, chunk.index)
    return entry != NULL and entry.secondary == sds_id


cdef bint intent_durable(Engine* e, Chunk* chunk) noexcept nogil:
    """Whether the agreement may write to the chunk; if not, that is under way and sync_continue is called after it."""
    if chunk.slot == SLOT_NONE:
        return True
    if chunk_intent(e, chunk) < 0:
        e.intents_awaited = True
        if e.devices[chunk.device].d.failed == 0:
            checkpoint_start(e)
        return False
    if not chunk_durable(e, chunk):
        e.intents_awaited = True
        commit_start(e, &e.devices[chunk.device])
        return False
    return True


cdef uint32_t epoch_of(Engine* e, Chunk* chunk) noexcept nogil:
    cdef const MapEntry* entry = entry_of(e, chunk.volume_id, chunk.index)
    return 0 if entry == NULL else entry.epoch


cdef void sync_continue(Engine* e) noexcept nogil:
    cdef uint32_t i, asked = 0
    cdef Chunk* chunk
    e.intents_awaited = False
    if e.unsynced_count == 0:
        return
    for i in range(e.table_capacity):
        chunk = e.table[i]
        while chunk != NULL:
            if chunk.unsynced and chunk.retry_ns <= e.now_ns:
                look(e, chunk, i, &asked)
            chunk = chunk.hash_next


cdef void sync_next(Engine* e, Sync* s) noexcept nogil:
    """Another chunk for this peer, from the place of the last one on: there may be very many."""
    cdef uint32_t i, at, asked = 0
    cdef Chunk* chunk
    for i in range(e.table_capacity if e.unsynced_count else 0):
        at = (s.place + i) & (e.table_capacity - 1)
        chunk = e.table[at]
        while chunk != NULL:
            if chunk.unsynced and chunk.retry_ns <= e.now_ns:
                look(e, chunk, at, &asked)
                if s.chunk != NULL:
                    return
            chunk = chunk.hash_next


cdef void look(Engine* e, Chunk* chunk, uint32_t place, uint32_t* asked) noexcept nogil:
    """Begins what is to be done now about a chunk that may differ."""
    cdef MapVolume* v = map_volume_find(&e.map, chunk.volume_id)
    cdef const MapEntry* entry = entry_of(e, chunk.volume_id, chunk.index)
    cdef Peer* p
    cdef Sync* s
    if v != NULL and v.user != NULL and (<TargetVolume*>v.user).dropped:
        return                                             # its slots are given back, or already were
    if entry == NULL:
        map_miss(e, chunk.volume_id, chunk.index >> 10)
    elif entry.primary == e.sds_id:
        p = e.peers[entry.secondary]
        if entry.secondary == 0:
            adopt_alone(e, chunk)
        elif p != NULL and peer_ready(p.out) and chunk.alone:
            ask_alone(e, p.out, chunk)
        elif p != NULL and peer_ready(p.out) and opened(e, entry, chunk):
            s = &e.syncs[p.out.id & (CONNS_MAX - 1)]
            if s.chunk == NULL and intent_durable(e, chunk):
                s.chunk = chunk
                s.place = place
                s.outstanding = 1
                s.failed = s.refused = s.own = s.postponed = False
                ask(e, p.out, OP_TAGS, chunk.volume_id, chunk.index, 0, 0, 0)
    elif entry.secondary == e.sds_id and asked[0] < WORDS_MAX:
        # The primary's list may have come after its word that the two agree, on another connection; or our map after
        # its word that whoever left serves no more.
        p = e.peers[entry.primary]
        asked[0] += 1
        if (chunk.retry_ns or chunk.waits) and p != NULL and peer_ready(p.out) and peer_ready(p.incoming):
            ask(e, p.out, OP_REPAIR, chunk.volume_id, chunk.index, 0, CHUNK_SIZE,
                FLAG_ABSENT if chunk.doubtful else 0)
        chunk.retry_ns = e.now_ns + (5 if chunk.doubtful else 1) * ASK_AGAIN_NS
    elif entry.secondary != e.sds_id and entry.learner != e.sds_id and chunk.slot == SLOT_NONE:
        agreed(e, chunk)                                   # told of by a peer that has it with somebody else


cdef bint local_good(Engine* e, Chunk* chunk, Tag* tag, uint32_t block, char* bytes) noexcept nogil:
    """Reads the block; whether it is what its tag says."""
    if tag_is_unknown(tag):
        return False
    if chunk.slot == SLOT_NONE:
        memset(bytes, 0, BLOCK_SIZE)
        return True
    if disk_pread(chunk_fd(e, chunk), bytes, BLOCK_SIZE,
                  <int64_t>device_offset(chunk.slot) + (<int64_t>block << BLOCK_SHIFT)) != BLOCK_SIZE:
        return False
    return crc32c(block_seed(chunk.volume_id, chunk.index, block), bytes, BLOCK_SIZE) == tag_check(tag)


cdef void push_head(Engine* e, Conn* c, uint64_t request_id, const Chunk* chunk, uint32_t first, uint32_t count,
                    const Tag* tags) noexcept nogil:
    cdef Header h
    memset(&h, 0, sizeof(h))
    h.opcode = OP_PUSH
    h.request_id = request_id
    h.volume_id = chunk.volume_id
    h.chunk_index = chunk.index
    h.offset = first << BLOCK_SHIFT
    h.length = count << BLOCK_SHIFT
    h.flags = FLAG_RESYNC
    h.body_length = 20 * count + h.length
    h.epoch = tags.epoch
    h.seq = tags.seq
    h.incarnation = e.incarnation
    send_head(e, c, &h)


cdef void push_block(Engine* e, Conn* c, Sync* s, Chunk* chunk, uint32_t block, Tag* tag, char* bytes) noexcept nogil:
    cdef uint32_t check = tag_check(tag)
    push_head(e, c, 0, chunk, block, 1, tag)
    send_body(e, c, &check, 4)
    send_body(e, c, tag, 16)
    send_body(e, c, bytes, BLOCK_SIZE)
    s.outstanding += 1
    s.pushed += 1


cdef bint adopt(Engine* e, Chunk* chunk, uint32_t block, Tag* adopted, char* bytes) noexcept nogil:
    """Gives a block that nobody can vouch for, as it is on the disk here, a new name."""
    cdef uint32_t check
    if disk_pread(chunk_fd(e, chunk), bytes, BLOCK_SIZE,
                  <int64_t>device_offset(chunk.slot) + (<int64_t>block << BLOCK_SHIFT)) != BLOCK_SIZE:
        return False
    e.counter += 1
    check = crc32c(block_seed(chunk.volume_id, chunk.index, block), bytes, BLOCK_SIZE)
    tag_set(adopted, check, epoch_of(e, chunk), (e.incarnation << SEQ_COUNTER_BITS) | e.counter)
    return chunk_write(e, chunk, block, 1, bytes, &check, adopted.epoch, adopted.seq) == 0


cdef void adopt_alone(Engine* e, Chunk* chunk) noexcept nogil:
    """The only member has restarted: what it has is what there is. Who has not restarted has no such block but rot."""
    cdef Tag adopted
    cdef uint32_t block
    if chunk_missing(e, chunk):
        missing_both(e, chunk)
        return
    if device_lost(e, chunk) or not chunk.doubtful:        # there is nothing to wait for
        agreed(e, chunk)                                   # what has rotted is nothing to be adopted
        return
    if not intent_durable(e, chunk):
        return
    if chunk.slot != SLOT_NONE:
        for block in range(CHUNK_BLOCKS):
            if (tag_is_unknown(chunk_tags(e, chunk) + block) and not tag_is_lost(chunk_tags(e, chunk) + block)
                    and not adopt(e, chunk, block, &adopted, e.scratch)):
                chunk.retry_ns = e.now_ns + RETRY_NS
                return
    agreed(e, chunk)


cdef bint give_up(Engine* e, Chunk* chunk) noexcept nogil:
    """The other copy has nothing, and that is what everybody was shown. It may have no room for ours either: first
    writes that it was sent and never got are sent again by the client, and then refused or not."""
    cdef Op* op = chunk.ops
    while op != NULL:
        if op.pending & PENDING_REMOTE:
            op.status = op.status or ST_NOT_READY
            op_undo(e, op)
        op = op.next
    e.counter += 1
    return chunk_discard(e, chunk, 0, CHUNK_BLOCKS, epoch_of(e, chunk),
                         (e.incarnation << SEQ_COUNTER_BITS) | e.counter) == 0


cdef void compare(Engine* e, Conn* c, Sync* s, Chunk* chunk, Tag* theirs, bint missing) noexcept nogil:
    """Tag by tag. A copy that has not restarted has everything that anybody was shown: it wins over one that has. Else
    the newer block wins; one that nobody can vouch for is adopted from here. `missing`: that there is nothing says
    nothing; ours wins if it is good."""
    cdef Tag never[2]
    cdef Tag adopted
    cdef Tag* mine
    cdef Tag* other
    cdef uint32_t block
    cdef char* bytes = e.scratch
    cdef bint good, take
    cdef bint push_all = chunk.peer_doubtful and not chunk.doubtful
    cdef bint pull_all = chunk.doubtful and not chunk.peer_doubtful
    cdef uint64_t pushed = s.pushed
    if theirs == NULL and chunk.slot == SLOT_NONE:
        return
    if theirs == NULL and not missing and (pull_all or (chunk.untold and not push_all)):
        s.failed = s.own = not give_up(e, chunk)
        return
    for block in range(CHUNK_BLOCKS):
        tag_set_never(&never[0], chunk.volume_id, chunk.index, block)
        mine = &never[0] if chunk.slot == SLOT_NONE else chunk_tags(e, chunk) + block
        tag_set_lost(&never[1], chunk.volume_id, chunk.index, block)
        other = &never[missing] if theirs == NULL else theirs + block
        if memcmp(mine, other, 16) == 0 and not tag_is_unknown(mine):
            continue
        good = local_good(e, chunk, mine, block, bytes)
        take = not tag_is_unknown(other) and (pull_all or (tag_newer(other.epoch, other.seq, mine) and not push_all))
        if good and not take:
            push_block(e, c, s, chunk, block, mine, bytes)
        elif theirs != NULL and (not tag_is_unknown(other) or not power_lost(e)):
            ask(e, c, OP_PULL, chunk.volume_id, chunk.index, block << BLOCK_SHIFT, BLOCK_SIZE, 0)
            s.outstanding += 1
            s.pulled += 1
        elif chunk.slot != SLOT_NONE:
            # Who has not restarted since it was written knows what it cannot vouch for to have rotted.
            if tag_is_lost(mine) or (missing and not (chunk.doubtful and power_lost(e))):
                unrepairable(e, chunk, block)
            elif adopt(e, chunk, block, &adopted, bytes):
                push_block(e, c, s, chunk, block, &adopted, bytes)
            else:
                s.failed = s.own = True
    if missing and s.pushed == pushed:                     # not one is good: the other one would take it for empty
        s.failed = True


cdef void tags_seen(Engine* e, Conn* c, Sync* s, Tag* theirs, bint missing) noexcept nogil:
    s.chunk.peer_doubtful = s.chunk.peer_doubtful or missing
    if not s.chunk.unsynced:                               # its volume was purged meanwhile: it gets no slot again
        s.failed = True
    elif missing and chunk_missing(e, s.chunk):
        missing_both(e, s.chunk)
        s.failed = s.own = s.refused = True                # by both, so nobody is blamed
    elif theirs != NULL and chunk_allocate(e, s.chunk, epoch_of(e, s.chunk)) < 0:
        s.failed = s.own = True
    elif not intent_durable(e, s.chunk):
        s.postponed = True
    else:
        compare(e, c, s, s.chunk, theirs, missing)


cdef void unrepairable(Engine* e, Chunk* chunk, uint32_t block) noexcept nogil:
    e.counters.blocks_unrepairable += 1
    emit(e, EV_REPAIRED, chunk.index, chunk.volume_id, <uint64_t>block << 32, 1, NULL, 0)


cdef inline bint power_lost(const Engine* e) noexcept nogil:
    """Perhaps: this is the first start since then (or since a device failed)."""
    return e.incarnation == e.durable_incarnation


cdef void bad_there(Engine* e, Conn* c, Sync* s, Chunk* chunk, uint32_t block, const char* theirs) noexcept nogil:
    """What does not match its tag never wins. When ours does not either, nobody reads the block until it is written,
    unless it is the same."""
    cdef Tag* mine = chunk_tags(e, chunk) + block
    cdef Tag adopted
    e.counters.checksum_errors += 1
    if local_good(e, chunk, mine, block, e.scratch):
        push_block(e, c, s, chunk, block, mine, e.scratch)
        return
    if (not tag_is_lost(mine) and disk_pread(chunk_fd(e, chunk), e.scratch, BLOCK_SIZE,
                                             <int64_t>device_offset(chunk.slot) + (<int64_t>block << BLOCK_SHIFT))
            == BLOCK_SIZE and memcmp(e.scratch, theirs, BLOCK_SIZE) == 0
            and adopt(e, chunk, block, &adopted, e.scratch)):
        push_block(e, c, s, chunk, block, &adopted, e.scratch)
        return
    unrepairable(e, chunk, block)


cdef bint pulled(Engine* e, Conn* c, Sync* s, Header* h, char* body) noexcept nogil:
    """Whether the block is here now as the other copy has it, or it has no good one."""
    cdef Chunk* chunk = s.chunk
    cdef Tag* tag = <Tag*>(body + 4)
    cdef uint32_t block = h.offset >> BLOCK_SHIFT
    cdef int error
    if chunk.slot == SLOT_NONE:                            # purged meanwhile, or an answer to what was not asked
        return False
    if h.status != ST_OK or h.length != BLOCK_SIZE or h.flags & (FLAG_ZEROS | FLAG_ABSENT):
        return False
    if verify_range(h.volume_id, h.chunk_index, h.offset, h.length, body + 20, <uint32_t*>body) >= 0:
        return False                                       # damaged on its way
    if tag_is_unknown(tag):
        bad_there(e, c, s, chunk, block, body + 20)
        return True
    if tag_is_hole(tag):
        error = chunk_discard(e, chunk, block, 1, tag.epoch, tag.seq & SEQ_MASK)
    else:
        error = chunk_write(e, chunk, block, 1, body + 20, <uint32_t*>body, tag.epoch, tag.seq & SEQ_MASK)
    s.own = s.own or error < 0
    return error == 0


cdef void sync_step(Engine* e, Conn* c, Sync* s) noexcept nogil:
    """One answer less to wait for; after the last the chunk agrees, or is tried again later if one was a refusal."""
    cdef Chunk* chunk = s.chunk
    cdef Op* op
    cdef Op* following
    cdef uint32_t confirmed
    s.outstanding -= 1
    if s.outstanding:
        return
    s.chunk = NULL
    if s.failed or s.postponed:
        chunk.retry_ns = e.now_ns + RETRY_NS if s.failed else 0
        if s.failed:
            agreement_failed(e, c, chunk, s)
        sync_next(e, s)
        return
    s.chunks += 1
    chunk.retry_ns = 0
    agreed(e, chunk)
    ops_tell(e, c, chunk)
    ask(e, c, OP_PING, chunk.volume_id, chunk.index, 0, 0, FLAG_RESYNC | FLAG_ABSENT)
    op = chunk.ops
    while op != NULL:
        following = op.next
        confirmed = 0
        if op.pending & PENDING_REMOTE and op.remote_id == (<Session*>c.user).node_id:
            confirmed |= PENDING_REMOTE
        if op.pending & PENDING_LEARNER and op.learner_id == (<Session*>c.user).node_id:
            confirmed |= PENDING_LEARNER
        if confirmed and op.state == STATE_RUNNING:
            # The other copy has it now, but maybe not on its disk: who wanted that sends again.
            op_settle(e, op, confirmed, ST_NOT_READY if op.h.flags & FLAG_COMMIT or
                      volume_commit(e, chunk.volume_id) else ST_OK)
            following = chunk.ops                          # the list may have changed: from the start
        op = following
    chunk_trim(e, chunk, False)
    chunk_forget(e, chunk)
    sync_next(e, s)
    if s.chunk == NULL:
        emit(e, EV_PEER_SYNCED, (<Session*>c.user).node_id, s.chunks, s.pulled, s.pushed, NULL, 0)


cdef bint elsewhere(Engine* e, uint64_t volume_id, uint32_t index, uint32_t sds_id) noexcept nogil:
    """Whether we lead the chunk, and the SDS counts for nothing in it."""
    cdef const MapEntry* entry = entry_of(e, volume_id, index)
    cdef Chunk* chunk
    if entry == NULL or entry.primary != e.sds_id or entry.secondary == sds_id:
        return False
    chunk = chunk_find(e, volume_id, index)
    return chunk == NULL or entry.learner != sds_id or chunk.learn < LEARN_TOLD


cdef void dirty_list(Engine* e, Conn* c, Header* h, char* body) noexcept nogil:
    cdef uint64_t volume_id
    cdef uint32_t index, i
    cdef Chunk* chunk
    for i in range(h.body_length // 16):
        memcpy(&volume_id, body + 16 * i, 8)
        memcpy(&index, body + 16 * i + 8, 4)
        chunk = NULL if elsewhere(e, volume_id, index, (<Session*>c.user).node_id) else chunk_get(e, volume_id, index)
        if chunk != NULL:
            unsync_told(e, chunk)
            chunk.peer_doubtful = body[16 * i + 12] != 0
            intent_durable(e, chunk)                       # all of them in one commit
    if h.flags & FLAG_REPLY_MORE:
        ask(e, c, OP_DIRTY, 0, 0, h.offset, 0, 0)
        return
    (<Session*>c.user).ready = True
    if e.peers[(<Session*>c.user).node_id] != NULL:
        e.peers[(<Session*>c.user).node_id].agreed_as_primary = True
    ops_tell_all(e, c)
    ask(e, c, OP_PING, 0, 0, 0, 0, FLAG_RESYNC)
    sync_continue(e)


cdef int secondary_answer(Engine* e, Conn* c, Header* h, char* body) noexcept nogil:
    cdef Sync* s = &e.syncs[c.id & (CONNS_MAX - 1)]
    cdef uint32_t at, waits
    cdef uint32_t sds_id = (<Session*>c.user).node_id
    cdef Op* op
    if h.opcode != (OP_PING | OP_REPLY):
        peer_heard(e, c)
    if h.request_id & LEARN_REQUEST:
        return learn_answer(e, c, h, body)
    if (h.opcode == (OP_REPLICATE | OP_REPLY) or h.opcode == (OP_REPLICATE_DISCARD | OP_REPLY)
            or (h.opcode == (OP_PING | OP_REPLY) and h.request_id)):
        at = <uint32_t>h.request_id
        if at >= e.op_count or replication_id(e.ops[at]) != h.request_id or e.ops[at].chunk == NULL:
            return 0                                       # settled meanwhile by the pair's agreement
        op = e.ops[at]
        waits = PENDING_REMOTE if op.pending & PENDING_REMOTE and op.remote_id == sds_id else 0
        if op.pending & PENDING_LEARNER and op.learner_id == sds_id:
            waits = PENDING_LEARNER
            if h.status == ST_OK or not is_secondary(e, op.chunk, sds_id):
                learner_confirmed(e, op, h.status)
                return 0
        if not waits:
            return 0
        if h.status != ST_OK and op.state != STATE_REMOTE_FIRST and not is_secondary(e, op.chunk, sds_id):
            e.gated = True                                 # it is out, and has heard of that first
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
            s.failed = s.failed or s.chunk == op.chunk     # also when its agreement has looked already
            op.full += h.status == ST_NO_SPACE
        op_settle(e, op, waits, h.status)
        return 0
    if h.opcode == (OP_DIRTY | OP_REPLY):
        if h.status != ST_OK:
            return BAD_STATUS                              # without the list there is no pair: a new session asks again
        dirty_list(e, c, h, body)
        return 0
    if h.opcode == (OP_PING | OP_REPLY) and h.op_id:
        if h.volume_id:
            ops_told_back(e, c, h)
        else:
            lease_answered(e, c, h)
        return 0
    if h.opcode == (OP_PING | OP_REPLY) or h.opcode == (OP_REPAIR | OP_REPLY):
        return 0
    if h.request_id and (h.opcode == (OP_VERIFY | OP_REPLY) or h.opcode == (OP_PULL | OP_REPLY)
                         or h.opcode == (OP_PUSH | OP_REPLY)):
        return check_answer(e, c, h, body)
    if s.chunk == NULL or h.volume_id != s.chunk.volume_id or h.chunk_index != s.chunk.index:
        return BAD_OPCODE
    s.refused = s.refused or h.status == ST_IO_ERROR or h.status == ST_NO_SPACE
    if h.opcode == (OP_PULL | OP_REPLY):
        s.failed = s.failed or not pulled(e, c, s, h, body)
    elif h.opcode != (OP_TAGS | OP_REPLY) and h.opcode != (OP_PUSH | OP_REPLY):
        return BAD_OPCODE
    elif h.status != ST_OK:
        s.failed = True
    elif h.opcode == (OP_TAGS | OP_REPLY):
        tags_seen(e, c, s, NULL if h.flags & FLAG_ABSENT else <Tag*>body,
                  h.flags & (FLAG_ABSENT | FLAG_RESYNC) == FLAG_ABSENT | FLAG_RESYNC)
    sync_step(e, c, s)
    return 0
