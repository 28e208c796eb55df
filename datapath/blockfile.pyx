"""A device of an SDS: a directory with a superblock, a sparse block file, slots, tags and an intent journal.

Owns the files and mappings of one device, and who holds which slot. The format is in ondisk.pxd, which function
belongs to which thread in device.pxd. Promises that a slot is given out only when its old bytes are punched and its
tags have room on the disk, that what a commit or sync reported as durable is, and that the first error of the host's
disk takes the device out of service: a later sync never claims what the failed one lost.
"""
from libc.errno cimport EBUSY, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t, int64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcmp, memcpy
from posix.mman cimport MADV_RANDOM, MAP_FAILED, MAP_SHARED, PROT_READ, PROT_WRITE, madvise, mmap, munmap
import fcntl
import os
from datapath.checksum cimport block_seed, crc32c
from datapath.device cimport (
    TAG_GROUP, Device, Own, device_checkpoint_begin, device_checkpoint_end, device_fail, device_intent,
    device_journal_appended, device_journal_commit, device_journal_durable, device_journal_void, device_offset,
    device_entry_store, device_slot_alloc, device_slot_free, device_sure, device_sync_all, device_sync_begin,
    device_tags, device_tags_settled,
    device_verify_slot,
    journal_of, own_of, tags_reserve)
from datapath.deviceformat cimport (
    check_sizes, create_device, id_bytes, raise_errno, superblock_exchange, superblock_parse, superblock_write)
from datapath.disk cimport disk_fdatasync
from datapath.journal cimport (
    Journal, journal_append, journal_delete, journal_new, pfvol_load_int, pthread_mutex_destroy,
    pthread_mutex_init, read_all, write_all)
from datapath.ondisk cimport (
    INCARNATION_MAX, JOURNAL_DIRTY, SDS_ID_MAX, SLOT_ENTRY_SIZE, SLOT_FREE, SLOT_LOST, SLOT_NONE, SLOT_SIZE,
    SLOT_TAGS_SIZE, SLOT_USED, TAGS_PER_SLOT, UNSURE_INTENTS, UNSURE_SLOTS, SlotEntry, Superblock, Tag)
from datapath.recovery cimport recover_device
from datapath.deviceformat import FILES, DeviceFormatError, boot_id_now
from datapath.tags cimport tag_check, tag_set

cdef extern from "<unistd.h>" nogil:
    int c_close "close"(int fd)

cdef extern from "<sys/vfs.h>" nogil:
    cdef struct statfs_t "statfs":
        long f_type
    int fstatfs(int fd, statfs_t* out)

cdef enum:
    BLOCK_SIZE = 4096
    EXT4_MAGIC = 0xef53              # statfs(2); ext2 and ext3 have the same
    TMPFS_MAGIC = 0x01021994

NO_SLOT = <uint32_t>SLOT_NONE


cdef class BlockDevice:
    """A device, open and locked. Made by ``open``; ``recover`` it before anything else; ``close`` it at the end."""

    def __cinit__(self):
        cdef Own* own
        self.device = <Device*>calloc(1, sizeof(Device))
        if self.device == NULL:
            raise MemoryError()
        self.device.block_fd = self.device.tag_fd = self.device.slot_fd = -1
        self.device.journal_fd = self.device.directory_fd = -1
        self.device.superblock = <Superblock*>calloc(1, sizeof(Superblock))
        self.device.own = calloc(1, sizeof(Own))
        if self.device.superblock == NULL or self.device.own == NULL:
            raise MemoryError()
        own = own_of(self.device)
        pthread_mutex_init(&own.punch_list_lock, NULL)
        pthread_mutex_init(&own.punch_lock, NULL)
        pthread_mutex_init(&own.slots_lock, NULL)

    def __dealloc__(self):
        if self.device == NULL:
            return
        self.release()
        if self.device.own != NULL:
            pthread_mutex_destroy(&own_of(self.device).punch_list_lock)
            pthread_mutex_destroy(&own_of(self.device).punch_lock)
            pthread_mutex_destroy(&own_of(self.device).slots_lock)
        free(self.device.own)
        free(self.device.superblock)
        free(self.device)

    @staticmethod
    def create(path, *, cluster_id, uint32_t sds_id=0, uint32_t index=0, size_bytes):
        """Makes a device of ``size_bytes`` (whole slots of 4 MiB count) in ``path``, absent or empty.

        Whole or not at all. Raises ``ValueError`` (a size or id out of range), ``FileExistsError``, ``OSError``.
        """
        create_device(os.path.abspath(os.fspath(path)), id_bytes(cluster_id, "cluster id"), sds_id, index, size_bytes)

    @staticmethod
    def open(path, *, cluster_id=None, boot_id=None):
        """Checks, locks and opens a device; its incarnation rises by one, durably. Call ``recover`` next.

        ``boot_id`` (16 bytes) is the running kernel's unless a test gives another. Raises ``DeviceFormatError``,
        ``OSError`` (EBUSY: another process has it).
        """
        cdef BlockDevice self = BlockDevice.__new__(BlockDevice)
        self.path = os.path.abspath(os.fspath(path))
        self.dirty, self.freed = [], []
        try:
            self.lock()
            self.restored = superblock_parse(self.device.superblock, self.path, cluster_id)
            check_sizes(self.path, self.device.superblock.slot_count)
            if self.restored:
                superblock_exchange(self.device.directory_fd, self.path)
            self.map_files()
            self.rise(id_bytes(boot_id, "boot id") if boot_id is not None else boot_id_now())
            self.prepare()
        except BaseException:
            self.release()
            raise
        return self

    cdef lock(self):
        try:
            self.device.directory_fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except NotADirectoryError:
            raise DeviceFormatError(f"{self.path}: is not a directory") from None
        try:
            fcntl.flock(self.device.directory_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(EBUSY, "the device is in use by another process", self.path) from None

    cdef map_files(self):
        cdef Device* d = self.device
        cdef void* mapping
        d.index, d.slot_count = d.superblock.device_index, <uint32_t>d.superblock.slot_count
        d.block_fd, d.slot_fd, d.tag_fd, d.journal_fd = [
            os.open(os.path.join(self.path, name), os.O_RDWR | os.O_CLOEXEC) for name in FILES]
        d.slots = <SlotEntry*>malloc(<size_t>d.slot_count * SLOT_ENTRY_SIZE)
        if d.slots == NULL:
            raise MemoryError()
        raise_errno(read_all(d.slot_fd, d.slots, <size_t>d.slot_count * SLOT_ENTRY_SIZE, 0), self.path)
        mapping = mmap(NULL, <size_t>d.slot_count * SLOT_TAGS_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, d.tag_fd, 0)
        if mapping == MAP_FAILED:
            raise OSError(errno, os.strerror(errno), self.path)
        d.tags = <Tag*>mapping
        # Read-ahead makes large folios, and ext4 walks all of a folio's blocks at each write to it.
        os.posix_fadvise(d.block_fd, 0, 0, os.POSIX_FADV_RANDOM)
        madvise(mapping, <size_t>d.slot_count * SLOT_TAGS_SIZE, MADV_RANDOM)

    cdef rise(self, bytes boot_id):
        """The next incarnation. What an older one of this boot acknowledged is in the page cache still, unless a sync
        failed, which a superblock that rotted would have told.
        """
        cdef Superblock* s = self.device.superblock
        s.incarnation += 1
        self.was_clean = bool(s.clean)
        s.clean = 0
        if self.restored or s.durable_incarnation == 0 or memcmp(s.boot_id, <const char*>boot_id, 16) != 0:
            s.durable_incarnation = s.incarnation
        memcpy(s.boot_id, <const char*>boot_id, 16)

    cdef prepare(self):
        cdef Device* d = self.device
        cdef statfs_t fs
        cdef Own* own = own_of(d)
        cdef uint32_t groups = (d.slot_count + TAG_GROUP - 1) // TAG_GROUP
        d.journal = journal_new(d.journal_fd, d.slot_count, <uint32_t>d.superblock.incarnation, d.superblock.device_id)
        # Not XFS: a file that was copied by reference is no longer written where it is.
        own.in_place = fstatfs(d.tag_fd, &fs) == 0 and (fs.f_type == EXT4_MAGIC or fs.f_type == TMPFS_MAGIC)
        own.tags_given = 1
        own.vacant = <uint32_t*>malloc(4 * <size_t>d.slot_count)
        own.resting = <uint32_t*>malloc(4 * <size_t>d.slot_count)
        own.to_punch = <uint32_t*>malloc(4 * <size_t>d.slot_count)
        own.punching = <uint32_t*>malloc(4 * <size_t>d.slot_count)
        own.tag_groups = <uint8_t*>calloc(groups, 1)
        if (d.journal == NULL or own.vacant == NULL or own.resting == NULL or own.to_punch == NULL
                or own.punching == NULL or own.tag_groups == NULL):
            raise MemoryError()
        raise_errno(superblock_write(d.directory_fd, d.superblock), self.path)

    cdef release(self):
        """Gives everything back; the lock goes with the directory's descriptor."""
        cdef Device* d = self.device
        cdef Own* own = own_of(d)
        if own != NULL:
            own.serving = False
            free(own.vacant)
            free(own.resting)
            free(own.to_punch)
            free(own.punching)
            free(own.tag_groups)
            own.vacant = own.resting = own.to_punch = own.punching = NULL
            own.tag_groups = NULL
        journal_delete(journal_of(d))
        d.journal = NULL
        free(d.slots)
        if d.tags != NULL:
            munmap(d.tags, <size_t>d.slot_count * SLOT_TAGS_SIZE)
        d.slots, d.tags = NULL, NULL
        for fd in (d.block_fd, d.slot_fd, d.tag_fd, d.journal_fd, d.directory_fd):
            if fd >= 0:
                c_close(fd)
        d.block_fd = d.tag_fd = d.slot_fd = d.journal_fd = d.directory_fd = -1

    cdef Device* opened(self) except NULL:
        if self.device.journal == NULL:
            raise ValueError(f"{self.path}: the device is closed")
        return self.device

    cdef Device* used_slot(self, uint32_t slot, uint32_t block=0) except NULL:
        cdef Device* d = self.opened()
        if slot >= d.slot_count or d.slots[slot].state != SLOT_USED or block >= <uint32_t>TAGS_PER_SLOT:
            raise ValueError(f"{self.path}: block {block} of slot {slot} is not in use")
        return d

    def recover(self):
        """Makes the device fit to serve, after a crash or a clean stop alike; once per open.

        Replays the journal, repairs the slot table, verifies the blocks of dirty slots and marks those unknown whose
        bytes are not their tag's, and makes all that durable. Returns, and keeps the first two as attributes:

        - ``dirty``: (volume id, chunk index, slot) of chunks that may differ from their other copy
        - ``freed``: (volume id, chunk index) of those whose slot was taken back: absent here, perhaps not there
        - ``lost``, ``lost_reasons``: slots whose chunk cannot be told; they are not given out again
        - ``mended``: entries of the slot table that had rotted, and are known all the same
        - ``unsure``: a chunk that is in no slot may be lost; until ``sure``, over any number of starts
        - ``clean records generations journal_damaged superblock_restored unknown_blocks never_blocks punched carried``,
          ``used free``

        ``dirty`` and ``freed`` stay in the journal until a checkpoint voids it: checkpoint only when they are in sync,
        or append intents for them again. Raises ``OSError``; the device is then to be closed.
        """
        cdef Device* d = self.opened()
        cdef Own* own = own_of(d)
        cdef Journal* journal = journal_of(d)
        if own.serving:
            raise RuntimeError(f"{self.path}: recovered already")
        # What is read may be in the page cache only: it is acted upon, so it becomes durable first.
        if disk_fdatasync(d.journal_fd):
            raise_errno(device_fail(d, -errno), self.path)
        summary = recover_device(d, journal, self.restored, self.path)
        punch, carry, changed = summary.pop("punch"), summary.pop("carry"), summary.pop("changed")
        unsure = d.superblock.unsure
        if summary["lost"] or summary["journal_damaged"]:
            unsure |= UNSURE_SLOTS
        if summary["journal_damaged"]:
            unsure |= UNSURE_INTENTS
        if unsure != d.superblock.unsure:                  # before what shows it is overwritten
            d.superblock.unsure = unsure
            raise_errno(superblock_write(d.directory_fd, d.superblock), self.path)
        own.entries_repaired = summary["mended"]
        for slot in changed:
            raise_errno(device_entry_store(d, slot), self.path)
        # So are entries that say that a slot is free, before its blocks and tags go.
        if punch and disk_fdatasync(d.slot_fd):
            raise_errno(device_fail(d, -errno), self.path)
        for slot in punch:
            raise_errno(tags_reserve(d, slot), self.path)
            own.to_punch[own.to_punch_count] = slot
            own.to_punch_count += 1
        raise_errno(device_sync_all(d), self.path)
        for volume_id, chunk_index, slot, epoch in carry:
            raise_errno(journal_append(journal, journal.capacity, JOURNAL_DIRTY, volume_id, chunk_index, slot, epoch),
                        self.path)
        raise_errno(device_journal_commit(d), self.path)
        d.superblock.unsure &= ~<uint32_t>UNSURE_INTENTS   # each has one again; the superblock's next writing tells
        if summary["generations"] > 1:
            raise_errno(device_journal_void(d), self.path)
        self.collect_vacant()
        own.serving = True
        self.dirty, self.freed = summary["dirty"], summary["freed"]
        return summary | {"clean": self.was_clean, "punched": len(punch), "carried": len(carry),
                          "used": self.used, "free": self.free, "unsure": self.unsure}

    cdef collect_vacant(self):
        """Highest first, so that the lowest is given out first and the files stay short."""
        cdef Device* d = self.device
        cdef uint32_t slot = d.slot_count
        d.free_count = 0
        own_of(d).lost_count = 0
        while slot:
            slot -= 1
            if d.slots[slot].state == SLOT_FREE:
                own_of(d).vacant[d.free_count] = slot
                d.free_count += 1
            elif d.slots[slot].state == SLOT_LOST:
                own_of(d).lost_count += 1

    def set_sds(self, uint32_t sds_id, uint64_t incarnation):
        """Durably, before IO: the SDS that the device belongs to, and the incarnation that its devices share."""
        cdef Device* d = self.opened()
        cdef Superblock* s = d.superblock
        if not 1 <= sds_id <= SDS_ID_MAX or s.sds_id not in (0, sds_id):
            raise DeviceFormatError(f"{self.path}: the device belongs to SDS {s.sds_id}, not {sds_id}")
        if not s.incarnation <= incarnation <= INCARNATION_MAX:
            raise ValueError(f"incarnation {incarnation} is not {s.incarnation} to {INCARNATION_MAX}")
        if s.durable_incarnation == s.incarnation:
            s.durable_incarnation = incarnation
        s.sds_id, s.incarnation = sds_id, incarnation
        journal_of(d).incarnation = <uint32_t>incarnation
        raise_errno(superblock_write(d.directory_fd, d.superblock), self.path)

    def close(self, clean=True):
        """Syncs (when ``clean``) and lets go. Makes no checkpoint: the journal keeps its records. Idempotent."""
        cdef Device* d = self.device
        cdef int error = 0
        if d.journal == NULL:
            return
        if clean and own_of(d).serving:
            error = device_sync_all(d)
            if not error:
                error = device_journal_commit(d)
            if not error:
                d.superblock.clean = 1
                error = superblock_write(d.directory_fd, d.superblock)
        self.release()
        raise_errno(error, self.path)

    @property
    def size(self):
        return <uint64_t>self.device.slot_count * SLOT_SIZE

    @property
    def slots(self):
        return self.device.slot_count

    @property
    def free(self):
        return self.device.free_count

    @property
    def quarantined(self):
        return self.device.quarantine_count

    @property
    def used(self):
        cdef Device* d = self.device
        return d.slot_count - d.free_count - d.quarantine_count - own_of(d).lost_count

    @property
    def index(self):
        return self.device.index

    @property
    def incarnation(self):
        return self.device.superblock.incarnation

    @property
    def durable_incarnation(self):
        return self.device.superblock.durable_incarnation

    @property
    def sds_id(self):
        return self.device.superblock.sds_id

    @property
    def device_id(self):
        return (<char*>self.device.superblock.device_id)[:16]

    @property
    def cluster_id(self):
        return (<char*>self.device.superblock.cluster_id)[:16]

    @property
    def generation(self):
        return journal_of(self.opened()).generation

    @property
    def unsure(self):
        return bool(self.device.superblock.unsure & UNSURE_SLOTS)

    @property
    def entries_repaired(self):
        """Of the slot table's file, since it was opened."""
        return own_of(self.device).entries_repaired

    @property
    def failed(self):
        """The errno that took the device out of service, 0 in service."""
        return pfvol_load_int(&self.device.failed)

    def used_slots(self):
        """``(slot, volume_id, chunk_index, epoch)`` of every slot in use."""
        cdef Device* d = self.opened()
        cdef uint32_t slot
        for slot in range(d.slot_count):
            if d.slots[slot].state == SLOT_USED:
                yield slot, d.slots[slot].volume_id, d.slots[slot].chunk_index, d.slots[slot].epoch

    # -- the C functions, for tests and offline tools: the engine calls them directly

    def alloc(self, uint64_t volume_id, uint32_t chunk_index, uint32_t epoch=1):
        cdef int64_t slot = device_slot_alloc(self.opened(), volume_id, chunk_index, epoch)
        raise_errno(slot, self.path)
        return slot

    def free_slot(self, uint32_t slot):
        raise_errno(device_slot_free(self.opened(), slot), self.path)

    def sure(self):
        raise_errno(device_sure(self.opened()), self.path)

    def intent(self, uint64_t volume_id, uint32_t chunk_index, uint32_t slot):
        cdef int64_t count = device_intent(self.opened(), volume_id, chunk_index, slot)
        raise_errno(count, self.path)
        return count

    @property
    def journal_appended(self):
        return device_journal_appended(self.opened())

    @property
    def journal_durable(self):
        return device_journal_durable(self.opened())

    def commit(self):
        cdef Device* d = self.opened()
        cdef int error
        with nogil:
            error = device_journal_commit(d)
        raise_errno(error, self.path)

    @property
    def tags_settled(self):
        return device_tags_settled(self.opened())

    def sync(self):
        cdef Device* d = self.opened()
        cdef int error
        device_sync_begin(d)
        with nogil:
            error = device_sync_all(d)
        raise_errno(error, self.path)

    def checkpoint_begin(self):
        cdef int64_t generation = device_checkpoint_begin(self.opened())
        raise_errno(generation, self.path)
        return generation

    def journal_void(self):
        cdef Device* d = self.opened()
        cdef int error
        with nogil:
            error = device_journal_void(d)
        raise_errno(error, self.path)

    def checkpoint_end(self):
        device_checkpoint_end(self.opened())

    def checkpoint(self):
        """The whole sequence, with nothing in flight."""
        self.checkpoint_begin()
        self.sync()
        self.journal_void()
        self.checkpoint_end()

    def tag(self, uint32_t slot, uint32_t block):
        """``(check, epoch, seq)`` of a block."""
        cdef Tag* tag = device_tags(self.used_slot(slot, block), slot) + block
        return tag_check(tag), tag.epoch, tag.seq

    def write_block(self, uint32_t slot, uint32_t block, const uint8_t[::1] data, uint32_t epoch, uint64_t seq):
        """Writes a block and its tag, as the engine does after the chunk's intent is durable."""
        cdef Device* d = self.used_slot(slot, block)
        cdef SlotEntry* entry = d.slots + slot
        cdef uint32_t check
        if data.shape[0] != BLOCK_SIZE:
            raise ValueError(f"a block has {BLOCK_SIZE} bytes, not {data.shape[0]}")
        raise_errno(write_all(d.block_fd, &data[0], BLOCK_SIZE, device_offset(slot) + block * <uint64_t>BLOCK_SIZE),
                    self.path)
        check = crc32c(block_seed(entry.volume_id, entry.chunk_index, block), &data[0], BLOCK_SIZE)
        tag_set(device_tags(d, slot) + block, check, epoch, seq)
        d.needs_sync = True

    def read_block(self, uint32_t slot, uint32_t block):
        """``(bytes, whether they match the tag)``."""
        cdef Device* d = self.used_slot(slot, block)
        cdef SlotEntry* entry = d.slots + slot
        data = bytearray(BLOCK_SIZE)
        cdef uint8_t[::1] view = data
        raise_errno(read_all(d.block_fd, &view[0], BLOCK_SIZE, device_offset(slot) + block * <uint64_t>BLOCK_SIZE),
                    self.path)
        check = crc32c(block_seed(entry.volume_id, entry.chunk_index, block), &view[0], BLOCK_SIZE)
        return bytes(data), check == tag_check(device_tags(d, slot) + block)

    def verify_slot(self, uint32_t slot):
        """The blocks of a slot whose bytes are not those of their tag."""
        cdef Device* d = self.used_slot(slot)
        cdef SlotEntry* entry = d.slots + slot
        cdef uint8_t[128] bad
        cdef int count
        cdef char* scratch = <char*>malloc(SLOT_SIZE)
        if scratch == NULL:
            raise MemoryError()
        try:
            with nogil:
                count = device_verify_slot(d, entry.volume_id, entry.chunk_index, slot, scratch, bad)
        finally:
            free(scratch)
        raise_errno(count, self.path)
        return [block for block in range(TAGS_PER_SLOT) if bad[block >> 3] >> (block & 7) & 1]
