"""The SDS engine: serves the data port, applies, replicates, locks ranges, syncs. One shard = one thread."""

from typing import Any

from datapath.blockfile import BlockDevice

class Target:
    """One shard of an SDS.

    Every method may be called from one thread only (the trio thread); none blocks on IO except ``start`` and ``stop``.
    Commands take effect in the order given. What the engine has to say arrives through ``events``.
    """

    event_fd: int
    """Readable (eventfd) when ``events`` has something."""

    def __init__(self, sds_id: int, incarnation: int, durable_incarnation: int, *, io_threads: int = 2) -> None: ...
    def add_device(self, device: BlockDevice) -> None:
        """Before ``start``: the engine indexes its slots and owns it from now on."""
    def start(self) -> None: ...
    def stop(self, *, checkpoint: bool = True) -> None:
        """Closes every connection (who waits for an answer asks again), joins the thread, checkpoints.

        Blocks: use a worker thread.
        """
    def events(self) -> list[tuple[Any, ...]]:
        """What happened since the last call, in order:

        - ``("capability", conn_id, request_id, volume_id, token: bytes)``: answer with ``grant`` or ``refuse``
        - ``("map_miss", volume_id, segment_index)``: answer with ``set_segment`` (asked once until it is answered)
        - ``("client_closed", conn_id, sdc_id, reason: str)``
        - ``("peer_closed", conn_id, sds_id, outgoing: bool, reason: str)``
        - ``("peer_synced", sds_id, chunks, blocks_pulled, blocks_pushed)``: the pair agrees, chunks of the pair serve
        - ``("device_failed", device_index, errno, message: str)``
        - ``("checkpoint", generation, chunks, seconds)``
        - ``("verified", token, present: bool, tags: bytes, bad: bytes)``: 1024 tags of 16 bytes, 128 bytes of bad bits
        - ``("corrupted", token, errno)``: 0, or ENOENT (no copy here), ENODATA (the block is not written), the disk's
        - ``("purged", volume_id)``
        - ``("no_space", volume_id, chunk_index)``
        - ``("peer_silent", sds_id)``: no lease from it for a second; again every half second
        - ``("leaving", sds_id, as_primary, as_secondary, [(volume_id, chunk), ...])``: in which roles the pair has
          agreed since this SDS started, and all chunks that may lack something here
        - ``("learned", sds_id, [(volume_id, chunk, epoch), ...], resync_bytes)``: the learner has all of these on its
          disks; how many bytes were copied from here until then, to all learners
        - ``("learner_lost", sds_id, [(volume_id, chunk), ...])``: it went away after ``learned``
        - ``("lost", [(volume_id, chunk, sds_id, incarnation), ...])``: what a disk here cannot keep, and the other
          member, which has it; again while it lasts
        - ``("copy_refused", sds_id, [(volume_id, chunk), ...])``: for a second these have not agreed with this
          secondary, because its disk refuses; again while it lasts
        - ``("repair_needed", volume_id, chunk_index, block, reason: str)``: a stored block does not match its tag
        - ``("repaired", volume_id, chunk_index, first_block, repaired, unrepairable)``: how many blocks from there on
          were rewritten from the other copy, here or there, and how many no copy has
        - ``("chunk_gone", volume_id, chunk_index)``: asked for, and nobody can tell what it held; at most every ten
          seconds
        - ``("sure",)``: what rot took from a device is here again, or known never to have been
        - ``("scrubbed", chunks, bytes, errors)``: the scrubber's pass has ended; totals since start
        """
    def add_client(self, fd: int, sdc_id: int, incarnation: int) -> int:
        """Hands over an authenticated socket of an SDC (the engine owns fd); its older sessions are closed first."""
    def add_peer(self, fd: int, sds_id: int, incarnation: int, *, outgoing: bool) -> int:
        """An authenticated socket to another SDS: outgoing = we are the primary's side (we replicate on it)."""
    def close_conn(self, conn_id: int) -> None: ...
    def grant(self, conn_id: int, request_id: int, volume_id: int, *, write: bool, expires_boot_ns: int) -> None:
        """Accepts a capability: IO for the volume is served on the connection until CLOCK_BOOTTIME expires_boot_ns."""
    def refuse(self, conn_id: int, request_id: int, volume_id: int, status: int) -> None: ...
    def revoke(self, volume_id: int, sdc_id: int) -> None:
        """At once: no request of that SDC for the volume that has not yet been applied is applied any more."""
    def set_volume(self, volume_id: int, size_bytes: int, *, commit: bool, thick: bool, pool_id: int = 0) -> None: ...
    def drop_volume(self, volume_id: int) -> None:
        """The volume does not exist (any more): its requests get NO_VOLUME."""
    def purge_volume(self, volume_id: int) -> None:
        """Drop it and give all its slots back; ends with a ``purged`` event."""
    def set_segment(self, volume_id: int, segment_index: int, entries: bytes, version: int = 0) -> None:
        """The map of 1024 chunks: 12 bytes each, ``<IHHHH``: epoch, primary, secondary, learner, left.

        An entry is taken when its epoch is newer than the one known. ``version``: the MDM's map version when it made
        these entries; an SDS that has left a set has to know it before it is granted a lease again.
        """
    def set_map_version(self, version: int) -> None:
        """Every segment known here is at least this new. Nobody is granted a lease before the first call."""
    def leave(self, sds_id: int) -> None:
        """Closes the connections with the peer, grants it nothing any more, and answers with ``leaving``."""
    def stay(self, sds_id: int) -> None:
        """The MDM has spoken, or cannot: the peer may connect again."""
    def peer_dead(self, sds_id: int, incarnation: int) -> None:
        """Nothing is left of that process of the peer: what it was granted counts as over."""
    def set_resync_rate(self, pool_id: int, bytes_per_second: int) -> None:
        """What may be copied to learners in this pool; 0: nothing."""
    def set_scrub_rate(self, bytes_per_second: int) -> None:
        """How fast chunks led here are verified in all their copies; 0: not at all. A pass begins, if none goes on."""
    def set_reserved(self, slots: int) -> None:
        """Slots promised to thick volumes on this SDS in all (used ones included): thin ones leave room for them."""
    def checkpoint(self) -> None: ...
    @property
    def unsure(self) -> bool:
        """A chunk that has no slot here may have been lost to rot."""
    def maps_whole(self) -> None:
        """The maps of all chunks that this SDS has a part in are known, so that one that is missing is found."""
    def verify(self, token: int, volume_id: int, chunk_index: int) -> None: ...
    def repair(self, volume_id: int, chunk_index: int) -> None:
        """Has the chunk's copies compared with their tags, and what is bad in one rewritten from the other."""
    def corrupt(self, token: int, volume_id: int, chunk_index: int, block: int) -> None:
        """Flips bytes of a stored block on purpose; its tag stays as it is."""
    def stats(self) -> dict[str, Any]:
        """Counters since start and gauges, read without stopping the engine:

        ``slots_total slots_used slots_free slots_reserved clients peers queue_depth known_volumes known_chunks``,
        ``read_ops read_bytes read_ns write_ops write_bytes write_ns replicate_ops replicate_bytes flush_ops flush_ns``,
        ``discard_ops reads_inline reads_pooled checksum_errors journal_commits checkpoints bad_frames buffer_bytes``,
        ``leases_lapsed turn_max_ns`` (the longest turn of the engine's loop),
        ``ops_known`` (sent again, and answered without being carried out again), ``op_ids_bytes op_ids_forgotten``
        (memory of operations that may be sent again; such that were given up because it was full),
        ``resync_bytes resync_chunks`` (sent to learners; chunks that have become whole there),
        ``resync_left`` (chunks led here whose learner is connected and not whole yet),
        ``blocks_repaired blocks_unrepairable`` (of chunks led here, in all their copies),
        ``entries_repaired`` (of the devices' slot tables), ``devices_unsure`` (that had lost track of what was in their
        slots when they were opened), ``chunks_gone`` (how often a chunk was asked for that was lost so in all copies),
        ``scrub_chunks scrub_bytes scrub_errors scrub_passes``,
        ``read_histogram write_histogram`` (lists, see histogram.pxd),
        ``volumes``: ``{volume_id: (chunks, blocks, primary_chunks, primary_blocks)}`` allocated here.
        """
