"""A device that is open: slots, intents, tags, syncs, checkpoints (see device.pxd). No function raises."""

from libc.errno cimport EAGAIN, EBUSY, EINVAL, EIO, ENOSPC, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t, int64_t
from libc.string cimport memcmp, memset
from posix.types cimport off_t
from datapath.checksum cimport crc32c
from datapath.deviceformat cimport superblock_write
from datapath.disk cimport disk_fdatasync, disk_punch, disk_pwrite, disk_reserve, disk_sync_pages
from datapath.journal cimport (
    Journal, journal_append, journal_begin, journal_commit, journal_commit_locked, pfvol_load, pfvol_load_int,
    pfvol_store, pfvol_store_int, pthread_mutex_lock, pthread_mutex_unlock, read_all)
from datapath.ondisk cimport (
    JOURNAL_ALLOC, JOURNAL_DIRTY, JOURNAL_FREE, SLOT_ENTRY_SIZE, SLOT_FREE, SLOT_LOST, SLOT_NONE, SLOT_SIZE,
    SLOT_TAGS_SIZE, SLOT_USED, TAG_SIZE, TAGS_PER_SLOT, SlotEntry, Tag)
from datapath.tags cimport tag_set_never, tags_verify

cdef extern from "<fcntl.h>" nogil:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    extern int sync_file_range(int, off_t, off_t, unsigned int);
    #define SYNC_FILE_RANGE_WRITE 2  /* glibc shows it with _GNU_SOURCE only, which Python.h may have come before */
    """
    int sync_file_range(int fd, off_t offset, off_t size, unsigned int flags)
    unsigned int SYNC_FILE_RANGE_WRITE


cdef enum:
    CHECKS_PER_SYNC = 256            # pages of the slot table: 1 MiB, the entries of 128 GiB


cdef Own* own_of(Device* d) noexcept nogil:
    return <Own*>d.own


cdef Journal* journal_of(Device* d) noexcept nogil:
    return <Journal*>d.journal


cdef int device_fail(Device* d, int error) noexcept nogil:
    """Takes the device out of service for -errno `error`; the first one counts. The caller does not hold the
    journal's lock.

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
    if disk_reserve(d.tag_fd, <off_t>first * SLOT_TAGS_SIZE, <off_t>count * SLOT_TAGS_SIZE):
        return -errno
    own.tag_groups[slot // TAG_GROUP] = 1
    return 0


cdef int device_entry_store(Device* d, uint32_t slot) noexcept nogil:
    cdef ssize_t got = disk_pwrite(d.slot_fd, d.slots + slot, SLOT_ENTRY_SIZE, <off_t>slot * SLOT_ENTRY_SIZE)
    if got == SLOT_ENTRY_SIZE:
        return 0
    return device_fail(d, -errno if got < 0 else -EIO)


cdef int entry_write(Device* d, uint32_t slot, uint32_t state, uint64_t volume_id, uint32_t chunk_index,
                     uint32_t epoch) noexcept nogil:
    cdef SlotEntry* entry = d.slots + slot
    cdef int error
    pthread_mutex_lock(&own_of(d).slots_lock)
    entry.volume_id = volume_id
    entry.chunk_index = chunk_index
    entry.state = state
    entry.epoch = epoch
    entry.generation = <uint32_t>journal_of(d).generation
    entry.slot = slot
    entry.crc = crc32c(0, entry, SLOT_ENTRY_SIZE - 4)
    error = device_entry_store(d, slot)
    pthread_mutex_unlock(&own_of(d).slots_lock)
    return error


cdef int out_of_service(Device* d) noexcept nogil:
    if pfvol_load_int(&d.failed):
        return -d.failed
    return 0 if own_of(d).serving else -EINVAL


cdef int device_tags_write(Device* d, uint32_t slot, uint32_t first, uint32_t count,
                           const Tag* tags) noexcept nogil:
    cdef size_t size = <size_t>count * TAG_SIZE
    cdef ssize_t got = disk_pwrite(d.tag_fd, tags, size, (<off_t>slot * TAGS_PER_SLOT + first) * TAG_SIZE)
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
    pfvol_store(&own.tags_given, own.tags_given + 1)
    error = entry_write(d, slot, SLOT_USED, volume_id, chunk_index, epoch)
    d.needs_sync = True
    return error if error else slot


cdef int device_slot_free(Device* d, uint32_t slot) noexcept nogil:
    cdef int error = out_of_service(d)
    if error:
        return error
    if slot >= d.slot_count or d.slots[slot].state != SLOT_USED:
        return -EINVAL
    return give_back(d, slot)


cdef int give_back(Device* d, uint32_t slot) noexcept nogil:
    cdef Own* own = own_of(d)
    cdef SlotEntry* entry = d.slots + slot
    cdef int error
    if journal_append(journal_of(d), journal_of(d).running, JOURNAL_FREE, entry.volume_id, entry.chunk_index, slot,
                      entry.epoch) < 0:
        return -EAGAIN
    error = entry_write(d, slot, SLOT_FREE, entry.volume_id, entry.chunk_index, entry.epoch)
    if error:
        return error
    own.resting[d.quarantine_count] = slot
    d.quarantine_count += 1
    pthread_mutex_lock(&own.punch_list_lock)
    own.to_punch[own.to_punch_count] = slot
    own.to_punch_count += 1
    pthread_mutex_unlock(&own.punch_list_lock)
    d.needs_sync = True
    return 0


cdef int device_sure(Device* d) noexcept nogil:
    cdef uint32_t slot
    cdef int error = out_of_service(d)
    for slot in range(d.slot_count):
        if not error and d.slots[slot].state == SLOT_LOST:
            error = give_back(d, slot)
            own_of(d).lost_count -= not error
    if error:
        return error
    pthread_mutex_lock(&journal_of(d).lock)
    d.superblock.unsure = 0
    pthread_mutex_unlock(&journal_of(d).lock)
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
    """Punches what was freed so far and blanks its tags; returns when that is done, also by another thread: how many.

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
        if disk_punch(d.block_fd, <off_t>device_offset(slot), SLOT_SIZE):
            error = -errno
        else:
            error = device_tags_write(d, slot, 0, TAGS_PER_SLOT, blank)
    pthread_mutex_unlock(&own.punch_lock)
    return error if error else <int>count


cdef bint device_tags_settled(Device* d) noexcept nogil:
    cdef Own* own = own_of(d)
    return own.in_place and pfvol_load(&own.tags_synced) >= pfvol_load(&own.tags_given)


cdef int sync_tags(Device* d, bint blanked) noexcept nogil:
    """Brings the tags to the disk; the sync of the block file that follows has the disk empty its cache.

    A tag table whose slots all have durable places is only overwritten where it is. Writing its pages is then all, and
    spares a sync its second turn through inode, disk cache and back (ext4 without a journal: 110 us instead of 209).
    """
    cdef Own* own = own_of(d)
    cdef uint64_t given = pfvol_load(&own.tags_given)
    if not blanked and device_tags_settled(d):
        sync_file_range(d.tag_fd, 0, 0, SYNC_FILE_RANGE_WRITE)
        sync_file_range(d.block_fd, 0, 0, SYNC_FILE_RANGE_WRITE)
        return -errno if disk_sync_pages(d.tag_fd) else 0
    if disk_fdatasync(d.tag_fd):
        return -errno
    pfvol_store(&own.tags_synced, given)
    return 0


cdef int device_sync(Device* d) noexcept nogil:
    cdef int error = pfvol_load_int(&d.failed)
    if error:
        return -error
    error = punch_freed(d)
    if error >= 0:
        error = sync_tags(d, error > 0)
    if error >= 0 and disk_fdatasync(d.block_fd):
        error = -errno
    if error < 0:
        return device_fail(d, error)
    # Another thread's sync may have been told of an error that concerns this one's data too.
    return -pfvol_load_int(&d.failed)


cdef void device_writeback(Device* d) noexcept nogil:
    sync_file_range(d.block_fd, 0, 0, SYNC_FILE_RANGE_WRITE)


cdef int slots_check(Device* d) noexcept nogil:
    """Compares a part of the slot table's file with what it has to hold, and writes anew what has rotted there."""
    cdef Own* own = own_of(d)
    cdef SlotEntry[128] found
    cdef uint32_t first, count, i, _turn
    cdef int error = 0
    for _turn in range(min(<uint32_t>CHECKS_PER_SYNC, (d.slot_count + 127) // 128)):
        pthread_mutex_lock(&own.slots_lock)
        first = own.slots_checked
        count = min(<uint32_t>128, d.slot_count - first)
        own.slots_checked = first + count if first + count < d.slot_count else 0
        error = read_all(d.slot_fd, found, count * SLOT_ENTRY_SIZE, <uint64_t>first * SLOT_ENTRY_SIZE)
        for i in range(count):
            if not error and memcmp(&found[i], d.slots + first + i, SLOT_ENTRY_SIZE):
                own.entries_repaired += 1
                error = device_entry_store(d, first + i)
        pthread_mutex_unlock(&own.slots_lock)
        if error:
            return error
    return 0


cdef int device_sync_all(Device* d) noexcept nogil:
    cdef int error = device_sync(d)
    if not error:
        error = slots_check(d)
        error = device_fail(d, error) if error else 0
    if not error and disk_fdatasync(d.slot_fd):
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
