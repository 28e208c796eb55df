# The part of the kernel's FUSE protocol (7.12 to 7.4x) that the channel reads or writes itself. Native byte order,
# naturally aligned.
from libc.stdint cimport int32_t, uint16_t, uint32_t, uint64_t

cdef enum FuseOpcode:
    FUSE_FORGET = 2
    FUSE_OPEN = 14
    FUSE_READ = 15
    FUSE_WRITE = 16
    FUSE_RELEASE = 18
    FUSE_FSYNC = 20
    FUSE_FLUSH = 25
    FUSE_INIT = 26
    FUSE_INTERRUPT = 36
    FUSE_BATCH_FORGET = 42
    FUSE_FALLOCATE = 43
    FUSE_LSEEK = 46

cdef enum:
    FUSE_KERNEL_VERSION = 7
    FUSE_MINOR_LONG_INIT = 23        # from here on the INIT answer has 64 bytes

    INIT_ASYNC_READ = 1 << 0
    INIT_ATOMIC_O_TRUNC = 1 << 3
    INIT_BIG_WRITES = 1 << 5
    INIT_AUTO_INVAL_DATA = 1 << 12
    INIT_ASYNC_DIO = 1 << 15
    INIT_WRITEBACK_CACHE = 1 << 16
    INIT_PARALLEL_DIROPS = 1 << 18
    INIT_MAX_PAGES = 1 << 22
    INIT_EXT = 1 << 30
    INIT2_DIRECT_IO_ALLOW_MMAP = 1 << 4      # bit 36, in flags2

    WRITTEN_FROM_CACHE = 1 << 0      # write_flags: delayed, from the page cache

    OPENED_DIRECT_IO = 1 << 0
    OPENED_KEEP_CACHE = 1 << 1
    OPENED_PARALLEL_DIRECT_WRITES = 1 << 6

cdef struct FuseInHeader:
    uint32_t len
    uint32_t opcode
    uint64_t unique
    uint64_t nodeid
    uint32_t uid
    uint32_t gid
    uint32_t pid
    uint16_t total_extlen
    uint16_t padding

cdef struct FuseOutHeader:
    uint32_t len
    int32_t error
    uint64_t unique

cdef struct FuseInitIn:
    uint32_t major
    uint32_t minor
    uint32_t max_readahead
    uint32_t flags
    uint32_t flags2                  # with INIT_EXT only
    uint32_t unused[11]

cdef struct FuseInitOut:
    uint32_t major
    uint32_t minor
    uint32_t max_readahead
    uint32_t flags
    uint16_t max_background
    uint16_t congestion_threshold
    uint32_t max_write
    uint32_t time_gran
    uint16_t max_pages
    uint16_t map_alignment
    uint32_t flags2
    uint32_t unused[7]

cdef struct FuseOpenIn:
    uint32_t flags
    uint32_t open_flags

cdef struct FuseOpenOut:
    uint64_t fh
    uint32_t open_flags
    uint32_t padding

cdef struct FuseReleaseIn:
    uint64_t fh
    uint32_t flags
    uint32_t release_flags
    uint64_t lock_owner

cdef struct FuseReadIn:
    uint64_t fh
    uint64_t offset
    uint32_t size
    uint32_t read_flags
    uint64_t lock_owner
    uint32_t flags
    uint32_t padding

cdef struct FuseWriteIn:
    uint64_t fh
    uint64_t offset
    uint32_t size
    uint32_t write_flags
    uint64_t lock_owner
    uint32_t flags
    uint32_t padding

cdef struct FuseWriteOut:
    uint32_t size
    uint32_t padding

cdef struct FuseFallocateIn:
    uint64_t fh
    uint64_t offset
    uint64_t length
    uint32_t mode
    uint32_t padding

cdef struct FuseLseekIn:
    uint64_t fh
    uint64_t offset
    uint32_t whence
    uint32_t padding
