"""Log-linear latency histograms, shared by both engines.

Owns the bucket layout (in the .pxd) and what Python needs to read one: bounds and quantiles. An engine's thread
records without the GIL; a reader may see counts that are an instant apart, never a torn one.
"""


cdef list hist_list(const Histogram* h):
    cdef int last = HIST_BUCKETS
    while last > 0 and h.buckets[last - 1] == 0:
        last -= 1
    return [h.buckets[i] for i in range(last)]


def bucket_of(ns: int) -> int:
    """The bucket that a latency of ``ns`` nanoseconds is counted in."""
    return hist_index(ns)


def upper_bound_ns(bucket: int) -> int:
    """The first latency that no longer belongs to the bucket, in nanoseconds."""
    if not 0 <= bucket < HIST_BUCKETS:
        raise ValueError(f"bucket {bucket} is not in 0..{HIST_BUCKETS - 1}")
    if bucket < HIST_SUB:
        return (bucket + 1) << HIST_UNIT_SHIFT
    octave = bucket // HIST_SUB + 3
    sub = bucket % HIST_SUB
    return (HIST_SUB + sub + 1) << (octave - HIST_SUB_SHIFT + HIST_UNIT_SHIFT)


def quantile_ns(counts: list[int], q: float) -> int:
    """The latency that a share ``q`` (0..1) of the recorded ones does not exceed; 0 when none was recorded."""
    total = sum(counts)
    if total == 0:
        return 0
    wanted = max(1, int(q * total + 0.999999))
    seen = 0
    for bucket, count in enumerate(counts):
        seen += count
        if seen >= wanted:
            return upper_bound_ns(bucket)
    return upper_bound_ns(len(counts) - 1)


def count_below(counts: list[int], ns: int) -> int:
    """How many of the recorded latencies lie in buckets that end at or before ``ns`` (for cumulative metrics)."""
    total = 0
    for bucket, count in enumerate(counts):
        if upper_bound_ns(bucket) > ns:
            break
        total += count
    return total


def difference(newer: list[int], older: list[int]) -> list[int]:
    """What was recorded between two readings of one histogram."""
    return [count - (older[i] if i < len(older) else 0) for i, count in enumerate(newer)]
