"""The volume map of an engine: which SDSs hold which chunk, loaded by segments of 1024 chunks.

Owns the memory of the entries. One engine's thread owns each map and is the only one to touch it. Promises lookups
without allocation or lock, and that what it is given is checked for size before it is believed.
"""

from libc.errno cimport EINVAL, ENOMEM
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcpy, memset

cdef enum:
    TABLE_CAPACITY_MIN = 64
    SEGMENTS_MIN = 4


cdef int _grow(VolumeMap* m) noexcept nogil:
    """Doubles the table. The map's thread."""
    cdef VolumeMap bigger
    cdef uint32_t i
    bigger.capacity = m.capacity * 2
    bigger.count = m.count
    bigger.generation = m.generation
    bigger.table = <MapVolume**>calloc(bigger.capacity, sizeof(MapVolume*))
    if bigger.table == NULL:
        return -ENOMEM
    for i in range(m.capacity):
        if m.table[i] != NULL:
            bigger.table[map_volume_slot(&bigger, m.table[i].volume_id)] = m.table[i]
    free(m.table)
    m[0] = bigger
    return 0


cdef void _free_volume(MapVolume* v) noexcept nogil:
    cdef uint32_t i
    for i in range(v.segment_count):
        free(v.segments[i])
    free(v.segments)
    free(v)


cdef int map_init(VolumeMap* m) noexcept nogil:
    m.count = m.generation = 0
    m.capacity = TABLE_CAPACITY_MIN
    m.table = <MapVolume**>calloc(m.capacity, sizeof(MapVolume*))
    return 0 if m.table != NULL else -ENOMEM


cdef void map_destroy(VolumeMap* m) noexcept nogil:
    cdef uint32_t i
    if m.table == NULL:
        return
    for i in range(m.capacity):
        if m.table[i] != NULL:
            _free_volume(m.table[i])
    free(m.table)
    m.table = NULL
    m.capacity = 0
    m.count = 0


cdef MapVolume* map_volume_add(VolumeMap* m, uint64_t volume_id) noexcept nogil:
    cdef MapVolume* v
    cdef uint32_t i = map_volume_slot(m, volume_id)
    if m.table[i] != NULL:
        return m.table[i]
    if m.count >= MAP_VOLUMES_MAX:
        return NULL
    if (m.count + 1) * 2 > m.capacity:
        if _grow(m) < 0:
            return NULL
        i = map_volume_slot(m, volume_id)
    v = <MapVolume*>calloc(1, sizeof(MapVolume))
    if v == NULL:
        return NULL
    v.volume_id = volume_id
    m.table[i] = v
    m.count += 1
    m.generation += 1
    return v


cdef void map_volume_remove(VolumeMap* m, uint64_t volume_id) noexcept nogil:
    cdef uint32_t hole = map_volume_slot(m, volume_id)
    cdef uint32_t i, home
    cdef uint32_t mask = m.capacity - 1
    if m.table[hole] == NULL:
        return
    _free_volume(m.table[hole])
    m.table[hole] = NULL
    m.count -= 1
    m.generation += 1
    # Entries behind the hole that probed past it move up, so that no tombstone is needed.
    i = (hole + 1) & mask
    while m.table[i] != NULL:
        home = map_volume_home(m, m.table[i].volume_id)
        if ((i - home) & mask) >= ((i - hole) & mask):
            m.table[hole] = m.table[i]
            m.table[i] = NULL
            hole = i
        i = (i + 1) & mask


cdef int map_segment_set(MapVolume* v, uint32_t segment, const void* entries, uint64_t size) noexcept nogil:
    cdef MapEntry** grown
    cdef uint32_t wanted
    if segment >= MAP_SEGMENTS_MAX or size > MAP_SEGMENT_SIZE or size % MAP_ENTRY_SIZE:
        return -EINVAL
    if segment >= v.segment_count:
        wanted = max(v.segment_count * 2, <uint32_t>SEGMENTS_MIN)
        while wanted <= segment:
            wanted *= 2
        grown = <MapEntry**>realloc(v.segments, wanted * sizeof(MapEntry*))
        if grown == NULL:
            return -ENOMEM
        memset(grown + v.segment_count, 0, (wanted - v.segment_count) * sizeof(MapEntry*))
        v.segments = grown
        v.segment_count = wanted
    if v.segments[segment] == NULL:
        v.segments[segment] = <MapEntry*>calloc(1, MAP_SEGMENT_SIZE)
        if v.segments[segment] == NULL:
            return -ENOMEM
    memcpy(v.segments[segment], entries, size)
    memset(<char*>v.segments[segment] + size, 0, MAP_SEGMENT_SIZE - size)
    return 0


cdef void map_segment_drop(MapVolume* v, uint32_t segment) noexcept nogil:
    if segment < v.segment_count and v.segments[segment] != NULL:
        free(v.segments[segment])
        v.segments[segment] = NULL


cdef class Map:
    """A map for Python: tests, and tools that look at what an engine would decide."""

    cdef VolumeMap _map

    def __cinit__(self):
        if map_init(&self._map) < 0:
            raise MemoryError

    def __dealloc__(self):
        map_destroy(&self._map)

    def __len__(self) -> int:
        return self._map.count

    def add(self, volume_id: int) -> None:
        if map_volume_add(&self._map, volume_id) == NULL:
            raise MemoryError

    def remove(self, volume_id: int) -> None:
        map_volume_remove(&self._map, volume_id)

    def __contains__(self, volume_id: int) -> bool:
        return map_volume_find(&self._map, volume_id) != NULL

    def set_segment(self, volume_id: int, segment: int, entries: bytes) -> None:
        cdef MapVolume* v = map_volume_find(&self._map, volume_id)
        if v == NULL:
            raise KeyError(volume_id)
        cdef int result = map_segment_set(v, segment, <const char*>entries, len(entries))
        if result == -EINVAL:
            raise ValueError(f"segment {segment} of {len(entries)} bytes")
        if result < 0:
            raise MemoryError

    def drop_segment(self, volume_id: int, segment: int) -> None:
        cdef MapVolume* v = map_volume_find(&self._map, volume_id)
        if v != NULL:
            map_segment_drop(v, segment)

    def lookup(self, volume_id: int, chunk: int) -> tuple[int, int, int, int, int] | None:
        """(epoch, primary, secondary, learner, left), None when the segment is not loaded."""
        cdef MapVolume* v = map_volume_find(&self._map, volume_id)
        if v == NULL:
            raise KeyError(volume_id)
        cdef const MapEntry* e = map_lookup(v, chunk)
        return None if e == NULL else (e.epoch, e.primary, e.secondary, e.learner, e.left)
