# Token buckets. A bucket holds what may be spent now; it may go into debt by one request, so that a request larger than
# the burst passes at all, and the next one waits for longer. Everything belongs to the engine's thread that uses it.
from libc.stdint cimport int64_t, uint64_t

cdef enum:
    RATE_BURST_DIVISOR = 10          # a bucket holds what a tenth of a second brings
    RATE_NS = 1000000000

cdef struct RateLimit:
    uint64_t rate                    # units per second, 0 = no limit
    int64_t nano_tokens_max          # the burst, in units of a billionth
    int64_t nano_tokens
    uint64_t last_ns

# Starts full. A rate of 2^33 units a second or more counts as no limit.
cdef void rate_set(RateLimit* r, uint64_t rate, uint64_t now_ns) noexcept nogil
# 0 when something may be spent now, else how long until it may.
cdef uint64_t rate_wait_ns(RateLimit* r, uint64_t now_ns) noexcept nogil

cdef inline void rate_spend(RateLimit* r, uint64_t units) noexcept nogil:
    """Takes units out, into debt if need be. The owner's thread, after rate_wait_ns said 0."""
    if r.rate:
        r.nano_tokens -= <int64_t>units * RATE_NS
