"""The SDC engine: the FUSE channel's requests in, frames to the SDSs out. One thread per mount."""

from typing import Any

class Initiator:
    """The engine of one SDC.

    Every method may be called from one thread only (the trio thread) and returns at once, except ``start`` and
    ``stop``. Commands take effect in the order given.
    """

    event_fd: int
    """Readable (eventfd) when ``events`` has something."""

    def __init__(self, sdc_id: int, incarnation: int, *, io_deadline_seconds: float = 60.0) -> None: ...
    def start(self, fuse_fd: int = -1, relay_fd: int = -1, *, force_direct: bool = False) -> None:
        """Starts the thread. fuse_fd: /dev/fuse already mounted; relay_fd: our end of the SOCK_SEQPACKET pair whose
        other end pyfuse3 has. Both -1: no FUSE (benchmarks, tests: ``submit``). The engine owns both."""
    def stop(self) -> None:
        """Fails what is in flight with EIO, closes all, joins the thread (blocking: call it in a worker thread)."""
    def events(self) -> list[tuple[Any, ...]]:
        """What happened since the last call, in order:

        - ``("sds_closed", sds_id, reason: str)``: connect again and hand over with ``add_sds``
        - ``("sds_needed", sds_id)``: IO wants an SDS that has no connection (asked once until answered)
        - ``("map_miss", volume_id, segment_index)``: answer with ``set_segment``
        - ``("stale_map", volume_id, segment_index)``: an SDS knows a newer epoch: fetch and ``set_segment``
        - ``("capability_refused", volume_id, sds_id, status)``: fetch a new capability and ``set_capability``
        - ``("unmounted",)``: /dev/fuse says ENODEV
        - ``("relay_closed",)``: pyfuse3 has closed its end; what is not for the engine gets ENODEV from now on
        - ``("forced", volume_id, segment_index)``: an operator has made an older copy of a part of it serve
        - ``("past_end", volume_id)``: a buffered write went past the end, and the kernel now believes in a larger
          file: truncate our own file to its true size
        - ``("completed", token, status_errno, data: bytes)``: for ``submit``
        - ``("io_error", volume_id, errno, message: str)``: an application got an error
        - ``("checksum_error", volume_id, chunk_index, sds_id)``: a reply did not verify (the other copy was asked)
        """
    def add_sds(self, sds_id: int, fd: int, durable_incarnation: int) -> None:
        """Hands over an authenticated socket (the engine owns fd). Presents capabilities again, sends again what
        waits."""
    def remove_sds(self, sds_id: int) -> None: ...
    def add_volume(
        self,
        volume_id: int,
        inode: int,
        size_bytes: int,
        *,
        read_only: bool,
        capability: bytes,
        iops_limit: int = 0,
        bandwidth_limit_bytes: int = 0,
    ) -> None: ...
    def set_volume(
        self, volume_id: int, size_bytes: int, *, read_only: bool, iops_limit: int = 0, bandwidth_limit_bytes: int = 0
    ) -> None: ...
    def set_capability(self, volume_id: int, capability: bytes) -> None: ...
    def remove_volume(self, volume_id: int) -> None:
        """Unmapped: IO in flight and later gets ENODEV."""
    def set_segment(self, volume_id: int, segment_index: int, entries: bytes) -> None:
        """The map of 1024 chunks: 12 bytes each, ``<IHHHH``: epoch, primary, secondary, learner, flags (0)."""
    def submit(self, token: int, kind: str, volume_id: int, offset: int, length: int = 0, data: bytes = b"") -> None:
        """IO from Python, for tests and benchmarks: kind is read, write, discard, flush, seek_data or seek_hole.

        ``length`` is for read and discard; a seek's ``completed`` event carries the position as 8 bytes in native
        order. Tokens are below 2**56; a read or write is of at most 1 MiB (ValueError)."""
    def bench(self, volume_id: int, kind: str, block_size: int, depth: int, seconds: float, span: int) -> None:
        """A load generator inside the engine's thread (no FUSE, no Python per IO); ends with a ``completed`` event of
        token 0.

        kind: read, write (at random block-aligned places of the first ``span`` bytes), seqread or seqwrite. One at a
        time."""
    def invalidate(self, message: bytes) -> None:
        """Writes a FUSE notification (e.g. of an inode) to the kernel."""
    def stats(self) -> dict[str, Any]:
        """``sds`` (per SDS: connected, in_flight, latency_ns, bytes), ``volumes`` (per volume: ``read_ops read_bytes
        read_ns write_ops write_bytes write_ns flush_ops discard_ops errors read_histogram write_histogram``),
        ``in_flight``, ``parked``, ``resent``, ``buffer_bytes``, ``relayed``, ``fuse_requests``; besides per volume
        ``flush_ns discard_bytes seek_ops checksum_errors``, and ``in_flight_bytes fuse_reply_errors``."""

class BenchResult:
    """What a ``bench`` run measured, from the data of its ``completed`` event (token 0)."""

    seconds: float
    ops: int
    errors: int
    histogram: list[int]
    def __init__(self, data: bytes) -> None: ...
