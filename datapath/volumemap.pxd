# The map: volume id -> segments of 1024 chunks -> which SDSs hold a chunk. Used by both engines; a VolumeMap and all
# in it belong to one engine's thread, nothing is locked.
from libc.stdint cimport uint16_t, uint32_t, uint64_t

cdef enum:
    MAP_SEGMENTS_MAX = 262144        # 1 PiB
    MAP_ENTRY_SIZE = 12
    MAP_SEGMENT_CHUNKS = 1024
    MAP_SEGMENT_SIZE = 12288
    MAP_VOLUMES_MAX = 65536
    MAP_ERA_BITS = 20                # of an epoch, below its era: an operator has forced an older copy (EPOCH_ERA)

# As the MDM sends it (SEGMENT_ENTRY_FORMAT). An SDS number of 0 is none; an entry without a primary is not placed.
cdef packed struct MapEntry:
    uint32_t epoch
    uint16_t primary
    uint16_t secondary
    uint16_t learner
    uint16_t left                    # the member that the newest change took out of the set

cdef struct MapVolume:
    uint64_t volume_id
    MapEntry** segments              # NULL where not loaded
    uint32_t segment_count           # pointers in `segments`
    void* user                       # the engine's own
    uint32_t writers                 # of an inode, the FUSE channel's: opens for writing, not yet released

cdef struct VolumeMap:
    MapVolume** table                # open addressing, linear probing
    uint32_t capacity                # a power of two
    uint32_t count
    uint32_t generation              # raised whenever volumes come, go, or change places in the table

cdef int map_init(VolumeMap* m) noexcept nogil
cdef void map_destroy(VolumeMap* m) noexcept nogil
# The volume, new (no segments, user NULL) if it was not there; NULL when memory is gone or MAP_VOLUMES_MAX is
# reached. The address stays valid until map_volume_remove.
cdef MapVolume* map_volume_add(VolumeMap* m, uint64_t volume_id) noexcept nogil
cdef inline uint32_t map_volume_home(const VolumeMap* m, uint64_t volume_id) noexcept nogil:
    # Fibonacci hashing: volume ids are counted, their low bits alone would cluster behind removed ones.
    return <uint32_t>((volume_id * <uint64_t>0x9E3779B97F4A7C15) >> 32) & (m.capacity - 1)

cdef inline uint32_t map_volume_slot(const VolumeMap* m, uint64_t volume_id) noexcept nogil:
    """Where the volume is, or the free slot where it would go."""
    cdef uint32_t i = map_volume_home(m, volume_id)
    while m.table[i] != NULL and m.table[i].volume_id != volume_id:
        i = (i + 1) & (m.capacity - 1)
    return i

cdef inline MapVolume* map_volume_find(const VolumeMap* m, uint64_t volume_id) noexcept nogil:
    return m.table[map_volume_slot(m, volume_id)]
cdef void map_volume_remove(VolumeMap* m, uint64_t volume_id) noexcept nogil
# Takes a copy of one segment's entries. `size` is a multiple of 12, at most 12288; chunks beyond it get no primary.
# 0, -EINVAL (size or index), -ENOMEM.
cdef int map_segment_set(MapVolume* v, uint32_t segment, const void* entries, uint64_t size) noexcept nogil
# Forgets a segment: lookups miss until it is set again.
cdef void map_segment_drop(MapVolume* v, uint32_t segment) noexcept nogil

cdef inline const MapEntry* map_lookup(const MapVolume* v, uint32_t chunk) noexcept nogil:
    """The chunk's entry, NULL when its segment is not loaded. Valid until the segment is set, dropped, or the volume
    goes."""
    cdef uint32_t segment = chunk >> 10
    if segment >= v.segment_count or v.segments[segment] == NULL:
        return NULL
    return &v.segments[segment][chunk & (MAP_SEGMENT_CHUNKS - 1)]
