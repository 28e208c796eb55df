"""A device of an SDS: a directory with a superblock, a sparse block file, slots, tags and an intent journal.

Owns the files and mappings of one device, and who holds which slot. The format is in ondisk.pxd, which function
belongs to which thread in blockfile.pxd. Promises that a slot is given out only when its old bytes are punched and its
tags have room on the disk, that what a commit or sync reported as durable is, and that the first error of the host's
disk takes the device out of service: a later sync never claims what the failed one lost.
"""
from libc.errno cimport EAGAIN, EBUSY, EINVAL, EIO, ENOSPC, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t, int64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcmp, memcpy, memset
from posix.mman cimport MADV_RANDOM, MAP_FAILED, MAP_SHARED, PROT_READ, PROT_WRITE, madvise, mmap, munmap
from posix.types cimport off_t
import fcntl
import os
from datapath.checksum cimport block_seed, crc32c
from datapath.deviceformat cimport (
    check_sizes, create_device, id_bytes, raise_errno, require, superblock_parse, superblock_write)
from datapath.journal cimport (
    Journal, journal_append, journal_begin, journal_commit, journal_commit_locked, journal_delete, journal_new,
    journal_read_header, pfvol_load, pfvol_load_int, pfvol_store_int, pthread_mutex_destroy, pthread_mutex_init,
    pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock, read_all, write_all)
from datapath.ondisk cimport (
    INCARNATION_MAX, JOURNAL_ALLOC, JOURNAL_DIRTY, JOURNAL_FREE, SDS_ID_MAX, SLOT_ENTRY_SIZE, SLOT_FREE, SLOT_LOST,
    SLOT_NONE, SLOT_SIZE, SLOT_TAGS_SIZE, SLOT_USED, TAG_SIZE, TAGS_PER_SLOT, SlotEntry, Superblock,
    Tag)
from datapath.recovery cimport recover_device
from datapath.deviceformat import FILES, DeviceFormatError, boot_id_now
from datapath.tags cimport tag_check, tag_set, tag_set_never, tags_verify

cdef extern from "<fcntl.h>" nogil:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <linux/falloc.h>
    extern int fallocate(int, int, off_t, off_t);
    """
    int fallocate(int fd, int mode, off_t offset, off_t size)
    int FALLOC_FL_KEEP_SIZE
    int FALLOC_FL_PUNCH_HOLE

cdef extern from "<unistd.h>" nogil:
    int fdatasync(int fd)
    ssize_t pwrite(int fd, const void* data, size_t size, off_t offset)
    int c_close "close"(int fd)

cdef enum:
    BLOCK_SIZE = 4096
    TAG_GROUP = 64                   # slots whose tags are preallocated together: one call per 256 MiB of data

NO_SLOT = <uint32_t>SLOT_NONE

cdef struct Own:
    bint serving                     # recovered: shard functions may be called
    bint checkpointing               # shard
    uint32_t* vacant                 # shard: stack of slots that can be given out, free_count of them
    uint32_t* resting                # shard: quarantine, oldest first, quarantine_count of them
    uint32_t resting_before          # shard: how many of them were there when the checkpoint began
    uint8_t* tag_groups              # shard: 1 when the tags of the group have room on the disk
    uint32_t* to_punch               # under punch_list_lock
    uint32_t to_punch_count          # under punch_list_lock
    uint32_t* punching               # under punch_lock
    pthread_mutex_t punch_list_lock  # held for a few instructions
    pthread_mutex_t punch_lock       # held while holes are punched


cdef Own* own_of(Device* d) noexcept nogil:
    return <Own*>d.own


cdef Journal* journal_of(Device* d) noexcept nogil:
    return <Journal*>d.journal


cdef int device_fail(Device* d, int error) noexcept nogil:
    """Takes the device out of service for -errno `error`; the first one counts. The caller holds no lock of the device.

    The page cache may have dropped what could not be written, so acknowledgements of this boot no longer hold: a boot
    id of zeros makes the next start a durable incarnation of its own. When even that cannot be written, the tags are
    the last line.
    """
    cdef Journal* journal = journal_of(d)
    if pfvol_load_int(&d.failed) == 0:
        pthread_mutex_lock(&journal.lock)
        if d.failed == 0:
            pfvol_store_int(&d.failed, -error)
            memset(d.superblock.boot_id, 0, 16)
            superblock_write(d.directory_fd, d.superblock)
        pthread_mutex_unlock(&journal.lock)
    return error


# -- shard

cdef int tags_reserve(Device* d, uint32_t slot) noexcept nogil:
    """Makes the disk keep room for the slot's tags: a store to a mapped hole of a full disk would be a SIGBUS."""
    cdef Own* own = own_of(d)
    cdef uint32_t first = slot // TAG_GROUP * TAG_GROUP
    cdef uint32_t count = min(<uint32_t>TAG_GROUP, d.slot_count - first)
    if own.tag_groups[slot // TAG_GROUP]:
        return 0
    if fallocate(d.tag_fd, 0, <off_t>first * SLOT_TAGS_SIZE, <off_t>count * SLOT_TAGS_SIZE):
        return -errno
    own.tag_groups[slot // TAG_GROUP] = 1
    return 0


cdef void entry_write(Device* d, uint32_t slot, uint32_t state, uint64_t volume_id, uint32_t chunk_index,
                      uint32_t epoch) noexcept nogil:
    cdef SlotEntry* entry = d.slots + slot
    entry.volume_id = volume_id
    entry.chunk_index = chunk_index
    entry.state = state
    entry.epoch = epoch
    entry.generation = <uint32_t>journal_of(d).generation
    entry.slot = slot
    entry.crc = crc32c(0, entry, SLOT_ENTRY_SIZE - 4)


cdef int out_of_service(Device* d) noexcept nogil:
    if pfvol_load_int(&d.failed):
        return -d.failed
    return 0 if own_of(d).serving else -EINVAL


cdef int device_tags_write(Device* d, uint32_t slot, uint32_t first, uint32_t count,
                           const Tag* tags) noexcept nogil:
    cdef size_t size = <size_t>count * TAG_SIZE
    cdef ssize_t got = pwrite(d.tag_fd, tags, size, (<off_t>slot * TAGS_PER_SLOT + first) * TAG_SIZE)
    if got == <ssize_t>size:
        return 0
    return device_fail(d, -errno if got < 0 else -EIO)


cdef int64_t device_slot_alloc(Device* d, uint64_t volume_id, uint32_t chunk_index, uint32_t epoch) noexcept nogil:
    cdef Own* own = own_of(d)
    cdef uint32_t slot, block
    cdef Tag never[1024]
    cdef int error = out_of_service(d)
    if error:
        return error
    if d.free_count == 0:
        return -ENOSPC
    slot = own.vacant[d.free_count - 1]
    error = tags_reserve(d, slot)
    if error:
        return error
    if journal_append(journal_of(d), journal_of(d).running, JOURNAL_ALLOC, volume_id, chunk_index, slot, epoch) < 0:
        return -EAGAIN
    d.free_count -= 1
    for block in range(<uint32_t>TAGS_PER_SLOT):
        tag_set_never(never + block, volume_id, chunk_index, block)
    error = device_tags_write(d, slot, 0, TAGS_PER_SLOT, never)
    if error:
        return error
    entry_write(d, slot, SLOT_USED, volume_id, chunk_index, epoch)
    d.needs_sync = True
    return slot


cdef int device_slot_free(Device* d, uint32_t slot) noexcept nogil:
    cdef Own* own = own_of(d)
    cdef SlotEntry* entry = d.slots + slot
    cdef int error = out_of_service(d)
    if error:
        return error
    if slot >= d.slot_count or entry.state != SLOT_USED:
        return -EINVAL
    if journal_append(journal_of(d), journal_of(d).running, JOURNAL_FREE, entry.volume_id, entry.chunk_index, slot,
                      entry.epoch) < 0:
        return -EAGAIN
    entry_write(d, slot, SLOT_FREE, entry.volume_id, entry.chunk_index, entry.epoch)
    own.resting[d.quarantine_count] = slot
    d.quarantine_count += 1
    pthread_mutex_lock(&own.punch_list_lock)
    own.to_punch[own.to_punch_count] = slot
    own.to_punch_count += 1
    pthread_mutex_unlock(&own.punch_list_lock)
    d.needs_sync = True
    return 0


cdef int64_t device_intent(Device* d, uint64_t volume_id, uint32_t chunk_index, uint32_t slot) noexcept nogil:
    cdef int error = out_of_service(d)
    if error:
        return error
    if slot != <uint32_t>SLOT_NONE and slot >= d.slot_count:
        return -EINVAL
    return journal_append(journal_of(d), journal_of(d).running, JOURNAL_DIRTY, volume_id, chunk_index, slot,
                          d.slots[slot].epoch if slot != <uint32_t>SLOT_NONE else 0)


cdef uint64_t device_journal_appended(Device* d) noexcept nogil:
    return pfvol_load(&journal_of(d).appended)


cdef uint64_t device_journal_durable(Device* d) noexcept nogil:
    return pfvol_load(&journal_of(d).durable)


cdef int64_t device_checkpoint_begin(Device* d) noexcept nogil:
    cdef Own* own = own_of(d)
    cdef int error = out_of_service(d)
    if error:
        return error
    if own.checkpointing:
        return -EBUSY
    own.checkpointing = True
    own.resting_before = d.quarantine_count
    return <int64_t>journal_begin(journal_of(d))


cdef void device_checkpoint_end(Device* d) noexcept nogil:
    cdef Own* own = own_of(d)
    cdef uint32_t i
    if not own.checkpointing or d.failed:
        return
    for i in range(own.resting_before):
        own.vacant[d.free_count] = own.resting[i]
        d.free_count += 1
    d.quarantine_count -= own.resting_before
    for i in range(d.quarantine_count):
        own.resting[i] = own.resting[i + own.resting_before]
    own.resting_before = 0
    own.checkpointing = False


cdef void device_sync_begin(Device* d) noexcept nogil:
    d.needs_sync = False


# -- pool

cdef int device_journal_commit(Device* d) noexcept nogil:
    cdef int error = pfvol_load_int(&d.failed)
    if error:
        return -error
    error = journal_commit(journal_of(d))
    return device_fail(d, error) if error else 0


cdef Tag blank[1024]                 # zeros: as they were before the slot was given out


cdef int punch_freed(Device* d) noexcept nogil:
    """Punches what was freed so far and blanks its tags; returns when that is done, also by another thread.

    The records are made durable first: a chunk whose FREE is lost with the power must still have its bytes.
    """
    cdef Own* own = own_of(d)
    cdef uint32_t count, i, slot
    cdef int error = 0
    pthread_mutex_lock(&own.punch_lock)
    pthread_mutex_lock(&own.punch_list_lock)
    own.punching, own.to_punch = own.to_punch, own.punching
    count = own.to_punch_count
    own.to_punch_count = 0
    pthread_mutex_unlock(&own.punch_list_lock)
    if count:
        error = journal_commit(journal_of(d))
    for i in range(count):
        if error:
            break
        slot = own.punching[i]
        if fallocate(d.block_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, <off_t>device_offset(slot), SLOT_SIZE):
            error = -errno
        else:
            error = device_tags_write(d, slot, 0, TAGS_PER_SLOT, blank)
    pthread_mutex_unlock(&own.punch_lock)
    return error


cdef int device_sync(Device* d) noexcept nogil:
    cdef int error = pfvol_load_int(&d.failed)
    if error:
        return -error
    error = punch_freed(d)
    if not error and (fdatasync(d.block_fd) or fdatasync(d.tag_fd)):
        error = -errno
    if error:
        return device_fail(d, error)
    # Another thread's sync may have been told of an error that concerns this one's data too.
    return -pfvol_load_int(&d.failed)


cdef int device_sync_all(Device* d) noexcept nogil:
    cdef int error = device_sync(d)
    if not error and fdatasync(d.slot_fd):
        error = device_fail(d, -errno)
    return error


cdef int device_journal_void(Device* d) noexcept nogil:
    cdef Journal* journal = journal_of(d)
    cdef int error = pfvol_load_int(&d.failed)
    if error:
        return -error
    pthread_mutex_lock(&journal.lock)
    error = journal_commit_locked(journal)
    if not error:
        d.superblock.journal_generation = pfvol_load(&journal.generation)
        error = superblock_write(d.directory_fd, d.superblock)
    pthread_mutex_unlock(&journal.lock)
    return device_fail(d, error) if error else 0


cdef int device_verify_slot(Device* d, uint64_t volume_id, uint32_t chunk_index, uint32_t slot,
                            char* scratch, uint8_t* bad) noexcept nogil:
    cdef int error
    if slot >= d.slot_count:
        return -EINVAL
    error = read_all(d.block_fd, scratch, SLOT_SIZE, device_offset(slot))
    if error:
        return error
    return tags_verify(device_tags(d, slot), volume_id, chunk_index, scratch, bad)


# -- open and close

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

    def __dealloc__(self):
        if self.device == NULL:
            return
        self.release()
        if self.device.own != NULL:
            pthread_mutex_destroy(&own_of(self.device).punch_list_lock)
            pthread_mutex_destroy(&own_of(self.device).punch_lock)
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
            superblock_parse(self.device.superblock, self.path, cluster_id)
            check_sizes(self.path, self.device.superblock.slot_count)
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
        mapping = mmap(NULL, <size_t>d.slot_count * SLOT_ENTRY_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, d.slot_fd, 0)
        if mapping == MAP_FAILED:
            raise OSError(errno, os.strerror(errno), self.path)
        d.slots = <SlotEntry*>mapping
        mapping = mmap(NULL, <size_t>d.slot_count * SLOT_TAGS_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, d.tag_fd, 0)
        if mapping == MAP_FAILED:
            raise OSError(errno, os.strerror(errno), self.path)
        d.tags = <Tag*>mapping
        # Read-ahead of a fault would make large folios, and ext4 walks all of a folio's blocks at each write to it.
        madvise(mapping, <size_t>d.slot_count * SLOT_TAGS_SIZE, MADV_RANDOM)

    cdef rise(self, bytes boot_id):
        """The next incarnation. What an older one of this boot acknowledged is in the page cache still."""
        cdef Superblock* s = self.device.superblock
        s.incarnation += 1
        self.was_clean = bool(s.clean)
        s.clean = 0
        if s.durable_incarnation == 0 or memcmp(s.boot_id, <const char*>boot_id, 16) != 0:
            s.durable_incarnation = s.incarnation
        memcpy(s.boot_id, <const char*>boot_id, 16)

    cdef prepare(self):
        cdef Device* d = self.device
        cdef Own* own = own_of(d)
        cdef uint64_t generation = 0
        cdef int found
        cdef uint32_t groups = (d.slot_count + TAG_GROUP - 1) // TAG_GROUP
        d.journal = journal_new(d.journal_fd, d.slot_count, <uint32_t>d.superblock.incarnation, d.superblock.device_id)
        own.vacant = <uint32_t*>malloc(4 * <size_t>d.slot_count)
        own.resting = <uint32_t*>malloc(4 * <size_t>d.slot_count)
        own.to_punch = <uint32_t*>malloc(4 * <size_t>d.slot_count)
        own.punching = <uint32_t*>malloc(4 * <size_t>d.slot_count)
        own.tag_groups = <uint8_t*>calloc(groups, 1)
        if (d.journal == NULL or own.vacant == NULL or own.resting == NULL or own.to_punch == NULL
                or own.punching == NULL or own.tag_groups == NULL):
            raise MemoryError()
        found = journal_read_header(journal_of(d), d.superblock.journal_generation % 2, &generation)
        file = os.path.join(self.path, "journal")
        require(found == 1, file, f"the header of generation {d.superblock.journal_generation} is damaged")
        require(generation == d.superblock.journal_generation, file,
                f"has generation {generation} where {d.superblock.journal_generation} is due")
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
        if d.slots != NULL:
            munmap(d.slots, <size_t>d.slot_count * SLOT_ENTRY_SIZE)
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
        - ``clean records generations journal_damaged unknown_blocks never_blocks punched carried used free``

        ``dirty`` and ``freed`` stay in the journal until a checkpoint voids it: checkpoint only when they are in sync,
        or append intents for them again. Raises ``OSError``; the device is then to be closed.
        """
        cdef Device* d = self.opened()
        cdef Own* own = own_of(d)
        cdef Journal* journal = journal_of(d)
        if own.serving:
            raise RuntimeError(f"{self.path}: recovered already")
        # What is read may be in the page cache only: it is acted upon, so it becomes durable first.
        if fdatasync(d.journal_fd):
            raise_errno(device_fail(d, -errno), self.path)
        summary = recover_device(d, journal, self.path)
        punch, carry = summary.pop("punch"), summary.pop("carry")
        for slot in punch:
            raise_errno(tags_reserve(d, slot), self.path)
            own.to_punch[own.to_punch_count] = slot
            own.to_punch_count += 1
        raise_errno(device_sync_all(d), self.path)
        for volume_id, chunk_index, slot, epoch in carry:
            raise_errno(journal_append(journal, journal.capacity, JOURNAL_DIRTY, volume_id, chunk_index, slot, epoch),
                        self.path)
        raise_errno(device_journal_commit(d), self.path)
        if summary["generations"] > 1:
            raise_errno(device_journal_void(d), self.path)
        self.collect_vacant()
        own.serving = True
        self.dirty, self.freed = summary["dirty"], summary["freed"]
        return summary | {"clean": self.was_clean, "punched": len(punch), "carried": len(carry),
                          "used": self.used, "free": self.free}

    cdef collect_vacant(self):
        """Highest first, so that the lowest is given out first and the files stay short."""
        cdef Device* d = self.device
        cdef uint32_t slot = d.slot_count
        d.free_count = 0
        self.lost_count = 0
        while slot:
            slot -= 1
            if d.slots[slot].state == SLOT_FREE:
                own_of(d).vacant[d.free_count] = slot
                d.free_count += 1
            elif d.slots[slot].state == SLOT_LOST:
                self.lost_count += 1

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
        return self.device.slot_count - self.device.free_count - self.device.quarantine_count - self.lost_count

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
