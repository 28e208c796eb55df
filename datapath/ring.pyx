"""The mailbox: single-producer single-consumer rings of fixed-size messages, with an eventfd each (see ring.pxd).

Promises: neither side ever blocks, nothing is lost short of ENOMEM, and the order is kept: a message that meets a
full ring waits in the producer's overflow, and so do all later ones until it has gone through.
"""

from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memmove
from libc.errno cimport errno, ENOMEM
from posix.unistd cimport close, read, write
from datapath.waiting cimport EFD_CLOEXEC, EFD_NONBLOCK, eventfd

cdef extern from *:
    """
    #define ring_load_acquire(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
    #define ring_store_release(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)
    """
    uint32_t ring_load_acquire(uint32_t* p) nogil
    void ring_store_release(uint32_t* p, uint32_t v) nogil


cdef int ring_init(Ring* r, uint32_t capacity) noexcept nogil:
    r.capacity = capacity
    r.head = 0
    r.tail = 0
    r.overflow = NULL
    r.overflow_count = 0
    r.overflow_capacity = 0
    r.event_fd = -1
    r.slots = <Message*>calloc(capacity, sizeof(Message))
    if r.slots == NULL:
        return -ENOMEM
    r.event_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
    if r.event_fd < 0:
        return -errno
    return 0


cdef void ring_destroy(Ring* r) noexcept nogil:
    cdef Message m
    cdef uint32_t i
    if r.slots != NULL:
        while ring_pop(r, &m):
            free(m.data)
        for i in range(r.overflow_count):
            free(r.overflow[i].data)
    free(r.slots)
    free(r.overflow)
    r.slots = NULL
    r.overflow = NULL
    r.overflow_count = 0
    if r.event_fd >= 0:
        close(r.event_fd)
    r.event_fd = -1


cdef inline void ring_wake(Ring* r) noexcept nogil:
    cdef uint64_t one = 1
    write(r.event_fd, &one, sizeof(one))


cdef inline bint ring_put(Ring* r, const Message* m) noexcept nogil:
    cdef uint32_t tail = r.tail
    if tail - ring_load_acquire(&r.head) >= r.capacity:
        return False
    r.slots[tail & (r.capacity - 1)] = m[0]
    ring_store_release(&r.tail, tail + 1)
    return True


cdef int ring_push(Ring* r, const Message* m) noexcept nogil:
    cdef Message* grown
    cdef uint32_t capacity
    if r.overflow_count == 0 and ring_put(r, m):
        ring_wake(r)
        return 0
    if r.overflow_count == r.overflow_capacity:
        capacity = r.overflow_capacity * 2 if r.overflow_capacity else 64
        grown = <Message*>realloc(r.overflow, capacity * sizeof(Message))
        if grown == NULL:
            return -ENOMEM
        r.overflow = grown
        r.overflow_capacity = capacity
    r.overflow[r.overflow_count] = m[0]
    r.overflow_count += 1
    ring_wake(r)
    return 0


cdef uint32_t ring_retry(Ring* r) noexcept nogil:
    cdef uint32_t moved = 0
    if r.overflow_count == 0:
        return 0
    while moved < r.overflow_count and ring_put(r, &r.overflow[moved]):
        moved += 1
    if moved:
        r.overflow_count -= moved
        memmove(r.overflow, r.overflow + moved, r.overflow_count * sizeof(Message))
        ring_wake(r)
    return r.overflow_count


cdef bint ring_pop(Ring* r, Message* m) noexcept nogil:
    cdef uint32_t head = r.head
    if ring_load_acquire(&r.tail) == head:
        return False
    m[0] = r.slots[head & (r.capacity - 1)]
    ring_store_release(&r.head, head + 1)
    return True


cdef void ring_clear(Ring* r) noexcept nogil:
    cdef uint64_t count
    read(r.event_fd, &count, sizeof(count))


# ------------------------------------------------------------------------------------------------------------ for tests

cdef class TestRing:
    """A ring of (kind, b) pairs for tests; producer and consumer may be two threads."""

    cdef Ring ring

    def __cinit__(self, uint32_t capacity):
        if ring_init(&self.ring, capacity) < 0:
            raise MemoryError

    def __dealloc__(self):
        ring_destroy(&self.ring)

    @property
    def event_fd(self):
        return self.ring.event_fd

    def push(self, uint32_t kind, uint64_t b):
        cdef Message m
        m.kind = kind
        m.a = 0
        m.b = b
        m.c = 0
        m.d = 0
        m.data = NULL
        m.size = 0
        return ring_push(&self.ring, &m)

    def retry(self):
        return ring_retry(&self.ring)

    def clear(self):
        ring_clear(&self.ring)

    def pop(self):
        cdef Message m
        if not ring_pop(&self.ring, &m):
            return None
        return m.kind, m.b
