"""Chunks that may have been here (see targetunsure.pxd, docs/internals/integrity.md).

A device whose slot table or journal has rotted beyond repair knows which chunks it has, and not which it had. As long
as that is so, a chunk of ours that is in no slot is *missing*: it is not served, no write is applied to it, and what
others ask about it is answered with "that says nothing". The pair compares it like one whose copy here is doubtful, at
the latest when it is met by the search below: then it is here again, or known never to have been. Promises: what is
missing never reads as zeros, and never wins over another copy; of one that has no other copy IO_ERROR is said.
"""

from libc.stdint cimport uint32_t, uint64_t
from datapath.chunkstore cimport chunk_find, chunk_get, chunk_missing
from datapath.device cimport device_sure
from datapath.targetdurability cimport checkpoint_start
from datapath.targetengine cimport EV_GONE, EV_SURE, emit
from datapath.targetpair cimport ask, peer_ready, unsync
from datapath.targetstate cimport *
from datapath.volumemap cimport MAP_SEGMENT_CHUNKS, MapEntry, MapVolume
from datapath.wire cimport CHUNK_SIZE, FLAG_ABSENT, OP_REPAIR, ST_IO_ERROR, ST_NOT_READY

cdef enum:
    LOOKED_AT_MAX = 16384            # entries of the map, at a tick
    COMPARED_MAX = 256               # at a time, of those that nobody waits for
    ASK_AGAIN_NS = 1000000000
    TELL_AGAIN_NS = 10000000000


cdef void gone_tell(Engine* e, uint64_t volume_id, uint32_t index) noexcept nogil:
    e.counters.chunks_gone += 1
    if e.now_ns >= e.gone_told_ns:
        e.gone_told_ns = e.now_ns + TELL_AGAIN_NS
        emit(e, EV_GONE, index, volume_id, 0, 0, NULL, 0)


cdef uint32_t missing_status(Engine* e, uint64_t volume_id, uint32_t index, const MapEntry* entry) noexcept nogil:
    cdef Chunk* chunk = chunk_find(e, volume_id, index)
    cdef Peer* p
    if (chunk != NULL and chunk.gone) or (entry.primary == e.sds_id and entry.secondary == 0):
        gone_tell(e, volume_id, index)
        return ST_IO_ERROR
    if chunk == NULL:
        chunk = chunk_get(e, volume_id, index)
    if chunk == NULL:
        return ST_NOT_READY
    unsync(e, chunk)
    p = e.peers[entry.primary]
    if entry.primary != e.sds_id and p != NULL and peer_ready(p.out) and chunk.retry_ns <= e.now_ns:
        chunk.retry_ns = e.now_ns + ASK_AGAIN_NS
        ask(e, p.out, OP_REPAIR, volume_id, index, 0, CHUNK_SIZE, FLAG_ABSENT)
    return ST_NOT_READY


cdef void missing_there(Engine* e, uint64_t volume_id, uint32_t index) noexcept nogil:
    cdef Chunk* chunk = chunk_get(e, volume_id, index)
    if chunk != NULL:
        chunk.peer_doubtful = True
        unsync(e, chunk)


cdef void missing_both(Engine* e, Chunk* chunk) noexcept nogil:
    """It waits for nothing any more, until the map says something new of it."""
    chunk.gone = True
    chunk.doubtful = chunk.peer_doubtful = False
    if chunk.unsynced:
        chunk.unsynced = False
        e.unsynced_count -= 1
    gone_tell(e, chunk.volume_id, chunk.index)


cdef uint32_t missing_with(Engine* e, uint32_t sds_id, uint64_t* found) noexcept nogil:
    cdef uint32_t at, segment, i, index, count = 0
    cdef MapVolume* v
    cdef const MapEntry* entry
    for at in range(e.map.capacity):
        v = e.map.table[at]
        if v == NULL or v.user == NULL or (<TargetVolume*>v.user).dropped:
            continue
        for segment in range(v.segment_count):
            if v.segments[segment] == NULL:
                continue
            for i in range(<uint32_t>MAP_SEGMENT_CHUNKS):
                entry = v.segments[segment] + i
                index = segment * MAP_SEGMENT_CHUNKS + i
                if ((entry.primary == e.sds_id and entry.secondary == sds_id
                        or entry.primary == sds_id and entry.secondary == e.sds_id)
                        and chunk_missing(e, chunk_find(e, v.volume_id, index))):
                    if found != NULL:
                        found[2 * count] = v.volume_id
                        found[2 * count + 1] = index
                    count += 1
    return count


cdef void look(Engine* e, MapVolume* v, uint32_t index, const MapEntry* entry) noexcept nogil:
    cdef Chunk* chunk
    cdef bint member = entry.primary == e.sds_id or (entry.primary != 0 and entry.secondary == e.sds_id)
    if not member and (entry.left != e.sds_id or entry.learner != e.sds_id):
        return
    chunk = chunk_find(e, v.volume_id, index)
    if not chunk_missing(e, chunk):
        return
    e.unsure_found += 1
    if not member:
        return                                             # an operator may have it serve: not as if it held nothing
    if (chunk != NULL and chunk.gone) or (entry.primary == e.sds_id and entry.secondary == 0):
        return                                             # said when somebody asks for it
    if e.unsynced_count < COMPARED_MAX or (chunk != NULL and chunk.unsynced):
        missing_status(e, v.volume_id, index, entry)


cdef void settle(Engine* e) noexcept nogil:
    """Every chunk of ours is here, or known not to have been."""
    cdef uint32_t i
    for i in range(e.device_count):
        if device_sure(e.devices[i].d) < 0:
            checkpoint_start(e)                            # its journal was full, or it has failed: the next round
            return
    e.unsure = False
    checkpoint_start(e)                                    # which tells the superblocks
    emit(e, EV_SURE, 0, 0, 0, 0, NULL, 0)


cdef void unsure_tick(Engine* e) noexcept nogil:
    cdef uint32_t _turn
    cdef MapVolume* v
    cdef TargetVolume* tv
    cdef MapEntry* entries
    for _turn in range(<uint32_t>LOOKED_AT_MAX):
        if e.unsure_volume >= e.map.capacity:
            # A round that has not seen all of one and the same map shows nothing.
            if e.unsure_found == 0 and e.unsure_whole and e.maps_whole and e.unsure_generation == e.map.generation:
                settle(e)
            e.unsure_volume = e.unsure_chunk = e.unsure_found = 0
            e.unsure_generation = e.map.generation
            e.unsure_whole = e.maps_whole
            return
        v = e.map.table[e.unsure_volume]
        tv = NULL if v == NULL else <TargetVolume*>v.user
        if tv == NULL or tv.dropped or e.unsure_chunk // MAP_SEGMENT_CHUNKS >= v.segment_count:
            e.unsure_volume += 1
            e.unsure_chunk = 0
            continue
        entries = v.segments[e.unsure_chunk // MAP_SEGMENT_CHUNKS]
        if entries == NULL:
            e.unsure_chunk = (e.unsure_chunk // MAP_SEGMENT_CHUNKS + 1) * MAP_SEGMENT_CHUNKS
            continue
        look(e, v, e.unsure_chunk, entries + e.unsure_chunk % MAP_SEGMENT_CHUNKS)
        e.unsure_chunk += 1
