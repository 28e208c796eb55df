"""Token buckets for the limits of a mapping (IOs and bytes per second)."""

class Bucket:
    """A token bucket for Python, driven by a clock of the caller's."""

    def __init__(self, rate: int, now_ns: int) -> None:
        """``rate`` units per second; 0 is no limit. Starts full."""
    def wait_ns(self, now_ns: int) -> int:
        """0 when something may be spent now, else how long until it may, in nanoseconds."""
    def spend(self, units: int) -> None:
        """Takes units out, into debt if need be; to be called after ``wait_ns`` said 0."""
