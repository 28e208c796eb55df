"""Peers that do nothing, for the layer benchmarks: an SDS that stores nothing, and a file of zeros behind the FUSE
channel.

Owns the descriptors it is given. Each runs on the calling thread, without the GIL, until its descriptor ends. They
bound what the layer in front of them can do; no other part of pfvol uses them.
"""

from libc.errno cimport ENODEV, EPIPE
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset
from posix.fcntl cimport F_GETFL, F_SETFL, O_NONBLOCK, fcntl
from datapath.checksum cimport check_range, verify_range
from datapath.connection cimport (Buf, Conn, Pool, buf_get, buf_put, conn_append, conn_append_ref, conn_destroy,
                                  conn_flush, conn_init, conn_receive, conn_reserve, pool_destroy, pool_init)
from datapath.fuseabi cimport FuseWriteOut
from datapath.fusechannel cimport (FUSE_IO_READ, FUSE_IO_WRITE, Channel, FuseIo, channel_destroy, channel_error,
                                   channel_init, channel_read, channel_relay_flush, channel_relay_read, channel_reply)
from datapath.volumemap cimport VolumeMap, map_destroy, map_init, map_volume_add
from datapath.wire cimport (HEADER_SIZE, IO_SIZE_MAX, OP_READ, OP_REPLY, OP_WRITE, ST_PAYLOAD, Header,
                            blocks_touched, header_seal)

cdef extern from "poll.h" nogil:
    cdef struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd* fds, unsigned long count, int timeout_ms)
    int POLLIN, POLLOUT

cdef enum:
    COPIED_MAX = 32768
    ZEROS_SIZE = 1052672             # IO_SIZE_MAX and a block
    NO_ROOM = 99                     # beside BadFrame: closes the connection


cdef struct NullSds:
    Pool pool
    char* zeros


cdef int _answer(void* context, Conn* c, Header* h, char* body, Buf* owner) noexcept nogil:
    """Verifies what is written, sends zeros with their check values for what is read, says OK to all else."""
    cdef NullSds* n = <NullSds*>context
    cdef Header reply = h[0]
    cdef uint32_t blocks = blocks_touched(h.offset, h.length)
    cdef uint32_t head = HEADER_SIZE + 4 * blocks
    cdef bint copied = h.length <= COPIED_MAX
    cdef Buf* data
    cdef char* room
    cdef int result
    reply.opcode = h.opcode | OP_REPLY
    reply.body_length = 0
    reply.incarnation = 1
    if h.opcode != OP_READ:
        if h.opcode == OP_WRITE:
            if verify_range(h.volume_id, h.chunk_index, h.offset, h.length, body + 4 * blocks, <uint32_t*>body) >= 0:
                reply.status = ST_PAYLOAD
        header_seal(&reply)
        return NO_ROOM if conn_append(c, &n.pool, &reply, HEADER_SIZE) < 0 else 0
    reply.body_length = 4 * blocks + h.length
    header_seal(&reply)
    room = conn_reserve(c, &n.pool, head + h.length if copied else head)
    if room == NULL:
        return NO_ROOM
    memcpy(room, &reply, HEADER_SIZE)
    check_range(h.volume_id, h.chunk_index, h.offset, h.length, n.zeros, <uint32_t*>(room + HEADER_SIZE))
    if copied:
        memcpy(room + head, n.zeros, h.length)
        return 0
    data = buf_get(&n.pool, h.length)
    if data == NULL:
        return NO_ROOM
    memcpy(data.data, n.zeros, h.length)
    result = conn_append_ref(c, &n.pool, data, data.data, h.length)
    buf_put(&n.pool, data)
    return NO_ROOM if result < 0 else 0


def serve_null_sds(int fd):
    """Answers one SDC's connection until it ends. Owns ``fd``."""
    cdef NullSds n
    cdef Conn c
    cdef pollfd p
    cdef int full = 0
    with nogil:
        pool_init(&n.pool)
        n.zeros = <char*>calloc(1, ZEROS_SIZE)
        fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK)
        p.fd = fd
        if n.zeros != NULL and conn_init(&c, &n.pool, fd, 1) == 0:
            while full >= 0:
                p.events = POLLIN | (POLLOUT if full else 0)
                poll(&p, 1, -1)
                if conn_receive(&c, &n.pool, _answer, &n) < 0:
                    break
                full = conn_flush(&c, &n.pool)
            conn_destroy(&c, &n.pool)
        free(n.zeros)
        pool_destroy(&n.pool)


cdef struct NullFile:
    Channel channel
    char* zeros


cdef void _serve_file(void* context, FuseIo* io) noexcept nogil:
    cdef NullFile* f = <NullFile*>context
    cdef FuseWriteOut written
    if io.kind == FUSE_IO_READ:
        channel_reply(&f.channel, io.unique, f.zeros, io.length)
    elif io.kind == FUSE_IO_WRITE:
        memset(&written, 0, sizeof(written))
        written.size = <uint32_t>io.length
        buf_put(f.channel.pool, io.owner)
        channel_reply(&f.channel, io.unique, &written, sizeof(written))
    else:
        channel_error(&f.channel, io.unique, 0)


def serve_null_file(int fuse_fd, int relay_fd, uint64_t inode):
    """Serves one inode of a mount as a file of zeros until the mount is gone. Owns ``fuse_fd``, borrows the other."""
    cdef NullFile* f = <NullFile*>calloc(1, sizeof(NullFile))
    cdef Pool pool
    cdef VolumeMap inodes
    cdef pollfd p[2]
    if f == NULL:
        raise MemoryError
    with nogil:
        pool_init(&pool)
        map_init(&inodes)
        f.zeros = <char*>calloc(1, IO_SIZE_MAX)
        map_volume_add(&inodes, inode).user = f
        channel_init(&f.channel, &pool, &inodes, fuse_fd, relay_fd, False, _serve_file, f)
        p[0].fd = fuse_fd
        p[1].fd = relay_fd
        p[0].events = POLLIN
        p[1].events = POLLIN
        while f.zeros != NULL:
            poll(p, 2, -1)
            if channel_relay_read(&f.channel) == -EPIPE or channel_read(&f.channel) == -ENODEV:
                break
            channel_relay_flush(&f.channel)
        f.channel.relay_fd = -1      # the caller's: pyfuse3 is told to end before it is closed
        channel_destroy(&f.channel)
        map_destroy(&inodes)
        pool_destroy(&pool)
        free(f.zeros)
        free(f)
