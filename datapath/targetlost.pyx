"""When a disk fails below a chunk that has another copy (see targetlost.pxd, docs/internals/failover.md).

Nobody can bring such a copy back here, so it leaves the set: this SDS asks that the other member goes on alone, or, as
a primary whose secondary's disk refuses, that it does so itself. Until then clients wait. Promises: a chunk is given
over only to a member that this SDS is connected with and that has everything (it has not restarted without comparing
since), and not before earlier members that left serve no more; who is alone keeps the chunk and says IO_ERROR.
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from datapath.chunkstore cimport chunk_durable
from datapath.ondisk cimport SLOT_NONE
from datapath.targetengine cimport EV_COPY_REFUSED, EV_LOST, emit
from datapath.targetmembers cimport entry_of, opened
from datapath.targetpair cimport peer_ready
from datapath.targetstate cimport *
from datapath.volumemap cimport MapEntry, MapVolume, map_volume_find
from datapath.wire cimport ST_IO_ERROR, ST_NOT_READY, ST_OK

cdef enum:
    FAILURES_MAX = 5                 # with the pauses between them: a second
    AGAIN_NS = 1000000000


cdef bint device_lost(Engine* e, const Chunk* chunk) noexcept nogil:
    cdef uint32_t i
    if e.devices[chunk.device].d.failed and (chunk.slot != SLOT_NONE or not chunk_durable(e, <Chunk*>chunk)):
        return True
    if chunk.slot != SLOT_NONE:
        return False
    for i in range(e.device_count):
        if e.devices[i].d.failed == 0:
            return False
    return True


cdef bint chunk_lost(Engine* e, const Chunk* chunk) noexcept nogil:
    return chunk.bad or device_lost(e, chunk)


cdef uint32_t lost_status(Engine* e, Chunk* chunk) noexcept nogil:
    cdef const MapEntry* entry = entry_of(e, chunk.volume_id, chunk.index)
    e.lost = True
    return ST_IO_ERROR if entry != NULL and entry.primary == e.sds_id and entry.secondary == 0 else ST_NOT_READY


cdef uint32_t block_lost(Engine* e, Chunk* chunk) noexcept nogil:
    cdef uint32_t status = lost_status(e, chunk)
    chunk.bad = status == ST_NOT_READY
    return status


cdef uint32_t flush_status(Engine* e, uint64_t volume_id, uint32_t asker) noexcept nogil:
    cdef uint32_t i, status = ST_OK
    cdef Chunk* c
    cdef const MapEntry* entry
    if not e.lost:
        return ST_OK
    for i in range(e.table_capacity):
        c = e.table[i]
        while c != NULL:
            if (c.volume_id == volume_id or volume_id == 0) and device_lost(e, c):
                entry = entry_of(e, c.volume_id, c.index)
                if volume_id == 0:                         # of what this primary has sent us, nothing else
                    if (entry != NULL and entry.primary == asker
                            and (entry.secondary == e.sds_id or entry.learner == e.sds_id)):
                        return ST_IO_ERROR
                elif entry == NULL or entry.secondary == e.sds_id or (entry.primary == e.sds_id and entry.secondary):
                    status = ST_NOT_READY
                elif entry.primary == e.sds_id:
                    return ST_IO_ERROR
            c = c.hash_next
    return status


cdef void agreement_failed(Engine* e, Conn* c, Chunk* chunk, const Sync* s) noexcept nogil:
    cdef Op* op = chunk.ops
    if s.refused == s.own:                                 # neither, or each has something that the other cannot take
        return
    chunk.failures += 1
    if chunk.failures < FAILURES_MAX:
        return
    if not s.refused:
        block_lost(e, chunk)
        return
    while op != NULL and op.state != STATE_REMOTE_FIRST:   # it may show what is not here yet
        op = op.next
    if op == NULL and not chunk.doubtful:
        chunk.alone = True
        ask_alone(e, c, chunk)


cdef void ask_alone(Engine* e, Conn* c, Chunk* chunk) noexcept nogil:
    cdef uint64_t pair[2]
    pair[0] = chunk.volume_id
    pair[1] = chunk.index
    chunk.retry_ns = e.now_ns + AGAIN_NS
    emit(e, EV_COPY_REFUSED, (<Session*>c.user).node_id, 0, 0, 0, pair, sizeof(pair))


cdef Conn* taker(Engine* e, const Chunk* chunk, const MapEntry* entry) noexcept nogil:
    """The connection with the member that may go on without us, NULL when there is none now."""
    cdef Peer* p
    cdef bint leads = entry.primary == e.sds_id
    cdef uint16_t other = entry.secondary if leads else entry.primary
    if not other or (not leads and entry.secondary != e.sds_id and entry.learner != e.sds_id):
        return NULL
    p = e.peers[other]
    if p == NULL or not peer_ready(p.out) or (chunk.peer_doubtful and entry.learner != e.sds_id):
        return NULL
    if leads and not opened(e, entry, chunk):
        return NULL
    return p.out


cdef void lost_tell(Engine* e) noexcept nogil:
    cdef uint32_t i, count = 0
    cdef uint64_t* found = <uint64_t*>malloc(32 * <size_t>e.chunk_count + 32)
    cdef Chunk* c
    cdef Conn* other
    cdef MapVolume* v
    cdef const MapEntry* entry
    if found == NULL:
        return                                             # the next tick has memory
    e.lost = False
    for i in range(e.table_capacity):
        c = e.table[i]
        while c != NULL:
            if chunk_lost(e, c):
                e.lost = True
                v = map_volume_find(&e.map, c.volume_id)
                entry = entry_of(e, c.volume_id, c.index)
                other = NULL
                if entry != NULL and v.user != NULL and not (<TargetVolume*>v.user).dropped:
                    other = taker(e, c, entry)
                if other != NULL:
                    found[4 * count] = c.volume_id
                    found[4 * count + 1] = c.index
                    found[4 * count + 2] = (<Session*>other.user).node_id
                    found[4 * count + 3] = (<Session*>other.user).incarnation
                    count += 1
            c = c.hash_next
    if count:
        emit(e, EV_LOST, 0, 0, 0, 0, found, 32 * <uint64_t>count)
    free(found)
