# Which operations of which SDC have been carried out. An SDC gives every write a place among those that it has not
# finished yet, and a number that rises; it uses a place again only when the write before is finished. So one entry per
# place is all there is to remember. See docs/internals/protocol.md, "Operation ids". The engine's thread owns it.
from libc.stdint cimport uint32_t, uint64_t

cdef enum:
    PLACES_MAX = 65536               # that one SDC may use; places count from 1, 0 is none: not remembered
    ISSUERS = 256

cdef enum Known:
    OP_NEW = 0
    OP_CARRIED_OUT = 1
    OP_FINISHED = 2                  # its SDC has given the place to a later one: nobody waits for an answer

cdef struct Entry:
    uint64_t op_id                   # 0: none yet
    uint64_t volume_id
    uint64_t serial                  # of all that is noted here, rising
    uint32_t index                   # chunk

cdef struct Issuer:                  # an SDC
    uint32_t node_id
    uint32_t count                   # places there is memory for
    uint64_t serial                  # of its newest entry
    Entry* entries
    Issuer* next

cdef struct OpIds:
    uint64_t serial
    uint64_t size                    # bytes
    uint64_t size_max
    uint64_t forgotten               # entries given up for want of memory
    Issuer* issuers[256]

# What was carried out stays noted when something older of the same place is noted after it.
cdef void opids_note(OpIds* o, uint32_t node_id, uint64_t place, uint64_t op_id, uint64_t volume_id,
                     uint32_t index) noexcept nogil
# It was not carried out after all. Those before it stay finished.
cdef void opids_undo(OpIds* o, uint32_t node_id, uint64_t place, uint64_t op_id) noexcept nogil
# Entries up to serial `since` do not count: the copy of the chunk has been replaced since.
cdef int opids_find(const OpIds* o, uint32_t node_id, uint64_t place, uint64_t op_id, uint64_t since) noexcept nogil
cdef void opids_free(OpIds* o) noexcept nogil
