# What a flush has to reach: the pairs of SDSs that acknowledged writes of one volume since its last flush, and the
# durable incarnation that each had. A pair whose members both changed theirs has lost something: that flush must fail.
# `since` is the engine's count of events (an SDS left a set, or lost its memory) before the first of these writes was
# sent: what has happened since then can be told.
from libc.stdint cimport uint16_t, uint32_t, uint64_t

cdef struct DirtyPair:
    uint16_t primary                 # 0: the entry is free
    uint16_t secondary               # 0: the write had one copy
    uint32_t mark                    # of the flush that last took a copy; 0: none since the first write
    uint64_t primary_incarnation     # at the first write not yet flushed
    uint64_t secondary_incarnation   # the same, 0 when unknown: then only the primary can vouch
    uint64_t since
    uint64_t next_primary            # at the first write since that flush took its copy
    uint64_t next_secondary
    uint64_t next_since              # 0: there was none

cdef struct FlushSet:
    DirtyPair* pairs                 # open addressing by (primary, secondary)
    uint32_t capacity                # 0 or a power of two
    uint32_t count
    uint32_t last_mark

cdef void flushset_init(FlushSet* f) noexcept nogil
cdef void flushset_destroy(FlushSet* f) noexcept nogil
# A write was acknowledged. 0 or -ENOMEM.
cdef int flushset_note(FlushSet* f, uint16_t primary, uint16_t secondary, uint64_t primary_incarnation,
                       uint64_t secondary_incarnation, uint64_t since) noexcept nogil
# A flush begins: a malloc'ed copy of the pairs in `out` (NULL when there are none), the flush's mark in `mark`.
# Returns the number of pairs, or -ENOMEM.
cdef int flushset_begin(FlushSet* f, DirtyPair** out, uint64_t* mark) noexcept nogil
# The flush was answered: what was dirty when it began no longer is. Later writes stay.
cdef void flushset_end(FlushSet* f, const DirtyPair* pairs, uint32_t count, uint64_t mark) noexcept nogil
