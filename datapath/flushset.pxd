# What a flush has to reach: the pairs of SDSs that acknowledged writes of one volume since its last flush, and the
# durable incarnation that each had. A pair whose members both changed theirs has lost something: that flush must fail.
# `since` is the engine's count of events (an SDS lost its memory, an older copy was forced) before the first of these
# writes was sent: what has happened since then can be told. A pair has an entry for each group of chunks that it wrote
# to, since who leaves the set of one chunk, as copies move, still has all that others were given.
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef enum:
    LEFT_PRIMARY = 1
    LEFT_SECONDARY = 2
    GONE_MAX = 8

cdef struct DirtyPair:
    uint16_t primary                 # 0: the entry is free
    uint16_t secondary               # 0: the write had one copy
    uint8_t group                    # of chunks: the low bits of their numbers
    uint8_t left                     # LEFT_*: it may have been out of a set of these chunks since one of the writes
    uint8_t next_left                # the same for those of next_since
    uint32_t mark                    # of the flush that last took a copy; 0: none since the first write
    uint64_t primary_incarnation     # at the first write not yet flushed
    uint64_t secondary_incarnation   # the same, 0 when unknown: then only the primary can vouch
    uint64_t since
    uint64_t next_primary            # at the first write since that flush took its copy
    uint64_t next_secondary
    uint64_t next_since              # 0: there was none

cdef struct Gone:                    # who has left sets, by group of chunks; 0: none
    uint16_t sds_ids[256][8]
    bint any

cdef struct FlushSet:
    DirtyPair* pairs                 # open addressing by (primary, secondary, group)
    uint32_t capacity                # 0 or a power of two
    uint32_t count
    uint32_t last_mark

cdef void flushset_init(FlushSet* f) noexcept nogil
cdef void flushset_destroy(FlushSet* f) noexcept nogil
# A write to the chunk was acknowledged. `left`: who may have been out of its set since it was sent. 0 or -ENOMEM.
cdef int flushset_note(FlushSet* f, uint32_t chunk, uint16_t primary, uint16_t secondary, uint64_t primary_incarnation,
                       uint64_t secondary_incarnation, uint64_t since, uint8_t left) noexcept nogil
# An SDS may have been out of the chunk's set. False when there is no place to note it.
cdef bint gone_note(Gone* gone, uint32_t chunk, uint16_t sds_id) noexcept nogil
# They vouch no more for what these pairs (of the set, or a copy that a flush has taken) wrote there until now.
cdef void pairs_left(DirtyPair* pairs, uint32_t count, const Gone* gone) noexcept nogil
# A flush begins: a malloc'ed copy of the pairs in `out` (NULL when there are none), the flush's mark in `mark`.
# Returns the number of pairs, or -ENOMEM.
cdef int flushset_begin(FlushSet* f, DirtyPair** out, uint64_t* mark) noexcept nogil
# The flush was answered: what was dirty when it began no longer is. Later writes stay.
cdef void flushset_end(FlushSet* f, const DirtyPair* pairs, uint32_t count, uint64_t mark) noexcept nogil
