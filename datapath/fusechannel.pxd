# The FUSE channel: /dev/fuse on one side, pyfuse3 (over a SOCK_SEQPACKET pair) and the engine on the other. Belongs to
# one engine's thread.
from libc.stdint cimport int32_t, uint32_t, uint64_t
from libc.stddef cimport size_t
from datapath.connection cimport Buf, Pool
from datapath.volumemap cimport MapVolume, VolumeMap

cdef enum:
    CHANNEL_BATCH = 64               # messages taken from /dev/fuse per wake-up
    CHANNEL_OPENS_MAX = 1024         # opens of volumes that pyfuse3 has not yet answered
    CHANNEL_RELAY_MAX = 1024         # messages waiting for room towards pyfuse3
    CHANNEL_COPY_MAX = 131072        # payloads up to this are copied, larger ones keep the buffer they were read into
    CHANNEL_MAX_WRITE = 1048576
    CHANNEL_MAX_PAGES = 256
    CHANNEL_READAHEAD = 4194304
    CHANNEL_BACKGROUND = 128
    CHANNEL_CONGESTION = 96

cdef enum FuseKind:
    FUSE_IO_READ = 1
    FUSE_IO_WRITE = 2
    FUSE_IO_DISCARD = 3              # punch hole and zero range: reads as zeros afterwards
    FUSE_IO_FLUSH = 4
    FUSE_IO_SEEK_DATA = 5
    FUSE_IO_SEEK_HOLE = 6

# A request for a volume's file, as the engine gets it.
cdef struct FuseIo:
    uint64_t unique
    void* volume                     # `user` of the inode in `inodes`
    int kind
    bint keep_size                   # DISCARD: never beyond the end (else that is an error)
    bint from_cache                  # WRITE: of dirty pages, by the kernel's own size of the file
    bint all_data                    # SEEK: open for writing, so that the kernel may hold pages that nobody else knows
    uint64_t offset
    uint64_t length
    char* data                       # WRITE: the bytes, and
    Buf* owner                       # the reference that passes to the callee

ctypedef void (*fuse_io_fn)(void* context, FuseIo* io) noexcept nogil

cdef struct Channel:
    int fuse_fd                      # -1 after the kernel said that the mount is gone
    int relay_fd                     # -1 after pyfuse3 has hung up
    bint force_direct
    Pool* pool
    Buf* staging                     # the next message is read into this
    VolumeMap* inodes                # keyed by inode number
    fuse_io_fn serve
    void* context
    uint64_t init_unique             # 0: no INIT is waiting for its answer
    uint32_t init_minor
    uint32_t init_flags
    uint32_t init_flags2
    uint64_t open_unique[1024]
    MapVolume* open_inode[1024]
    uint32_t open_flags[1024]
    uint32_t open_count
    Buf* relay[1024]                 # a ring: messages to pyfuse3 that found its socket full
    uint32_t relay_size[1024]
    uint32_t relay_head
    uint32_t relay_tail
    # counters
    uint64_t requests
    uint64_t relayed
    uint64_t reply_errors            # answers that the kernel no longer wanted

cdef int channel_init(Channel* c, Pool* pool, VolumeMap* inodes, int fuse_fd, int relay_fd, bint force_direct,
                      fuse_io_fn serve, void* context) noexcept nogil
cdef void channel_destroy(Channel* c) noexcept nogil
# Takes up to CHANNEL_BATCH messages. 1: more may wait; 0: none left; -ENODEV: unmounted (fuse_fd is closed).
cdef int channel_read(Channel* c) noexcept nogil
# Answers of pyfuse3 to the kernel. 1: more may wait; 0: none left; -EPIPE: pyfuse3 hung up (relay_fd is closed).
cdef int channel_relay_read(Channel* c) noexcept nogil
# Sends what waits towards pyfuse3. 1: still full, arm EPOLLOUT; 0: nothing waits.
cdef int channel_relay_flush(Channel* c) noexcept nogil
# Answers one request: an error (positive errno), or 0 and `size` bytes.
cdef void channel_error(Channel* c, uint64_t unique, int error) noexcept nogil
cdef void channel_reply(Channel* c, uint64_t unique, const void* data, size_t size) noexcept nogil
# A notification, written as it is. 0 or -errno.
cdef int channel_notify(Channel* c, const void* data, size_t size) noexcept nogil
# Messages may be taken: the mount is there and pyfuse3 is not hopelessly behind.
cdef bint channel_can_read(Channel* c) noexcept nogil
