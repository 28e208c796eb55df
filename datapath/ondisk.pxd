# Everything that is written to an SDS's disk, whole: names, structures, limits. Little-endian. A change here is a new
# DISK_VERSION. Golden bytes: tests/golden/. Every structure carries its own crc32c and is checked field by field on
# open.
#
# A device is a directory:
#   superblock   4096 bytes      struct Superblock, replaced at each start and checkpoint (write-new, fsync, exchange)
#   blocks       slots * 4 MiB   sparse; slot n holds bytes [n * 4 MiB, (n + 1) * 4 MiB)
#   slots        slots * 32      struct SlotEntry, read at the start and kept in memory
#   tags         slots * 16 KiB  struct Tag[1024] per slot, mmapped; preallocated when the slot is, so that a store to
#                                the mapping cannot meet a full disk
#   journal      two halves      generation g uses half g % 2: a JOURNAL_BLOCK with struct JournalHeader,
#                                then JOURNAL_RECORDS_PER_SLOT * slots + JOURNAL_RECORDS_EXTRA struct JournalRecord,
#                                the half rounded up to a JOURNAL_BLOCK
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef enum:
    DISK_VERSION = 1
    TAG_SIZE = 16
    TAGS_PER_SLOT = 1024
    SLOT_TAGS_SIZE = 16384
    SLOT_ENTRY_SIZE = 32
    JOURNAL_RECORD_SIZE = 64
    JOURNAL_BLOCK = 4096
    JOURNAL_RECORDS_PER_SLOT = 6     # three for a running device, the rest for what a recovery carries over
    JOURNAL_RECORDS_EXTRA = 64
    SUPERBLOCK_BLOCK = 4096
    SLOT_SIZE = 4194304
    SLOT_COUNT_MAX = 16777216        # 64 TiB a device
    INCARNATION_MAX = 1048575        # the 20 bits it has in a seq
    DEVICE_INDEX_MAX = 65535
    SDS_ID_MAX = 65535               # the 16 bits it has in a map entry
    SLOT_FREE = 0
    SLOT_USED = 1
    SLOT_LOST = 2                    # recovery cannot tell what it holds: kept, reported, never given out
    SLOT_NONE = 0xffffffff
    UNSURE_SLOTS = 1                 # a chunk that is in no slot may have been in one
    UNSURE_INTENTS = 2               # intents were lost, and not every chunk has a new one yet

cdef extern from *:
    """
    #define PFVOL_SUPERBLOCK_MAGIC 0x3142535655465650ULL
    #define PFVOL_JOURNAL_MAGIC    0x314c4e4a55465650ULL
    #define PFVOL_TAG_HOLE    (1ULL << 63)
    #define PFVOL_TAG_UNKNOWN (1ULL << 62)
    #define PFVOL_SEQ_MASK    ((1ULL << 62) - 1)
    #define PFVOL_SEQ_COUNTER_BITS 42
    """
    const uint64_t SUPERBLOCK_MAGIC "PFVOL_SUPERBLOCK_MAGIC"
    const uint64_t JOURNAL_MAGIC "PFVOL_JOURNAL_MAGIC"
    const uint64_t TAG_HOLE "PFVOL_TAG_HOLE"          # the block reads as zeros and is a hole in the block file
    const uint64_t TAG_UNKNOWN "PFVOL_TAG_UNKNOWN"    # the bytes are not to be trusted: take them from the peer
    const uint64_t SEQ_MASK "PFVOL_SEQ_MASK"
    const int SEQ_COUNTER_BITS "PFVOL_SEQ_COUNTER_BITS"

# seq = incarnation (20 bits) << 42 | counter: unique and rising within an epoch, across restarts of the primary,
# without anything per chunk to keep. (epoch, seq) names a write.
#
# check = the block's check value XOR crc32c(epoch, seq with its flags): a flipped bit anywhere in tag or block shows.
# A tag of an allocated slot is never all zeros: a block never written has epoch 0, seq TAG_HOLE.
cdef packed struct Tag:
    uint32_t check
    uint32_t epoch
    uint64_t seq

cdef packed struct SlotEntry:
    uint64_t volume_id
    uint32_t chunk_index
    uint32_t state                   # SLOT_FREE, SLOT_USED or SLOT_LOST
    uint32_t epoch                   # of the chunk when the slot was given out
    uint32_t generation              # low half of the journal generation in which the entry was written
    uint32_t slot                    # its own number: a misplaced entry shows
    uint32_t crc                     # of the 28 bytes before it; free entries have it too: zeros show

cdef packed struct Superblock:
    uint64_t magic
    uint32_t version
    uint32_t size                    # of this structure
    uint8_t cluster_id[16]
    uint8_t device_id[16]
    uint32_t sds_id                  # 0 until admitted
    uint32_t device_index
    uint64_t slot_count
    uint64_t incarnation             # + 1 at each start
    uint64_t durable_incarnation     # the incarnation at the first start since the host booted (or since a sync failed)
    uint64_t journal_generation      # generations below it are void
    uint8_t boot_id[16]              # the host boot that last wrote this
    uint32_t clean                   # 1 after a clean stop
    uint32_t unsure                  # UNSURE_*: what rot has taken, until it was made good
    uint32_t reserved[6]
    uint32_t crc

cdef enum JournalKind:
    JOURNAL_DIRTY = 1                # the chunk may have writes that are not on disk
    JOURNAL_ALLOC = 2                # the slot was given to the chunk (implies dirty)
    JOURNAL_FREE = 3                 # the slot was taken from the chunk

cdef packed struct JournalHeader:
    uint64_t magic
    uint32_t version
    uint32_t crc
    uint64_t generation
    uint8_t device_id[16]

cdef packed struct JournalRecord:
    uint32_t crc                     # of the 60 bytes after it
    uint32_t kind
    uint64_t generation
    uint64_t index                   # position in the half, from 0
    uint64_t volume_id
    uint32_t chunk_index
    uint32_t slot                    # SLOT_NONE in a JOURNAL_DIRTY: the chunk holds no slot any more
    uint32_t epoch
    uint32_t incarnation             # never goes back within a half: what an older process left behind the end shows
    uint32_t settled                 # records of the half that were durable before this one: such a one cannot be torn
    uint32_t reserved[3]
