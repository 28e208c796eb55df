"""Token buckets for the limits of a mapping (IOs and bytes per second).

Owns nothing; promises that over any span no more than rate * seconds + burst + one request passes.
"""

cdef enum:
    RATE_BITS_MAX = 33
    ELAPSED_NS_MAX = 1000000000


cdef void rate_set(RateLimit* r, uint64_t rate, uint64_t now_ns) noexcept nogil:
    r.rate = rate if rate >> RATE_BITS_MAX == 0 else 0
    # At least one whole unit, or a rate below ten a second would never let anything pass.
    r.nano_tokens_max = max(<int64_t>(r.rate * (RATE_NS // RATE_BURST_DIVISOR)), <int64_t>RATE_NS)
    r.nano_tokens = r.nano_tokens_max
    r.last_ns = now_ns


cdef uint64_t rate_wait_ns(RateLimit* r, uint64_t now_ns) noexcept nogil:
    cdef uint64_t elapsed
    if r.rate == 0:
        return 0
    if now_ns > r.last_ns:
        # Bounded, so that rate * elapsed stays below 2^63; a longer pause fills the bucket anyway, a debt it may not.
        while now_ns > r.last_ns and r.nano_tokens < r.nano_tokens_max:
            elapsed = min(now_ns - r.last_ns, <uint64_t>ELAPSED_NS_MAX)
            if <uint64_t>(r.nano_tokens_max - r.nano_tokens) <= r.rate * elapsed:
                r.nano_tokens = r.nano_tokens_max
                break
            r.nano_tokens += <int64_t>(r.rate * elapsed)
            r.last_ns += elapsed
        if r.nano_tokens >= r.nano_tokens_max:
            r.last_ns = now_ns
    if r.nano_tokens > 0:
        return 0
    return <uint64_t>(-r.nano_tokens) // r.rate + 1


cdef class Bucket:
    """A token bucket for Python, driven by a clock of the caller's."""

    cdef RateLimit _limit

    def __init__(self, rate: int, now_ns: int) -> None:
        rate_set(&self._limit, rate, now_ns)

    def wait_ns(self, now_ns: int) -> int:
        return rate_wait_ns(&self._limit, now_ns)

    def spend(self, units: int) -> None:
        rate_spend(&self._limit, units)
