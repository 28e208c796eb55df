"""What an SDS engine does when the in-sync set of a chunk changes (see targetmembers.pxd, docs/internals/failover.md).

The maps come from the MDM, which has made them durable. Promises: nothing is served, and no write acknowledged, without
a member that has left before what it was granted is over; who is no longer primary answers no write; a copy that the
map does not name is given back only on the word of a map that is at least as new as the copy.
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from datapath.chunkstore cimport chunk_find, chunk_forget, chunk_get, chunk_missing, chunk_release
from datapath.ondisk cimport SLOT_NONE
from datapath.targetengine cimport EV_LEAVING, apply, emit, op_settle
from datapath.targetlearn cimport learn_forget
from datapath.targetlease cimport LEASE_NS, fence, gate_open, leased
from datapath.targetlost cimport chunk_lost
from datapath.targetpair cimport agreed, ask, peer_ready, unsync, unsync_told
from datapath.targetstate cimport *
from datapath.targetunsure cimport missing_with
from datapath.volumemap cimport MAP_ERA_BITS, MapEntry, MapVolume, map_lookup, map_volume_find
from datapath.wire cimport FLAG_RESYNC, OP_PING, ST_OK, ST_STALE_MAP


cdef const MapEntry* entry_of(Engine* e, uint64_t volume_id, uint32_t index) noexcept nogil:
    cdef MapVolume* v = map_volume_find(&e.map, volume_id)
    if v == NULL:
        return NULL
    return map_lookup(v, index)


cdef bint passed(Engine* e, const MapEntry* entry, uint64_t volume_id, uint32_t index) noexcept nogil:
    """The gate of a chunk that we lead. A new secondary does not know when it opens: it is told."""
    cdef Peer* p
    cdef const Chunk* chunk
    if entry.left == 0:
        return True
    if not gate_open(e, entry):
        return False
    p = e.peers[entry.secondary]
    chunk = chunk_find(e, volume_id, index)
    if entry.secondary and p != NULL and peer_ready(p.out) and (chunk == NULL or not chunk.unsynced):
        ask(e, p.out, OP_PING, volume_id, index, 0, 0, FLAG_RESYNC)    # else at the end of the comparison
    return True


cdef bint opened(Engine* e, const MapEntry* entry, const Chunk* chunk) noexcept nogil:
    return (chunk == NULL or chunk.hold_ns <= e.now_ns) and gate_open(e, entry)


cdef bint members_ready(Engine* e, const MapEntry* entry, uint64_t volume_id, uint32_t index,
                        const Chunk* chunk) noexcept nogil:
    cdef Peer* p
    if chunk != NULL and chunk.hold_ns > e.now_ns:
        return False
    if entry.primary != e.sds_id:
        p = e.peers[entry.primary]
        return p != NULL and peer_ready(p.incoming) and leased(e, p)
    if not passed(e, entry, volume_id, index):
        return False
    if entry.secondary == 0:
        return e.now_ns >= e.alone_ns
    p = e.peers[entry.secondary]
    return p != NULL and peer_ready(p.out) and leased(e, p)


cdef void entry_changed(Engine* e, uint64_t volume_id, uint32_t index, const MapEntry* old, const MapEntry* entry,
                        uint64_t version) noexcept nogil:
    cdef Chunk* chunk = chunk_find(e, volume_id, index)
    cdef bint leads = entry.primary == e.sds_id
    cdef bint member = leads or entry.secondary == e.sds_id
    cdef bint joins = leads and old.epoch and entry.secondary and entry.secondary != old.secondary
    cdef bint taught, doubtful
    # Not by an operator's word: it may have learned nothing yet.
    cdef bint taught_us = (e.unsure and member and old.learner == e.sds_id
                           and entry.epoch >> MAP_ERA_BITS == old.epoch >> MAP_ERA_BITS)
    cdef bint certain
    if entry.left and entry.left != e.sds_id and member:
        fence(e, entry.left, version)
    if chunk == NULL and (joins or taught_us or (member and (entry.left or old.left))):
        chunk = chunk_get(e, volume_id, index)
    if chunk == NULL:
        return
    chunk.certain = chunk.certain or taught_us
    chunk.gone = False
    chunk.alone = False
    chunk.failures = 0
    if member and old.left and old.left != entry.left and old.left != e.sds_id and not gate_open(e, old):
        chunk.hold_ns = max(chunk.hold_ns, e.peers[old.left].fence_ns)  # two members have left one after the other
    if member and chunk.waits and old.left != entry.left:  # nor do we know who was granted what by who led
        chunk.hold_ns = max(chunk.hold_ns, e.now_ns + LEASE_NS)
    if not leads and member and entry.left and chunk.open_epoch < entry.epoch:
        unsync_told(e, chunk)                              # the primary says when the one that left serves no more
        chunk.waits = True
        chunk.retry_ns = 0
    if entry.primary != old.primary or entry.secondary != old.secondary:
        chunk.untold = chunk.full = False                  # who is out may have shown it
    taught = chunk.learn == LEARN_TOLD and old.learner == entry.secondary
    learn_forget(e, chunk)
    e.gated = True
    if joins and not taught:                               # by somebody else, or it was lost since: they compare
        unsync(e, chunk)
    if leads:
        if entry.secondary:
            first_writes(e, chunk, entry.secondary)
        if entry.secondary == 0 and chunk.doubtful:
            unsync(e, chunk)                               # forced: it was only a learner when it came back
        elif entry.secondary == 0 and chunk.unsynced:
            agreed(e, chunk)                               # with nobody but itself
        chunk_forget(e, chunk)                             # of those that have only learned that there is nothing
        return
    refuse_writes(e, chunk)
    if entry.secondary == e.sds_id and old.learner == e.sds_id:
        chunk.doubtful = False                             # it was brought up to date
    if entry.secondary != e.sds_id:
        doubtful = chunk.doubtful and entry.learner == e.sds_id
        certain = chunk.certain or entry.learner != e.sds_id
        agreed(e, chunk)
        chunk.doubtful = doubtful                          # an operator may have it serve before it has learned
        chunk.certain = chunk.certain and certain
        e.strays = entry.learner != e.sds_id or e.strays
    elif old.learner == e.sds_id and entry.left == 0:
        agreed(e, chunk)


cdef void first_writes(Engine* e, Chunk* chunk, uint16_t secondary) noexcept nogil:
    """A chunk's first writes, not applied here yet, that were sent to a secondary which is out. It may have shown them:
    they stay, and reach the new secondary by the comparison, before they are answered."""
    cdef Op* op = chunk.ops
    while op != NULL:
        if op.state == STATE_REMOTE_FIRST and op.pending & PENDING_REMOTE and op.remote_id != secondary:
            op.remote_id = secondary
            unsync(e, chunk)
            apply(e, op)                                   # does not end it, the new secondary has not got it
        op = op.next


cdef void refuse_writes(Engine* e, Chunk* chunk) noexcept nogil:
    """Clients' writes that wait for another copy: the new primary will hear of them from the client."""
    cdef Op* op = chunk.ops
    cdef uint32_t waits
    while op != NULL:
        waits = op.pending & (PENDING_REMOTE | PENDING_LEARNER)
        if waits and (op.kind == KIND_WRITE or op.kind == KIND_DISCARD):
            if op.state == STATE_REMOTE_FIRST:
                waits |= PENDING_LOCAL
            op_settle(e, op, waits, ST_STALE_MAP)
            op = chunk.ops                                 # the list may have changed: from the start
        else:
            op = op.next


cdef void release_gated(Engine* e) noexcept nogil:
    cdef uint32_t i, done
    cdef Op* op
    cdef Chunk* chunk
    cdef const MapEntry* entry
    e.gated = False
    for i in range(e.op_count):
        op = e.ops[i]
        chunk = op.chunk
        if chunk == NULL or not op.pending & (PENDING_REMOTE | PENDING_LEARNER):
            continue
        entry = entry_of(e, chunk.volume_id, chunk.index)
        if entry == NULL or entry.primary != e.sds_id:
            continue
        done = 0
        if op.pending & PENDING_REMOTE and op.remote_id != entry.secondary and op.state != STATE_REMOTE_FIRST:
            done |= PENDING_REMOTE
        if (op.pending & PENDING_LEARNER and op.learner_id != entry.secondary
                and (op.learner_id != entry.learner or chunk.learn == LEARN_NOT)):
            done |= PENDING_LEARNER
        if done == 0:
            continue
        if chunk.hold_ns <= e.now_ns and passed(e, entry, chunk.volume_id, chunk.index):
            op_settle(e, op, done, ST_OK)
        else:
            e.gated = True


cdef void tell_leaving(Engine* e, Peer* p) noexcept nogil:
    cdef uint32_t i, count = missing_with(e, p.sds_id, NULL) if e.unsure else 0
    cdef uint64_t* found = <uint64_t*>malloc(16 * (<size_t>e.chunk_count + count) + 16)
    cdef Chunk* c
    cdef bint knows = not e.unsure or e.maps_whole         # else it cannot even name what it may lack
    if found == NULL:
        return                                             # asked again while the trouble lasts
    if e.unsure:
        count = missing_with(e, p.sds_id, found)
    for i in range(e.table_capacity):
        c = e.table[i]
        while c != NULL:
            if (c.doubtful or c.full or chunk_lost(e, c)) and not chunk_missing(e, c):
                found[2 * count] = c.volume_id             # also of others' pairs: the MDM's map may be newer than ours
                found[2 * count + 1] = c.index
                count += 1
            c = c.hash_next
    emit(e, EV_LEAVING, p.sds_id, knows and p.agreed_as_primary, knows and p.agreed_as_secondary, 0, found,
         16 * <uint64_t>count)
    free(found)


cdef void discard_strays(Engine* e) noexcept nogil:
    cdef uint32_t i
    cdef Chunk* c
    cdef const MapEntry* entry
    e.strays = False
    for i in range(e.table_capacity):
        c = e.table[i]
        while c != NULL:
            if c.slot != SLOT_NONE:
                entry = entry_of(e, c.volume_id, c.index)
                if (entry != NULL and entry.primary and entry.primary != e.sds_id and entry.secondary != e.sds_id
                        and entry.learner != e.sds_id
                        and entry.epoch >= e.devices[c.device].d.slots[c.slot].epoch):
                    if c.ops != NULL or not chunk_release(e, c):
                        e.strays = True
            c = c.hash_next
