# Flushes: what they have to reach, what makes one true, and which SDS need not be waited for. The engine's thread calls
# all of it.
from libc.stdint cimport uint32_t, uint64_t
from datapath.sdcstate cimport Engine, Part, Request, Volume
from datapath.wire cimport Header

# A request of REQ_FLUSH that has been admitted. May end it at once.
cdef void flush_begin(Engine* e, Request* r) noexcept nogil
# The end of one of its parts, which has been unlinked from it.
cdef void flush_member(Engine* e, Request* r, Part* p, int error, int reason, const Header* h) noexcept nogil
# Engine.flush_spares.
cdef int flush_spares(Engine* e, Part* p) noexcept nogil
# A write has been acknowledged, and may not be on disk yet. 0 or -ENOMEM.
cdef int flush_note(Engine* e, const Part* p, uint64_t incarnation) noexcept nogil
# map_segment_set, and what it says about the SDSs that acknowledged what is not flushed yet. 0 or -errno.
cdef int flush_segment_set(Engine* e, Volume* v, uint32_t segment, const void* entries, uint64_t size) noexcept nogil
# A connection's durable incarnation: news when the SDS had another one before.
cdef void flush_heard(Engine* e, uint64_t before, uint64_t durable_incarnation) noexcept nogil
# Flushes that nobody asked for, when the sets of a volume's chunks have changed.
cdef void flush_run_tidy(Engine* e) noexcept nogil
cdef void flush_tidied(Request* r) noexcept nogil
