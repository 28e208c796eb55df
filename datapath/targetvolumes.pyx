"""What the SDS engine knows of volumes: sizes and maps, what it holds of each, purging (see targetvolumes.pxd)."""

from libc.errno cimport EAGAIN, EBUSY
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset
from datapath.device cimport device_slot_free
from datapath.ondisk cimport SLOT_NONE
from datapath.ring cimport Message
from datapath.targetdurability cimport checkpoint_start
from datapath.targetengine cimport EV_PURGED, EV_VOLUMES, emit, map_miss, op_settle
from datapath.targetlearn cimport learn_forget
from datapath.targetmembers cimport entry_changed
from datapath.targetpair cimport agreed, sync_continue
from datapath.targetstate cimport *
from datapath.volumemap cimport (MAP_SEGMENT_CHUNKS, MAP_SEGMENT_SIZE, MapEntry, MapVolume, map_lookup,
                                 map_segment_set, map_volume_add, map_volume_find, map_volume_remove)
from datapath.wire cimport ST_NO_VOLUME


cdef TargetVolume* volume_get(Engine* e, uint64_t volume_id) noexcept nogil:
    cdef MapVolume* v = map_volume_add(&e.map, volume_id)
    cdef uint32_t i
    cdef Chunk* c
    if v == NULL:
        return NULL
    if v.user == NULL:
        v.user = calloc(1, sizeof(TargetVolume))
        if v.user != NULL:
            for i in range(e.table_capacity):
                c = e.table[i]
                while c != NULL:
                    (<TargetVolume*>v.user).slots += c.volume_id == volume_id and c.slot != SLOT_NONE
                    c = c.hash_next
    return <TargetVolume*>v.user


cdef void misses_answered(Engine* e, uint64_t volume_id, int64_t segment) noexcept nogil:
    """The map's segment is known now, or will never be (-1: all of the volume): it may be asked for again."""
    cdef uint32_t i = 0
    while i < e.miss_count:
        if e.miss_volume[i] == volume_id and (segment < 0 or e.miss_segment[i] == segment):
            e.miss_count -= 1
            e.miss_volume[i] = e.miss_volume[e.miss_count]
            e.miss_segment[i] = e.miss_segment[e.miss_count]
        else:
            i += 1


cdef void segment(Engine* e, Message* m) noexcept nogil:
    cdef MapEntry* entries = <MapEntry*>e.scratch
    if volume_get(e, m.b) != NULL and m.size <= MAP_SEGMENT_SIZE:
        memset(entries, 0, MAP_SEGMENT_SIZE)
        memcpy(entries, m.data, m.size)
        merge(e, map_volume_find(&e.map, m.b), m.a, entries, m.c)
    misses_answered(e, m.b, m.a)
    sync_continue(e)


cdef void merge(Engine* e, MapVolume* v, uint32_t index, MapEntry* entries, uint64_t version) noexcept nogil:
    """Takes the entries that are newer than what is known: answers and pushes may cross each other."""
    cdef uint32_t first = index * MAP_SEGMENT_CHUNKS
    cdef MapEntry* before = entries + MAP_SEGMENT_CHUNKS
    cdef const MapEntry* known
    cdef uint32_t i
    memset(before, 0, MAP_SEGMENT_SIZE)
    known = map_lookup(v, first)
    if known != NULL:
        memcpy(before, known, MAP_SEGMENT_SIZE)
        for i in range(MAP_SEGMENT_CHUNKS):
            if before[i].epoch >= entries[i].epoch:
                entries[i] = before[i]
    if map_segment_set(v, index, entries, MAP_SEGMENT_SIZE) < 0:
        return
    for i in range(MAP_SEGMENT_CHUNKS):
        if entries[i].epoch > before[i].epoch:
            entry_changed(e, v.volume_id, first + i, before + i, entries + i, version)


cdef bint forget_chunks(Engine* e, uint64_t volume_id) noexcept nogil:
    """Frees a purged volume's chunks. False when an operation or an agreement still holds one."""
    cdef uint32_t i, at
    cdef Chunk** link
    cdef Chunk* c
    for i in range(CONNS_MAX):
        if e.syncs[i].chunk != NULL and e.syncs[i].chunk.volume_id == volume_id:
            return False
    for at in range(e.table_capacity):
        link = &e.table[at]
        while link[0] != NULL:
            c = link[0]
            if c.volume_id != volume_id:
                link = &c.hash_next
            elif c.ops != NULL:
                return False
            else:
                link[0] = c.hash_next
                e.chunk_count -= 1
                free(c)
    return True


cdef void settle_purged(Engine* e, Chunk* c) noexcept nogil:
    """Ends what waits for the other copy: a chunk whose volume is gone will not agree with it again."""
    cdef Op* op = c.ops
    while op != NULL:
        if op.pending & (PENDING_REMOTE | PENDING_LEARNER):
            op_settle(e, op, PENDING_REMOTE | PENDING_LEARNER | (
                PENDING_LOCAL if op.state == STATE_REMOTE_FIRST else 0), ST_NO_VOLUME)
            op = c.ops                                     # the list has changed: from the start
        else:
            op = op.next


cdef void purge(Engine* e) noexcept nogil:
    """Gives the slots of purged volumes back, as far as the journal has room; the next tick goes on."""
    cdef uint32_t i, at, left
    cdef int error
    cdef bint full = False
    cdef Chunk* c
    cdef MapVolume* v
    cdef TargetVolume* tv
    e.purging = False
    for i in range(e.map.capacity):
        v = e.map.table[i]
        tv = NULL if v == NULL else <TargetVolume*>v.user
        if tv == NULL or not tv.purge:
            continue
        left = 0
        for at in range(e.table_capacity):
            c = e.table[at]
            while c != NULL:
                if c.volume_id == v.volume_id:
                    learn_forget(e, c)
                    settle_purged(e, c)
                    agreed(e, c)
                    if c.slot != SLOT_NONE:
                        error = -EBUSY if c.ops != NULL else (
                            0 if e.devices[c.device].d.failed else device_slot_free(e.devices[c.device].d, c.slot))
                        if error == 0:
                            c.slot = SLOT_NONE
                            c.generation = 0
                            c.live_blocks = 0
                        else:
                            left += 1
                            full = full or error == -EAGAIN
                c = c.hash_next
        if left:
            e.purging = True
            if full:
                checkpoint_start(e)
            continue
        tv.purge = False
        tv.slots = 0
        if not tv.aged:
            emit(e, EV_PURGED, 0, v.volume_id, 0, 0, NULL, 0)
        if forget_chunks(e, v.volume_id):
            free(tv)
            map_volume_remove(&e.map, v.volume_id)
        e.purging = True                                   # others may have moved in the table: looked at next tick
        return


cdef void forget_dropped(Engine* e) noexcept nogil:
    """Volumes that do not exist and have nothing here are known for a tick or two, for who is just asking."""
    cdef uint32_t i
    cdef TargetVolume* tv
    for i in range(e.map.capacity):
        tv = NULL if e.map.table[i] == NULL else <TargetVolume*>e.map.table[i].user
        if tv != NULL and tv.dropped and tv.slots == 0 and not tv.purge:
            if tv.aged:
                tv.purge = e.purging = True
            tv.aged = True


cdef void volume_report(Engine* e) noexcept nogil:
    """What each volume holds here: id, chunks, blocks, and of these as primary; five numbers each."""
    cdef uint64_t* table = <uint64_t*>calloc(e.map.count + 1024, 40)
    cdef uint32_t i, at, count = 0, capacity = e.map.count + 1024
    cdef Chunk* c
    cdef MapVolume* v
    cdef const MapEntry* entry
    if table == NULL:
        return
    for i in range(e.table_capacity):
        c = e.table[i]
        while c != NULL:
            if c.slot != SLOT_NONE:
                at = 0
                while at < count and table[5 * at] != c.volume_id:
                    at += 1
                if at == count and count < capacity:
                    table[5 * at] = c.volume_id
                    count += 1
                if at < count:
                    table[5 * at + 1] += 1
                    table[5 * at + 2] += c.live_blocks
                    v = map_volume_find(&e.map, c.volume_id)
                    entry = map_lookup(v, c.index) if v != NULL else NULL
                    if entry == NULL and not (v != NULL and v.user != NULL and (<TargetVolume*>v.user).dropped):
                        map_miss(e, c.volume_id, c.index >> 10)
                    elif entry != NULL and entry.primary == e.sds_id:
                        table[5 * at + 3] += 1
                        table[5 * at + 4] += c.live_blocks
            c = c.hash_next
    emit(e, EV_VOLUMES, count, 0, 0, 0, table, count * 40)
    free(table)
