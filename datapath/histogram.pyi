"""Log-linear latency histograms, shared by both engines: lists of counts, the layout is in ``histogram.pxd``."""

def bucket_of(ns: int) -> int:
    """The bucket that a latency of ``ns`` nanoseconds is counted in."""

def upper_bound_ns(bucket: int) -> int:
    """The first latency that no longer belongs to the bucket, in nanoseconds."""

def quantile_ns(counts: list[int], q: float) -> int:
    """The latency that a share ``q`` (0..1) of the recorded ones does not exceed; 0 when none was recorded."""

def count_below(counts: list[int], ns: int) -> int:
    """How many of the recorded latencies lie in buckets that end at or before ``ns`` (for cumulative metrics)."""

def difference(newer: list[int], older: list[int]) -> list[int]:
    """What was recorded between two readings of one histogram."""
