"""The SDC engine's state: tables, slabs and the mailbox's outgoing side.

Owns the memory of volumes, SDSs, requests and parts. Everything is called by the engine's thread (engine_alloc and
engine_free by the thread that makes and drops the Python object, before and after that). Promises that requests and
parts come from free lists that only ever grow, and that a Volume or Sds, once made, keeps its address until
engine_free.
"""

from libc.errno cimport ENOMEM
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memset
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec
from datapath.connection cimport buf_put, conn_destroy, pool_destroy, pool_init
from datapath.flushset cimport flushset_destroy, flushset_init
from datapath.ring cimport ring_destroy, ring_init, ring_push
from datapath.volumemap cimport (map_destroy, map_init, map_volume_add, map_volume_find)
from datapath.wire cimport BLOCK_SIZE, IO_SIZE_MAX

cdef extern from *:
    """
    #define pfvol_store_release(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)
    """
    void pfvol_store_release(uint32_t* p, uint32_t v) nogil

cdef enum:
    COMMANDS_CAPACITY = 1024
    EVENTS_CAPACITY = 4096
    SDS_NUMBERS = 65536
    SEGMENT_BYTES_SHIFT = 32         # a segment covers 4 GiB


cdef uint64_t clock_ns() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return <uint64_t>t.tv_sec * 1000000000 + <uint64_t>t.tv_nsec


cdef int engine_alloc(Engine* e) noexcept nogil:
    memset(e, 0, sizeof(Engine))
    e.epoll_fd = e.timer_fd = -1
    e.commands.event_fd = -1
    e.events.event_fd = -1
    e.channel.fuse_fd = -1
    e.channel.relay_fd = -1
    e.happened = 1
    list_init(&e.active)
    list_init(&e.backoff)
    list_init(&e.throttled)
    pool_init(&e.pool)
    # calloc of this size is memory that does not exist until it is touched.
    e.volumes = <Volume**>calloc(VOLUMES_MAX, sizeof(Volume*))
    e.sds = <Sds**>calloc(SDS_MAX, sizeof(Sds*))
    e.sds_by_id = <Sds**>calloc(SDS_NUMBERS, sizeof(Sds*))
    e.part_slabs = <Part**>calloc(PART_SLABS_MAX, sizeof(Part*))
    e.zeros = <char*>calloc(1, IO_SIZE_MAX + BLOCK_SIZE)
    if (e.volumes == NULL or e.sds == NULL or e.sds_by_id == NULL or e.part_slabs == NULL or e.zeros == NULL
            or map_init(&e.map) < 0 or map_init(&e.inodes) < 0
            or ring_init(&e.commands, COMMANDS_CAPACITY) < 0 or ring_init(&e.events, EVENTS_CAPACITY) < 0):
        return -ENOMEM
    return 0


cdef void engine_free(Engine* e) noexcept nogil:
    cdef uint32_t i
    cdef Volume* v
    for i in range(e.sds_count):
        if e.sds[i].connected:
            conn_destroy(&e.sds[i].conn, &e.pool)
        free(e.sds[i])
    for i in range(e.volume_count):
        v = e.volumes[i]
        free(v.asked)
        free(v.capability)
        flushset_destroy(&v.dirty)
        free(v)
    for i in range(e.part_slab_count):
        free(e.part_slabs[i])
    for i in range(e.request_slab_count):
        free(e.request_slabs[i])
    free(e.part_slabs)
    free(e.request_slabs)
    free(e.volumes)
    free(e.sds)
    free(e.sds_by_id)
    free(e.zeros)
    map_destroy(&e.map)
    map_destroy(&e.inodes)
    ring_destroy(&e.commands)
    ring_destroy(&e.events)
    pool_destroy(&e.pool)
    memset(e, 0, sizeof(Engine))


cdef void emit(Engine* e, uint32_t kind, uint32_t a, uint64_t b, uint64_t c, uint64_t d,
               char* data, uint64_t size) noexcept nogil:
    cdef Message m
    m.kind = kind
    m.a = a
    m.b = b
    m.c = c
    m.d = d
    m.data = data
    m.size = size
    if ring_push(&e.events, &m) < 0:
        free(data)


cdef Request* request_new(Engine* e) noexcept nogil:
    cdef Request* slab
    cdef Request** grown
    cdef Request* r
    cdef int i
    if e.free_requests == NULL:
        if e.request_slab_count == e.request_slab_capacity:
            grown = <Request**>realloc(e.request_slabs, (e.request_slab_capacity + 16) * sizeof(Request*))
            if grown == NULL:
                return NULL
            e.request_slabs = grown
            e.request_slab_capacity += 16
        slab = <Request*>calloc(REQUEST_SLAB, sizeof(Request))
        if slab == NULL:
            return NULL
        e.request_slabs[e.request_slab_count] = slab
        e.request_slab_count += 1
        for i in range(REQUEST_SLAB):
            slab[i].next_free = e.free_requests
            e.free_requests = &slab[i]
    r = e.free_requests
    e.free_requests = r.next_free
    memset(r, 0, sizeof(Request))
    list_init(&r.link)
    return r


cdef void request_free(Engine* e, Request* r) noexcept nogil:
    if r.buffer != NULL:
        buf_put(&e.pool, r.buffer)
        r.buffer = NULL
    free(r.pairs)
    free(r.members)
    r.pairs = NULL
    r.members = NULL
    r.next_free = e.free_requests
    e.free_requests = r


cdef Part* part_new(Engine* e) noexcept nogil:
    cdef Part* slab
    cdef Part* p
    cdef uint32_t slot, op_place, generation, i
    if e.free_parts == NULL:
        if e.part_slab_count == PART_SLABS_MAX:
            return NULL
        slab = <Part*>calloc(PART_SLAB, sizeof(Part))
        if slab == NULL:
            return NULL
        for i in range(PART_SLAB):
            slab[i].slot = e.part_slab_count * PART_SLAB + i
            slab[i].op_place = slab[i].slot + 1
            slab[i].next_free = e.free_parts
            e.free_parts = &slab[i]
        e.part_slabs[e.part_slab_count] = slab
        e.part_slab_count += 1
    p = e.free_parts
    e.free_parts = p.next_free
    slot = p.slot
    op_place = p.op_place
    generation = p.generation + 1    # an answer to this slot's earlier holder no longer fits
    memset(p, 0, sizeof(Part))
    list_init(&p.link)
    p.slot = slot
    p.op_place = op_place
    p.generation = generation
    return p


cdef void part_free(Engine* e, Part* p) noexcept nogil:
    p.state = 0
    p.request = NULL
    p.next_free = e.free_parts
    e.free_parts = p


cdef Part* part_find(Engine* e, uint64_t request_id) noexcept nogil:
    cdef uint32_t slot = <uint32_t>request_id
    cdef Part* p
    if slot >= e.part_slab_count * PART_SLAB:
        return NULL
    p = &e.part_slabs[slot // PART_SLAB][slot % PART_SLAB]
    if p.state != PART_SENT or p.generation != <uint32_t>(request_id >> 32):
        return NULL
    return p


cdef Sds* sds_get(Engine* e, uint32_t id) noexcept nogil:
    cdef Sds* s
    if id == 0 or id >= SDS_NUMBERS:
        return NULL
    s = e.sds_by_id[id]
    if s != NULL or e.sds_count == SDS_MAX:
        return s
    s = <Sds*>calloc(1, sizeof(Sds))
    if s == NULL:
        return NULL
    s.id = <uint16_t>id
    s.index = <uint16_t>e.sds_count
    s.conn.fd = -1
    list_init(&s.in_flight)
    list_init(&s.waiting)
    e.sds_by_id[id] = s
    e.sds[e.sds_count] = s
    pfvol_store_release(&e.sds_count, e.sds_count + 1)
    return s


cdef Volume* volume_find(Engine* e, uint64_t id) noexcept nogil:
    cdef MapVolume* m = map_volume_find(&e.map, id)
    return <Volume*>m.user if m != NULL else NULL


cdef Volume* volume_get(Engine* e, uint64_t id, uint64_t inode) noexcept nogil:
    cdef MapVolume* m = map_volume_add(&e.map, id)
    cdef MapVolume* by_inode = map_volume_add(&e.inodes, inode)
    cdef Volume* v
    if m == NULL or by_inode == NULL:
        return NULL
    v = <Volume*>m.user
    if v == NULL:
        if e.volume_count == VOLUMES_MAX:
            return NULL
        v = <Volume*>calloc(1, sizeof(Volume))
        if v == NULL:
            return NULL
        v.id = id
        v.map = m
        v.removed = True
        list_init(&v.throttled)
        list_init(&v.throttle_link)
        list_init(&v.map_wait)
        flushset_init(&v.dirty)
        m.user = v
        e.volumes[e.volume_count] = v
        pfvol_store_release(&e.volume_count, e.volume_count + 1)
    by_inode.user = v
    return v


cdef int volume_fit_asked(Volume* v) noexcept nogil:
    cdef uint64_t segments = (v.size >> SEGMENT_BYTES_SHIFT) + 1
    cdef uint32_t wanted = <uint32_t>((segments + 7) // 8)
    cdef uint8_t* grown
    if wanted <= v.asked_bytes:
        return 0
    grown = <uint8_t*>realloc(v.asked, wanted)
    if grown == NULL:
        return -ENOMEM
    memset(grown + v.asked_bytes, 0, wanted - v.asked_bytes)
    v.asked = grown
    v.asked_bytes = wanted
    return 0
