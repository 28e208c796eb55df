"""The FUSE channel: takes the kernel's requests, serves what touches a volume's bytes, relays the rest to pyfuse3.

Owns the /dev/fuse descriptor and our end of the relay. Assumes one engine thread. Promises that a request goes to
exactly one of the engine and pyfuse3, that messages are relayed in order and verbatim except the INIT and OPEN
answers, which are edited to what a block device needs, and that nothing the kernel or pyfuse3 sends makes it read
past a buffer.
"""

from libc.errno cimport (EAGAIN, ECONNABORTED, EINTR, EINVAL, EIO, ENFILE, ENODEV, ENOENT, ENOMEM, EOPNOTSUPP, EPIPE,
                         errno)
from libc.string cimport memcpy, memset
from posix.unistd cimport close, read
from datapath.connection cimport BUF_LARGE, buf_get, buf_put
from datapath.fuseabi cimport *
from datapath.volumemap cimport MapVolume, map_volume_find

cdef extern from "fcntl.h" nogil:
    int fcntl(int fd, int command, ...)
    int F_GETFL, F_SETFL, O_NONBLOCK, O_DIRECT, O_ACCMODE, O_RDONLY

cdef extern from "sys/uio.h" nogil:
    cdef struct iovec:
        void* iov_base
        size_t iov_len
    ssize_t writev(int fd, const iovec* v, int count)

cdef extern from "sys/socket.h" nogil:
    int MSG_DONTWAIT, MSG_NOSIGNAL, MSG_TRUNC, SOL_SOCKET, SO_SNDBUF
    ssize_t send(int fd, const void* data, size_t size, int flags)
    ssize_t recv(int fd, void* data, size_t size, int flags)
    int setsockopt(int fd, int level, int name, const void* value, unsigned int size)

cdef enum:
    FALLOC_KEEP_SIZE = 1
    FALLOC_PUNCH_HOLE = 2
    FALLOC_ZERO_RANGE = 16
    LSEEK_DATA = 3
    LSEEK_HOLE = 4
    IN_HEADER = 40
    OUT_HEADER = 16
    INIT_OUT_SIZE = 64
    OPEN_OUT_SIZE = 16
    RELAY_SOCKET_BYTES = 4194304


cdef int channel_init(Channel* c, Pool* pool, VolumeMap* inodes, int fuse_fd, int relay_fd, bint force_direct,
                      fuse_io_fn serve, void* context) noexcept nogil:
    cdef int size = RELAY_SOCKET_BYTES
    memset(c, 0, sizeof(Channel))
    c.pool = pool
    c.inodes = inodes
    c.fuse_fd = fuse_fd
    c.relay_fd = relay_fd
    c.force_direct = force_direct
    c.serve = serve
    c.context = context
    if fuse_fd >= 0:
        if fcntl(fuse_fd, F_SETFL, fcntl(fuse_fd, F_GETFL) | O_NONBLOCK) < 0:
            return -errno
    if relay_fd >= 0:
        # A message must fit the socket's buffer whole; a smaller limit of the host only costs the rare long one.
        setsockopt(relay_fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof(size))
    return 0


cdef void channel_destroy(Channel* c) noexcept nogil:
    if c.fuse_fd >= 0:
        close(c.fuse_fd)
    if c.relay_fd >= 0:
        close(c.relay_fd)
    c.fuse_fd = -1
    c.relay_fd = -1
    _drop_relay_queue(c)
    if c.staging != NULL:
        buf_put(c.pool, c.staging)
        c.staging = NULL


cdef void _drop_relay_queue(Channel* c) noexcept nogil:
    while c.relay_head != c.relay_tail:
        buf_put(c.pool, c.relay[c.relay_head % CHANNEL_RELAY_MAX])
        c.relay_head += 1


cdef bint _has_staging(Channel* c) noexcept nogil:
    """False while memory is short: tried again when something has been given back."""
    if c.staging == NULL:
        c.staging = buf_get(c.pool, BUF_LARGE)
    return c.staging != NULL


cdef bint channel_can_read(Channel* c) noexcept nogil:
    return c.fuse_fd >= 0 and c.relay_tail - c.relay_head < CHANNEL_RELAY_MAX // 2


# -- answers to the kernel (the engine's thread)

cdef void _answer(Channel* c, uint64_t unique, int error, const void* data, size_t size) noexcept nogil:
    cdef FuseOutHeader out
    cdef iovec v[2]
    cdef ssize_t sent
    if c.fuse_fd < 0:
        return
    out.len = <uint32_t>(OUT_HEADER + size)
    out.error = -error
    out.unique = unique
    v[0].iov_base = &out
    v[0].iov_len = OUT_HEADER
    v[1].iov_base = <void*>data
    v[1].iov_len = size
    sent = writev(c.fuse_fd, v, 2 if size else 1)
    if sent < 0:
        # ENOENT: the caller was killed and its request is gone. Anything else would leave a caller waiting for good.
        c.reply_errors += 1
        if errno != ENOENT and errno != ENODEV and size:
            _answer(c, unique, EIO, NULL, 0)


cdef void channel_error(Channel* c, uint64_t unique, int error) noexcept nogil:
    _answer(c, unique, error, NULL, 0)


cdef void channel_reply(Channel* c, uint64_t unique, const void* data, size_t size) noexcept nogil:
    _answer(c, unique, 0, data, size)


cdef int channel_notify(Channel* c, const void* data, size_t size) noexcept nogil:
    cdef iovec v[1]
    if c.fuse_fd < 0:
        return -ENODEV
    v[0].iov_base = <void*>data
    v[0].iov_len = size
    return 0 if writev(c.fuse_fd, v, 1) >= 0 else -errno


# -- requests of the kernel (the engine's thread)

cdef int channel_read(Channel* c) noexcept nogil:
    cdef int _turn
    cdef ssize_t size
    if c.fuse_fd < 0:
        return -ENODEV
    for _turn in range(CHANNEL_BATCH):
        if not _has_staging(c):
            return 1
        size = read(c.fuse_fd, c.staging.data, c.staging.size)
        if size < 0:
            if errno == EAGAIN:
                return 0
            if errno == ENODEV or errno == ECONNABORTED:
                close(c.fuse_fd)
                c.fuse_fd = -1
                return -ENODEV
            # EINTR; ENOENT: the request was interrupted while it was being read; EIO, E2BIG: answered by the kernel
            # itself
            continue
        _take(c, c.staging.data, size)
        if not channel_can_read(c):
            return 1
    return 1


cdef void _take(Channel* c, char* message, size_t size) noexcept nogil:
    """Decides who serves one message."""
    cdef FuseInHeader* h = <FuseInHeader*>message
    cdef MapVolume* inode
    if size < IN_HEADER or h.len != size:
        return
    c.requests += 1
    if h.opcode == FUSE_INTERRUPT:
        # Legal to ignore, and nothing here takes long except engine requests, which end by their own deadline.
        return
    if h.opcode == FUSE_INIT:
        _note_init(c, h, size)
    else:
        inode = map_volume_find(c.inodes, h.nodeid)
        if inode != NULL and inode.user != NULL and _serve(c, h, size, inode):
            return
        if h.opcode == FUSE_OPEN and inode != NULL and not _note_open(c, h, size, inode):
            channel_error(c, h.unique, ENFILE)       # its answer could not be edited: a direct mount would be cached
            return
        if h.opcode == FUSE_RELEASE and inode != NULL:
            _note_release(h, size, inode)
    _relay(c, h, size)


cdef bint _serve(Channel* c, FuseInHeader* h, size_t size, const MapVolume* inode) noexcept nogil:
    """Hands one request for a volume to the engine, or answers it; 0 when it is pyfuse3's."""
    cdef FuseIo io
    cdef char* body = <char*>h + IN_HEADER
    cdef size_t body_size = size - IN_HEADER
    cdef int error = 0
    io.unique = h.unique
    io.volume = inode.user
    io.keep_size = True
    io.from_cache = False
    io.all_data = inode.writers != 0
    io.offset = 0
    io.length = 0
    io.data = NULL
    io.owner = NULL
    if h.opcode == FUSE_READ:
        error = _parse_read(&io, <FuseReadIn*>body, body_size)
    elif h.opcode == FUSE_WRITE:
        error = _parse_write(c, &io, <FuseWriteIn*>body, body_size)
    elif h.opcode == FUSE_FSYNC:
        io.kind = FUSE_IO_FLUSH
    elif h.opcode == FUSE_FLUSH:
        # close(2) promises nothing about the disk, and the kernel has written its dirty pages before it asks.
        channel_error(c, h.unique, 0)
        return True
    elif h.opcode == FUSE_FALLOCATE:
        error = _parse_fallocate(&io, <FuseFallocateIn*>body, body_size)
    elif h.opcode == FUSE_LSEEK:
        error = _parse_lseek(&io, <FuseLseekIn*>body, body_size)
    else:
        return False
    if error:
        channel_error(c, h.unique, error)
    else:
        c.serve(c.context, &io)
    return True


cdef int _parse_read(FuseIo* io, const FuseReadIn* body, size_t size) noexcept nogil:
    if size < sizeof(FuseReadIn) or body.size > CHANNEL_MAX_WRITE:
        return EINVAL
    io.kind = FUSE_IO_READ
    io.offset = body.offset
    io.length = body.size
    return 0


cdef int _parse_write(Channel* c, FuseIo* io, const FuseWriteIn* body, size_t size) noexcept nogil:
    if size < sizeof(FuseWriteIn) or body.size > size - sizeof(FuseWriteIn) or body.size > CHANNEL_MAX_WRITE:
        return EINVAL
    io.kind = FUSE_IO_WRITE
    io.from_cache = (body.write_flags & WRITTEN_FROM_CACHE) != 0
    io.offset = body.offset
    io.length = body.size
    if body.size <= CHANNEL_COPY_MAX:
        io.owner = buf_get(c.pool, body.size if body.size else 1)
        if io.owner == NULL:
            return ENOMEM
        io.data = io.owner.data
        memcpy(io.data, <const char*>body + sizeof(FuseWriteIn), body.size)
    else:
        io.owner = c.staging         # the reference goes along, a new buffer is read into next time
        io.data = <char*>body + sizeof(FuseWriteIn)
        c.staging = NULL
    return 0


cdef int _parse_fallocate(FuseIo* io, const FuseFallocateIn* body, size_t size) noexcept nogil:
    if size < sizeof(FuseFallocateIn):
        return EINVAL
    if body.mode == (FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE) or body.mode == (FALLOC_ZERO_RANGE | FALLOC_KEEP_SIZE):
        io.keep_size = True
    elif body.mode == FALLOC_ZERO_RANGE:
        io.keep_size = False
    else:
        return EOPNOTSUPP
    io.kind = FUSE_IO_DISCARD
    io.offset = body.offset
    io.length = body.length
    return 0


cdef int _parse_lseek(FuseIo* io, const FuseLseekIn* body, size_t size) noexcept nogil:
    if size < sizeof(FuseLseekIn):
        return EINVAL
    if body.whence == LSEEK_DATA:
        io.kind = FUSE_IO_SEEK_DATA
    elif body.whence == LSEEK_HOLE:
        io.kind = FUSE_IO_SEEK_HOLE
    else:
        return EINVAL
    io.offset = body.offset
    return 0


# -- the relay (the engine's thread)

cdef void _note_init(Channel* c, const FuseInHeader* h, size_t size) noexcept nogil:
    cdef const FuseInitIn* init = <const FuseInitIn*>(<const char*>h + IN_HEADER)
    cdef size_t body_size = size - IN_HEADER
    if body_size < 16 or init.major != FUSE_KERNEL_VERSION:
        return                       # not ours to mend: pyfuse3 answers with its version and the kernel asks again
    c.init_unique = h.unique
    c.init_minor = init.minor
    c.init_flags = init.flags
    c.init_flags2 = init.flags2 if body_size >= 20 and init.flags & INIT_EXT else 0


cdef inline bint _writes(uint32_t flags) noexcept nogil:
    return flags & <uint32_t>O_ACCMODE != <uint32_t>O_RDONLY


cdef bint _note_open(Channel* c, const FuseInHeader* h, size_t size, MapVolume* inode) noexcept nogil:
    cdef uint32_t flags
    if size < IN_HEADER + sizeof(FuseOpenIn) or c.open_count >= CHANNEL_OPENS_MAX:
        return False
    c.open_unique[c.open_count] = h.unique
    c.open_inode[c.open_count] = inode
    flags = (<const FuseOpenIn*>(<const char*>h + IN_HEADER)).flags
    c.open_flags[c.open_count] = flags
    c.open_count += 1
    inode.writers += _writes(flags)
    return True


cdef void _note_release(const FuseInHeader* h, size_t size, MapVolume* inode) noexcept nogil:
    """The kernel has written the pages that were dirty before it releases a file."""
    if (size >= IN_HEADER + sizeof(FuseReleaseIn) and inode.writers
            and _writes((<const FuseReleaseIn*>(<const char*>h + IN_HEADER)).flags)):
        inode.writers -= 1


cdef bint _forget_open(Channel* c, uint64_t unique, bint failed, uint32_t* flags) noexcept nogil:
    """Takes an open off the list and tells its flags; False when it is not there."""
    cdef uint32_t i
    for i in range(c.open_count):
        if c.open_unique[i] == unique:
            flags[0] = c.open_flags[i]
            if failed and _writes(flags[0]):
                c.open_inode[i].writers -= 1
            c.open_count -= 1
            c.open_unique[i] = c.open_unique[c.open_count]
            c.open_inode[i] = c.open_inode[c.open_count]
            c.open_flags[i] = c.open_flags[c.open_count]
            return True
    return False


cdef void _relay(Channel* c, const FuseInHeader* h, size_t size) noexcept nogil:
    cdef Buf* b
    if c.relay_fd < 0:
        _refuse(c, h, ENODEV)
        return
    c.relayed += 1
    if c.relay_head == c.relay_tail:
        if send(c.relay_fd, h, size, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0:
            return
        if errno != EAGAIN and errno != EINTR:
            _refuse(c, h, EIO)
            return
    b = buf_get(c.pool, size) if c.relay_tail - c.relay_head < CHANNEL_RELAY_MAX else NULL
    if b == NULL:
        _refuse(c, h, ENOMEM)
        return
    memcpy(b.data, h, size)
    c.relay[c.relay_tail % CHANNEL_RELAY_MAX] = b
    c.relay_size[c.relay_tail % CHANNEL_RELAY_MAX] = <uint32_t>size
    c.relay_tail += 1


cdef void _refuse(Channel* c, const FuseInHeader* h, int error) noexcept nogil:
    cdef uint32_t flags
    if h.opcode == FUSE_OPEN:
        _forget_open(c, h.unique, True, &flags)
    if h.opcode != FUSE_FORGET and h.opcode != FUSE_BATCH_FORGET:      # these two have no answer
        channel_error(c, h.unique, error)


cdef int channel_relay_flush(Channel* c) noexcept nogil:
    cdef Buf* b
    cdef uint32_t i
    while c.relay_head != c.relay_tail and c.relay_fd >= 0:
        i = c.relay_head % CHANNEL_RELAY_MAX
        b = c.relay[i]
        if send(c.relay_fd, b.data, c.relay_size[i], MSG_DONTWAIT | MSG_NOSIGNAL) < 0:
            if errno == EAGAIN or errno == EINTR:
                return 1
            _refuse(c, <const FuseInHeader*>b.data, EIO)
        buf_put(c.pool, b)
        c.relay_head += 1
    return 0


cdef int channel_relay_read(Channel* c) noexcept nogil:
    cdef int _turn
    cdef ssize_t size
    if c.relay_fd < 0:
        return -EPIPE
    for _turn in range(CHANNEL_BATCH):
        if not _has_staging(c):
            return 1
        size = recv(c.relay_fd, c.staging.data, c.staging.size, MSG_DONTWAIT)
        if size < 0:
            if errno == EINTR:
                continue
            if errno == EAGAIN:
                return 0
        if size <= 0:
            close(c.relay_fd)
            c.relay_fd = -1
            while c.relay_head != c.relay_tail:
                _refuse(c, <const FuseInHeader*>c.relay[c.relay_head % CHANNEL_RELAY_MAX].data, ENODEV)
                buf_put(c.pool, c.relay[c.relay_head % CHANNEL_RELAY_MAX])
                c.relay_head += 1
            return -EPIPE
        if size >= OUT_HEADER:
            _answer_of_pyfuse3(c, c.staging.data, size)
    return 1


cdef void _answer_of_pyfuse3(Channel* c, char* message, size_t size) noexcept nogil:
    cdef FuseOutHeader* out = <FuseOutHeader*>message
    cdef iovec v[1]
    if out.unique:
        if out.unique == c.init_unique:
            if out.error == 0 and size >= OUT_HEADER + 24:
                size = _edit_init(c, message, size)
            c.init_unique = 0
        elif c.open_count:
            _edit_open(c, message, size)
    if c.fuse_fd < 0:
        return
    v[0].iov_base = message
    v[0].iov_len = size
    if writev(c.fuse_fd, v, 1) < 0:
        c.reply_errors += 1


cdef size_t _edit_init(Channel* c, char* message, size_t size) noexcept nogil:
    """Asks for what a block device needs, as far as this kernel offers it. Returns the answer's new size."""
    cdef FuseInitOut* init = <FuseInitOut*>(message + OUT_HEADER)
    cdef uint32_t wanted = (INIT_ASYNC_READ | INIT_BIG_WRITES | INIT_ASYNC_DIO | INIT_WRITEBACK_CACHE
                            | INIT_PARALLEL_DIROPS | INIT_MAX_PAGES)
    if c.init_minor < FUSE_MINOR_LONG_INIT:
        return size
    if size < OUT_HEADER + INIT_OUT_SIZE:
        memset(message + size, 0, OUT_HEADER + INIT_OUT_SIZE - size)
        size = OUT_HEADER + INIT_OUT_SIZE
        (<FuseOutHeader*>message).len = <uint32_t>size
    init.minor = max(init.minor, <uint32_t>FUSE_MINOR_LONG_INIT)
    init.flags |= wanted & c.init_flags
    # O_TRUNC as part of OPEN would make the kernel believe in a size of 0; as a SETATTR it can be answered with the
    # true size. A volume's pages change only through this mount or an explicit notification: a new mtime says nothing
    # about them.
    init.flags &= ~<uint32_t>(INIT_ATOMIC_O_TRUNC | INIT_AUTO_INVAL_DATA)
    init.max_readahead = CHANNEL_READAHEAD
    init.max_background = CHANNEL_BACKGROUND
    init.congestion_threshold = CHANNEL_CONGESTION
    init.max_write = CHANNEL_MAX_WRITE
    init.time_gran = 1
    if init.flags & INIT_MAX_PAGES:
        init.max_pages = CHANNEL_MAX_PAGES
    if c.init_flags & INIT_EXT:
        if not init.flags & INIT_EXT:
            init.flags2 = 0
        init.flags |= INIT_EXT
        init.flags2 |= INIT2_DIRECT_IO_ALLOW_MMAP & c.init_flags2
    return size


cdef void _edit_open(Channel* c, char* message, size_t size) noexcept nogil:
    """An O_DIRECT open of a volume gets parallel direct IO, any other keeps the page cache."""
    cdef FuseOutHeader* out = <FuseOutHeader*>message
    cdef FuseOpenOut* opened = <FuseOpenOut*>(message + OUT_HEADER)
    cdef uint32_t flags = 0
    if not _forget_open(c, out.unique, out.error != 0, &flags) or out.error or size < OUT_HEADER + OPEN_OUT_SIZE:
        return
    if c.force_direct or flags & <uint32_t>O_DIRECT:
        opened.open_flags &= ~<uint32_t>OPENED_KEEP_CACHE
        opened.open_flags |= OPENED_DIRECT_IO | OPENED_PARALLEL_DIRECT_WRITES
    else:
        opened.open_flags &= ~<uint32_t>OPENED_DIRECT_IO
        opened.open_flags |= OPENED_KEEP_CACHE
