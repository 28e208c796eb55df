# Latency histograms: log-linear, 16 buckets per power of two, so that a quantile is right within 6 %. Recording is a
# shift, a count of leading zeros and an increment; the one writer is the engine's thread, readers see plain memory.
from libc.stdint cimport uint32_t, uint64_t

cdef enum:
    HIST_UNIT_SHIFT = 8              # the first buckets are 256 ns wide
    HIST_SUB_SHIFT = 4
    HIST_SUB = 16
    HIST_BUCKETS = 448               # the last one ends at 2^39 ns (9 minutes) and takes all that is longer

cdef struct Histogram:
    uint64_t count
    uint64_t total_ns
    uint64_t buckets[448]

cdef extern from *:
    """
    #define PFVOL_CLZ64(x) ((uint32_t)__builtin_clzll(x))
    """
    uint32_t PFVOL_CLZ64(uint64_t x) noexcept nogil

cdef inline uint32_t hist_index(uint64_t ns) noexcept nogil:
    """The bucket of a latency. Any thread; pure."""
    cdef uint64_t units = ns >> HIST_UNIT_SHIFT
    cdef uint32_t octave
    if units < HIST_SUB:
        return <uint32_t>units
    octave = 63 - PFVOL_CLZ64(units)
    if octave > 30:
        return HIST_BUCKETS - 1
    return (octave - 3) * HIST_SUB + <uint32_t>((units >> (octave - HIST_SUB_SHIFT)) & (HIST_SUB - 1))

cdef inline void hist_record(Histogram* h, uint64_t ns) noexcept nogil:
    """Counts one latency. Only the thread that owns the histogram."""
    h.count += 1
    h.total_ns += ns
    h.buckets[hist_index(ns)] += 1

# The buckets' counts, trailing empty ones left off. Any thread with the GIL: the counts may be an instant apart.
cdef list hist_list(const Histogram* h)
