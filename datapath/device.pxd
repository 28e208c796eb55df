# A device: a directory with a superblock, a sparse block file, a slot table, a tag table and an intent journal.
#
# Threads: "shard" functions are called only by the shard's thread; "pool" functions by any thread of the IO pool, at
# most one of each kind per device at a time unless said otherwise. Errors are negative errno values. No function
# blocks on the disk except those marked pool, open and close.
from libc.stdint cimport uint8_t, uint32_t, uint64_t, int64_t
from datapath.journal cimport Journal, pthread_mutex_t
from datapath.ondisk cimport SlotEntry, Superblock, Tag

cdef enum:
    TAG_GROUP = 64                   # slots whose tags are preallocated together: one call per 256 MiB of data

cdef struct Device:
    int block_fd
    int tag_fd
    int slot_fd
    int journal_fd
    int directory_fd
    uint32_t index                   # position among the SDS's devices
    uint32_t slot_count
    uint32_t free_count              # slots that can be given out now
    uint32_t quarantine_count        # freed since the last checkpoint: given out again only after it
    SlotEntry* slots                 # in memory: what rots in the file changes nothing here
    Tag* tags                        # mmap
    Superblock* superblock           # in memory
    int failed                       # errno that took the device out of service, 0 in service
    bint needs_sync                  # shard: something was written since device_sync_begin
    void* journal                    # journal.pxd: struct Journal
    void* own                        # struct Own

cdef struct Own:
    bint serving                     # recovered: shard functions may be called
    bint checkpointing               # shard
    uint32_t* vacant                 # shard: stack of slots that can be given out, free_count of them
    uint32_t* resting                # shard: quarantine, oldest first, quarantine_count of them
    uint32_t resting_before          # shard: how many of them were there when the checkpoint began
    bint in_place                    # the file system overwrites a file's blocks where they are
    uint64_t tags_given              # shard: slots given out, and one for what was before
    uint64_t tags_synced             # of these, how many tags' places in the file are durable
    uint8_t* tag_groups              # shard: 1 when the tags of the group have room on the disk
    uint32_t lost_count              # shard: slots of which nobody knows what they hold
    uint32_t slots_checked           # pool: the file's entries are compared with memory from here on
    uint64_t entries_repaired        # of the file, whenever that was
    pthread_mutex_t slots_lock       # held while an entry, or a page of them, goes to the file
    uint32_t* to_punch               # under punch_list_lock
    uint32_t to_punch_count          # under punch_list_lock
    uint32_t* punching               # under punch_lock
    pthread_mutex_t punch_list_lock  # held for a few instructions
    pthread_mutex_t punch_lock       # held while holes are punched

# -- shard
# Gives a slot to the chunk: preallocates its tags (the hole was punched when it was freed), fills 1024 never-written
# tags, writes the entry, appends JOURNAL_ALLOC. Returns the slot, or -ENOSPC (no slot, or no room for its tags),
# -EAGAIN (the journal's half is full: a checkpoint has to end first), the errno of a failed device.
cdef int64_t device_slot_alloc(Device* d, uint64_t volume_id, uint32_t chunk_index, uint32_t epoch) noexcept nogil
# Takes the slot back (appends JOURNAL_FREE; the hole is punched by device_sync, the slot rests until the next
# checkpoint).
cdef int device_slot_free(Device* d, uint32_t slot) noexcept nogil

# What was lost to rot is made good: gives back the slots of which nobody knows what they hold, and takes the flags out of
# the superblock with the next checkpoint. -EAGAIN: the journal's half is full.
cdef int device_sure(Device* d) noexcept nogil

cdef inline Tag* device_tags(Device* d, uint32_t slot) noexcept nogil:
    return d.tags + <uint64_t>slot * 1024

# Writes `count` tags of a slot, from block `first` on. Through the file, not the mapping: a page that is only read
# through its mapping is cleaned without faults and without flushing TLBs, which made a sync 2.5 times slower. 0 or
# -errno.
cdef int device_tags_write(Device* d, uint32_t slot, uint32_t first, uint32_t count,
                           const Tag* tags) noexcept nogil

cdef inline uint64_t device_offset(uint32_t slot) noexcept nogil:
    return <uint64_t>slot << 22

# Appends JOURNAL_DIRTY for the chunk to the open generation. Returns the journal index that must be durable before the
# first byte is written, or -errno (-ENOSPC: the half is full, a checkpoint has to end first).
cdef int64_t device_intent(Device* d, uint64_t volume_id, uint32_t chunk_index, uint32_t slot) noexcept nogil
# The number of records (counted over the life of the process, never reset) appended / durable. What was appended at
# count n is durable when device_journal_durable(d) >= n.
cdef uint64_t device_journal_appended(Device* d) noexcept nogil
cdef uint64_t device_journal_durable(Device* d) noexcept nogil
# Starts a new generation: from now on intents go to the other half; returns it. The caller must append again an intent
# for each chunk with a write in flight. -EBUSY while a checkpoint is under way.
cdef int64_t device_checkpoint_begin(Device* d) noexcept nogil
# After device_sync_all and device_journal_void: quarantined slots that were freed before the begin can be given out.
cdef void device_checkpoint_end(Device* d) noexcept nogil
# Notes that something is about to be synced: clears needs_sync.
cdef void device_sync_begin(Device* d) noexcept nogil

# Takes the device out of service for -errno `error`, which it returns. Any thread.
cdef int device_fail(Device* d, int error) noexcept nogil

# -- pool
# Makes all records appended so far durable (pwrite + fdatasync); group commit. 0 or -errno.
cdef int device_journal_commit(Device* d) noexcept nogil
# Punches freed slots, syncs block file and tag table: what was written is safe, because the slot table can still be
# told again by the journal. 0 or -errno. Any thread, also several at once.
cdef int device_sync(Device* d) noexcept nogil
# Whether the place of every tag in its file is durable: a sync then only overwrites them where they are.
cdef bint device_tags_settled(Device* d) noexcept nogil
# Has the kernel begin to write the block file's dirty pages.
cdef void device_writeback(Device* d) noexcept nogil
# The slot table too: before older generations of the journal are voided.
cdef int device_sync_all(Device* d) noexcept nogil
# Voids the generations before the open one (superblock, durable).
cdef int device_journal_void(Device* d) noexcept nogil
# Reads the slot's 4 MiB and compares each block with its tag: fills bad[128] (one bit a block). Returns the count, or
# -errno. `scratch` is 4 MiB. The tags are read once, block by block: a block written meanwhile may show as bad, the
# caller decides.
cdef int device_verify_slot(Device* d, uint64_t volume_id, uint32_t chunk_index, uint32_t slot,
                            char* scratch, uint8_t* bad) noexcept nogil

# -- for who opens devices
# Writes the slot's entry to the file. 0 or -errno.
cdef int device_entry_store(Device* d, uint32_t slot) noexcept nogil
cdef Own* own_of(Device* d) noexcept nogil
cdef Journal* journal_of(Device* d) noexcept nogil
# Makes sure that the slot's tags have room on the disk. 0 or -errno.
cdef int tags_reserve(Device* d, uint32_t slot) noexcept nogil
