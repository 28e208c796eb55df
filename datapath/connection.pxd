# Pooled buffers and framed, pipelined, non-blocking connections: what both engines share. Everything here belongs to
# one shard's thread; nothing is locked.
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stddef cimport size_t
from datapath.wire cimport Header

# -- buffers: reference-counted blocks from three size classes
cdef enum:
    BUF_SMALL = 8192
    BUF_MEDIUM = 262144
    BUF_LARGE = 1118208              # holds the largest body, and what the kernel wants to read a FUSE write into
    BUF_CLASSES = 3

cdef struct Buf:
    char* data
    uint32_t size                    # bytes that fit
    uint32_t refs
    Buf* next
    uint32_t cls

cdef struct Pool:
    Buf* free[3]
    uint32_t free_count[3]
    uint32_t keep[3]                 # free buffers kept per class, the rest go back to malloc
    uint64_t bytes_out               # handed out and not returned

cdef void pool_init(Pool* p) noexcept nogil
cdef void pool_destroy(Pool* p) noexcept nogil
# A buffer of at least `need` bytes with one reference, NULL when memory is gone or need > BUF_LARGE.
cdef Buf* buf_get(Pool* p, size_t need) noexcept nogil
cdef void buf_put(Pool* p, Buf* b) noexcept nogil

cdef inline Buf* buf_ref(Buf* b) noexcept nogil:
    b.refs += 1
    return b

# -- connections
cdef enum:
    OUT_SEGMENTS_FIRST = 256         # a power of two; the queue doubles when it is full
    OUT_SEGMENTS_MAX = 65536

cdef struct Segment:
    char* data
    uint32_t size
    Buf* owner

cdef struct Conn:
    int fd
    uint32_t id
    int kind                         # the engine's own
    void* user                       # the engine's own
    bint closing                     # no more input is read
    int error                        # errno, or -BadFrame, why it closed
    bint want_write                  # EPOLLOUT is armed (the engine arms it when conn_flush returned 1)
    # input
    Buf* in_buf
    uint32_t in_start
    uint32_t in_end
    Buf* body_buf                    # a body larger than what in_buf can hold is received straight into this
    uint32_t body_have
    Header body_header
    # output
    Segment* out                     # a ring of out_capacity segments
    uint32_t out_capacity
    uint32_t out_head
    uint32_t out_tail
    Buf* tail_buf
    uint32_t tail_used
    uint64_t out_bytes               # not yet taken by the kernel
    # counters
    uint64_t bytes_in
    uint64_t bytes_out

# Called for each whole frame. `body` stays valid during the call; to keep it, buf_ref(owner) and buf_put later.
# `body` is 4-byte aligned at least. Non-zero closes the connection with that BadFrame code.
ctypedef int (*frame_fn)(void* context, Conn* c, Header* h, char* body, Buf* owner) noexcept nogil

cdef int conn_init(Conn* c, Pool* p, int fd, uint32_t id) noexcept nogil
# Closes the socket and gives everything back.
cdef void conn_destroy(Conn* c, Pool* p) noexcept nogil
# Reads what is there (bounded per call) and calls fn. 0: fine; 1: more may be waiting; <0: closed, c.error says why.
cdef int conn_receive(Conn* c, Pool* p, frame_fn fn, void* context) noexcept nogil
# Room for `size` bytes at the end of the output, to be filled at once by the caller; NULL when memory is gone or
# size > BUF_MEDIUM.
cdef char* conn_reserve(Conn* c, Pool* p, uint32_t size) noexcept nogil
# Takes back the last `size` bytes of what conn_reserve just gave.
cdef void conn_unreserve(Conn* c, uint32_t size) noexcept nogil
cdef int conn_append(Conn* c, Pool* p, const void* data, uint32_t size) noexcept nogil
# Sends from memory of `owner` without copying; takes a reference of its own.
cdef int conn_append_ref(Conn* c, Pool* p, Buf* owner, const char* data, uint32_t size) noexcept nogil
# 0: all sent; 1: the socket is full, arm EPOLLOUT; <0: closed.
cdef int conn_flush(Conn* c, Pool* p) noexcept nogil
