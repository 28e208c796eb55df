"""The chunks an SDS holds (see chunkstore.pxd): which slot, which intent, and the order of a block's bytes and tag.

The order on disk: intent durable, then bytes, then tag. A crash between them leaves a block that does not match its tag
in a chunk whose intent is there, which recovery finds and the pair settles.
"""

from libc.errno cimport EAGAIN, EIO, ENOSPC, errno
from libc.stdlib cimport calloc, free
from libc.stdint cimport int64_t
from datapath.device cimport (
    Device, device_fail, device_intent, device_journal_appended, device_journal_durable, device_offset,
    device_slot_alloc, device_slot_free, device_tags, device_tags_write)
from datapath.checksum cimport check_zero_block
from datapath.disk cimport disk_punch, disk_pwrite_new
from datapath.ondisk cimport SLOT_NONE, TAG_HOLE, Tag
from datapath.tags cimport tag_good_hole, tag_is_hole, tag_set, tag_set_lost
from datapath.targetstate cimport CONNS_MAX, DeviceState, LEARN_NOT, TargetVolume
from datapath.volumemap cimport MapVolume, map_volume_find
from datapath.wire cimport BLOCK_SHIFT, CHUNK_BLOCKS


# The page cache makes folios as large as a write, and ext4 walks all blocks of a folio at each later write to it: a
# 4 KiB write takes 24 us of CPU in a file written in 1 MiB pieces, 4.2 us after 64 KiB pieces, 3.0 after 32 KiB pieces.
cdef enum:
    PIECE = 32768


cdef inline uint32_t hash_of(Engine* e, uint64_t volume_id, uint32_t index) noexcept nogil:
    cdef uint64_t h = (volume_id * <uint64_t>0x9E3779B1) ^ (<uint64_t>index * <uint64_t>0x85EBCA77)
    return <uint32_t>((h ^ (h >> 29)) & (e.table_capacity - 1))


cdef Chunk* chunk_find(Engine* e, uint64_t volume_id, uint32_t index) noexcept nogil:
    cdef Chunk* c = e.table[hash_of(e, volume_id, index)]
    while c != NULL and (c.index != index or c.volume_id != volume_id):
        c = c.hash_next
    return c


cdef Chunk* chunk_get(Engine* e, uint64_t volume_id, uint32_t index) noexcept nogil:
    cdef Chunk* c = chunk_find(e, volume_id, index)
    cdef uint32_t at
    if c != NULL:
        return c
    c = <Chunk*>calloc(1, sizeof(Chunk))
    if c == NULL:
        return NULL
    c.volume_id = volume_id
    c.index = index
    c.slot = SLOT_NONE
    at = hash_of(e, volume_id, index)
    c.hash_next = e.table[at]
    e.table[at] = c
    e.chunk_count += 1
    return c


cdef void chunk_forget(Engine* e, Chunk* c) noexcept nogil:
    cdef Chunk** link = &e.table[hash_of(e, c.volume_id, c.index)]
    cdef uint32_t i
    if (c.slot != SLOT_NONE or c.ops != NULL or c.unsynced or c.noted or c.learn != LEARN_NOT
            or c.hold_ns > e.now_ns or (e.unsure and (c.certain or c.gone))):
        return
    if not chunk_durable(e, c):
        return                                             # that it gave its slot back: see chunk_allocate
    for i in range(CONNS_MAX):
        if e.syncs[i].chunk == c:
            return
    while link[0] != c:
        link = &link[0].hash_next
    link[0] = c.hash_next
    e.chunk_count -= 1
    free(c)


cdef inline TargetVolume* volume_of(Engine* e, uint64_t volume_id) noexcept nogil:
    cdef MapVolume* v = map_volume_find(&e.map, volume_id)
    return NULL if v == NULL else <TargetVolume*>v.user


cdef int room_for(Engine* e, uint64_t volume_id) noexcept nogil:
    """0; -EAGAIN when there is room after the next checkpoint, which lets freed slots go; -ENOSPC. A thin volume leaves
    the room that thick volumes were promised and do not use yet."""
    cdef TargetVolume* v = volume_of(e, volume_id)
    cdef uint64_t unused = 0, resting = 0, used_by_thick = 0, kept = 0
    cdef uint32_t i
    for i in range(e.device_count):
        if e.devices[i].d.failed == 0:
            unused += e.devices[i].d.free_count
            resting += e.devices[i].d.quarantine_count - e.devices[i].refused
    if e.reserved and (v == NULL or not v.thick):
        for i in range(e.map.capacity):
            if e.map.table[i] != NULL and e.map.table[i].user != NULL and (<TargetVolume*>e.map.table[i].user).thick:
                used_by_thick += (<TargetVolume*>e.map.table[i].user).slots
        kept = e.reserved - min(e.reserved, used_by_thick)
    if unused > kept:
        return 0
    return -EAGAIN if unused + resting > kept else -ENOSPC


cdef int chunk_allocate(Engine* e, Chunk* c, uint32_t epoch) noexcept nogil:
    cdef uint32_t i, best = e.device_count
    cdef DeviceState* ds
    cdef TargetVolume* v
    cdef Tag lost[1024]
    cdef int64_t slot
    cdef int error
    cdef bint missing = chunk_missing(e, c) and c.doubtful  # a member's; who learns it is given everything anyway
    if c.slot != SLOT_NONE:
        return 0
    error = room_for(e, c.volume_id)
    if error < 0:
        return error
    for i in range(e.device_count):
        if e.devices[i].d.failed == 0 and e.devices[i].d.free_count and (
                best == e.device_count or e.devices[i].d.free_count > e.devices[best].d.free_count):
            best = i
    # The slot that it gave back must not return with a crash beside the new one. A journal's records have their order;
    # that of another device has to be durable first.
    if best != c.device and device_journal_durable(e.devices[c.device].d) < c.mark:
        if e.devices[c.device].d.failed:
            return -e.devices[c.device].d.failed
        if e.devices[c.device].d.free_count == 0:
            return -EAGAIN
        best = c.device
    ds = &e.devices[best]
    slot = device_slot_alloc(ds.d, c.volume_id, c.index, epoch)
    if slot < 0:
        return <int>slot
    if missing:                                            # not zeros, until the other copy has said so
        for i in range(CHUNK_BLOCKS):
            tag_set_lost(&lost[i], c.volume_id, c.index, i)
        error = device_tags_write(ds.d, <uint32_t>slot, 0, CHUNK_BLOCKS, lost)
        if error < 0:
            return error
    c.slot = <uint32_t>slot
    c.device = best
    c.live_blocks = CHUNK_BLOCKS if missing else 0
    c.generation = ds.generation
    c.mark = device_journal_appended(ds.d)
    v = volume_of(e, c.volume_id)
    if v != NULL:
        v.slots += 1
    return 0


cdef int chunk_intent(Engine* e, Chunk* c) noexcept nogil:
    cdef DeviceState* ds = &e.devices[c.device]
    cdef int64_t index
    if ds.d.failed:
        return -ds.d.failed
    if c.generation == ds.generation:
        return 0
    index = device_intent(ds.d, c.volume_id, c.index, c.slot)
    if index < 0:
        return <int>index
    c.generation = ds.generation
    c.mark = device_journal_appended(ds.d)
    return 0


cdef bint chunk_durable(Engine* e, Chunk* c) noexcept nogil:
    return device_journal_durable(e.devices[c.device].d) >= c.mark


cdef Tag* chunk_tags(Engine* e, Chunk* c) noexcept nogil:
    return device_tags(e.devices[c.device].d, c.slot)


cdef int chunk_fd(Engine* e, Chunk* c) noexcept nogil:
    return e.devices[c.device].d.block_fd


cdef int chunk_write(Engine* e, Chunk* c, uint32_t first, uint32_t count, const char* data, const uint32_t* checks,
                     uint32_t epoch, uint64_t seq) noexcept nogil:
    cdef Tag fresh[1024]
    cdef uint32_t i
    for i in range(count):
        tag_set(&fresh[i], checks[i], epoch, seq)
    return chunk_put(e, c, first, count, data, fresh)


cdef int chunk_put(Engine* e, Chunk* c, uint32_t first, uint32_t count, const char* data,
                   const Tag* names) noexcept nogil:
    cdef Device* d = e.devices[c.device].d
    cdef Tag* tags = device_tags(d, c.slot) + first
    cdef int64_t offset = <int64_t>device_offset(c.slot) + (<int64_t>first << BLOCK_SHIFT)
    cdef size_t size = <size_t>count << BLOCK_SHIFT
    cdef size_t done = 0
    cdef ssize_t got
    cdef uint32_t i
    cdef int error = 0
    if d.failed:
        return -d.failed
    d.needs_sync = True
    while done < size:
        got = disk_pwrite_new(d.block_fd, data + done, min(size - done, <size_t>PIECE), offset + <int64_t>done)
        if got <= 0:
            error = -errno if got < 0 else -EIO
            if error != -ENOSPC:
                return device_fail(d, error)
            break
        done += got
    count = <uint32_t>(done >> BLOCK_SHIFT)                # a full host disk: the blocks that went in are named
    for i in range(count):
        c.live_blocks += tag_is_hole(&tags[i])
    if count and device_tags_write(d, c.slot, first, count, names) < 0:
        return -d.failed
    return error


cdef int chunk_discard(Engine* e, Chunk* c, uint32_t first, uint32_t count, uint32_t epoch,
                       uint64_t seq) noexcept nogil:
    cdef Device* d = e.devices[c.device].d
    cdef Tag* tags = device_tags(d, c.slot) + first
    cdef Tag fresh[1024]
    cdef uint32_t i
    if d.failed:
        return -d.failed
    d.needs_sync = True
    if disk_punch(d.block_fd, <int64_t>device_offset(c.slot) + (<int64_t>first << BLOCK_SHIFT),
                  <int64_t>count << BLOCK_SHIFT) < 0:
        return device_fail(d, -errno)
    for i in range(count):
        c.live_blocks -= not tag_is_hole(&tags[i])
        tag_set(&fresh[i], check_zero_block(c.volume_id, c.index, first + i), epoch, seq | TAG_HOLE)
    return device_tags_write(d, c.slot, first, count, fresh)


cdef void chunk_count_live(Engine* e, Chunk* c) noexcept nogil:
    """By tags that vouch for a hole: a flipped flag makes none."""
    cdef const Tag* tags
    cdef uint32_t i
    c.live_blocks = 0
    if c.slot == SLOT_NONE:
        return
    tags = chunk_tags(e, c)
    for i in range(CHUNK_BLOCKS):
        c.live_blocks += not tag_good_hole(&tags[i], c.volume_id, c.index, i)


cdef void chunk_trim(Engine* e, Chunk* c, bint refused) noexcept nogil:
    if c.slot == SLOT_NONE or c.live_blocks or c.ops != NULL or c.unsynced or e.devices[c.device].d.failed:
        return
    chunk_count_live(e, c)                                 # what goes is gone: a wrong count must not make it go
    if c.live_blocks == 0 and chunk_release(e, c):
        e.devices[c.device].refused += refused


cdef bint chunk_release(Engine* e, Chunk* c) noexcept nogil:
    cdef TargetVolume* v
    cdef bint failed = e.devices[c.device].d.failed != 0   # it stays there: the next start finds it beside a newer one
    if not failed and device_slot_free(e.devices[c.device].d, c.slot) < 0:
        return False                                       # the journal is full: the next time
    c.slot = SLOT_NONE
    c.certain = True
    c.generation = 0
    c.live_blocks = 0
    c.bad = False
    c.mark = 0 if failed else device_journal_appended(e.devices[c.device].d)
    v = volume_of(e, c.volume_id)
    if v != NULL and v.slots:
        v.slots -= 1
    return True
