"""Pooled buffers and framed, pipelined, non-blocking connections, shared by both engines (see connection.pxd).

Owns the sockets it is given and the buffers it hands out. Assumes that one thread alone uses a Pool and the connections
on it. Promises: a frame reaches the engine only whole and with a checked header; a body that the engine keeps a
reference to is never overwritten; nothing is sent twice or out of order.
"""

from libc.errno cimport EAGAIN, ECONNRESET, EINTR, ENOBUFS, ENOMEM, errno
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memmove, memset
from posix.unistd cimport close
from datapath.wire cimport HEADER_SIZE, Header, header_check

cdef extern from "sys/uio.h" nogil:
    cdef struct iovec:
        void* iov_base
        size_t iov_len
    ssize_t readv(int fd, const iovec* iov, int count)

cdef extern from "sys/socket.h" nogil:
    cdef struct msghdr:
        void* msg_name
        unsigned int msg_namelen
        iovec* msg_iov
        size_t msg_iovlen
        void* msg_control
        size_t msg_controllen
        int msg_flags
    ssize_t sendmsg(int fd, const msghdr* message, int flags)
    ssize_t recv(int fd, void* data, size_t size, int flags)
    int MSG_NOSIGNAL
    int MSG_DONTWAIT

cdef enum:
    RECEIVES_PER_CALL = 8            # then other connections get their turn
    ROOM_MIN = 32768                 # input room below which the buffer is compacted before a receive
    DIRECT_BODY_MIN = 65536          # a body from here on is received into a buffer of its own, not copied
    IOV_MAX_PER_SEND = 128


# -------------------------------------------------------------------------------------------------------------- buffers

cdef inline uint32_t class_of(size_t need) noexcept nogil:
    return 0 if need <= BUF_SMALL else (1 if need <= BUF_MEDIUM else 2)


cdef inline uint32_t class_size(uint32_t cls) noexcept nogil:
    return BUF_SMALL if cls == 0 else (BUF_MEDIUM if cls == 1 else BUF_LARGE)


cdef void pool_init(Pool* p) noexcept nogil:
    memset(p, 0, sizeof(Pool))
    p.keep[0] = 1024                 # 8 MiB
    p.keep[1] = 32                   # 8 MiB
    p.keep[2] = 8                    # 9 MiB


cdef void pool_destroy(Pool* p) noexcept nogil:
    cdef uint32_t cls
    cdef Buf* b
    for cls in range(BUF_CLASSES):
        while p.free[cls] != NULL:
            b = p.free[cls]
            p.free[cls] = b.next
            free(b.data)
            free(b)
        p.free_count[cls] = 0


cdef Buf* buf_get(Pool* p, size_t need) noexcept nogil:
    cdef uint32_t cls = class_of(need)
    cdef Buf* b
    if need > BUF_LARGE:
        return NULL
    b = p.free[cls]
    if b != NULL:
        p.free[cls] = b.next
        p.free_count[cls] -= 1
    else:
        b = <Buf*>malloc(sizeof(Buf))
        if b == NULL:
            return NULL
        b.data = <char*>malloc(class_size(cls))
        if b.data == NULL:
            free(b)
            return NULL
        b.size = class_size(cls)
        b.cls = cls
    b.refs = 1
    b.next = NULL
    p.bytes_out += b.size
    return b


cdef void buf_put(Pool* p, Buf* b) noexcept nogil:
    b.refs -= 1
    if b.refs:
        return
    p.bytes_out -= b.size
    if p.free_count[b.cls] >= p.keep[b.cls]:
        free(b.data)
        free(b)
        return
    b.next = p.free[b.cls]
    p.free[b.cls] = b
    p.free_count[b.cls] += 1


# ---------------------------------------------------------------------------------------------------------- connections

cdef int conn_init(Conn* c, Pool* p, int fd, uint32_t id) noexcept nogil:
    memset(c, 0, sizeof(Conn))
    c.fd = fd
    c.id = id
    c.out = <Segment*>calloc(OUT_SEGMENTS_FIRST, sizeof(Segment))
    if c.out == NULL:
        return -ENOMEM
    c.out_capacity = OUT_SEGMENTS_FIRST
    return 0


cdef void conn_destroy(Conn* c, Pool* p) noexcept nogil:
    if c.fd >= 0:
        close(c.fd)
    c.fd = -1
    c.closing = True
    while c.out_head != c.out_tail:
        buf_put(p, c.out[c.out_head & (c.out_capacity - 1)].owner)
        c.out_head += 1
    free(c.out)
    c.out = NULL
    if c.tail_buf != NULL:
        buf_put(p, c.tail_buf)
        c.tail_buf = NULL
    if c.in_buf != NULL:
        buf_put(p, c.in_buf)
        c.in_buf = NULL
    if c.body_buf != NULL:
        buf_put(p, c.body_buf)
        c.body_buf = NULL


cdef int close_with(Conn* c, int error) noexcept nogil:
    c.error = error
    c.closing = True
    return -1


cdef int move_input(Conn* c, Pool* p) noexcept nogil:
    """Brings the unread input to the start of a buffer that nobody else looks at."""
    cdef uint32_t have = c.in_end - c.in_start
    cdef Buf* fresh
    if c.in_buf.refs == 1:
        if c.in_start:
            memmove(c.in_buf.data, c.in_buf.data + c.in_start, have)
    else:
        fresh = buf_get(p, BUF_MEDIUM)
        if fresh == NULL:
            return -ENOMEM
        memcpy(fresh.data, c.in_buf.data + c.in_start, have)
        buf_put(p, c.in_buf)
        c.in_buf = fresh
    c.in_start = 0
    c.in_end = have
    return 0


cdef int make_room(Conn* c, Pool* p) noexcept nogil:
    if c.in_buf == NULL:
        c.in_buf = buf_get(p, BUF_MEDIUM)
        if c.in_buf == NULL:
            return -ENOMEM
        c.in_start = 0
        c.in_end = 0
        return 0
    if c.in_start == c.in_end and c.in_buf.refs == 1:
        c.in_start = 0
        c.in_end = 0
        return 0
    if c.in_buf.size - c.in_end < ROOM_MIN:
        return move_input(c, p)
    return 0


cdef int deliver(Conn* c, frame_fn fn, void* context, Header* h, char* body, Buf* owner) noexcept nogil:
    cdef int code
    code = fn(context, c, h, body, owner)
    if code:
        return close_with(c, -code)
    return -1 if c.closing else 0


cdef int parse_input(Conn* c, Pool* p, frame_fn fn, void* context) noexcept nogil:
    """Delivers every whole frame of the input; starts a body of its own where one is too large."""
    cdef Header h
    cdef uint32_t have, total
    cdef int code
    while True:
        have = c.in_end - c.in_start
        if have < HEADER_SIZE:
            return 0
        if c.in_start & 3 and move_input(c, p) < 0:      # an odd-sized body came before: align the next one
            return close_with(c, ENOMEM)
        memcpy(&h, c.in_buf.data + c.in_start, HEADER_SIZE)
        code = header_check(&h)
        if code:
            return close_with(c, -code)
        total = HEADER_SIZE + h.body_length               # both bounded: no wrap
        if have >= total:
            c.in_start += total
            if deliver(c, fn, context, &h, c.in_buf.data + c.in_start - h.body_length, c.in_buf) < 0:
                return -1
            continue
        if h.body_length >= DIRECT_BODY_MIN:
            c.body_buf = buf_get(p, h.body_length)
            if c.body_buf == NULL:
                return close_with(c, ENOMEM)
            c.body_header = h
            c.body_have = have - HEADER_SIZE
            memcpy(c.body_buf.data, c.in_buf.data + c.in_start + HEADER_SIZE, c.body_have)
            c.in_start = c.in_end
            return 0
        if c.in_start + total > c.in_buf.size and move_input(c, p) < 0:
            return close_with(c, ENOMEM)
        return 0


cdef int finish_body(Conn* c, Pool* p, frame_fn fn, void* context) noexcept nogil:
    cdef Buf* body = c.body_buf
    cdef Header h = c.body_header
    cdef int result
    c.body_buf = NULL
    c.body_have = 0
    result = deliver(c, fn, context, &h, body.data, body)
    buf_put(p, body)
    return result


cdef int conn_receive(Conn* c, Pool* p, frame_fn fn, void* context) noexcept nogil:
    cdef iovec iov[2]
    cdef int _turn
    cdef uint32_t body_room, room
    cdef ssize_t got
    if c.closing:
        return -1
    for _turn in range(RECEIVES_PER_CALL):
        if make_room(c, p) < 0:
            return close_with(c, ENOMEM)
        room = c.in_buf.size - c.in_end
        if c.body_buf != NULL:
            body_room = c.body_header.body_length - c.body_have
            iov[0].iov_base = c.body_buf.data + c.body_have
            iov[0].iov_len = body_room
            iov[1].iov_base = c.in_buf.data + c.in_end
            iov[1].iov_len = room
            got = readv(c.fd, iov, 2)
        else:
            body_room = 0
            got = recv(c.fd, c.in_buf.data + c.in_end, room, MSG_DONTWAIT)
        if got < 0:
            if errno == EAGAIN:
                return 0
            if errno == EINTR:
                continue
            return close_with(c, errno)
        if got == 0:
            return close_with(c, ECONNRESET)
        c.bytes_in += got
        if c.body_buf != NULL:
            if got < body_room:
                c.body_have += <uint32_t>got
                continue
            c.in_end += <uint32_t>(got - body_room)
            if finish_body(c, p, fn, context) < 0:
                return -1
        else:
            c.in_end += <uint32_t>got
        if parse_input(c, p, fn, context) < 0:
            return -1
        if got < body_room + room and c.body_buf == NULL:
            return 0                                       # the socket is drained
    return 1


cdef int out_grow(Conn* c) noexcept nogil:
    cdef uint32_t capacity = c.out_capacity * 2
    cdef Segment* grown
    cdef uint32_t i, count = c.out_tail - c.out_head
    if capacity > OUT_SEGMENTS_MAX:
        return -ENOBUFS
    grown = <Segment*>calloc(capacity, sizeof(Segment))
    if grown == NULL:
        return -ENOMEM
    for i in range(count):
        grown[i] = c.out[(c.out_head + i) & (c.out_capacity - 1)]
    free(c.out)
    c.out = grown
    c.out_capacity = capacity
    c.out_head = 0
    c.out_tail = count
    return 0


cdef int push_segment(Conn* c, Buf* owner, char* data, uint32_t size) noexcept nogil:
    cdef Segment* last
    cdef int error
    if c.out_head != c.out_tail:
        last = &c.out[(c.out_tail - 1) & (c.out_capacity - 1)]
        if last.owner == owner and last.data + last.size == data:
            last.size += size
            c.out_bytes += size
            return 0
    if c.out_tail - c.out_head == c.out_capacity:
        error = out_grow(c)
        if error < 0:
            return error
    last = &c.out[c.out_tail & (c.out_capacity - 1)]
    last.owner = buf_ref(owner)
    last.data = data
    last.size = size
    c.out_tail += 1
    c.out_bytes += size
    return 0


cdef char* conn_reserve(Conn* c, Pool* p, uint32_t size) noexcept nogil:
    cdef char* data
    if size > BUF_MEDIUM or c.closing:
        return NULL
    if c.tail_buf != NULL and c.out_head == c.out_tail and c.tail_buf.refs == 1:
        c.tail_used = 0
    c.tail_used = (c.tail_used + 7) & ~<uint32_t>7
    if c.tail_buf == NULL or c.tail_used + size > c.tail_buf.size:
        if c.tail_buf != NULL:
            buf_put(p, c.tail_buf)
        c.tail_used = 0
        c.tail_buf = buf_get(p, BUF_MEDIUM)
        if c.tail_buf == NULL:
            return NULL
    data = c.tail_buf.data + c.tail_used
    if push_segment(c, c.tail_buf, data, size) < 0:
        return NULL
    c.tail_used += size
    return data


cdef void conn_unreserve(Conn* c, uint32_t size) noexcept nogil:
    cdef Segment* last = &c.out[(c.out_tail - 1) & (c.out_capacity - 1)]
    last.size -= size
    c.tail_used -= size
    c.out_bytes -= size
    if last.size == 0:
        last.owner.refs -= 1          # tail_buf itself holds another: it cannot reach zero here
        c.out_tail -= 1


cdef int conn_append(Conn* c, Pool* p, const void* data, uint32_t size) noexcept nogil:
    cdef char* room = conn_reserve(c, p, size)
    if room == NULL:
        return -ENOMEM
    memcpy(room, data, size)
    return 0


cdef int conn_append_ref(Conn* c, Pool* p, Buf* owner, const char* data, uint32_t size) noexcept nogil:
    if c.closing:
        return -ECONNRESET
    return push_segment(c, owner, <char*>data, size)


cdef void sent(Conn* c, Pool* p, size_t size) noexcept nogil:
    cdef Segment* s
    c.bytes_out += size
    c.out_bytes -= size
    while size:
        s = &c.out[c.out_head & (c.out_capacity - 1)]
        if size < s.size:
            s.data += size
            s.size -= <uint32_t>size
            return
        size -= s.size
        buf_put(p, s.owner)
        c.out_head += 1


cdef int conn_flush(Conn* c, Pool* p) noexcept nogil:
    cdef iovec iov[IOV_MAX_PER_SEND]
    cdef msghdr message
    cdef Segment* s
    cdef uint32_t i, count
    cdef size_t asked
    cdef ssize_t got
    if c.closing:
        return -1
    memset(&message, 0, sizeof(message))
    message.msg_iov = iov
    while c.out_head != c.out_tail:
        count = c.out_tail - c.out_head
        if count > IOV_MAX_PER_SEND:
            count = IOV_MAX_PER_SEND
        asked = 0
        for i in range(count):
            s = &c.out[(c.out_head + i) & (c.out_capacity - 1)]
            iov[i].iov_base = s.data
            iov[i].iov_len = s.size
            asked += s.size
        message.msg_iovlen = count
        got = sendmsg(c.fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT)
        if got < 0:
            if errno == EAGAIN:
                return 1
            if errno == EINTR:
                continue
            return close_with(c, errno)
        sent(c, p, got)
        if <size_t>got < asked:
            return 1
    return 0


# -------------------------------------------------------------------------------------------------- for tests and tools

cdef int collect_frame(void* context, Conn* c, Header* h, char* body, Buf* owner) noexcept nogil:
    cdef int keep
    with gil:
        keep = (<TestConnection>context).collect(h, body, owner)
    return keep


cdef class TestConnection:
    """A Conn on a socket, driven from Python: for tests of framing and for the fuzzer."""

    cdef Pool pool
    cdef Conn conn
    cdef bint retain
    cdef Buf* kept[64]
    cdef uint32_t kept_count
    cdef public list frames

    def __cinit__(self, int fd, bint retain=False):
        """Takes over `fd`. With `retain`, bodies stay referenced (up to 64), as in an engine with writes in flight."""
        pool_init(&self.pool)
        if conn_init(&self.conn, &self.pool, fd, 1) < 0:
            raise MemoryError
        self.retain = retain
        self.frames = []

    def __dealloc__(self):
        self.release()
        conn_destroy(&self.conn, &self.pool)
        pool_destroy(&self.pool)

    cdef int collect(self, Header* h, char* body, Buf* owner) noexcept:
        self.frames.append(((<char*>h)[:HEADER_SIZE], body[:h.body_length]))
        if self.retain and self.kept_count < 64:
            self.kept[self.kept_count] = buf_ref(owner)
            self.kept_count += 1
        return 0

    def release(self):
        while self.kept_count:
            self.kept_count -= 1
            buf_put(&self.pool, self.kept[self.kept_count])

    def receive(self):
        """Appends whole frames to ``frames``; returns what conn_receive does."""
        cdef int result
        with nogil:
            result = conn_receive(&self.conn, &self.pool, collect_frame, <void*>self)
        return result

    def send(self, bytes data, bint by_reference=False):
        cdef Buf* b
        cdef int result
        if not by_reference:
            return conn_append(&self.conn, &self.pool, <char*>data, <uint32_t>len(data))
        b = buf_get(&self.pool, len(data))
        if b == NULL:
            raise MemoryError
        memcpy(b.data, <char*>data, len(data))
        result = conn_append_ref(&self.conn, &self.pool, b, b.data, <uint32_t>len(data))
        buf_put(&self.pool, b)
        return result

    def flush(self):
        return conn_flush(&self.conn, &self.pool)

    @property
    def error(self):
        """errno, or the negative BadFrame code, that closed the connection."""
        return self.conn.error

    @property
    def bytes_out(self):
        return self.pool.bytes_out
